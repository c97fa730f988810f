"""Shard sets over time: a killed run continues, a complete set is reused, a changed source and damage are found."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.folder_lock import FolderLock, LockedError
from data_pipeline.index import read_index
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.verify import verify_shards
from tests.photos import SMALL_SHARD, contents

# Interrupted and repeated runs

KILLED = """
import os, signal, sys
from pathlib import Path
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
def kill(done, total):
    if done >= 25:
        os.kill(os.getpid(), signal.SIGKILL)
options = ShardOptions(shard_bytes=int(sys.argv[3]))
write_shards(read_gsv_cities(Path(sys.argv[1])), Path(sys.argv[2]), options, on_progress=kill)
"""


@pytest.mark.slow
def test_a_killed_run_continues_where_it_stopped(native, shard_set, tmp_path):
    out = tmp_path / "set"
    killed = subprocess.run([sys.executable, "-c", KILLED, native[0], out, str(SMALL_SHARD)], check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match=r"no index\.parquet: not a shard set, or not finished"):
        read_index(out)
    finished = {tar: tar.stat().st_mtime_ns for tar in (out / "shards").glob("*.tar")}
    assert finished
    assert list((out / "shards").glob(".*.partial"))
    summary = write_shards(read_gsv_cities(native[0]), out, ShardOptions(shard_bytes=SMALL_SHARD))
    assert summary.shards_reused == len(finished)
    assert summary.shards_written > 0
    assert {tar: tar.stat().st_mtime_ns for tar in finished} == finished
    assert contents(out) == contents(shard_set)


def test_a_finished_tar_that_was_damaged_before_the_run_continued_is_written_again(native, shard_set, tmp_path):
    out, listing = tmp_path / "set", read_gsv_cities(native[0])

    def stop(done: int, total: int) -> None:
        if done > 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(listing, out, ShardOptions(shard_bytes=SMALL_SHARD), on_progress=stop)
    flip(out / "shards/train-000000.tar", 700)
    write_shards(listing, out, ShardOptions(shard_bytes=SMALL_SHARD))
    assert contents(out) == contents(shard_set)


def test_a_complete_set_is_reused(native, shard_set, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(shard_set, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    summary = write_shards(read_gsv_cities(native[0]), out, ShardOptions(shard_bytes=SMALL_SHARD))
    assert summary.was_complete
    assert (summary.images, summary.places, summary.places_left_out) == (42, 8, 2)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def swap(files: list[Path]) -> None:
    """Two photographs of one length change places: all names and sizes stay as they are."""
    first, second = (file.read_bytes() for file in files)
    assert len(first) == len(second)
    files[0].write_bytes(second)
    files[1].write_bytes(first)


def of_one_length(files: list[Path]) -> list[Path]:
    """The files, filled up behind their end to the length of the longest."""
    longest = max(file.stat().st_size for file in files)
    for file in files:
        file.write_bytes(file.read_bytes().ljust(longest, b"\0"))
    return files


@pytest.mark.parametrize("options", [{}, {"max_side": 20}])
def test_a_photograph_swapped_for_one_of_equal_length_is_seen(own_native, tmp_path, options):
    folder, files = own_native
    pair = of_one_length([files["Oslo", 12][1], files["San-Juan_2", 6][4]])
    files["Alta", 0][2].write_bytes(b"no photograph")
    out, options = tmp_path / "set", ShardOptions(shard_bytes=SMALL_SHARD, max_bad=0.1, **options)
    write_shards(read_gsv_cities(folder), out, options)
    for file in files["Alta", 0]:
        file.touch()
    assert write_shards(read_gsv_cities(folder), out, options).was_complete
    swap(pair)
    with pytest.raises(ValueError, match=f"{pair[0].name} is not the photograph that was sharded"):
        write_shards(read_gsv_cities(folder), out, options)


def test_a_tar_whose_photographs_changed_since_is_written_again(own_native, tmp_path):
    folder, files = own_native
    pair = of_one_length(files["Alta", 0][:2])
    listing = read_gsv_cities(folder)

    def stop(done: int, total: int) -> None:
        if done > 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(listing, tmp_path / "set", ShardOptions(shard_bytes=SMALL_SHARD), on_progress=stop)
    assert (tmp_path / "set/shards/train-000000.tar").is_file()
    swap(pair)
    write_shards(listing, tmp_path / "set", ShardOptions(shard_bytes=SMALL_SHARD))
    write_shards(listing, tmp_path / "straight", ShardOptions(shard_bytes=SMALL_SHARD))
    assert contents(tmp_path / "set") == contents(tmp_path / "straight")


def test_progress_reaches_the_end(native, tmp_path):
    seen = []
    write_shards(
        read_gsv_cities(native[0]), tmp_path / "set", on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (42, 42)
    assert seen == sorted(seen)


def test_a_folder_with_another_set_is_refused(native, shard_set, tmp_path):
    listing = read_gsv_cities(native[0])
    before = contents(shard_set)
    with pytest.raises(ValueError, match="holds another shard set"):
        write_shards(listing, shard_set, ShardOptions(shard_bytes=SMALL_SHARD + 1))
    with pytest.raises(ValueError, match="holds another shard set"):
        write_shards(read_gsv_cities(native[0], cities=["Oslo"]), shard_set, ShardOptions(shard_bytes=SMALL_SHARD))
    assert contents(shard_set) == before
    out = tmp_path / "foreign"
    (out / "shards").mkdir(parents=True)
    shutil.copy(shard_set / "shards/train-000000.tar", out / "shards")
    with pytest.raises(ValueError, match=r"train-000000.tar: of another shard set"):
        write_shards(listing, out, ShardOptions(shard_bytes=SMALL_SHARD))
    assert list(contents(out)) == ["shards/train-000000.tar"]


def test_two_runs_do_not_write_the_same_folder(native, tmp_path):
    out = tmp_path / "set"
    (out / "shards").mkdir(parents=True)
    (out / "shards/.train-000000.tar.other-1-0.partial").write_bytes(b"the other's")
    with FolderLock(out, "rerankvpr shard"):
        for part in (None, (0, 2)):
            with pytest.raises(
                LockedError, match=r"set: another process \(rerankvpr shard, pid \d+ on .* is writing there"
            ):
                write_shards(read_gsv_cities(native[0]), out, part=part)
    assert contents(out) == {"shards/.train-000000.tar.other-1-0.partial": b"the other's"}


# Verifying


def flip(path: Path, position: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_any_flipped_byte_is_found_and_named(shard_set, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(shard_set, out)
    assert verify_shards(out) == []
    rng = np.random.default_rng(11)
    tar = out / "shards/train-000001.tar"
    with tarfile.open(tar) as members:
        spans = [(m.name, m.offset, m.offset_data, m.offset_data + m.size) for m in members]
    ends = [span[1] for span in spans[1:]] + [spans[-1][3] + -spans[-1][3] % 512]
    kinds = set()
    for name, head, data, data_end in spans:
        for start, stop in (
            (head, data),
            (data, data_end),
            (data_end, ends[spans.index((name, head, data, data_end))]),
        ):
            for position in rng.integers(start, stop, size=2).tolist() if stop > start else []:
                flip(tar, position, bit := int(rng.integers(8)))
                faults = verify_shards(out)
                flip(tar, position, bit)
                assert faults, f"byte {position}, bit {bit} of {name}"
                assert {fault.file for fault in faults} == {"shards/train-000001.tar"}
                assert {fault.member for fault in faults} == {name}
                kinds |= {fault.what for fault in faults}
    assert len(kinds) >= 5
    flip(tar, tar.stat().st_size - 1)
    assert [fault.file for fault in verify_shards(out)] == ["shards/train-000001.tar"]


def test_missing_extra_short_and_long_tars_are_found(shard_set, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(shard_set, out)
    shards = out / "shards"
    (shards / "train-000000.tar").unlink()
    shutil.copy(shards / "train-000001.tar", shards / "train-000099.tar")
    short, long = shards / "train-000002.tar", shards / "train-000003.tar"
    short.write_bytes(short.read_bytes()[:1500])
    long.write_bytes(long.read_bytes() + bytes(10))
    faults = [str(fault) for fault in verify_shards(out)]
    assert [fault.split(":")[0] for fault in faults] == [f"shards/train-0000{n}.tar" for n in ("00", "02", "03", "99")]
    assert "missing" in faults[0]
    assert "1500 bytes long" in faults[1]
    assert "are cut off, from " in faults[1]
    assert "not in the index" in faults[3]


def test_a_damaged_index_is_found_and_named(shard_set, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(shard_set, out)
    index = out / "index.parquet"
    for position in np.random.default_rng(2).integers(0, index.stat().st_size, size=60).tolist():
        flip(index, position)
        faults = verify_shards(out)
        assert faults[0].file == "index.parquet", position
        flip(index, position)
    index.write_bytes(index.read_bytes()[:-9])
    assert [fault.file for fault in verify_shards(out)] == ["index.parquet"] * 2
    with pytest.raises(ValueError, match=r"index.parquet: damaged, or no Parquet file"):
        read_index(out)


@pytest.mark.parametrize(
    "column", ["place_id", "view", "offset", "size", "crc32", "city_place_id", "width", "lat", "shard"]
)
def test_rows_that_do_not_match_the_tars_are_found(shard_set, tmp_path, column):
    out = tmp_path / "set"
    shutil.copytree(shard_set, out)
    table = pq.read_table(out / "index.parquet")
    values = table[column].to_pylist()
    values[7] = "shards/other.tar" if column == "shard" else values[7] + 1
    position = table.column_names.index(column)
    changed = table.set_column(position, table.schema.field(column), pa.array(values, table.schema.field(column).type))
    pq.write_table(changed, out / "index.parquet")
    digest = hashlib.sha256((out / "index.parquet").read_bytes()).hexdigest()
    (out / "index.parquet.sha256").write_text(f"{digest}  index.parquet\n")
    faults = verify_shards(out)
    assert faults
    assert all(
        fault.file in ("index.parquet", "shards/train-000000.tar", "shards/train-000001.tar") for fault in faults
    )


# Reading what is no shard set


def test_what_is_no_shard_set_is_refused(shard_set, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        verify_shards(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no index\.parquet"):
        read_index(tmp_path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "index.parquet")
    with pytest.raises(ValueError, match="not the index of a shard set"):
        read_index(tmp_path)
    table = pq.read_table(shard_set / "index.parquet")
    said = json.loads(table.schema.metadata[b"rerankvpr"]) | {"format_version": 99}
    pq.write_table(table.replace_schema_metadata({b"rerankvpr": json.dumps(said)}), tmp_path / "index.parquet")
    with pytest.raises(ValueError, match="format version 99; expected 1"):
        read_index(tmp_path)
