"""An index: the engine of `eval` for use. What it finds, how it grows, what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval.benchmarks.load import load_benchmarks
from eval.evaluate import FirstStage, evaluate
from eval.index.build import add_to_index, build_index
from eval.index.index import Index
from eval.index.manifest import IndexFault
from eval.index.photo_list import list_source
from eval.index.verify import verify_index
from eval.report.locations import as_json
from tests.indexes import noise_index, tiny

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def photos(noise_benchmark: Path) -> Path:
    return noise_benchmark / "images" / "test"


@pytest.fixture(scope="module")
def built(photos: Path, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """An index of the database; nobody changes it."""
    return noise_index(tmp_path_factory.mktemp("index"), photos)


def queries_of(photos: Path) -> list[Path]:
    return sorted((photos / "queries").iterdir())


def test_the_candidates_are_those_of_an_evaluation_to_the_bit(photos: Path, built: Path) -> None:
    found: list[FirstStage] = []
    (benchmark,) = load_benchmarks([f"folder:{photos.parent.parent}"], Path())
    describer = tiny()
    config = describer.config.model_copy(update={"recall_at": [1, 5], "bootstrap": 0})
    result = evaluate(describer.model, benchmark, config, on_features=found.append)
    assert result.reranked_QK is not None
    locations = Index.open(built).locate(benchmark.queries, top_k=5)
    numbers = np.array([[one.number for one in location.candidates] for location in locations])
    np.testing.assert_array_equal(numbers, result.reranked_QK[:, :5])
    similarities = np.array([[one.similarity for one in location.candidates] for location in locations])
    of = {
        (q, int(i)): s
        for q in range(5)
        for i, s in zip(found[0].predictions_QK[q], found[0].similarities_QK[q], strict=True)
    }
    assert similarities.tolist() == [[of[q, int(i)] for i in row] for q, row in enumerate(numbers)]
    descriptors = np.stack([location.descriptor for location in locations if location.descriptor is not None])
    np.testing.assert_array_equal(descriptors, found[0].queries.descriptors())


def test_a_location_says_where_and_how_far_apart(photos: Path, built: Path) -> None:
    index = Index.open(built)
    (location,) = index.locate(queries_of(photos)[0], top_k=7)
    first = location.candidates[0]
    assert len(location.candidates) == len(index) == 7
    assert first.name == f"@{500000 + 100 * first.number}@4000000@33@T@@@{first.number}@@@@@@@@.jpg"
    assert first.apart_m == 0
    for one in location.candidates:
        assert one.apart_m == pytest.approx(100 * abs(one.number - first.number), abs=1e-6)
        assert (one.east, one.north, one.zone) == (500000 + 100 * one.number, 4000000, 33)
        assert (one.lat, one.lon) == pytest.approx((36.144, 15.003), abs=0.004)
        assert index.path_of(one.number) == photos / "database" / one.name
    assert location.position is not None
    assert (location.position.spread_m, location.position.candidates) == (0, 1)  # they stand 100 m apart
    assert 0 < location.position.support <= 1


def test_a_photograph_of_the_database_finds_itself_and_others_say_why_not(photos: Path, built: Path) -> None:
    text = built.parent / "text.jpg"
    text.write_text("no photograph")
    database = sorted((photos / "database").iterdir())
    index = Index.open(built)
    own, bad, absent = index.locate([database[3], text, built / "absent.jpg"])
    assert own.candidates[0].name == database[3].name
    assert own.candidates[0].similarity == pytest.approx(1, abs=1e-6)
    assert (bad.candidates, absent.candidates) == ((), ())
    assert str(text) in bad.error
    assert "absent.jpg" in absent.error
    assert index.locate([]) == []


def test_an_index_grows_by_what_it_does_not_have_and_readers_see_it_after_a_refresh(
    photos: Path, tmp_path: Path
) -> None:
    listed = list_source(str(photos / "database"))
    out = tmp_path / "growing"
    build_index(tiny(), listed.part([0, 1, 2, 3]), out)
    before = Index.open(out)
    assert len(before) == 4
    added = add_to_index(tiny().model, listed, out)
    assert (added.images, added.added, added.known) == (7, 3, 4)
    query = queries_of(photos)[0]
    assert len(before.locate(query, top_k=9)[0].candidates) == 4  # what it was when it was opened
    after = before.refresh()
    assert len(after) == 7
    assert [one.name for one in after.locate(query, top_k=7)[0].candidates] != []
    assert after.refresh() is after
    again = add_to_index(tiny().model, listed, out)
    assert (again.added, again.known, again.was_complete) == (0, 7, True)


def test_parts_find_what_one_build_finds(photos: Path, built: Path, tmp_path: Path) -> None:
    listed = list_source(str(photos / "database"))
    build_index(tiny(), listed.part([0, 1, 2, 3]), tmp_path / "parts")
    add_to_index(tiny().model, listed, tmp_path / "parts")
    ours = Index.open(tmp_path / "parts").locate(queries_of(photos))
    assert [as_json(one) for one in ours] == [as_json(one) for one in Index.open(built).locate(queries_of(photos))]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, r"index\.json: an index of format 2, this rerankvpr reads 1; use a newer one"),
        ({"images": "many"}, r"index\.json: not the description of an index \(images: input should be a valid integer"),
        ({"images": 8}, r"index\.json: 8 photographs, but 7 in its parts"),
        ({"parts": ["../../x"]}, r"index\.json: not the description of an index \(parts\.0: "),
        ({"network": {"backbone": "vitx"}}, r"index\.json: not the description of an index \(backbone: "),
        (
            {"settings": {"rerank": {"layer": 9}}},
            r"index\.json: not the settings of an index of this network \(layer 9",
        ),
        ({"settings": {"image_size": 10**12}}, r"index\.json: not the description .* a side has at most"),
        ({"verdict": {"threshold": "x", "sample": 1, "apart": ""}}, r"index\.json: not the description of an index"),
        ({"approximate": {"factory": "Flat"}}, r"index\.json: not the description .*approximate of \['factory'\]"),
        ({"weights": "0" * 64}, r"network\.safetensors is damaged, or not the network"),
    ],
)
def test_what_an_index_is_not_is_one_line(built: Path, tmp_path: Path, change: dict[str, object], words: str) -> None:
    for file in ("network.safetensors", "parts"):
        (tmp_path / file).symlink_to(built / file)
    content = json.loads((built / "index.json").read_text())
    del content["sha256"]
    (tmp_path / "index.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=words) as caught:
        Index.open(tmp_path).network  # noqa: B018
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "value", "other"),
    [
        ("index.json", '"image_size": 56', '"image_size": 70'),
        ("index.json", '"sha256": "', '"sha256": "0'),
        ("parts/000000/part.json", '"root": "/', '"root": "/elsewhere/'),
    ],
)
def test_a_changed_value_of_a_description_is_seen(
    built: Path, tmp_path: Path, file: str, value: str, other: str
) -> None:
    out = tmp_path / "index"
    shutil.copytree(built, out)
    text = (out / file).read_text()
    assert text.count(value) == 1
    (out / file).write_text(text.replace(value, other))
    with pytest.raises(IndexFault, match=rf"{file}: not the description of .* \(its sha256 is that of other values"):
        Index.open(out)
    if file != "index.json":
        assert len(verify_index(out)) == 1
    content = json.loads(text)
    del content["sha256"]
    (out / file).write_text(json.dumps(content))
    assert verify_index(out) == [], "an index from before there was a digest"


def test_local_features_of_other_settings_are_refused(photos: Path, built: Path, tmp_path: Path) -> None:
    for file in ("network.safetensors", "parts"):
        (tmp_path / file).symlink_to(built / file)
    content = json.loads((built / "index.json").read_text())
    content["settings"]["rerank"]["hierarchy"] = 1
    del content["sha256"]
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(IndexFault, match=r"local features have \d+ numbers, by its index\.json they have \d+$"):
        Index.open(tmp_path).locate([next((photos / "database").iterdir())])


def test_other_weights_settings_and_photographs_are_refused(photos: Path, built: Path, tmp_path: Path) -> None:
    listed = list_source(str(photos / "database"))
    other = tiny(seed=1)
    for attempt, words in (
        (lambda: Index.open(built, network=other), "was made with other weights"),
        (lambda: add_to_index(other.model, listed, built), "was made with other weights"),
        (lambda: build_index(other, listed, built), "was made with other weights"),
        (lambda: build_index(tiny(image_size=70), listed, built), "was made with image_size 56, asked for 70"),
        (lambda: build_index(tiny(rerank={"top_k": 3}), listed, built), "was made with rerank.top_k 4, asked for 3"),
        (lambda: build_index(tiny(), listed.part([1]), built), "an index of other photographs"),
        (lambda: Index.open(tmp_path), "no index in it"),
        (lambda: Index.open(tmp_path / "nowhere"), "no such folder"),
    ):
        with pytest.raises(IndexFault, match=words) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert build_index(tiny(), listed, built).was_complete


def test_an_approximate_index_is_trained_once_and_what_it_finds_is_scored_exactly(photos: Path, tmp_path: Path) -> None:
    listed, out = list_source(str(photos / "database")), tmp_path / "approximate"
    build_index(tiny(), listed.part([0, 1, 2, 3]), out, factory="IVF2,Flat", params="nprobe=2")
    (file,) = out.glob("trained-*.faiss")
    trained = file.read_bytes()
    add_to_index(tiny().model, listed, out)
    assert file.read_bytes() == trained
    index, queries = Index.open(out), queries_of(photos)
    exact = Index.open(out)
    exact.manifest = replace(exact.manifest, approximate=None)
    assert [as_json(one) for one in index.locate(queries)] == [as_json(one) for one in exact.locate(queries)]
    assert verify_index(out) == []
    file.write_bytes(trained[:-1] + b"x")
    for attempt in (
        lambda: add_to_index(tiny().model, list_source(str(photos / "queries")), out),
        lambda: build_index(tiny(), listed.part([0, 1, 2, 3]), out, factory="IVF2,Flat", params="nprobe=1"),
    ):
        with pytest.raises(IndexFault, match=f"{file} is damaged or gone; build the index again"):
            attempt()
    file.write_bytes(trained)
    assert len(Index.open(out)) == 7
    (block,) = out.glob("parts/000001/approximate-*.faiss")
    for content in (block.read_bytes()[:-1] + b"x", b""):
        block.write_bytes(content)
        assert verify_index(out) == [f"{block} is damaged or gone; build the index again"]
        with pytest.raises(IndexFault, match=f"{block} is damaged or gone"):
            Index.open(out).locate(queries)
    with pytest.raises(IndexFault, match="was made with --factory IVF2,Flat, asked for none"):
        build_index(tiny(), listed.part([0, 1, 2, 3]), out)
