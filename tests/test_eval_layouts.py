"""Each layout data is distributed in, as small folders of JPEGs; faults of data sets; what is said of wrong ones."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from scipy.io import savemat

from eval.benchmarks import catalogue
from eval.benchmarks.benchmark import Benchmark
from eval.benchmarks.catalogue import CATALOGUE, Variant, catalogue_table
from eval.benchmarks.ground_truth import GroundTruthError, clip_to, read_array, read_positives, within_radius
from eval.benchmarks.layouts import gsv_lists
from eval.benchmarks.load import load_benchmarks

_JPEG = io.BytesIO()
Image.new("RGB", (20, 14), "teal").save(_JPEG, "JPEG")


def photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_JPEG.getvalue())
    return path


def photos(folder: Path, names: list[str]) -> list[Path]:
    return [photo(folder / name) for name in names]


def rows(*lists: list[int]) -> np.ndarray:
    array = np.empty(len(lists), dtype=object)
    array[:] = [np.array(ids) for ids in lists]
    return array


def vpr_rows(*lists: list[int]) -> np.ndarray:
    array = np.empty((len(lists), 2), dtype=object)
    for i, ids in enumerate(lists):
        array[i, 0], array[i, 1] = i, ids
    return array


@pytest.fixture
def any_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue without its counts: the folders here are small."""
    for name, entry in CATALOGUE.items():
        variants = {key: replace(variant, counts=None) for key, variant in entry.variants.items()}
        monkeypatch.setitem(catalogue.CATALOGUE, name, replace(entry, variants=variants))


def load(spec: str, root: Path) -> Benchmark:
    (benchmark,) = load_benchmarks([spec], root)
    return benchmark


def positives(benchmark: Benchmark) -> list[list[int]]:
    return [benchmark.positives(q).tolist() for q in range(len(benchmark.queries))]


def write_utm(folder: Path, database: list[tuple[float, float]], queries: list[tuple[float, float]]) -> None:
    for part, points in (("database", database), ("queries", queries)):
        for i, (east, north) in enumerate(points):
            photo(folder / part / f"@{east:.2f}@{north:.2f}@10@S@@@{i}@@@@@@@@.jpg")


@pytest.mark.usefixtures("any_counts")
@pytest.mark.parametrize(
    ("spec", "base"),
    [
        *((name, "images/test") for name in ("pitts30k", "pitts250k", "tokyo247", "st_lucia", "eynsham", "sped")),
        ("amstertime", "images/test"),
        ("nordland/full", "images/test"),
        ("pitts30k/val", "images/val"),
        ("msls_val/11k", "images/val"),
        ("msls_val/11k", "val"),
        ("msls_val/11k", "images/test"),
    ],
)
def test_folder_convention(tmp_path: Path, spec: str, base: str) -> None:
    folder = tmp_path / spec.partition("/")[0] / base
    write_utm(folder, [(0, 0), (10, 0), (900, 0)], [(5, 0), (880, 0)])
    benchmark = load(spec, tmp_path)
    assert benchmark.name == spec
    assert positives(benchmark) == [[0, 1], [2]]


@pytest.mark.usefixtures("any_counts")
def test_svox_is_five_query_sets_of_one_gallery(tmp_path: Path) -> None:
    folder = tmp_path / "svox/images/test"
    photo(folder / "gallery/@5@5@.jpg")
    for weather in ("night", "rain", "snow", "sun", "overcast"):
        photo(folder / f"queries_{weather}/@5@6@.jpg")
    benchmarks = load_benchmarks(["svox"], tmp_path)
    assert [b.name for b in benchmarks] == [f"svox/{w}" for w in ("night", "rain", "snow", "sun", "overcast")]
    assert load("svox/rain", tmp_path).queries[0].parent.name == "queries_rain"
    with pytest.raises(ValueError, match="nearest: night"):
        load_benchmarks(["svox/nigth"], tmp_path)


