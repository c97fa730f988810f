"""`shard` of archives and of single files behind http and s3: the sets of local files, through outages too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.photo_source import shared_reader
from data_pipeline.remote_source import Bucket
from data_pipeline.shards import write_shards
from data_pipeline.sources.bucket import read_bucket
from data_pipeline.sources.manifest import read_manifest
from data_pipeline.sources.tars import Reading, finish, read_tars
from data_pipeline.storage import StorageError
from launch.cli import main
from tests.archives import SMALL, Sets, gldv2, of_set, osv5m
from tests.http_ranges import KillableServer
from tests.s3_server import bucket_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def landmarks(source: Path) -> Sets:
    return gldv2(source / "gldv2")


@pytest.fixture(scope="module")
def street(source: Path) -> Sets:
    return osv5m(source / "osv5m")


@pytest.fixture(scope="module")
def expected(landmarks: Sets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return landmarks.expected(tmp_path_factory.mktemp("expected") / "set")


@pytest.fixture(scope="module")
def server(source: Path, landmarks: Sets, street: Sets) -> Iterator[KillableServer]:
    server = KillableServer(source)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def bucket(source: Path, landmarks: Sets, street: Sets) -> Iterator[str]:
    with bucket_of(source) as url:
        shared_reader.cache_clear()  # its s3 has another server's address
        yield url


def shard(sets: Sets, words: list[str], out: Path, by: str) -> dict[str, bytes]:
    how = Reading(by, spill_bytes=30_000)  # type: ignore[arg-type]
    write_shards(read_tars(words, sets.table, out, how, say=lambda text: None), out, SMALL)
    finish(out)
    return of_set(out)


@pytest.mark.parametrize("by", ["ranges", "sequence"])
def test_archives_over_http(landmarks, street, expected, server, tmp_path, by):
    words = [f"{server.url}/gldv2/archives/images_{{000..003}}.tar"]
    assert shard(landmarks, words, tmp_path / "a", by) == expected
    words = [f"{server.url}/osv5m/archives/{{00..03}}.zip"]
    assert shard(street, words, tmp_path / "b", by) == street.expected(tmp_path / "c")


@pytest.mark.parametrize("by", ["ranges", "sequence"])
def test_archives_in_a_bucket(landmarks, expected, bucket, tmp_path, by):
    assert shard(landmarks, [f"{bucket}/gldv2/archives"], tmp_path, by) == expected


def test_keys_of_a_table_below_a_bucket_or_a_web_server(landmarks, expected, bucket, server, tmp_path):
    for number, url in enumerate((bucket, server.url)):
        listing = read_manifest(landmarks.loose_table, root=Bucket(f"{url}/gldv2/loose"))
        out = tmp_path / str(number)
        said: list[str] = []

        def told(done: int, total: int | None = None, note: str = "", said: list[str] = said) -> None:
            said.append(note)

        write_shards(listing, out, SMALL, on_progress=told)
        assert f"lengths of {listing.num_images} are known" in said
        assert said[-1] == ""
        assert of_set(out) == expected
        assert write_shards(listing, out, SMALL).was_complete


def test_a_table_of_urls(landmarks, expected, server, tmp_path, capsys):
    table = tmp_path / "train.csv"
    lines = landmarks.loose_table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *(f"{server.url}/gldv2/loose/{line}" for line in lines[1:])]) + "\n")
    assert main(["shard", "manifest", str(table), str(tmp_path / "set"), "--read-threads", "4"]) == 0
    tars = [data for name, data in of_set(tmp_path / "set").items() if name.endswith(".tar")]
    assert b"".join(tars).count(b"photograph ") == b"".join(expected.values()).count(b"photograph ")
    table.write_text("\n".join([*lines[:2], f"{server.url}/gldv2/loose/{lines[2]}"]) + "\n")
    with pytest.raises(ValueError, match=r"train\.csv row 2: path is .*; other rows have URLs"):
        read_manifest(table)


def test_the_folders_of_a_bucket_are_places(landmarks, bucket, tmp_path):
    folder = tmp_path / "scenes"
    names = [f"{number % 3:03d}/{number % 2:03d}/view/{number:03d}.jpg" for number in range(40)]
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((landmarks.loose / landmarks.names[number]).read_bytes())
    (folder / "000" / "notes.txt").write_text("x")
    (folder / "000" / "high.jpg").write_bytes(b"x")
    with bucket_of(folder, "scenes") as url:
        shared_reader.cache_clear()
        seen: list[tuple[int, int | None, str]] = []

        def told(done: int, total: int | None = None, note: str = "") -> None:
            seen.append((done, total, note))

        listing = read_bucket(Bucket(url), depth=2, on_progress=told)
        assert [done for done, _, _ in seen] == list(range(1, 17))
        assert seen[0] == (1, 4, "0 photographs")
        assert seen[-1] == (16, 16, "40 photographs")
        write_shards(listing, tmp_path / "set", SMALL)
        assert listing.num_places == 6
        assert listing.notes == ("left out: .txt 1, above the places' folders 1",)
        table = tmp_path / "scenes.csv"
        table.write_text("\n".join(["path,place", *(f"{name},{name[:7]}" for name in names)]) + "\n")
        write_shards(read_manifest(table, root=folder), tmp_path / "loose", SMALL)
        tars = [{k: v for k, v in of_set(tmp_path / out).items() if k.endswith(".tar")} for out in ("set", "loose")]
        assert tars[0] == tars[1]
        assert len(tars[0]) > 1
        with pytest.raises(FileNotFoundError, match="no photographs 9 folders below it"):
            read_bucket(Bucket(url), depth=9)
    shared_reader.cache_clear()


def test_an_outage_costs_time_and_one_for_good_stops_without_calling_photographs_bad(
    source, landmarks, expected, tmp_path
):
    server = KillableServer(source)
    server.start()
    url = f"{server.url}/gldv2/loose"
    killed = False

    def kill(done: int, total: int | None = None, note: str = "") -> None:
        nonlocal killed
        if done > 20 and not killed:
            killed = True
            server.kill()
            threading.Timer(1.0, server.start).start()

    try:
        listing = read_manifest(landmarks.loose_table, root=Bucket(url, retry_s=60))
        write_shards(listing, tmp_path / "set", SMALL, on_progress=kill)
        assert killed
        assert of_set(tmp_path / "set") == expected

        def end(done: int, total: int | None = None, note: str = "") -> None:
            if done > 20:
                server.kill()

        listing = read_manifest(landmarks.loose_table, root=Bucket(url, retry_s=0.5))
        with pytest.raises(StorageError, match="cannot be read"):
            write_shards(listing, tmp_path / "cut", SMALL, on_progress=end)
        server.start()
        summary = write_shards(listing, tmp_path / "cut", SMALL)
        assert summary.shards_reused > 0
        assert summary.bad == []
        assert of_set(tmp_path / "cut") == expected
    finally:
        server.kill()


def test_what_is_not_there_is_missing(landmarks, server, bucket, tmp_path):
    table = tmp_path / "train.csv"
    table.write_text(landmarks.loose_table.read_text() + "nowhere.jpg,1\n")
    for url in (server.url, bucket):
        listing = read_manifest(table, root=Bucket(f"{url}/gldv2/loose"))
        with pytest.raises(ValueError, match=r"nowhere\.jpg: missing"):
            write_shards(listing, tmp_path / "set", SMALL)
