"""Shard sets on real servers: a whole epoch over http and s3, servers that die and come back, and the cache."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import DataConfig
from data_pipeline.cache import RangeCache
from data_pipeline.index import read_index
from data_pipeline.loader import PlaceBatch, PlaceLoader, build_reader
from data_pipeline.mixture import EpochPlans, read_mixture
from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from data_pipeline.storage import RangeReader, StorageError
from tests.http_ranges import KillableServer, wait_for_port
from tests.photos import write_gsv_cities
from tests.ports import free_port
from tests.s3_server import Bucket, served_bucket

pytestmark = pytest.mark.slow

CITIES = {"Aachen": {i: 4 + i % 3 for i in range(20)}, "Bergen": dict.fromkeys(range(21), 5)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    write_gsv_cities(folder / "native", CITIES)
    write_shards(read_gsv_cities(folder / "native"), folder / "set", ShardOptions(shard_bytes=40_000))
    return folder / "set"


@pytest.fixture
def server(shards: Path) -> Iterator[KillableServer]:
    server = KillableServer(shards)
    server.start()
    yield server
    server.kill()


def config(location: object, **changes: object) -> DataConfig:
    options: dict = {"image_size": 28, "places_per_batch": 4, "images_per_place": 3, "read_ahead_mb": 0}
    return DataConfig(shards=str(location), **(options | changes))


def batches(data: DataConfig) -> Iterator[PlaceBatch]:
    """The batches of epoch 0."""
    reader = build_reader(data)
    places = read_mixture(data, reader)
    plan = EpochPlans(places, data, seed=0).epoch(0)
    return PlaceLoader(places, data, rank=0, world_size=1, reader=reader).batches(plan, range(plan.num_steps))


def assert_same(some: list[PlaceBatch], others: list[PlaceBatch]) -> None:
    assert len(some) == len(others) == 10
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.images_B3HW, other.images_B3HW)
        assert torch.equal(one.place_ids_B, other.place_ids_B)


NGINX = """
daemon off; master_process off; pid {work}/pid; error_log {work}/error.log;
events {{ worker_connections 64; }}
http {{
  log_format ranges '$status $http_range $request_uri';
  access_log {work}/access.log ranges;
  client_body_temp_path {work}/body; proxy_temp_path {work}/proxy; fastcgi_temp_path {work}/fastcgi;
  uwsgi_temp_path {work}/uwsgi; scgi_temp_path {work}/scgi;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@pytest.fixture
def nginx(shards: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of an nginx that serves the set, and its log of requests."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    port = free_port()
    settings = tmp_path / "nginx.conf"
    settings.write_text(NGINX.format(work=tmp_path, root=shards, port=port))
    process = subprocess.Popen([program, "-c", str(settings), "-e", str(tmp_path / "error.log")])
    wait_for_port(port)
    yield f"http://127.0.0.1:{port}", tmp_path / "access.log"
    process.terminate()
    process.wait()


def test_nginx_serves_an_epoch_by_ranges(shards: Path, nginx: tuple[str, Path]) -> None:
    url, log = nginx
    assert_same(list(batches(config(url))), list(batches(config(shards))))
    asked = [line.split() for line in log.read_text().splitlines() if line.endswith(".tar")]
    assert len(asked) == 40  # 10 steps of 4 places
    assert {(status, requested[:6]) for status, requested, _ in asked} == {("206", "bytes=")}


@pytest.mark.parametrize("threads", [0, 2])
def test_http_serves_an_epoch(shards: Path, server: KillableServer, threads: int) -> None:
    assert_same(list(batches(config(server.url, decode_threads=threads))), list(batches(config(shards))))


def test_a_server_killed_and_restarted_loses_nothing(
    shards: Path, server: KillableServer, capfd: pytest.CaptureFixture[str]
) -> None:
    received = []
    for step, batch in enumerate(batches(config(server.url, prefetch_batches=1))):
        received.append(batch)
        if step in (2, 6):
            server.kill()
            threading.Timer(1.0, server.start).start()
    assert_same(received, list(batches(config(shards))))
    assert "trying again for up to 120 s" in capfd.readouterr().err


def test_a_server_cut_for_good_ends_the_run_with_a_clear_error(server: KillableServer) -> None:
    stream = batches(config(server.url, prefetch_batches=1, remote_retry_s=1.5))
    next(stream)
    server.kill()
    began = time.monotonic()
    with pytest.raises(
        StorageError, match=r"http://.*train-0000\d\d\.tar: cannot be read \(tried for .* s\): .*onnect"
    ):
        list(stream)
    assert time.monotonic() - began < 10


def test_what_no_second_try_can_mend_is_an_error_at_once(shards: Path, server: KillableServer, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"/nowhere/index\.parquet: not found"):
        read_index(f"{server.url}/nowhere")
    with pytest.raises(StorageError, match=r"cannot be read: .*nosuch"):
        read_index("nosuch://bucket/set")
    whole_files = KillableServer(shards, "ignore-ranges")
    whole_files.start()
    try:
        with pytest.raises(StorageError, match="the server must answer range requests"):
            list(batches(config(whole_files.url)))
    finally:
        whole_files.kill()
    assert time.monotonic() - began < 10


def test_a_tar_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-000003\.tar: the index names it, but it is not there"):
        RangeReader().read(str(tmp_path / "train-000003.tar"), 0, 10)


@pytest.fixture
def s3(shards: Path) -> Iterator[Bucket]:
    with served_bucket(shards, prefix="set") as bucket:
        yield bucket


def test_s3_serves_an_epoch_and_an_outage_loses_nothing(shards: Path, s3: Bucket) -> None:
    expected = list(batches(config(shards)))
    assert_same(list(batches(config(s3.url))), expected)
    received = []
    for step, batch in enumerate(batches(config(s3.url, prefetch_batches=1))):
        received.append(batch)
        if step == 3:
            s3.server.stop()
            threading.Timer(1.0, s3.start_again).start()
    assert_same(received, expected)


def test_s3_serves_whole_tars_in_order(shards: Path, s3: Bucket) -> None:
    streamed = {"access": "stream", "composition": "mixed", "stream_buffer_places": 12}
    assert_same(list(batches(config(s3.url, **streamed))), list(batches(config(shards, **streamed))))


def test_s3_cut_for_good_is_a_clear_error_and_what_is_missing_is_named(s3: Bucket) -> None:
    with pytest.raises(FileNotFoundError, match=r"s3://places/other/index\.parquet: not found"):
        read_index("s3://places/other")
    stream = batches(config(s3.url, prefetch_batches=1, remote_retry_s=1.0))
    next(stream)
    s3.server.stop()
    with pytest.raises(StorageError, match=r"s3://places/set/shards/.*\.tar: cannot be read"):
        list(stream)


# The cache


def test_the_cache_serves_an_epoch_when_the_server_is_gone(
    shards: Path, server: KillableServer, tmp_path: Path
) -> None:
    data = config(server.url, cache=tmp_path / "cache", remote_retry_s=0)
    reader = build_reader(data)
    places = read_mixture(data, reader)
    plan = EpochPlans(places, data, seed=0).epoch(0)
    loader = PlaceLoader(places, data, rank=0, world_size=1, reader=reader)
    first = list(loader.batches(plan, range(plan.num_steps)))
    server.kill()
    assert_same(list(loader.batches(plan, range(plan.num_steps))), first)


def test_damage_in_the_cache_is_mended_from_the_source(shards: Path, server: KillableServer, tmp_path: Path) -> None:
    data = config(server.url, cache=tmp_path)
    expected = list(batches(data))
    kept = [path for path in tmp_path.glob("??/*") if path.is_file()]
    assert len(kept) > 30
    for number, path in enumerate(kept):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content if number % 2 else content[:100])
    assert_same(list(batches(data)), expected)
    assert_same(list(batches(config(shards))), expected)


def _hammer(folder: Path, seed: int, seconds: float, failures: object) -> None:
    cache, rng = RangeCache(folder, 200_000), np.random.default_rng(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number = int(rng.integers(60))
        content = bytes([number]) * (1000 + 300 * number)
        found = cache.get(str(number), len(content))
        if found is None:
            cache.put(str(number), content)
        elif found != content:
            failures.put(number)  # type: ignore[attr-defined]


def test_several_processes_share_a_bounded_cache_that_never_serves_half_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    processes = [context.Process(target=_hammer, args=(tmp_path, seed, 2.0, failures)) for seed in range(4)]
    for process in processes:
        process.start()
    sizes = []
    while any(process.is_alive() for process in processes):
        time.sleep(0.05)
        sizes.append(_folder_bytes(tmp_path))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert failures.empty()
    assert max(sizes) < 200_000 * (1 + 4 / 64) + 4 * 20_000
    assert max(sizes) > 100_000


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("??/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_the_longest_unused_goes_first_and_stale_parts_go_too(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 10_000)
    for number in range(9):
        cache.put(str(number), bytes(1000))
    cache.get("0", 1000)
    stale = tmp_path / "00" / "abandoned.partial"
    stale.parent.mkdir(exist_ok=True)
    stale.write_bytes(bytes(500))
    os.utime(stale, (1, 1))
    cache.put("big", bytes(3000))
    assert cache.get("0", 1000) is not None
    assert cache.get("1", 1000) is None
    assert cache.get("big", 3000) is not None
    assert not stale.exists()
    cache.put("too big", bytes(10_001))
    assert cache.get("too big", 10_001) is None
    with pytest.raises(ValueError, match="a cache of 0 bytes"):
        RangeCache(tmp_path, 0)


def test_a_flaky_read_is_tried_again_with_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's own clockwork, on a backend that fails twice."""
    import fsspec

    said: list[str] = []
    reader = RangeReader(retry_s=30, on_retry=said.append)
    memory = fsspec.filesystem("memory")
    memory.pipe("/set/a.tar", bytes(range(100)))
    calls = []
    real = type(memory).cat_file

    def flaky(self: object, *args: object, **kwargs: object) -> bytes:
        calls.append(time.monotonic())
        if len(calls) < 4:
            raise ConnectionResetError("reset by peer")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    assert reader.read("memory://set/a.tar", 10, 5) == bytes(range(10, 15))
    pauses = np.diff(calls)
    assert len(calls) == 4
    assert pauses[0] >= 0.1
    assert pauses[2] > pauses[0]
    assert said == ["memory://set/a.tar: reset by peer; trying again for up to 30 s"]