@pytest.mark.usefixtures("any_counts")
@pytest.mark.parametrize(("name", "stem"), [("nordland", "Nordland"), ("sped", "SPED"), ("essex3in1", "ESSEX")])
def test_vpr_bench_folder_and_gsv_lists_give_the_same(tmp_path: Path, name: str, stem: str) -> None:
    folder = tmp_path / name
    database = [path.relative_to(folder) for path in photos(folder / "ref", [f"{i:07d}.jpg" for i in range(3)])]
    queries = [path.relative_to(folder) for path in photos(folder / "query", [f"{i:07d}.jpg" for i in range(2)])]
    np.save(folder / "ground_truth_new.npy", vpr_rows([0, 1], [2]), allow_pickle=True)
    first = load(name, tmp_path)
    np.save(folder / f"{stem}_dbImages.npy", np.array([str(path) for path in database]))
    np.save(folder / f"{stem}_qImages.npy", np.array([str(path) for path in queries]))
    np.save(folder / f"{stem}_gt.npy", rows([0, 1], [2]), allow_pickle=True)
    second = load(name, tmp_path)
    assert positives(first) == positives(second) == [[0, 1], [2]]
    assert (first.database, first.queries, first.protocol) == (second.database, second.queries, second.protocol)


@pytest.mark.usefixtures("any_counts")
def test_numbers_in_names_order_a_vpr_bench_folder(tmp_path: Path) -> None:
    folder = tmp_path / "sped"
    photos(folder / "ref", [f"{i}.jpg" for i in range(11)])
    photos(folder / "query", ["0.jpg"])
    np.save(folder / "ground_truth_new.npy", vpr_rows([10]), allow_pickle=True)
    benchmark = load("sped", tmp_path)
    assert benchmark.database[int(benchmark.positives(0)[0])].name == "10.jpg"


@pytest.mark.usefixtures("any_counts")
def test_msls_counts_the_queries_that_are_picked(tmp_path: Path) -> None:
    folder = tmp_path / "msls_val"
    database = ["train_val/cph/database/images/a.jpg", "train_val/sf/database/images/b.jpg"]
    queries = [f"train_val/cph/query/images/{name}.jpg" for name in "xyz"]
    photos(folder, database + queries)
    np.save(folder / "msls_val_qIdx.npy", np.array([0, 2]))
    with pytest.raises(FileNotFoundError, match=r"msls_val_dbImages\.npy.*msls_val/11k"):
        load("msls_val", tmp_path)
    np.save(folder / "msls_val_dbImages.npy", np.array(database))
    np.save(folder / "msls_val_qImages.npy", np.array(queries))
    np.save(folder / "msls_val_pIdx.npy", rows([1], [0]), allow_pickle=True)
    benchmark = load("msls_val", tmp_path)
    assert [path.name for path in benchmark.queries] == ["x.jpg", "z.jpg"]
    assert positives(benchmark) == [[1], [0]]
    assert "740" in benchmark.protocol
    assert "names 3 queries, of which 2 count" in benchmark.notes[0]


