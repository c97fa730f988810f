"""Each layout data is distributed in, as small folders of JPEGs; faults of data sets; what is said of wrong ones."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy.io import savemat

from eval.benchmarks import msls
from eval.benchmarks.catalogue import ALIASES, CATALOGUE
from eval.benchmarks.lists import gsv_lists
from eval.benchmarks.load import load_benchmarks
from eval.benchmarks.named import LAYOUTS
from eval.benchmarks.overview import catalogue_table, own_table
from tests.benchmark_folders import load, photo, photos, positives, rows, vpr_rows, write_utm


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


def write_msls_test(root: Path, city: str, database: list[str], queries: list[str], chosen: list[bool]) -> None:
    for side, keys in (("database", database), ("query", queries)):
        photos(root / city / side / "images", [f"{key}.jpg" for key in keys])
        table = pd.DataFrame({"key": keys, "sequence_key": "s", "frame_number": range(len(keys))})
        table.to_csv(root / city / side / "seq_info.csv")
        subtasks = pd.DataFrame({"all": chosen[: len(keys)], "s2w": False})
        subtasks.to_csv(root / city / side / "subtask_index.csv")


@pytest.mark.usefixtures("any_counts")
@pytest.mark.parametrize("spec", ["msls_test", "msls_challenge", "layout:msls_test:msls_test"])
def test_msls_test_is_read_by_its_tables_and_has_no_ground_truth(tmp_path: Path, spec: str) -> None:
    for city in msls.TEST_CITIES:
        write_msls_test(tmp_path / "msls_test/test", city, [f"{city}-a", f"{city}_b"], [f"{city}-q"], [True, False])
    (benchmark,) = load_benchmarks([spec], tmp_path, labels="found")
    assert {path.stem for path in benchmark.database} == {f"{city}-a" for city in msls.TEST_CITIES}
    assert (len(benchmark.queries), benchmark.num_labelled, benchmark.submission) == (6, 0, "msls")
    (alone,) = load_benchmarks(["msls_test/athens"], tmp_path, labels="found")
    assert [path.stem for path in alone.queries] == ["athens-q"]
    (tmp_path / "msls_test/test/athens/query/subtask_index.csv").write_text(",all\n")
    with pytest.raises(ValueError, match=r"athens/query: seq_info\.csv has 1 rows, subtask_index\.csv 0"):
        load_benchmarks(["msls_test/athens"], tmp_path, labels="found")


@pytest.mark.usefixtures("any_counts")
def test_msls_test_by_salads_lists(tmp_path: Path) -> None:
    names = ["test/miami/database/images/a.jpg", "test/miami/query/images/q.jpg"]
    photos(tmp_path / "msls_test", names)
    for part, name in zip(("dbImages", "qImages"), names, strict=True):
        np.save(tmp_path / f"msls_test/msls_test_{part}.npy", np.array([name]))
    (benchmark,) = load_benchmarks(["msls_test"], tmp_path, labels="found")
    assert (benchmark.num_labelled, benchmark.submission) == (0, "msls")


@pytest.mark.usefixtures("any_counts")
@pytest.mark.parametrize("spec", ["msls_val", "msls-val", "layout:openvprlab:msls-val"])
def test_openvprlabs_msls_val(tmp_path: Path, spec: str) -> None:
    folder = tmp_path / ("msls_val" if spec == "msls_val" else "msls-val")
    database, queries = ["cph/database/images/a.jpg", "sf/database/images/b.jpg"], ["sf/query/images/q.jpg"]
    photos(folder, database + queries)
    np.save(folder / "msls_val_ref_image_names.npy", np.array(database))
    np.save(folder / "msls_val_query_image_names.npy", np.array(queries))
    np.save(folder / "msls_val_ground_truth_25m.npy", rows([1]), allow_pickle=True)
    assert positives(load(spec, tmp_path)) == [[1]]


@pytest.mark.usefixtures("any_counts")
@pytest.mark.parametrize("truth", ["gt", "gt_25m"])
@pytest.mark.parametrize(
    ("spec", "stem"),
    [
        ("pitts30k", "pitts30k_test"),
        ("pitts30k/val", "pitts30k_val"),
        ("pitts30k-val", "pitts30k_val"),
        ("pitts250k", "pitts250k_test"),
        ("layout:pitts250k:x", "pitts250k_test"),
    ],
)
def test_lists_of_pittsburgh(tmp_path: Path, spec: str, stem: str, truth: str) -> None:
    folder = tmp_path / spec.rpartition(":")[2].partition("/")[0]
    photos(folder, ["000/a.jpg", "000/b.jpg", "queries_real/000/q.jpg"])
    np.save(folder / f"{stem}_dbImages.npy", np.array(["000/a.jpg", "000/b.jpg"]))
    np.save(folder / f"{stem}_qImages.npy", np.array(["queries_real/000/q.jpg"]))
    np.save(folder / f"{stem}_{truth}.npy", rows([0, 1]), allow_pickle=True)
    assert positives(load(spec, tmp_path)) == [[0, 1]]


@pytest.mark.parametrize(("name", "count"), [("corridor", 111), ("17places", 406)])
def test_corridor_and_17_places_have_their_own_numbers_of_images(tmp_path: Path, name: str, count: int) -> None:
    for part in ("ref", "query"):
        photos(tmp_path / name / part, [f"{i:07d}.jpg" for i in range(count)])
    lists = [
        [j for j in range(i - 2, i + 3) if j >= 0] for i in range(count)
    ]  # past the end, as 17 Places' own has them
    np.save(tmp_path / name / "ground_truth_new.npy", vpr_rows(*lists), allow_pickle=True)
    benchmark = load(name, tmp_path)
    assert positives(benchmark)[-1] == [count - 3, count - 2, count - 1]
    assert f"up to {count + 1} for 2 queries" in benchmark.notes[0]
    (tmp_path / name / "ref/0000000.jpg").unlink()
    with pytest.raises(ValueError, match=f"its protocol has {count} and {count}"):
        load(name, tmp_path)


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


def test_list_shows_every_benchmark_and_what_is_found_in_80_columns(tmp_path: Path) -> None:
    write_utm(tmp_path / "eynsham/images/test", [(0, 0)], [(0, 0)])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(catalogue_table(tmp_path))
    console.print(own_table())
    text = console.export_text()
    names = (*CATALOGUE, *ALIASES, *LAYOUTS, "manifest:FILE", "folder:PATH", "svox/night", "msls_val/11k", "--database")
    assert [name for name in names if name not in text] == []
    assert text.count("yes: images/test/queries") == 1
    assert max(map(len, text.splitlines())) <= 80
