"""`rerankvpr locate` as a user runs it: every file that it writes is read again; bad input is one line."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest
from PIL import Image

from eval.index.build import build_index
from eval.index.index import BATCHES, Index
from eval.index.photo_list import list_source
from launch.cli import main
from tests.indexes import SETTINGS, tiny
from tests.phones import at, photograph
from tests.photos import write_noise_benchmark

NUM_QUERIES = 240  # many more than are held at a time

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """An index of noise, five queries and, among them, a grey one and one that is no photograph."""
    folder = tmp_path_factory.mktemp("place")
    write_noise_benchmark(folder)
    (folder / "images" / "test" / "queries").rename(folder / "queries")
    Image.new("RGB", (60, 50), (128, 128, 128)).save(folder / "queries" / "grey.png")
    (folder / "queries" / "text.jpg").write_text("no photograph")
    build_index(tiny(), list_source(str(folder / "images" / "test" / "database")), folder / "index")
    return folder


@pytest.mark.parametrize("sequence", [False, True])
def test_every_file_can_be_read_again(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sequence: bool
) -> None:
    kinds = ("json", "csv", "geojson", "pairs", "h5", "html")
    files = {kind: tmp_path / f"found.{kind}" for kind in kinds}
    flags = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    flags += ["--sequence"] if sequence else []
    assert main(["locate", str(place / "queries"), "--index", str(place / "index"), "--top", "3", *flags]) == 1
    printed = capsys.readouterr()
    assert "text.jpg" in printed.err
    count = len(list((place / "queries").iterdir()))
    tally = f"{count} photographs: {count - 1} without a verdict, 1 not readable"
    assert f"\n{tally}\n" in printed.out
    found = json.loads(files["json"].read_text())
    names = sorted(path.name for path in (place / "queries").iterdir())
    assert [one["query"] for one in found] == names
    assert [len(one["candidates"]) for one in found] == [0 if name == "text.jpg" else 3 for name in names]
    pairs = [(one["query"], candidate["name"]) for one in found for candidate in one["candidates"]]
    assert [tuple(line.split(" ")) for line in files["pairs"].read_text().splitlines()] == pairs
    rows = list(csv.DictReader(io.StringIO(files["csv"].read_text())))
    assert [(row["query"], row["candidate"]) for row in rows if row["candidate"]] == pairs
    assert [row["query"] for row in rows if row["error"]] == ["text.jpg"]
    features = json.loads(files["geojson"].read_text())["features"]
    for feature, one in zip(features, found, strict=True):
        if one["position"] is None:
            assert feature["geometry"] is None
        else:
            assert feature["geometry"]["coordinates"] == [one["position"]["lon"], one["position"]["lat"]]
    with h5py.File(files["h5"], "r") as stored:
        assert sorted(stored) == [name for name in names if name != "text.jpg"]
        for name in stored:
            assert np.linalg.norm(stored[name]["global_descriptor"][:]) == pytest.approx(1, abs=1e-5)
    page = files["html"].read_text()
    assert page.rstrip().endswith("</html>")
    assert all(name in page for name in names)
    assert f"<p>{tally}</p>" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert not list(tmp_path.glob(".*"))


def test_names_that_two_folders_share_are_told_apart(place: Path, tmp_path: Path) -> None:
    (name, *_) = (path.name for path in (place / "queries").glob("@*"))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        shutil.copy(place / "queries" / name, folder / name)
    h5, pairs = tmp_path / "found.h5", tmp_path / "pairs.txt"
    argv = ["locate", *map(str, folders), str(folders[0] / name), "--index", str(place / "index"), "--top", "1"]
    assert main([*argv, "--h5", str(h5), "--pairs", str(pairs)]) == 0
    whole = [str(folder / name) for folder in folders]
    assert [line.split(" ")[0] for line in pairs.read_text().splitlines()] == [*whole, whole[0]]
    with h5py.File(h5, "r") as stored:
        assert all(stored[one]["global_descriptor"].ndim == 1 for one in whole)


def test_a_photograph_that_matches_nothing_still_has_an_answer(place: Path) -> None:
    (location,) = Index.open(place / "index").locate(place / "queries" / "grey.png", top_k=7)
    assert (len(location.candidates), location.error) == (7, "")
    assert np.isfinite([one.similarity for one in location.candidates]).all()
    matches = [one.matches for one in location.candidates]
    assert all(number is not None and number >= 0 for number in matches[:4])  # so many are re-ranked
    assert matches[4:] == [None] * 3


def test_empty_folders_are_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    (query, *_) = (place / "queries").glob("@*")
    for argv, words in (
        (["locate", str(query), "--index", str(tmp_path / "empty")], "no index in it"),
        (["locate", str(tmp_path / "notes"), "--index", str(place / "index")], "no photograph in it left out: .txt 1"),
        (["index", "info", str(tmp_path / "empty")], "no index in it"),
        (["index", "verify", str(tmp_path / "gone")], "no such folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
        said = capsys.readouterr().err.strip()
        assert words in said
        assert "\n" not in said
    with pytest.raises(FileNotFoundError, match=r"no photograph in it left out: \.txt 1"):
        list_source(str(tmp_path / "notes"))


def test_positions_of_exif_are_those_of_the_index(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        photograph(photos / f"{i}.jpg", at(48.5 + 0.001 * i, -9.25), shade=i + 1, taken="2024:05:01 10:30:59")
    photograph(photos / "nowhere.jpg", shade=9)
    build_index(tiny(), list_source(str(photos)), tmp_path / "index")
    images = Index.open(tmp_path / "index").images
    assert images.names == ["0.jpg", "1.jpg", "2.jpg", "nowhere.jpg"]
    np.testing.assert_allclose(images.positions.lat, [48.5, 48.501, 48.502, np.nan], atol=1e-9)
    np.testing.assert_allclose(images.positions.lon, [-9.25] * 3 + [np.nan], atol=1e-9)
    assert images.times[:3].astype(str).tolist() == ["2024-05-01T10:30:59"] * 3
    assert np.isnat(images.times[3])
    locations = Index.open(tmp_path / "index").locate([photos / "1.jpg", photos / "nowhere.jpg"], top_k=4)
    assert all(len(one.candidates) == 4 and one.position is not None for one in locations)


def test_queries_are_held_a_few_at_a_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, taken, sizes = Index.open(place / "index"), 0, []
    encode = index.encode
    held = BATCHES * int(SETTINGS["batch_size"])  # type: ignore[call-overload]

    def encode_few(images: list[np.ndarray], names: list[str]) -> object:
        sizes.append(len(images))
        return encode(images[:1], names[:1])[0], [], dict.fromkeys(range(len(images)), "left alone")

    def photographs() -> Iterator[np.ndarray]:
        nonlocal taken
        for i in range(NUM_QUERIES):
            taken += 1
            yield np.full((16, 16, 3), i % 256, dtype=np.uint8)

    monkeypatch.setattr(index, "encode", encode_few)
    for told, location in enumerate(index.locate_each(photographs()), 1):
        assert taken - told < held
        assert location.query == f"image {told - 1}"
    assert (taken, max(sizes), len(sizes)) == (NUM_QUERIES, held, NUM_QUERIES // held)
