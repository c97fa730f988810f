"""Readers of an index in processes of their own while another one adds: each answer is that of a whole index."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.forked import fork, kill, wait_until
from tests.index_crashes import run, verbs, write_inputs
from tests.photos import jpeg

pytestmark = pytest.mark.slow

ROUNDS = 3


def read(index: Path, query: Path, out: Path, stop: Path) -> None:
    """Opens and asks the index until `stop` is there; a line per answer, or what was raised."""
    import torch

    from eval.index.index import Index
    from eval.report.locations import as_json

    torch.set_num_threads(1)
    kept: Index | None = None
    with out.open("w") as lines:
        while True:
            last = stop.exists()
            try:
                kept = kept.refresh() if kept else Index.open(index, device="cpu")
                for opened in (kept, Index.open(index, device="cpu")):
                    (location,) = opened.locate(query, top_k=50)
                    lines.write(json.dumps([len(opened), as_json(location)]) + "\n")
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the test's finding
                lines.write(json.dumps([f"{type(error).__name__}: {error}"]) + "\n")
            lines.flush()
            if last:
                return


def test_two_readers_see_an_index_as_it_was_or_as_it_is(tmp_path: Path) -> None:
    import numpy as np

    weights, database, more = write_inputs(tmp_path)
    rng = np.random.default_rng(3)
    added = [more]
    for number in range(1, ROUNDS):
        added.append(tmp_path / f"more-{number}")
        added[-1].mkdir()
        for i in range(2):
            (added[-1] / f"@{500000 + 100 * i}@4000700@33@T@@@{number}-{i}@@@@@@@@.jpg").write_bytes(jpeg(rng))
    query = sorted(more.iterdir())[0]

    def states(out: Path, after_each: Path | None = None) -> None:
        """Builds, and grows round by round."""
        build, _ = verbs(weights, database, more, out)
        run(tmp_path, build)
        for number, folder in enumerate([None, *added]):
            if folder:
                run(tmp_path, ["index", "add", str(out), str(folder)])
            if after_each:
                fork(read, out, query, after_each / f"{number}.jsonl", after_each).join(60)

    (tmp_path / "expected").mkdir()
    states(tmp_path / "alone", tmp_path / "expected")
    expected = [(tmp_path / "expected" / f"{n}.jsonl").read_text().splitlines()[0] for n in range(ROUNDS + 1)]
    assert len(set(expected)) == ROUNDS + 1

    out, stop = tmp_path / "shared", tmp_path / "stop"
    run(tmp_path, verbs(weights, database, more, out)[0])
    files = [tmp_path / f"reader-{number}.jsonl" for number in range(2)]
    readers = [fork(read, out, query, file, stop) for file in files]
    try:
        assert wait_until(lambda: all(file.exists() and file.read_text().count("\n") > 1 for file in files), 60)
        for folder in added:
            run(tmp_path, ["index", "add", str(out), str(folder)])
            time.sleep(0.2)
        stop.touch()
        assert wait_until(lambda: all(not reader.is_alive() for reader in readers), 60)
    finally:
        for reader in readers:
            kill(reader)
    for file in files:
        seen = [expected.index(line) if line in expected else line for line in file.read_text().splitlines()]
        assert [one for one in seen if not isinstance(one, int)] == []
        numbers = [one for one in seen if isinstance(one, int)]
        assert numbers == sorted(numbers)
        assert (numbers[0], numbers[-1]) == (0, ROUNDS)
