"""Files appear whole or not at all, each writer under a name of its own; what rank 0 finds, all ranks have."""

import hashlib
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from configs.files import file_sha256, partial_of, partials_of, remove_abandoned, replacing, write_whole
from configs.names import nearest
from configs.ranks import from_rank_0, raise_together
from tests.ranks import on_ranks

KILLED = """
import os, signal, sys
from pathlib import Path
from configs.files import replacing
with replacing(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print(partial, flush=True)
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "die" else sys.stdin.read()
"""


def test_a_file_holds_the_old_or_the_new_content(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def fail_half_way() -> None:
        with replacing(path) as partial:
            partial.write_text("n")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert path.read_text() == "old"
    write_whole(path, b"new", durable=True)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_goes_and_a_running_one_keeps_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"  # brackets mean something to glob
    running = subprocess.Popen(
        [sys.executable, "-c", KILLED, path, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert running.stdin
    assert running.stdout
    of_running = Path(running.stdout.readline().strip())
    died = subprocess.run([sys.executable, "-c", KILLED, path, "die"], capture_output=True, text=True, check=False)
    of_dead = Path(died.stdout.strip())
    elsewhere = tmp_path / f".{path.name}.another-host-{running.pid}-0.partial"
    elsewhere.touch()
    assert set(partials_of(path)) == {of_running, of_dead, elsewhere}
    write_whole(path, "mine")
    assert set(partials_of(path)) == {of_running, elsewhere}
    running.stdin.close()
    assert running.wait(60) == 0
    assert path.read_text() == "half"
    assert partials_of(path) == [elsewhere]


def test_an_abandoned_folder_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    folder = tmp_path / f".town.{platform.node()}-{ended.pid}-3.partial"
    (folder / "deep").mkdir(parents=True)
    mine = partial_of(tmp_path / "town")
    mine.mkdir()
    remove_abandoned(tmp_path / "town")
    assert list(tmp_path.iterdir()) == [mine]


def test_threads_write_one_file_without_meeting(tmp_path: Path) -> None:
    path, texts = tmp_path / "a", [str(i) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=write_whole, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_is_that_of_all_bytes(tmp_path: Path) -> None:
    path, data = tmp_path / "a", bytes(range(256)) * 9000
    path.write_bytes(data)
    blocks: list[int] = []
    assert file_sha256(path, blocks.append) == hashlib.sha256(data).hexdigest()
    assert sum(blocks) == len(data)


def test_the_nearest_name_or_all_of_them() -> None:
    assert nearest("vits15", ["vits14", "vitb14"], prefix="model.") == "nearest: model.vits14"
    assert nearest("qq", ["vits14", "vitb14"]) == "known: vits14, vitb14"
    assert nearest("qq", [f"name{i}" for i in range(30)], listed=2) == "known: name0, name1 and 28 more"
    assert nearest("qq", []) == "known: none"


def check_what_rank_0_finds_or_raises_is_everywhere() -> None:
    assert from_rank_0(dist.get_rank) == 0
    with pytest.raises(FileNotFoundError, match="No such file") as raised:
        from_rank_0(lambda: Path("/nowhere/at/all").read_text())
    assert raised.value.filename == "/nowhere/at/all"
    with pytest.raises((KeyError, RuntimeError), match="what is missing"):
        from_rank_0(lambda: {}["what is missing"])


def check_a_fault_of_one_is_raised_by_all() -> None:
    raise_together(None)
    last = dist.get_world_size() - 1
    with pytest.raises(ValueError, match="a bad file"):
        raise_together(ValueError("a bad file") if dist.get_rank() == last else None)


test_on_ranks = on_ranks(__file__, (1, 2))


def test_a_file_that_the_disk_does_not_take_is_named(tmp_path: Path) -> None:
    """Writes into an open file raise errors without a name."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    code = f"""{limited}
from pathlib import Path
from configs.files import replacing
from trainer.errors import one_line_errors
with one_line_errors(), replacing(Path(sys.argv[1])) as partial, partial.open("wb") as file:
    for _ in range(99):
        file.write(bytes(1000))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.tar"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"File too large: '{tmp_path / 'x.tar'}'" in done.stderr
    assert not list(tmp_path.iterdir())
