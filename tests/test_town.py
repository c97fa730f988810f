"""The procedural town: native layouts, held-out places, and the same bytes for the same seed."""

import csv
import hashlib
import io
import json
import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.town.conditions import MONTHS, draw_conditions
from data_pipeline.town.places import build_place
from data_pipeline.town.render import CITIES, COLUMNS, POSITIVE_RADIUS, Town, image_name, render_town, town_is_current
from data_pipeline.town.views import HEIGHT, WIDTH, render_view

SMALL = Town(seed=3, places=4, views=2, held_out_places=3, database_views=1, query_views=2)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def rows_of(folder: Path, city: str) -> list[dict[str, str]]:
    with (folder / "train" / "Dataframes" / f"{city}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def utm(path: Path) -> tuple[float, float]:
    east, north = path.name.split("@")[1:3]
    return float(east), float(north)


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("town") / "town"
    seen: list[tuple[int, int]] = []
    render_town(folder, SMALL, processes=1, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (SMALL.images, SMALL.images)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    return folder


def test_names_are_those_of_the_csv(town: Path) -> None:
    places = 0
    for city in CITIES:
        rows = rows_of(town, city)
        assert tuple(rows[0]) == COLUMNS
        names = {path.name for path in (town / "train" / "Images" / city).iterdir()}
        assert names == {image_name(row) for row in rows}
        for name in names:
            parts = name.removesuffix(".jpg").split("_", 7)
            row = next(row for row in rows if row["panoid"] == parts[7])
            assert [parts[0], parts[5], parts[6]] == [row["city_id"], row["lat"], row["lon"]]
            assert [int(v) for v in parts[1:5]] == [int(row[k]) for k in ("place_id", "year", "month", "northdeg")]
            assert [len(v) for v in parts[1:5]] == [7, 4, 2, 3]
        ids = [int(row["place_id"]) for row in rows]
        assert sorted(set(ids)) == list(range(1, len(set(ids)) + 1)), "ids start again in every city"
        assert all(ids.count(i) == SMALL.views for i in ids)
        places += len(set(ids))
    assert places == SMALL.places


def test_coordinates_survive_a_float(town: Path) -> None:
    for row in rows_of(town, CITIES[0]):
        assert (str(float(row["lat"])), str(float(row["lon"]))) == (row["lat"], row["lon"])


def test_held_out_places_are_apart_and_have_positives(town: Path) -> None:
    test = town / "images" / "test"
    database, queries = (sorted((test / kind).glob("@*@.jpg")) for kind in ("database", "queries"))
    assert (len(database), len(queries)) == (3, 6)
    assert all(len(path.name.split("@")) == 16 for path in database + queries)
    apart = np.linalg.norm(np.array([*map(utm, queries)])[:, None] - np.array([*map(utm, database)])[None], axis=-1)
    assert ((apart < POSITIVE_RADIUS).sum(1) == SMALL.database_views).all()
    assert not ((apart >= POSITIVE_RADIUS) & (apart < 2 * POSITIVE_RADIUS)).any()
    trained = {(row["lat"], row["lon"]) for city in CITIES for row in rows_of(town, city)}
    held_out = np.array([path.name.split("@")[5:7] for path in database + queries], float)
    metres = (np.array([*trained], float)[:, None] - held_out[None]) * (111_150, 74_595)
    assert np.linalg.norm(metres, axis=-1).min() > 2 * POSITIVE_RADIUS


def test_images_are_whole_and_views_differ(town: Path) -> None:
    for path in town.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (WIDTH, HEIGHT))
            image.load()
    assert len(set(digests(town).values())) == len(digests(town))


def test_same_bytes_from_any_number_of_processes(town: Path, tmp_path: Path) -> None:
    render_town(tmp_path / "again", SMALL, processes=2)
    assert digests(tmp_path / "again") == digests(town)
    assert [p.name for p in tmp_path.iterdir()] == ["again"], "nothing temporary is left"


def test_current_means_precisely_this_town(town: Path, tmp_path: Path) -> None:
    assert town_is_current(town, SMALL)
    assert not town_is_current(town, replace(SMALL, seed=4))
    assert not town_is_current(tmp_path, SMALL)
    photo = next(town.rglob("*.jpg"))
    whole = photo.read_bytes()
    photo.write_bytes(whole[:-1])
    assert not town_is_current(town, SMALL)
    photo.unlink()
    assert not town_is_current(town, SMALL)
    photo.write_bytes(whole)
    assert town_is_current(town, SMALL)
    manifest = town / "town.json"
    text = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(text), "format": -1}))
    assert not town_is_current(town, SMALL)
    manifest.write_text(text)


def test_an_older_town_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    tiny = Town(places=3, views=1, held_out_places=0)
    folder = tmp_path / "town"
    (folder / "stale").mkdir(parents=True)
    (folder / "stale" / "town.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else than a town"):
        render_town(folder, tiny, processes=1)
    assert (folder / "stale" / "town.txt").read_text() == "mine"
    (folder / "town.json").write_text("{}")
    dead = subprocess.Popen(["true"])
    dead.wait()
    abandoned = tmp_path / f".town.{platform.node()}-{dead.pid}-0.partial"
    abandoned.mkdir()
    render_town(folder, tiny, processes=1)
    assert not abandoned.exists()
    assert not (folder / "stale").exists()
    assert town_is_current(folder, tiny)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"places": 2}, "places 2: expected an integer of at least 3"),
        ({"views": 0}, "views 0"),
        ({"held_out_places": -1}, "held_out_places -1"),
        ({"query_views": 0}, "query_views 0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1.5}, "seed 1.5"),
    ],
)
def test_impossible_towns_are_refused(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Town(**arguments)


def test_processes_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processes 0: expected at least 1"):
        render_town(tmp_path / "town", SMALL, processes=0)


@pytest.mark.parametrize("seed", range(4))
def test_a_place_in_all_conditions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    place = build_place(rng)
    for kind in ("any", "fair"):
        now = draw_conditions(rng, kind)
        assert now.month in MONTHS[now.season]
        assert (now.light in ("cloudy", "sunny") and now.weather == "dry") or kind != "fair"
        assert now.season in ("spring", "summer") or kind != "fair"
        with Image.open(io.BytesIO(render_view(place, now, rng))) as image:
            assert np.asarray(image).std() > 10, "a street, not a blank"


def test_every_place_can_be_drawn() -> None:
    for seed in range(25):
        place = build_place(np.random.default_rng(seed))
        assert len(place.windows) > 10