@pytest.mark.usefixtures("any_counts")
def test_msls_tables_leave_panoramas_out_and_keep_cities_apart(tmp_path: Path) -> None:
    root = tmp_path / "msls_val/train_val"
    for city in ("cph", "sf"):
        for side, keys in (("database", ["a", "b"]), ("query", ["c", "d"])):
            keys = [city + key for key in keys]
            photos(root / city / side / "images", [f"{key}.jpg" for key in keys])
            table = pd.DataFrame({"key": keys, "easting": [0.0, 40.0], "northing": [0.0, 0.0]})
            table.to_csv(root / city / side / "postprocessed.csv")
            pd.DataFrame({"key": keys[::-1], "pano": [side == "query" and city == "sf", False]}).to_csv(
                root / city / side / "raw.csv"
            )
    benchmark = load("msls_val/11k", tmp_path)
    assert [path.stem for path in benchmark.queries] == ["cphc", "cphd", "sfc"]
    assert positives(benchmark) == [[0], [1], [2]]
    assert benchmark.notes == ("1 panoramas are left out",)
    (root / "sf/query/raw.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"sf/query/raw\.csv"):
        load("msls_val/11k", tmp_path)


@pytest.mark.usefixtures("any_counts")
@pytest.mark.parametrize("name", ["pitts30k", "pitts250k", "tokyo247"])
def test_netvlad_and_patch_netvlad_layouts(tmp_path: Path, name: str) -> None:
    stem = name if name == "tokyo247" else f"{name}_test"
    folder = tmp_path / name
    database, queries = ["000/a.jpg", "000/b.jpg", "001/c.jpg"], ["000/q.jpg", "000/r.jpg"]
    roots = ("tokyo247", "247query_v3") if name == "tokyo247" else ("", "queries_real")
    suffix = ".png" if name == "tokyo247" else ".jpg"  # Tokyo's lists say .jpg, its images are .png
    photos(folder / roots[0], [image.replace(".jpg", suffix) for image in database])
    photos(folder / roots[1], queries)
    utm_db, utm_q = np.array([[0.0, 0], [24, 0], [80, 0]]), np.array([[0.0, 5], [75, 0]])
    (folder / "datasets").mkdir()
    struct = {
        "whichSet": "test",
        "dbImage": np.array(database, dtype=object)[:, None],
        "utmDb": utm_db.T,
        "qImage": np.array(queries, dtype=object)[:, None],
        "utmQ": utm_q.T,
        "posDistThr": 25.0,
    }
    savemat(folder / "datasets" / f"{stem}.mat", {"dbStruct": struct})
    from_mat = load(name, tmp_path)
    (folder / "datasets" / f"{stem}.mat").unlink()
    np.savez(folder / f"{stem}.npz", utmQ=utm_q, utmDb=utm_db, posDistThr=25)
    with pytest.raises(FileNotFoundError, match=f"{name}_imageNames_index"):
        load(name, tmp_path)
    (folder / f"{name}_imageNames_index.txt").write_text("\n".join(database))
    (folder / f"{name}_imageNames_query.txt").write_text("\n".join(queries))
    from_npz = load(name, tmp_path)
    assert positives(from_mat) == positives(from_npz) == [[0, 1], [2]]
    assert from_mat.database == from_npz.database
    assert from_mat.database[0].suffix == suffix


@pytest.mark.usefixtures("any_counts")
def test_nordland_seasons_and_amstertime_pairs(tmp_path: Path) -> None:
    names = [f"images-{i:05d}.png" for i in range(30)]
    for season in ("summer", "winter"):
        photos(tmp_path / "nordland" / season, names)
    benchmark = load("nordland/full", tmp_path)
    assert positives(benchmark)[15] == list(range(5, 26))
    (tmp_path / "nordland/cleanImageNames.txt").write_text("\n".join(names[:12]))
    assert len(load("nordland/full", tmp_path).queries) == 12
    photos(tmp_path / "amstertime/new", ["1.png", "2.png"])
    photos(tmp_path / "amstertime/old", ["2.jpg", "1.jpg"])
    assert positives(load("amstertime", tmp_path)) == [[0], [1]]
    photo(tmp_path / "amstertime/old/3.jpg")
    with pytest.raises(ValueError, match="3 is in only one of"):
        load("amstertime", tmp_path)


def test_queries_that_leak_into_the_database_are_left_out(tmp_path: Path) -> None:
    photos(tmp_path, ["database/a.jpg", "database/q.jpg", "database/b.jpg", "queries/q.jpg"])
    np.save(tmp_path / "x_dbImages.npy", np.array(["database/a.jpg", "database/q.jpg", "database/b.jpg"]))
    np.save(tmp_path / "x_qImages.npy", np.array(["queries/q.jpg"]))
    np.save(tmp_path / "x_gt.npy", rows([0, 1, 2]), allow_pickle=True)
    benchmark = gsv_lists("x", tmp_path, "x", "p", unleak=True)
    assert [path.name for path in benchmark.database] == ["a.jpg", "b.jpg"]
    assert positives(benchmark) == [[0, 1]]
    assert "holds 1 of the 1 queries" in benchmark.notes[0]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("kind", ["place", "lat", "east"])
def test_manifest(tmp_path: Path, suffix: str, kind: str) -> None:
    table = pd.DataFrame(
        {
            "path": [f"{name}.jpg" for name in "abcqr"],
            "role": ["database"] * 3 + ["query"] * 2,
            "place": ["7", "8", "7", "7", "9"],
        }
    )
    if kind == "lat":  # one degree of longitude at 60 degrees north is half as long
        table = table.drop(columns="place").assign(lat=[60.0] * 5, lon=[10, 10.0004, 10.001, 10, 20.0])
    if kind == "east":
        table = table.drop(columns="place").assign(east=[0, 24, 26, 0, 5000.0], north=0.0)
    photos(tmp_path, table["path"].tolist())
    file = tmp_path / f"mine{suffix}"
    table.to_csv(file, index=False) if suffix == ".csv" else table.to_parquet(file)
    benchmark = load(f"manifest:{file.name}", tmp_path)
    assert positives(benchmark) == [[0, 2] if kind == "place" else [0, 1], []]
    assert "1 of 2 queries have no positive" in benchmark.notes[0]
    if kind == "east":
        assert positives(load(f"manifest:{file.name}:26", tmp_path))[0] == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("path,role\na.jpg,database\n", "expected path, role and one of"),
        ("path,role,place\na.jpg,databse,1\n", "row 2: role 'databse'; use database or query"),
        ("path,role,place\na.jpg,database,1\na.jpg,query,\n", "row 3: place is empty"),
        ("path,role,lat,lon\na.jpg,database,1,x\na.jpg,query,1,1\n", "row 2: lon is empty or no number"),
        ("path,role,place\na.jpg,database,1\n", "no row of role query"),
        ("path,role,place\nb.jpg,database,1\na.jpg,query,1\n", "b.jpg"),
        ("path,role,place\na.jpg,database,1\na.jpg,query,2\n", "none of 1 queries has a positive"),
    ],
)
def test_wrong_manifests_are_answered_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    photo(tmp_path / "a.jpg")
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        load("manifest:m.csv", tmp_path)
    assert "\n" not in str(caught.value)


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


