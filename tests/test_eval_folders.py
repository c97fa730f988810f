"""Any folder as a benchmark: which of its folders are read, with which ground truth, by which path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.positions import from_lat_lon
from eval.benchmarks.benchmark import Benchmark
from eval.benchmarks.load import Labels, load_benchmarks
from eval.benchmarks.places import metres_to
from tests.benchmark_folders import load, photo, photos, positives, rows, vpr_rows, write_utm
from tests.phones import at, photograph


def load_found(spec: str, root: Path, labels: Labels = "found") -> Benchmark:
    (benchmark,) = load_benchmarks([spec], root, labels=labels)
    return benchmark


@pytest.mark.parametrize("base", ["", "images/test", "images/val", "val"])
@pytest.mark.parametrize("parts", [("database", "queries"), ("ref", "query"), ("gallery", "queries")])
def test_pairs_of_folders_are_found_and_told(tmp_path: Path, base: str, parts: tuple[str, str]) -> None:
    write_utm(tmp_path / "x" / base, [(0, 0), (10, 0), (900, 0)], [(5, 0), (880, 0)], parts)
    photo(tmp_path / "x" / base / parts[0] / "deeper/@905@0@10@S@.JPG")
    benchmark = load("folder:x", tmp_path)
    assert [len(ids) for ids in positives(benchmark)] == [2, 2]
    assert benchmark.layout == f"{base}/{{{','.join(parts)}}}, @UTM_east@UTM_north@ in names".removeprefix("/")
    assert benchmark.protocol == "25 m radius, all queries"


def test_the_fields_folder_wins_and_what_else_is_there_is_told(tmp_path: Path) -> None:
    write_utm(tmp_path / "x/images/val", [(0, 0)], [(0, 0)])
    write_utm(tmp_path / "x/images/test", [(0, 0), (1, 0)], [(0, 0)])
    benchmark = load("folder:x", tmp_path)
    assert len(benchmark.database) == 2
    assert "images/val/{database,queries} of the same folder are not read" in benchmark.notes[0]
    assert len(load("folder:x/images/val", tmp_path).database) == 1


def test_ground_truth_beside_two_folders_is_read(tmp_path: Path) -> None:
    photos(tmp_path / "x/ref", ["0.jpg", "1.jpg", "2.png"])
    photos(tmp_path / "x/query", ["0.jpg", "1.jpg"])
    np.save(tmp_path / "x/ground_truth_new.npy", vpr_rows([2], [0]), allow_pickle=True)
    benchmark = load("folder:x", tmp_path)
    assert positives(benchmark) == [[2], [0]]
    assert benchmark.layout == "{ref,query}, ground_truth_new.npy"
    none = load_found("folder:x", tmp_path, labels="unused")
    assert none.num_labelled == 0
    assert none.protocol == "no ground truth: predictions without recall"


def test_folders_without_ground_truth_are_predicted_and_refused_where_recall_is_needed(tmp_path: Path) -> None:
    photos(tmp_path / "x/database", ["a.jpg", "b.jpg"])
    photos(tmp_path / "x/queries", ["a.jpg"])
    (tmp_path / "x/queries/.hidden.jpg").touch()
    (tmp_path / "x/queries/notes.txt").touch()
    benchmark = load_found("folder:x", tmp_path)
    assert (benchmark.num_labelled, len(benchmark.queries), benchmark.num_without_positive) == (0, 1, 0)
    assert benchmark.notes[0] == "queries/: left out: .txt 1, hidden 1"
    assert (
        "no ground truth was found ({database,queries}, names without positions, no GPS in EXIF)" in benchmark.notes[1]
    )
    with pytest.raises(ValueError, match=r"benchmark x has no ground truth .*rerankvpr eval"):
        load("folder:x", tmp_path)


def test_gps_in_exif_is_ground_truth_where_names_hold_no_positions(tmp_path: Path) -> None:
    for part, places in (("database", (0, 1, 2)), ("queries", (1, 7))):
        (tmp_path / "x" / part).mkdir(parents=True)
        for number, place in enumerate(places):
            photograph(tmp_path / "x" / part / f"{number}.jpg", at(48.0 + place * 1e-3, 9.5))
    photograph(tmp_path / "x/queries/2.jpg")
    photograph(tmp_path / "x/database/3.jpg", at(0.0, 0.0))
    benchmark = load("folder:x", tmp_path)
    assert benchmark.layout == "{database,queries}, names without positions, GPS in EXIF"
    assert positives(benchmark) == [[1], [], []]
    assert benchmark.protocol == "25 m radius, 2 of 3 queries"
    assert "1 database images: GPS 0, 0: a receiver without a fix" in benchmark.notes
    assert positives(load("folder:x:120", tmp_path))[0] == [0, 1, 2]
    lines = [
        f"x/{part}/{n}.jpg,{role}" for part, role in (("database", "database"), ("queries", "query")) for n in (0, 1)
    ]
    (tmp_path / "m.csv").write_text("\n".join(["path,role", *lines]))
    table = load("manifest:m.csv", tmp_path)
    assert "GPS in EXIF" in table.layout
    assert positives(table) == [[1], []]
    assert load_found("folder:x", tmp_path, labels="unused").num_labelled == 0


def test_queries_without_a_position_are_predicted_and_not_counted(tmp_path: Path) -> None:
    write_utm(tmp_path / "x", [(0, 0), (500, 0)], [(0, 0), (500, 0), (9000, 0)])
    photo(tmp_path / "x/queries/unknown.jpg")
    photo(tmp_path / "x/database/unknown.jpg")
    benchmark = load("folder:x", tmp_path)
    assert benchmark.protocol == "25 m radius, 3 of 4 queries"
    assert (benchmark.num_labelled, benchmark.num_without_positive) == (3, 1)
    told = "\n".join(benchmark.notes)
    assert "1 of 3 database images have no position and are no query's place (unknown.jpg)" in told
    assert "3 of 4 queries have ground truth and count" in told
    assert "1 of 3 queries have no positive and count as misses" in told


def test_a_path_that_exists_wins_over_a_radius_and_the_working_folder_over_the_data_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("2024-05-01T10:30", "Zürich, Haus 5:12", "plain"):
        write_utm(tmp_path / "data" / name, [(0, 0), (20, 0)], [(0, 0)])
        assert positives(load(f"folder:{name}", tmp_path / "data")) == [[0, 1]]
        assert positives(load(f"folder:{tmp_path / 'data' / name}:7.5", tmp_path)) == [[0]]
    write_utm(tmp_path / "data/plain:5", [(0, 0)], [(0, 0)])
    assert load("folder:plain:5", tmp_path / "data").name == "plain:5"
    assert load("folder:plain:6", tmp_path / "data").name == "plain"
    monkeypatch.chdir(tmp_path)
    write_utm(tmp_path / "plain", [(0, 0), (1, 0), (2, 0)], [(0, 0)])
    benchmark = load("folder:plain", Path("data"))
    assert len(benchmark.database) == 3
    assert benchmark.notes[0] == "plain of the working folder is read, not data/plain"


def test_any_two_folders_and_names_that_are_told_apart(tmp_path: Path) -> None:
    write_utm(tmp_path / "a", [(0, 0), (20, 0)], [(0, 0)])
    write_utm(tmp_path / "b/a", [(0, 0)], [(0, 0)])
    pair = (tmp_path / "a/database", tmp_path / "a/queries")
    both = load_benchmarks(["folder:a", "folder:b/a"], tmp_path, pair=pair, radius_m=5)
    assert [benchmark.name for benchmark in both] == ["a", "a (2)", "queries in database"]
    assert [positives(benchmark) for benchmark in both] == [[[0]], [[0]], [[0]]]
    with pytest.raises(FileNotFoundError, match=r"no images: there is no folder .*nowhere"):
        load_benchmarks([], tmp_path, pair=(tmp_path / "nowhere", pair[1]))


def test_any_utm_folder_with_its_radius_and_its_list_of_paths(tmp_path: Path) -> None:
    write_utm(tmp_path / "mine/images/test", [(0, 0), (8, 0)], [(0, 0)])
    assert positives(load("folder:mine", tmp_path)) == [[0, 1]]
    assert positives(load("folder:mine:5", tmp_path)) == [[0]]
    only = next((tmp_path / "mine/images/test/database").glob("@8*"))
    (tmp_path / "mine/images/test/database_images_paths.txt").write_text(f"{only.name}\n")
    assert load("folder:mine", tmp_path).database == [only]
    with pytest.raises(FileNotFoundError, match="no images"):
        load("folder:nowhere", tmp_path)
    with pytest.raises(ValueError, match="radius"):
        load("folder:mine:-5", tmp_path)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            "folder:odd",
            r"has none of .*; it has photos/, 1 files\. Folders of other names: --database DIR",
        ),
        ("layout:gsv_list:odd", "unknown layout 'gsv_list'; nearest: gsv_lists"),
        ("layout:gsv_lists", "expected layout:LAYOUT:PATH"),
        ("layout:vpr_bench:odd", r"layout vpr_bench expects query/, ref/, ground_truth_new\.npy: .*odd/ref"),
        ("layout:gsv_lists:odd:25", "lists its ground truth; a radius of 25 m means nothing to it"),
        ("layout:pitts30k/tes:odd", "pitts30k: unknown variant 'tes'"),
        ("folder:odd/read.me", r"odd/read\.me is a file, no folder of photographs; manifest:FILE reads a table"),
        ("folder:listed:9", r"ground_truth_new\.npy lists the ground truth; a radius of 9 m means nothing to it"),
        ("town", "no folder town"),
    ],
)
def test_wrong_paths_are_answered_in_one_line(tmp_path: Path, spec: str, said: str) -> None:
    photo(tmp_path / "odd/photos/a.jpg")
    (tmp_path / "odd/read.me").touch()
    photos(tmp_path / "listed", ["ref/0.jpg", "query/0.jpg"])
    np.save(tmp_path / "listed/ground_truth_new.npy", vpr_rows([0]), allow_pickle=True)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        load(spec, tmp_path)
    assert "\n" not in str(caught.value)


def test_distances_over_a_border_of_zones_are_right(tmp_path: Path) -> None:
    """At 48 degrees north a degree of longitude is 74,625 m: 21 and 52 m over the border of zones 32 and 33."""
    at = from_lat_lon(np.full(3, 48.0), np.array([11.99986, 11.99944, 12.00014]), "x")
    assert at.zone.tolist() == [32, 32, 33]
    names = [f"@{e:.2f}@{n:.2f}@{z}@U@.jpg" for e, n, z in zip(at.east, at.north, at.zone, strict=True)]
    photos(tmp_path / "x/database", [*names[:2], names[2].replace("@33@", "@32@")])
    photo(tmp_path / "x/queries" / names[2])
    benchmark = load("folder:x", tmp_path)
    assert [benchmark.database[number].name for number in positives(benchmark)[0]] == [names[0]]
    assert benchmark.at is not None
    order = [benchmark.database.index(tmp_path / "x/database" / name) for name in names[:2]]
    metres = metres_to(benchmark.at, np.zeros(2, dtype=np.int64), np.array(order))
    np.testing.assert_allclose(metres, [20.9, 52.2], atol=0.1)


def test_what_looks_wrong_with_a_ground_truth_is_told(tmp_path: Path) -> None:
    write_utm(tmp_path / "x", [(0, i) for i in range(6)], [(0, 0), (0, 1)])
    assert any("100% of all pairs" in note for note in load("folder:x", tmp_path).notes)
    write_utm(tmp_path / "y", [(7, 7)] * 6, [(7, 7)])
    assert any("all 6 positions of the database are equal" in note for note in load("folder:y", tmp_path).notes)
    write_utm(tmp_path / "z", [(500_000, 100_000)], [(500_000, 900_000)])
    with pytest.raises(ValueError, match=r"none of 1 queries.*the first of the queries lies 800 km from"):
        load("folder:z", tmp_path)
    photos(tmp_path / "d/database", [f"@9.08{i:05d}@48.00{i:05d}@{i}@.jpg" for i in range(6)])
    photos(tmp_path / "d/queries", ["@9.0800001@48.0000001@1@.jpg"])
    with pytest.raises(ValueError, match="look like degrees"):
        load("folder:d", tmp_path)
    unused = load_found("folder:d", tmp_path, labels="unused")
    assert "positions are not used" in unused.notes[0]


@pytest.mark.usefixtures("any_counts")
def test_layouts_are_read_under_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "Zürich 2024"
    photos(folder, ["ref/0.jpg", "ref/1.jpg", "query/0.jpg"])
    for stem in ("one", "two"):
        np.save(folder / f"{stem}_dbImages.npy", np.array(["ref/0.jpg", "ref/1.jpg"]))
        np.save(folder / f"{stem}_qImages.npy", np.array(["query/0.jpg"]))
    np.save(folder / "one_gt.npy", rows([1]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"of one, two; name one: .*/one"):
        load("layout:gsv_lists:Zürich 2024", tmp_path)
    benchmark = load("layout:gsv_lists:Zürich 2024/one", tmp_path)
    assert (benchmark.name, positives(benchmark)) == ("one", [[1]])
    assert load_found("layout:gsv_lists:Zürich 2024/two", tmp_path).num_labelled == 0
    write_utm(tmp_path / "theirs/images/val", [(0, 0)], [(0, 0)])
    assert load("layout:pitts30k/val:theirs", tmp_path).name == "theirs/val"
