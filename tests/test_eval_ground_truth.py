"""Published ground truth: files run nothing, and the real ones give the numbers that are known of them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.positions import from_metres, within_radius
from eval.benchmarks.catalogue import CATALOGUE, Variant
from eval.benchmarks.ground_truth import GroundTruthError, clip_to, read_array, read_positives
from eval.benchmarks.load import load_benchmarks
from tests.benchmark_folders import empty_files, load


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
        pytest.param("nordland", "Nordland", "Nordland", "Nordland", 2.9996, marks=pytest.mark.slow),
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
        empty_files(folder, map(str, read_array(folder / f"{stem}_{images}.npy")))
    lists = load(spec, tmp_path)
    assert np.diff(lists.positive_offsets).mean() == pytest.approx(every, abs=1e-3)
    (folder / f"{stem}_dbImages.npy").unlink()
    truth = GROUND_TRUTH / "vpr_bench" / source / "ground_truth_new.npy"
    (folder / truth.name).write_bytes(truth.read_bytes())
    bench = load(spec, tmp_path)
    assert (lists.database, lists.queries) == (bench.database, bench.queries)
    np.testing.assert_array_equal(lists.positive_ids, bench.positive_ids)


@pytest.mark.slow
@published
def test_msls_lists_pick_740_of_747(tmp_path: Path) -> None:
    folder = tmp_path / "msls_val"
    folder.mkdir()
    for file in (GROUND_TRUTH / "gsv_cities/msls_val").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    database = [f"train_val/cph/database/images/{i}.jpg" for i in range(18871)]  # this list is not published with them
    np.save(folder / "msls_val_dbImages.npy", np.array(database))
    empty_files(folder, map(str, [*database, *read_array(folder / "msls_val_qImages.npy")]))
    benchmark = load("msls_val", tmp_path)
    assert (len(benchmark.database), len(benchmark.queries)) == (18871, 740)
    assert np.diff(benchmark.positive_offsets).mean() == pytest.approx(10.75)
    assert "names 747 queries, of which 740 count" in benchmark.notes[0]


@pytest.mark.slow
@published
@pytest.mark.parametrize(("name", "stem"), [("pitts30k", "pitts30k_test"), ("tokyo247", "tokyo247")])
def test_patch_netvlad_positions(tmp_path: Path, name: str, stem: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    file = GROUND_TRUTH / "patch_netvlad" / f"{stem}.npz"
    (folder / file.name).write_bytes(file.read_bytes())
    with np.load(file) as table:
        counts = {"index": len(table["utmDb"]), "query": len(table["utmQ"])}
    for part, root in (("index", "images"), ("query", "query")):
        names = [f"{part}{i:06d}.jpg" for i in range(counts[part])]
        (folder / f"{name}_imageNames_{part}.txt").write_text("\n".join(names))
        empty_files(folder / root, names)
    benchmark = load(name, tmp_path)
    variant: Variant = CATALOGUE[name].variants[""]
    assert (len(benchmark.database), len(benchmark.queries)) == variant.counts
    assert benchmark.num_without_positive == 0


@published
def test_published_files_that_no_protocol_takes() -> None:
    """Patch-NetVLAD's Nordland means 7 frames to each side; an older VPR-Bench file holds ranges."""
    with np.load(GROUND_TRUTH / "patch_netvlad/nordland.npz") as table:
        utm_q, utm_db, radius_m = (table[key].astype(float) for key in ("utmQ", "utmDb", "posDistThr"))
    at = [from_metres(utm[:, 0], utm[:, 1], "nordland.npz") for utm in (utm_q, utm_db)]
    found = within_radius(at[0], at[1], float(radius_m))
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


def objects_of(kind: str) -> np.ndarray:
    """An array of objects as they are published."""
    if kind == "numbers":
        rows = np.empty((3, 2), dtype=object)
        for number in range(3):
            rows[number] = [np.int64(number), np.arange(number, dtype=">i4")]
        return rows
    if kind == "lists":
        ragged = np.empty(3, dtype=object)
        ragged[:] = [[1], [], [2, 3]]
        return ragged
    return np.asfortranarray(np.array([["a", "é"], ["b.jpg", "c"], ["d", ""]], dtype=object))


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("kind", ["numbers", "lists", "names"])
def test_pickled_arrays_are_those_that_numpy_reads(kind: str, protocol: int, tmp_path: Path) -> None:
    array, path = objects_of(kind), tmp_path / "array.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        pickle.dump(array, file, protocol=protocol)
    found, expected = read_array(path), np.load(path, allow_pickle=True)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    for one, other in zip(found.ravel(), expected.ravel(), strict=True):
        assert type(one) is type(other)
        np.testing.assert_array_equal(one, other)


def test_a_pickled_array_with_fewer_objects_than_its_shape_is_one_line(tmp_path: Path) -> None:
    """It crashes NumPy, which releases objects that it never read."""
    path = tmp_path / "rows.npy"
    np.save(path, objects_of("numbers"), allow_pickle=True)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"]\x94(h", b"]\x94(0h", 1))  # the mark goes, so the list stays empty
    assert path.read_bytes() != content
    with pytest.raises(GroundTruthError, match=rf"^ground truth {path}: not a whole .npy file \(.+\)$"):
        read_array(path)