def test_wrong_counts_wrong_layouts_and_images_that_are_not_there(tmp_path: Path) -> None:
    write_utm(tmp_path / "pitts30k/images/test", [(0, 0)], [(0, 0)])
    with pytest.raises(ValueError, match="holds 1 database images and 1 queries; its protocol has 10000 and 6816"):
        load("pitts30k", tmp_path)
    (tmp_path / "eynsham").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none of its layouts; expected images/test"):
        load("eynsham", tmp_path)
    write_utm(tmp_path / "svox/images/test", [], [])
    for part in ("gallery", "queries_rain"):
        photo(tmp_path / f"svox/images/test/{part}/@1@1@.jpg")
    (note,) = load("svox/rain", tmp_path).notes  # counts known from memory alone are no reason to refuse
    assert "937" in note
    folder = tmp_path / "sped"
    photos(folder / "ref", ["0.jpg"])
    np.save(folder / "SPED_dbImages.npy", np.array(["ref/0.jpg", "ref/1.jpg"]))
    np.save(folder / "SPED_qImages.npy", np.array(["ref/0.jpg"]))
    np.save(folder / "SPED_gt.npy", np.array([[0]]))
    with pytest.raises(FileNotFoundError, match=r"names 1 of 2 images that are not there: .*ref/1\.jpg"):
        load("sped", tmp_path)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo was run > evil",)


def test_ground_truth_runs_nothing_and_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = np.empty(1, dtype=object)
    evil[0] = _Evil()
    np.save("evil.npy", evil, allow_pickle=True)
    with pytest.raises(GroundTruthError, match=r"evil\.npy holds more than arrays, which is refused"):
        read_array(Path("evil.npy"))
    assert not Path("evil").exists() or Path("evil").is_dir()
    Path("cut.npy").write_bytes(Path("evil.npy").read_bytes()[:90])
    Path("text.npy").write_text("no array")
    Path("bare.npy").write_bytes(pickle.dumps([1, 2]))
    for name in ("cut.npy", "text.npy", "bare.npy", "nowhere.npy"):
        with pytest.raises(GroundTruthError, match=name):
            read_array(Path(name))


