"""The copy of an index that the processes of a machine map: equal to the table, checked, written once, or left out."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.planning import write_synthetic_index
from data_pipeline import index_copy
from data_pipeline.index import INDEX, INDEX_DIGEST, IndexFile, ShardIndex, read_index
from data_pipeline.index_copy import DamagedCopyError, open_index
from data_pipeline.storage import RangeReader

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("place_starts", "num_views", "place_city", "place_shard", "offset", "size", "crc32")


@pytest.fixture
def always_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_copy, "SHARED_FROM_IMAGES", 1)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of 60,000 places, whose columns have several checked parts."""
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic_index(folder, 60_000)
    return folder


def same(one: ShardIndex, other: ShardIndex) -> None:
    for name in COLUMNS:
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b), name
    assert (one.cities, one.metadata, one.digest) == (other.cities, other.metadata, other.digest)


def copies(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


@pytest.mark.usefixtures("always_shared")
@pytest.mark.parametrize("rows_at_once", [7, 2**17])
def test_a_copy_holds_what_the_table_says(
    shard_set: Path, tmp_path: Path, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.index.ROWS_AT_ONCE", rows_at_once)
    written, mapped = (open_index(str(shard_set), folder=tmp_path) for _ in range(2))
    table = pq.read_table(shard_set / INDEX)
    first = np.flatnonzero(table["view"].to_numpy() == 0)
    for index in (written, mapped, read_index(shard_set)):
        for name in ("offset", "size", "crc32"):
            assert np.array_equal(getattr(index, name), table[name].to_numpy())
        assert index.place_starts.tolist() == [*first, len(table)]
        assert index.num_views.tolist() == np.diff([*first, len(table)]).tolist()
        cities = list(dict.fromkeys(table["city"].to_pylist()))
        assert index.cities == cities
        assert [cities[number] for number in index.place_city] == [table["city"][int(row)].as_py() for row in first]
        shards = [index.metadata.shards[number].name for number in index.place_shard]
        assert shards == [table["shard"][int(row)].as_py() for row in first]
    assert len(copies(tmp_path)) == 1
    same(mapped, read_index(shard_set))
    assert not mapped.offset.flags.writeable


@pytest.mark.usefixtures("always_shared")
def test_a_copy_of_many_rows_is_that_of_the_table(synthetic: Path, tmp_path: Path) -> None:
    mapped, own = open_index(str(synthetic), folder=tmp_path), read_index(synthetic)
    same(mapped, own)
    assert mapped.num_views.sum() == mapped.num_images == 240_000
    for place in (0, 31_234, 59_999):
        one, other = mapped.place_range(place), own.place_range(place)
        assert (one.location, one.start, one.length) == (other.location, other.start, other.length)


def test_a_small_index_is_read_and_nothing_is_written(shard_set: Path, tmp_path: Path) -> None:
    assert open_index(str(shard_set), folder=tmp_path / "copies").num_images == read_index(shard_set).num_images
    assert not (tmp_path / "copies").exists()


@pytest.mark.usefixtures("always_shared")
def test_a_damaged_copy_is_written_again_and_said(synthetic: Path, tmp_path: Path) -> None:
    own = read_index(synthetic)
    open_index(str(synthetic), folder=tmp_path)
    (copy,) = copies(tmp_path)
    for name in ("about.json", "place_starts", "num_views", "place_city", "place_shard"):
        for damage in ("flip", "cut"):
            content = (copy / name).read_bytes()
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]
            (copy / name).write_bytes(flipped if damage == "flip" else content[:middle])
            said: list[str] = []
            same(open_index(str(synthetic), folder=tmp_path, on_note=said.append), own)
            assert len(said) == 1, (name, damage)
            assert str(copy) in said[0]
            assert said[0].endswith("it is written again")
            assert (copy / name).read_bytes() == content
    assert copies(tmp_path) == [copy]


@pytest.mark.usefixtures("always_shared")
@pytest.mark.parametrize("name", ["offset", "size", "crc32"])
def test_damaged_rows_are_named_when_they_are_asked_for(synthetic: Path, tmp_path: Path, name: str) -> None:
    open_index(str(synthetic), folder=tmp_path)
    (copy,) = copies(tmp_path)
    content = bytearray((copy / name).read_bytes())
    content[-3] ^= 1
    (copy / name).write_bytes(content)
    index = open_index(str(synthetic), folder=tmp_path)
    index.place_range(0)
    with pytest.raises(DamagedCopyError, match=f"its {name} is damaged; remove the folder"):
        index.place_range(59_999)


@pytest.mark.usefixtures("always_shared")
def test_an_index_that_changed_has_another_copy_and_a_damaged_one_is_refused(shard_set: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in (INDEX, INDEX_DIGEST):
        (folder / name).write_bytes((shard_set / name).read_bytes())
    open_index(str(folder), folder=tmp_path / "copies")
    content = bytearray((folder / INDEX).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.parquet: damaged"):
        open_index(str(folder), folder=tmp_path / "copies")
    (folder / INDEX_DIGEST).unlink()
    content[len(content) // 2] ^= 1
    (folder / INDEX).write_bytes(content)
    assert open_index(str(folder), folder=tmp_path / "copies").num_images
    assert len(copies(tmp_path / "copies")) == 1


@pytest.mark.usefixtures("always_shared")
@pytest.mark.parametrize("reason", ["a file", "full"])
def test_where_no_copy_can_be_written_each_process_reads_and_says_so(
    shard_set: Path, tmp_path: Path, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, said = tmp_path / "copies", []
    if reason == "a file":  # a folder without permission stops nobody who is root
        home.write_text("")
    else:
        monkeypatch.setattr(index_copy, "_map", _full)
    same(open_index(str(shard_set), folder=home, on_note=said.append), read_index(shard_set))
    assert len(said) == 1
    assert "no copy for all processes of this machine" in said[0]
    assert "data.index_cache" in said[0]
    assert reason == "a file" or copies(home) == []


def _full(*args: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.usefixtures("always_shared")
def test_a_folder_that_others_may_write_to_is_not_trusted(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said: list[str] = []
    open_index(str(shard_set), on_note=said.append)
    home = tmp_path / f"rerankvpr-{os.getuid()}" / "index"
    assert (said, len(copies(home))) == ([], 1)
    home.chmod(0o777)
    (copies(home)[0] / "about.json").unlink()
    open_index(str(shard_set), on_note=said.append)
    assert len(said) == 1
    assert "others may write to it" in said[0]


def _open(location: str, folder: Path, results: object, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    written: list[str] = []
    write = index_copy._write_copy
    index_copy._write_copy = lambda *args: (written.append("once"), write(*args))[1]  # type: ignore[assignment,func-returns-value]
    index = open_index(location, folder=folder)
    results.put((len(written), index.num_images))  # type: ignore[attr-defined]


@pytest.mark.usefixtures("always_shared")
def test_the_first_of_several_processes_writes_the_copy(synthetic: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results, start = context.Queue(), context.Event()
    ranks = [context.Process(target=_open, args=(str(synthetic), tmp_path, results, start)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    start.set()
    found = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert sorted(found) == [(0, 240_000)] * 3 + [(1, 240_000)]
    assert len(copies(tmp_path)) == 1


def test_a_copy_is_whole_wherever_its_writer_is_killed(synthetic: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys; from data_pipeline import index_copy as c; c.SHARED_FROM_IMAGES = 1\n"
        "if sys.argv[3] == 'rows': c.IndexFile.blocks = lambda self, cities: os._exit(9)\n"
        "else: c._put_in_place = lambda *a: os._exit(9)\n"
        "c.open_index(sys.argv[1], folder=__import__('pathlib').Path(sys.argv[2]))"
    )
    for moment in ("rows", "rename"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(synthetic), str(tmp_path), moment], cwd=ROOT, check=False
        )
        assert done.returncode == 9
        assert [path for path in copies(tmp_path) if not path.name.startswith(".")] == []
    index_copy_before = index_copy.SHARED_FROM_IMAGES
    index_copy.SHARED_FROM_IMAGES = 1
    try:
        same(open_index(str(synthetic), folder=tmp_path), read_index(synthetic))
    finally:
        index_copy.SHARED_FROM_IMAGES = index_copy_before
    assert len(copies(tmp_path)) == 1  # what the killed ones left is gone


def test_two_ranks_hold_one_copy(synthetic: Path, tmp_path: Path) -> None:
    """Proportional memory: of mapped columns that two processes have read, each counts half."""
    context = multiprocessing.get_context("fork")
    shared = [_pss_of_two(context, str(synthetic), tmp_path, 1), _pss_of_two(context, str(synthetic), tmp_path, 2)]
    size = 240_000 * 20 + 60_000 * 32
    assert size < sum(shared[0]) < 1.3 * size
    assert 0.95 * size < sum(shared[1]) < 1.3 * size
    assert max(shared[1]) < 0.65 * size


def _pss_of_two(context: multiprocessing.context.BaseContext, location: str, folder: Path, ranks: int) -> list[int]:
    results, barrier = context.Queue(), context.Barrier(ranks)  # type: ignore[attr-defined]
    processes = [
        context.Process(target=_mapped_pss, args=(location, folder, results, barrier))  # type: ignore[attr-defined]
        for _ in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    return found


def _mapped_pss(location: str, folder: Path, results: object, barrier: object) -> None:
    index_copy.SHARED_FROM_IMAGES = 1
    index = open_index(location, folder=folder)
    for name in COLUMNS:
        getattr(index, name).sum()
    barrier.wait()  # type: ignore[attr-defined]
    pss, mapped = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            mapped = str(folder) in line
        elif mapped and line.startswith("Pss:"):
            pss += int(line.split()[1]) * 1024
    barrier.wait()  # type: ignore[attr-defined]
    results.put(pss)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("always_shared")
def test_a_set_on_a_server_is_asked_for_once(shard_set: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in (INDEX, INDEX_DIGEST):
        memory.pipe(f"/copied/{name}", (shard_set / name).read_bytes())
    asked: list[str] = []
    for _ in range(3):
        reader = RangeReader()
        plain = reader.read_file
        reader.read_file = lambda location, plain=plain: (asked.append(location), plain(location))[1]  # type: ignore[method-assign,misc]
        index = open_index("memory://copied", reader, folder=tmp_path)
        assert np.array_equal(index.offset, read_index(shard_set).offset)
        assert index.location == "memory://copied"
    assert asked.count(f"memory://copied/{INDEX}") == 1


def test_an_index_file_says_how_many_rows_it_has(shard_set: Path) -> None:
    assert IndexFile(str(shard_set), RangeReader()).num_rows == read_index(shard_set).num_images
