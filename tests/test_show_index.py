"""What `rerankvpr show` draws of an index, a benchmark and a run: the photographs, and the network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eval.index.index import Index
from launch.show_command import main
from launch.show_flags import Kind, ShowCommand
from launch.show_images import Chosen, choose
from tests.checkpoints import gem_recipe, write_run
from tests.indexes import noise_index

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def photos(noise_benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `database` and `queries`, for this module to take from."""
    return Path(shutil.copytree(noise_benchmark, tmp_path_factory.mktemp("show") / "noise")) / "images" / "test"


@pytest.fixture(scope="module")
def index(photos: Path, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    return noise_index(tmp_path_factory.mktemp("index"), photos)


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = gem_recipe(84, eval={"benchmarks": [f"folder:{photos.parent.parent}"]})
    return write_run(tmp_path_factory.mktemp("run"), recipe)


def chosen(kind: Kind, *what: Path, index: Path | None = None, model: str = "", most: int = 8) -> Chosen:
    return choose(ShowCommand(kind, tuple(map(str, what)), model=model, index=index, most=most))


def test_a_photograph_is_shown_beside_what_the_index_finds(photos: Path, index: Path) -> None:
    query = photos / "queries" / "@500000@4000000@33@T@@@0@@@@@@@@.jpg"
    opened = Index.open(index)
    (location,) = opened.locate(query, top_k=3)
    files = [photos / "database" / one.name for one in location.candidates]
    matches = chosen("matches", query, index=index, most=3)
    assert matches.pairs == [(query, file) for file in files]
    assert str(matches) == f"3 pairs, 56 px square, bilinear; with what {index} finds, the best first"
    match = matches.describer.match(*matches.pairs[0])
    assert match.score == location.candidates[0].matches
    assert chosen("pca", query, index=index, most=4).images == [query, *files]


def test_several_photographs_have_their_first_candidates_and_none_are_the_index_s(photos: Path, index: Path) -> None:
    queries = sorted((photos / "queries").iterdir())
    firsts = [photos / "database" / one.best.name for one in Index.open(index).locate(queries, top_k=1) if one.best]
    assert chosen("matches", photos / "queries", index=index).pairs == list(zip(queries, firsts, strict=True))
    shown = chosen("similarity", *queries[:2], index=index).images
    assert shown == list(dict.fromkeys([queries[0], firsts[0], queries[1], firsts[1]]))
    database = sorted((photos / "database").iterdir())
    own = chosen("attention", index=index, most=3)
    assert own.images == [database[0], database[2], database[4]]
    assert "of the 7 photographs of" in str(own)


def test_a_benchmark_and_a_run_show_queries_with_their_positives(photos: Path, run: Path) -> None:
    for what, model in ((Path(f"folder:{photos.parent.parent}"), str(run)), (run, "")):
        pairs = chosen("matches", what, model=model, most=2).pairs
        assert [query.name for query, _ in pairs] == [positive.name for _, positive in pairs]  # named by where they are
        assert [query.parent.name for query, _ in pairs] == ["queries", "queries"]
        shown = chosen("pca", what, model=model, most=2)
        assert shown.images == [*pairs[0]]
        assert shown.note == "queries of noise, each with one of its positives"


@pytest.mark.parametrize("kind", ["attention", "pca", "matches", "similarity"])
def test_the_command_draws_of_an_index(kind: str, photos: Path, index: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen.svg"
    query = photos / "queries" / "@500100@4000000@33@T@@@1@@@@@@@@.jpg"
    assert main([kind, str(query), "--index", str(index), "--most", "2", "--out", str(out)]) == 0
    assert "<svg" in out.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["matches", "--index", "{index}"], "needs a photograph, which is matched with what is found"),
        (["pca", "{index}", "--model", "{run}"], "is an index: name it with --index"),
        (["pca", "--model", "{run}"], "show pca needs photographs, a folder of them, a benchmark, a run or --index"),
        (["pca", "{text}", "--index", "{index}"], "text.jpg: not a readable image"),
        (["pca", "--index", "{photos}"], "no index in it"),
        (["drift", "{run}", "--index", "{index}"], "--index does not go with show drift"),
        (["pca", "--index", "{index}", "--image-size", "84"], "--image-size does not go with --index"),
        (["pca", "folder:{photos}/none", "--model", "{run}"], "no images: there is no"),
        (["pca", "s3://b/x.jpg", "--model", "{run}"], "s3://b/x.jpg is an address; expected a path of this machine"),
        (["matches", "folder:{nolabels}", "--model", "{run}"], "has no ground truth to pair photographs by"),
    ],
)
def test_mistakes(words: list[str], message: str, photos: Path, index: Path, run: Path, tmp_path: Path) -> None:
    text, nolabels = tmp_path / "text.jpg", tmp_path / "nolabels"
    text.write_text("no photograph")
    for part in ("database", "queries"):
        (nolabels / part).mkdir(parents=True)
        shutil.copy(next((photos / part).iterdir()), nolabels / part / f"{part}.jpg")
    out = tmp_path / "seen.png"
    named = {"text": text, "nolabels": nolabels, "photos": photos, "index": index, "run": run}
    with pytest.raises((ValueError, OSError), match=message):
        main([*(word.format(**named) for word in words), "--out", str(out)])
    assert not out.exists()


def test_photographs_that_are_gone_are_counted(photos: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(photos, tmp_path / "moved"))
    index = noise_index(tmp_path, moved)
    first, *others = sorted((moved / "database").iterdir())
    first.unlink()
    assert chosen("pca", index=index).note.endswith("; 1 have no file here")
    for other in others:
        other.unlink()
    with pytest.raises(ValueError, match="is no file here; an index is shown where the photographs are"):
        chosen("pca", index=index)