def test_radius_equals_plain_loops_at_utm_sized_numbers() -> None:
    rng = np.random.default_rng(0)
    database = rng.integers(0, 200, (300, 2)) + np.array([5.84e5, 4.476e6])
    queries = rng.integers(0, 200, (40, 2)) + np.array([5.84e5, 4.476e6])
    expected = [[i for i, d in enumerate(database) if ((d - q) ** 2).sum() <= 625] for q in queries]
    assert [ids.tolist() for ids in within_radius(queries, database, 25)] == expected


def test_list_shows_every_benchmark_and_what_is_found(tmp_path: Path) -> None:
    write_utm(tmp_path / "eynsham/images/test", [(0, 0)], [(0, 0)])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(catalogue_table(tmp_path))
    text = console.export_text()
    assert all(name in text for name in (*CATALOGUE, "manifest:FILE", "folder:PATH", "svox/night", "msls_val/11k"))
    assert text.count("yes: images/test/queries") == 1


GROUND_TRUTH = Path(os.environ.get("RERANKVPR_TEST_DATA", "/nowhere")) / "ground_truth"
published = pytest.mark.skipif(
    not GROUND_TRUTH.is_dir(), reason="RERANKVPR_TEST_DATA names no folder with ground_truth/"
)

# Folder: queries, database images, mean number of positives, numbers that no database image has.
VPR_BENCH = {
    "17places": (406, 406, 4.985, 2),
    "CrossSeason_CoHOG_Dataset": (191, 191, 7.785, 0),
    "ESSEX3IN1_dataset": (210, 210, 1.0, 0),
    "GardensPointWalking": (200, 200, 4.97, 2),
    "GardensPoint_TN": (400, 200, 3.47, 200),
    "Living": (32, 32, 2.9375, 0),
    "Nordland": (2760, 27592, 2.9996, 0),
    "Pittsburgh": (1000, 23000, 23.0, 0),
    "SPEDTEST": (607, 607, 1.0, 0),
    "Synthia-NightToFall": (813, 911, 24.29, 0),
    "Tokyo247": (315, 4104, 118.286, 0),
    "corridor": (111, 111, 4.9459, 0),
    "inria_holidays": (300, 512, 1.7067, 0),
    "oneimage": (10, 10, 4.4, 0),
}


@published
def test_every_published_ground_truth_is_listed_here() -> None:
    assert {path.name for path in (GROUND_TRUTH / "vpr_bench").iterdir()} == set(VPR_BENCH)


@published
@pytest.mark.parametrize("name", list(VPR_BENCH))
def test_vpr_bench_ground_truth(name: str) -> None:
    num_queries, num_database, mean, faulty = VPR_BENCH[name]
    read = read_positives(GROUND_TRUTH / "vpr_bench" / name / "ground_truth_new.npy")
    kept, notes = clip_to(read, num_database, name)
    assert len(kept) == num_queries
    assert np.mean([len(ids) for ids in kept]) == pytest.approx(mean, abs=0.006)
    assert bool(notes) == bool(faulty)
    assert not faulty or f"for {faulty} queries" in notes[0]


