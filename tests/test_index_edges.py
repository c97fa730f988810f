"""An index at its edges: empty, built by parts of an array, searched with other parameters, locked by another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.folder_lock import FolderLock, LockedError, held_by_rank_0
from eval.index.build import add_to_index, build_index
from eval.index.index import Index
from eval.index.manifest import IndexFault
from eval.index.photo_list import list_source
from eval.index.verify import verify_index
from launch.locate_command import lines_of
from tests.index_crashes import bytes_of
from tests.indexes import tiny
from tests.photos import write_noise_benchmark

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of noise: `database` and `queries`."""
    folder = tmp_path_factory.mktemp("noise")
    write_noise_benchmark(folder)
    return folder / "images" / "test"


def test_an_index_of_no_readable_photograph_answers_that_it_is_empty(photos: Path, tmp_path: Path) -> None:
    """It grows as any other; until then a photograph has no candidates, no position and no verdict."""
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.jpg").write_text("no photograph")
    built = build_index(tiny(max_bad=1.0), list_source(str(tmp_path / "damaged")), tmp_path / "index")
    assert (built.images, [name for name, _ in built.left_out]) == (0, ["a.jpg"])
    query = sorted((photos / "queries").iterdir())[0]
    for sequence in (False, True):
        (location,) = Index.open(tmp_path / "index").locate(query, sequence=sequence)
        assert (location.candidates, location.position, location.in_map, location.error) == ((), None, None, "")
        assert list(lines_of(location)) == [f"{query}: no verdict", "  the index is empty"]
    assert verify_index(tmp_path / "index") == []
    add_to_index(tiny().model, list_source(str(photos / "database")), tmp_path / "index")
    assert len(Index.open(tmp_path / "index").locate(query, top_k=9)[0].candidates) == 7


def test_parts_and_what_makes_the_index_of_them_give_the_bytes_of_one_build(photos: Path, tmp_path: Path) -> None:
    """Of building and of adding; nothing is an index before the last run."""
    database, more = list_source(str(photos / "database")), list_source(str(photos / "queries"))
    one, parts = tmp_path / "one", tmp_path / "parts"
    build_index(tiny(), database, one)
    add_to_index(tiny().model, more, one)
    done = [build_index(tiny(), database, parts, share=(number, 3)) for number in (2, 0, 1)]
    assert sorted(built.added for built in done) == [2, 2, 3]
    with pytest.raises(IndexFault, match="not finished"):
        Index.open(parts)
    build_index(tiny(), database, parts)
    assert [add_to_index(tiny().model, more, parts, share=(number, 2)).added for number in (0, 1)] == [3, 2]
    assert len(Index.open(parts)) == 7
    with pytest.raises(IndexFault, match=r"left by an addition of other photographs.*run once without --part"):
        add_to_index(tiny().model, more.part([0]), parts, share=(0, 2))
    add_to_index(tiny().model, more, parts)
    assert bytes_of(parts) == bytes_of(one)


def test_parts_are_written_beside_each_other_and_the_whole_alone(tmp_path: Path) -> None:
    with held_by_rank_0(tmp_path, "first", (0, 2)), held_by_rank_0(tmp_path, "second", (1, 2)):
        for part in (None, (1, 2)):
            with pytest.raises(LockedError, match="is writing there"), held_by_rank_0(tmp_path, "third", part):
                pass
    with (
        FolderLock(tmp_path, "whole"),
        pytest.raises(LockedError, match=r"another process \(whole"),
        held_by_rank_0(tmp_path, "a part", (0, 2)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_is_there_is_searched_with_other_parameters(photos: Path, tmp_path: Path) -> None:
    listed, out = list_source(str(photos / "database")), tmp_path / "index"
    build_index(tiny(), listed, out, factory="IVF4,Flat", params="nprobe=1")
    assert build_index(tiny(), listed, out, factory="IVF4,Flat", params="nprobe=4").was_complete
    assert json.loads((out / "index.json").read_text())["approximate"]["params"] == "nprobe=4"
    query = sorted((photos / "queries").iterdir())[0]
    assert len(Index.open(out).locate(query, top_k=7)[0].candidates) == 7  # of all lists
    with pytest.raises(ValueError, match="nporbe"):
        build_index(tiny(), listed, out, factory="IVF4,Flat", params="nporbe=4")
