"""How a shard set is written: resized, shuffled, in parts, over processes, killed; whatever is sharded."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image

from data_pipeline.folder_lock import LOCK, FolderLock
from data_pipeline.index import read_index
from data_pipeline.listing import shuffle_places
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.verify import verify_shards
from tests import forked
from tests.photos import contents, write_gsv_cities

ROOT = Path(__file__).resolve().parent.parent
SMALL = 12_000
MANY = {"Aachen": dict.fromkeys(range(60), 4), "Bergen": {i: 4 + i % 4 for i in range(50)}}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_gsv_cities(folder, MANY)
    return folder


@pytest.fixture(scope="module")
def expected(native: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "set"
    write_shards(read_gsv_cities(native), out, ShardOptions(shard_bytes=SMALL))
    return contents(out)


# Resized and shuffled


def test_only_larger_photographs_are_scaled(native: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_shards(
            read_gsv_cities(native), tmp_path / name, ShardOptions(max_side=40, quality=80, workers=1, threads=1)
        )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert verify_shards(tmp_path / "one") == []
    index = read_index(tmp_path / "one")
    files = sorted((native / "Images").rglob("*.jpg"))
    by_pano = {re.sub(r".*_(pano_.*)\.jpg", r"\1", f.name) + f.parent.name: f for f in files}
    scaled = 0
    for row in index.table.to_pylist():
        with (tmp_path / "one" / row["shard"]).open("rb") as tar:
            tar.seek(row["offset"])
            data = tar.read(row["size"])
        source = by_pano[row["panoid"] + row["city"]].read_bytes()
        width, height = Image.open(io.BytesIO(source)).size
        if max(width, height) <= 40:
            assert data == source
            continue
        scaled += 1
        assert Image.open(io.BytesIO(data)).size == (row["width"], row["height"])
        assert max(row["width"], row["height"]) == 40
        assert abs(row["width"] / row["height"] - width / height) < 0.1 * width / height + 0.1
    assert scaled > 100
    with pytest.raises(ValueError, match="holds another shard set"):
        write_shards(read_gsv_cities(native), tmp_path / "one", ShardOptions(max_side=40, quality=81))


def test_shuffled_places_lie_in_another_order_under_the_same_ids(
    native: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    listing = read_gsv_cities(native)
    write_shards(listing, tmp_path / "plain", ShardOptions(shard_bytes=SMALL))
    assert contents(tmp_path / "plain") == expected
    write_shards(shuffle_places(listing, 3), tmp_path / "shuffled", ShardOptions(shard_bytes=SMALL))
    assert verify_shards(tmp_path / "shuffled") == []
    plain, shuffled = read_index(tmp_path / "plain"), read_index(tmp_path / "shuffled")
    where = ["shard", "offset"]
    assert plain.table.drop_columns(where).equals(shuffled.table.drop_columns(where))
    tars = sorted(str(tar) for tar in (tmp_path / "shuffled/shards").glob("*.tar"))
    keys = [sample["__key__"] for sample in webdataset.WebDataset(tars, shardshuffle=False)]
    assert sorted(keys) != keys
    assert [key.split("_")[0] for key in keys] == ["Aachen"] * 60 + ["Bergen"] * 50
    assert not np.array_equal(
        shuffle_places(listing, 4).images["row"].to_numpy(), shuffle_places(listing, 3).images["row"].to_numpy()
    )


# Processes, parts, kills


@pytest.mark.slow
def test_worker_processes_write_the_same_bytes(native: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_shards(
        read_gsv_cities(native),
        tmp_path / "set",
        ShardOptions(shard_bytes=SMALL, workers=2),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert contents(tmp_path / "set") == expected
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_parts_side_by_side_and_a_last_run_give_the_same_bytes(
    native: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out, listing = tmp_path / "set", read_gsv_cities(native)

    def other_part(done: int, total: int) -> None:
        if done == total:
            with pytest.raises(ValueError, match=r"another process .* is writing"):
                write_shards(listing, out, ShardOptions(shard_bytes=SMALL))
            with pytest.raises(ValueError, match=r"another process .* is writing"):
                write_shards(listing, out, ShardOptions(shard_bytes=SMALL), part=(0, 3))
            write_shards(listing, out, ShardOptions(shard_bytes=SMALL), part=(2, 3))

    first = write_shards(listing, out, ShardOptions(shard_bytes=SMALL), part=(0, 3), on_progress=other_part)
    assert first.part == (0, 3)
    assert not (out / "index.parquet").exists()
    written = {path: path.stat().st_mtime_ns for path in (out / "shards").glob("*.tar")}
    assert len(written) > first.shards_written > 3
    again = write_shards(listing, out, ShardOptions(shard_bytes=SMALL), part=(0, 3))
    assert (again.shards_written, again.shards_reused) == (0, first.shards_written)
    last = write_shards(listing, out, ShardOptions(shard_bytes=SMALL))
    assert last.shards_reused == len(written)
    assert last.shards_written > 3
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert contents(out) == expected
    for part in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="it counts from 0"):
            write_shards(listing, tmp_path / "no", part=part)


@pytest.mark.slow
def test_bad_images_of_all_workers_count_together(native: Path, tmp_path: Path) -> None:
    shutil.copytree(native, tmp_path / "native")
    files = sorted((tmp_path / "native/Images").rglob("*.jpg"))
    for file in (files[0], files[-1]):
        file.write_bytes(b"no photograph")
    listing = read_gsv_cities(tmp_path / "native")
    with pytest.raises(ValueError, match="stopped at 2 unreadable photographs"):
        write_shards(
            listing, tmp_path / "set", ShardOptions(shard_bytes=SMALL, workers=2, max_bad=1.5 / listing.num_images)
        )
    assert not (tmp_path / "set/index.parquet").exists()


def _shard(native: Path, out: Path, started: object) -> None:
    listing = read_gsv_cities(native)
    started.set()  # type: ignore[attr-defined]
    write_shards(listing, out, ShardOptions(shard_bytes=SMALL, threads=1))


@pytest.mark.slow
def test_killed_at_ten_random_moments_and_finished_the_bytes_are_the_same(
    native: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    def begin(out: Path) -> ForkServerProcess:
        started = forked.server().Event()
        process = forked.fork(_shard, native, out, started)
        assert started.wait(60)
        return process

    begin(tmp_path / "warm").join()
    process, began = begin(tmp_path / "timed"), time.monotonic()
    process.join()
    assert process.exitcode == 0
    seconds = time.monotonic() - began
    rng = np.random.default_rng()
    states = set()
    for number in range(10):
        out = tmp_path / str(number)
        process = begin(out)
        time.sleep(rng.uniform(0, 0.9 * seconds))
        process.kill()
        process.join()
        states.add(len(list((out / "shards").glob("*.tar"))) if out.exists() else -1)
        write_shards(read_gsv_cities(native), out, ShardOptions(shard_bytes=SMALL))
        assert contents(out) == expected, f"killed run {number}"
    assert len(states) > 2


@pytest.mark.slow
def test_a_lock_that_a_run_left_beside_a_complete_set_is_removed(
    native: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    write_shards(read_gsv_cities(native), tmp_path / "set", ShardOptions(shard_bytes=SMALL))
    child = forked.fork(_die_with_a_lock, tmp_path / "set")
    child.join()
    assert (tmp_path / "set" / LOCK).exists()
    with FolderLock(tmp_path / "set", "another"):
        assert write_shards(read_gsv_cities(native), tmp_path / "set", ShardOptions(shard_bytes=SMALL)).was_complete
        assert (tmp_path / "set" / LOCK).exists()
    assert write_shards(read_gsv_cities(native), tmp_path / "set", ShardOptions(shard_bytes=SMALL)).was_complete
    assert contents(tmp_path / "set") == expected


def _die_with_a_lock(folder: Path) -> None:
    with FolderLock(folder, "rerankvpr shard"):
        os.kill(os.getpid(), signal.SIGKILL)


PARENT = """
import sys
from pathlib import Path
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
if __name__ == "__main__":
    options = ShardOptions(shard_bytes=3000, workers=2, threads=1)
    write_shards(read_gsv_cities(Path(sys.argv[1])), Path(sys.argv[2]), options)
"""


@pytest.mark.slow
def test_workers_end_with_their_killed_parent(native: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "parent.py", tmp_path / "set"
    script.write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, script, native, out], env=env)
    deadline = time.monotonic() + 120
    while not list((out / "shards").glob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert not (out / "index.parquet").exists()
    write_shards(read_gsv_cities(native), out, ShardOptions(shard_bytes=3000))
    write_shards(read_gsv_cities(native), tmp_path / "plain", ShardOptions(shard_bytes=3000))
    assert contents(out) == contents(tmp_path / "plain")