@published
@pytest.mark.parametrize(
    ("spec", "part", "stem", "source", "every"),
    [
        ("essex3in1", "ESSEX", "ESSEX", "ESSEX3IN1_dataset", 1.0),
        ("sped", "SPED", "SPED", "SPEDTEST", 1.0),
        ("nordland", "Nordland", "Nordland", "Nordland", 2.9996),
    ],
)
def test_gsv_lists_with_their_real_counts(
    tmp_path: Path, spec: str, part: str, stem: str, source: str, every: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real lists over empty files of the names that they hold, and VPR-Bench's ground truth over the same."""
    folder = tmp_path / spec
    folder.mkdir()
    for file in (GROUND_TRUTH / "gsv_cities" / part).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for images in ("dbImages", "qImages"):
        for name in read_array(folder / f"{stem}_{images}.npy"):
            (folder / str(name)).parent.mkdir(exist_ok=True)
            (folder / str(name)).touch()
    lists = load(spec, tmp_path)
    assert np.diff(lists.positive_offsets).mean() == pytest.approx(every, abs=1e-3)
    (folder / f"{stem}_dbImages.npy").unlink()
    truth = GROUND_TRUTH / "vpr_bench" / source / "ground_truth_new.npy"
    (folder / truth.name).write_bytes(truth.read_bytes())
    bench = load(spec, tmp_path)
    assert (lists.database, lists.queries) == (bench.database, bench.queries)
    np.testing.assert_array_equal(lists.positive_ids, bench.positive_ids)


@published
def test_msls_lists_pick_740_of_747(tmp_path: Path) -> None:
    folder = tmp_path / "msls_val"
    folder.mkdir()
    for file in (GROUND_TRUTH / "gsv_cities/msls_val").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    database = [f"train_val/cph/database/images/{i}.jpg" for i in range(18871)]  # this list is not published with them
    np.save(folder / "msls_val_dbImages.npy", np.array(database))
    for name in [*database, *read_array(folder / "msls_val_qImages.npy")]:
        (folder / str(name)).parent.mkdir(parents=True, exist_ok=True)
        (folder / str(name)).touch()
    benchmark = load("msls_val", tmp_path)
    assert (len(benchmark.database), len(benchmark.queries)) == (18871, 740)
    assert np.diff(benchmark.positive_offsets).mean() == pytest.approx(10.75)
    assert "names 747 queries, of which 740 count" in benchmark.notes[0]


@published
@pytest.mark.parametrize(("name", "stem"), [("pitts30k", "pitts30k_test"), ("tokyo247", "tokyo247")])
def test_patch_netvlad_positions(tmp_path: Path, name: str, stem: str) -> None:
    folder = tmp_path / name
    (folder / "images").mkdir(parents=True)
    (folder / "query").mkdir()
    file = GROUND_TRUTH / "patch_netvlad" / f"{stem}.npz"
    (folder / file.name).write_bytes(file.read_bytes())
    with np.load(file) as table:
        counts = {"index": len(table["utmDb"]), "query": len(table["utmQ"])}
    for part, root in (("index", "images"), ("query", "query")):
        names = [f"{part}{i:06d}.jpg" for i in range(counts[part])]
        (folder / f"{name}_imageNames_{part}.txt").write_text("\n".join(names))
        for image in names:
            (folder / root / image).touch()
    benchmark = load(name, tmp_path)
    variant: Variant = CATALOGUE[name].variants[""]
    assert (len(benchmark.database), len(benchmark.queries)) == variant.counts
    assert benchmark.num_without_positive == 0


@published
def test_published_files_that_no_protocol_takes() -> None:
    """Patch-NetVLAD's Nordland means 7 frames to each side; an older VPR-Bench file holds ranges."""
    with np.load(GROUND_TRUTH / "patch_netvlad/nordland.npz") as table:
        utm_q, utm_db, radius_m = (table[key].astype(float) for key in ("utmQ", "utmDb", "posDistThr"))
    found = within_radius(utm_q, utm_db, float(radius_m))
    assert found[100].tolist() == list(range(93, 108))
    assert "+-7 frames and are not read" in CATALOGUE["nordland"].fault
    ranges = read_array(GROUND_TRUTH / "vpr_bench/oneimage/ground_truth.npy")
    rows = read_positives(GROUND_TRUTH / "vpr_bench/oneimage/ground_truth_new.npy")
    for (query, first, last), ids in zip(ranges, rows, strict=True):
        assert set(range(max(0, int(first)), min(9, int(last)) + 1)) <= set(ids.tolist()), query


@published
def test_gardens_point_notes_the_frames_that_do_not_exist() -> None:
    benchmarks = load_benchmarks(["gardens_point/all"], GROUND_TRUTH.parent)
    assert len(benchmarks) == 6
    for benchmark in benchmarks:
        assert "up to 201 for 2 queries (first: 198)" in benchmark.notes[0]
