"""GLDv2's and OSV-5M's layouts of 5,000 photographs from three stores, and runs killed at ten moments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.photo_source import shared_reader
from tests.archive_runs import check_killed_at, shard
from tests.archives import Sets, gldv2, of_set, osv5m
from tests.http_ranges import KillableServer
from tests.s3_server import bucket_of

WAYS = ("ranges", "sequence")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archives")


@pytest.fixture(scope="module")
def layouts(folder: Path) -> dict[str, tuple[Sets, dict[str, bytes]]]:
    """Each layout and what sharding its loose files gives."""
    sets = {
        "gldv2": gldv2(folder / "gldv2", images=5000, tars=20, landmarks=600),
        "zips": osv5m(folder / "zips", images=5000, archives=20),
        "webdataset": osv5m(folder / "webdataset", images=5000, archives=20, webdataset=True),
    }
    return {name: (one, one.expected(folder / f"{name}-expected")) for name, one in sets.items()}


@pytest.fixture(scope="module")
def stores(folder: Path, layouts: dict[str, tuple[Sets, dict[str, bytes]]]) -> Iterator[dict[str, str]]:
    server = KillableServer(folder)
    server.start()
    copied = folder / "bucket"
    copied.mkdir()
    for name in layouts:
        (copied / name).mkdir()
        (folder / name / "archives").rename(copied / name / "archives")
        (folder / name / "archives").symlink_to(copied / name / "archives")
    with bucket_of(copied) as bucket:
        shared_reader.cache_clear()
        yield {"local": str(folder), "http": server.url, "s3": bucket}
    server.kill()


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("layout", ["gldv2", "zips", "webdataset"])
@pytest.mark.parametrize("store", ["local", "http", "s3"])
def test_the_shards_are_those_of_loose_files(layouts, stores, tmp_path, store, layout, by):
    sets, expected = layouts[layout]
    names = [path.name for path in sorted(sets.archives.iterdir())]
    assert len(names) == 20
    words = [f"{stores[store]}/{layout}/archives/{name}" for name in names]
    shard(sets, words, tmp_path / "set", by, 2**20)
    assert of_set(tmp_path / "set") == expected


@pytest.mark.parametrize("by", WAYS)
def test_killed_at_ten_random_moments_and_finished_the_bytes_are_the_same(layouts, tmp_path, by):
    sets, expected = layouts["gldv2"]
    check_killed_at(sets, [str(sets.archives)], tmp_path, expected, 10, by)


def test_killed_while_it_reads_from_a_server(layouts, stores, tmp_path):
    sets, expected = layouts["gldv2"]
    check_killed_at(
        sets, [f"{stores['http']}/gldv2/archives/images_{{000..019}}.tar"], tmp_path, expected, 4, "sequence"
    )
