"""metrics.jsonl: whole lines whatever cuts it, fills its disk or writes to it at the same time."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.metrics_log import MetricsLog, is_open, read_records


@settings(max_examples=40)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers(), max_size=3), max_size=4), st.integers(0, 200))
def test_a_line_cut_anywhere_costs_itself_alone(records: list[dict[str, int]], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        log = MetricsLog(path, print)
        for record in records:
            log.append(record)
        log.close()
        data = path.read_bytes() if records else b""
        path.write_bytes(data[:cut])
        whole = [r for _, end, r in read_records(path)]
        assert whole == records[: len(whole)]
        assert len(whole) == data[:cut].count(b"\n")
        log = MetricsLog(path, print)
        log.append({"after": 1})
        log.close()
        read = [r for _, _, r in read_records(path) if r is not None]
        ended = len(whole) + (data[:cut].endswith(b"}") and len(whole) < len(records))  # only its end was missing
        assert read == [*records[:ended], {"after": 1}]


def test_a_log_is_locked_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert not is_open(path)
    log = MetricsLog(path, print)
    log.append({"step": 1})
    assert is_open(path)
    log.close()
    assert not is_open(path)


def test_a_full_disk_costs_no_line_that_is_held(tiny_disk: Path) -> None:
    said: list[str] = []
    log = MetricsLog(tiny_disk / "metrics.jsonl", said.append, held_lines=300)
    for step in range(500):
        log.append({"step": step, "text": "x" * 200})
    log.append({"event": "artifact"})
    log.flush()
    on_disk = [record["step"] for _, _, record in read_records(log.path) if record]
    assert on_disk == list(range(len(on_disk)))
    assert 200 < len(on_disk) < 400
    assert len(said) == 1
    assert "No space left on device" in said[0]
    for step in range(500, 700):
        log.append({"step": step, "text": "x" * 200})
    subprocess.run(["mount", "-o", "remount,size=1m", str(tiny_disk)], check=True)
    log.append({"step": 700})
    assert log.close() == 0
    read = [record for _, _, record in read_records(log.path)]
    steps = [record["step"] for record in read if record and "step" in record]
    # of what was held, the newest lines and the event
    assert steps == [*on_disk, *range(700 - 299, 701)]
    assert read.count({"event": "artifact"}) == 1
    assert len(said) == 2
    assert f"{701 - len(steps)} lines of metrics are lost" in said[1]


def test_two_threads_write_whole_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", print)
    threads = [
        threading.Thread(target=lambda n=n: [log.append({"thread": n, "i": i}) for i in range(300)]) for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    records = [record for _, _, record in read_records(log.path)]
    for n in range(3):
        assert [r["i"] for r in records if r and r["thread"] == n] == list(range(300))
