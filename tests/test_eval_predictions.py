"""What is written of each query's predictions; one set of photographs in every layout gives one result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy.io import savemat

from configs.schema import EvalConfig, ModelConfig, RerankConfig
from data_pipeline.positions import from_utm_names
from eval.benchmarks.benchmark import Benchmark
from eval.benchmarks.load import load_benchmarks
from eval.evaluate import evaluate
from eval.feature_cache import FeatureCache
from eval.features import StoredFeatures
from eval.recall import Recall
from eval.report.predictions import predictions_table, write_predictions, write_submission
from eval.report.tables import results_table, write_csv, write_results
from eval.result import Result
from model.network import PlaceModel, build_model
from tests.benchmark_folders import load, rows, vpr_rows
from tests.photos import jpeg

DATABASE, QUERIES = 9, 4
NAMES = {
    "database": [f"@{500000 + 20 * i}.00@4000000.00@33@T@@@{i}@.jpg" for i in range(DATABASE)],
    "queries": [f"@{500000 + 40 * i}.00@4000003.00@33@T@@@{i}@.jpg" for i in range(QUERIES)],
}
POSITIVES = [[i for i in range(DATABASE) if abs(20 * i - 40 * q) < 24] for q in range(QUERIES)]
CONFIG = EvalConfig(
    image_size=42, batch_size=4, recall_at=[1, 3], bootstrap=0, rerank=RerankConfig(top_k=4, nn_match_thresh=0.3)
)
pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def model() -> PlaceModel:
    return build_model(ModelConfig(backbone="tiny14", weights="random", finetune_last_n_blocks=0)).eval()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs in the field's layout."""
    root, rng = tmp_path_factory.mktemp("plain"), np.random.default_rng(7)
    for part, names in NAMES.items():
        folder = root / "plain/images/test" / part
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_bytes(jpeg(rng))
    return root


@pytest.fixture(scope="module")
def result(plain: Path, model: PlaceModel) -> tuple[Benchmark, Result]:
    benchmark = load("folder:plain", plain)
    return benchmark, evaluate(model, benchmark, CONFIG)


def _copied(plain: Path, folder: Path, names: dict[str, list[str]]) -> list[list[str]]:
    """The photographs under other names; these, database first."""
    for part, targets in names.items():
        for source, target in zip(NAMES[part], targets, strict=True):
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plain / "plain/images/test" / part / source, folder / target)
    return list(names.values())


def _numbered(database: str, queries: str) -> dict[str, list[str]]:
    """Names that say nothing, in the order of the photographs."""
    counts = {"database": (database, DATABASE), "queries": (queries, QUERIES)}
    return {part: [f"{folder}/{i:07d}.jpg" for i in range(count)] for part, (folder, count) in counts.items()}


def _metres(part: str) -> np.ndarray:
    at = from_utm_names(NAMES[part])
    return np.stack([at.east, at.north], axis=1)


def top_level(plain: Path, folder: Path) -> str:
    _copied(plain, folder, {part: [f"{part}/{name}" for name in names] for part, names in NAMES.items()})
    return f"folder:{folder}"


def vpr_bench(plain: Path, folder: Path) -> str:
    _copied(plain, folder, _numbered("ref", "query"))
    np.save(folder / "ground_truth_new.npy", vpr_rows(*POSITIVES), allow_pickle=True)
    return f"folder:{folder}"


def _lists(plain: Path, folder: Path, suffixes: tuple[str, str, str]) -> None:
    names = _copied(plain, folder, _numbered("a", "b"))
    for suffix, values in zip(suffixes, (*(np.array(part) for part in names), rows(*POSITIVES)), strict=True):
        np.save(folder / f"mine_{suffix}.npy", values, allow_pickle=True)


def gsv_lists(plain: Path, folder: Path) -> str:
    _lists(plain, folder, ("dbImages", "qImages", "gt"))
    return f"layout:gsv_lists:{folder}"


def openvprlab(plain: Path, folder: Path) -> str:
    _lists(plain, folder, ("ref_image_names", "query_image_names", "ground_truth_25m"))
    return f"layout:openvprlab:{folder}"


def netvlad_mat(plain: Path, folder: Path) -> str:
    database, queries = _copied(plain, folder, _numbered("a", "b"))
    (folder / "datasets").mkdir()
    images = {part: np.array(names, dtype=object)[:, None] for part, names in (("db", database), ("q", queries))}
    utm = {"utmDb": _metres("database").T, "utmQ": _metres("queries").T, "posDistThr": 25.0}
    struct = {"dbImage": images["db"], "qImage": images["q"], **utm}
    savemat(folder / "datasets/mine.mat", {"dbStruct": struct})
    return f"layout:netvlad_mat:{folder}"


def patch_netvlad(plain: Path, folder: Path) -> str:
    names = _copied(plain, folder, _numbered("a", "b"))
    for part, values in zip(("index", "query"), names, strict=True):
        (folder / f"mine_imageNames_{part}.txt").write_text("\n".join(values))
    np.savez(folder / "mine.npz", utmQ=_metres("queries"), utmDb=_metres("database"), posDistThr=25)
    return f"layout:patch_netvlad:{folder}"


def msls(plain: Path, folder: Path) -> str:
    sides = {"database": "database", "queries": "query"}
    for part, side in sides.items():
        keys = [f"key{i}" for i in range(len(NAMES[part]))]
        _copied(plain, folder, {part: [f"oslo/{side}/images/{key}.jpg" for key in keys]})
        east, north = _metres(part).T
        table = pd.DataFrame({"key": keys, "easting": east, "northing": north})
        table.to_csv(folder / "oslo" / side / "postprocessed.csv")
        pd.DataFrame({"key": keys, "pano": False}).to_csv(folder / "oslo" / side / "raw.csv")
    return f"layout:msls:{folder}"


def table_of_degrees(plain: Path, folder: Path) -> str:
    paths = _copied(plain, folder, _numbered("a", "b"))
    tables = []
    for part, names in zip(NAMES, paths, strict=True):
        at = from_utm_names(NAMES[part])
        role = "database" if part == "database" else "query"
        tables.append(pd.DataFrame({"path": names, "role": role, "lat": at.lat, "lon": at.lon}))
    pd.concat(tables).to_parquet(folder / "mine.parquet")
    return f"manifest:{folder / 'mine.parquet'}"


LAYOUTS = (top_level, vpr_bench, gsv_lists, openvprlab, netvlad_mat, patch_netvlad, msls, table_of_degrees)


@pytest.mark.parametrize("write", LAYOUTS)
def test_one_set_of_photographs_gives_one_result_in_every_layout(
    write: Callable[[Path, Path], str], plain: Path, tmp_path: Path, model: PlaceModel, result: tuple[Benchmark, Result]
) -> None:
    benchmark = load(write(plain, tmp_path / "mine"), tmp_path)
    assert [benchmark.positives(q).tolist() for q in range(QUERIES)] == POSITIVES
    found, expected = evaluate(model, benchmark, CONFIG), result[1]
    assert 0 < expected.retrieved[3] < 100
    assert (found.retrieved, found.reranked) == (expected.retrieved, expected.reranked)
    np.testing.assert_array_equal(found.predictions_QK, expected.predictions_QK)
    np.testing.assert_array_equal(found.reranked_QK, expected.reranked_QK)
    np.testing.assert_array_equal(found.similarities_QK, expected.similarities_QK)
    ours, theirs = (predictions_table(b, r, 3).to_pandas() for b, r in ((benchmark, found), result))
    same = ["stage", "rank", "score", "matches", "positive"]
    pd.testing.assert_frame_equal(ours[same], theirs[same])
    if benchmark.at is not None:  # degrees and metres of the map differ by the map's scale, 0.04 % here
        np.testing.assert_allclose(ours["metres"], theirs["metres"], rtol=1e-3, atol=0.002)


def test_predictions_say_what_was_found_and_where(result: tuple[Benchmark, Result], tmp_path: Path) -> None:
    benchmark, found = result
    files = write_predictions(tmp_path, [predictions_table(benchmark, found, 3)])
    table = pq.read_table(files[0])
    assert pd.read_csv(files[1])["image"].tolist() == table["image"].to_pylist()
    assert table.schema.metadata[b"root of plain"].decode().endswith("plain/images/test")
    frame = table.to_pandas().set_index(["stage", "query", "rank"])
    assert len(frame) == 2 * QUERIES * 3
    at = {part: _metres(part) for part in NAMES}
    assert found.matches_QT is not None
    assert found.similarities_QK is not None
    for stage, ids_QK in (("retrieved", found.predictions_QK), ("re-ranked", found.reranked_QK)):
        assert ids_QK is not None
        for q, name in enumerate(NAMES["queries"]):
            for rank, image in enumerate(ids_QK[q, :3].tolist(), 1):
                row = frame.loc[stage, f"queries/{name}", rank]
                column = found.predictions_QK[q].tolist().index(image)
                assert row["image"] == f"database/{NAMES['database'][image]}"
                assert row["score"] == found.similarities_QK[q, column]
                assert row["matches"] == found.matches_QT[q, column]
                assert row["metres"] == pytest.approx(np.hypot(*(at["queries"][q] - at["database"][image])), abs=1e-3)
                assert row["positive"] == (image in POSITIVES[q])


def test_without_ground_truth_everything_but_recall_is_there(
    plain: Path, tmp_path: Path, model: PlaceModel, result: tuple[Benchmark, Result]
) -> None:
    (benchmark,) = load_benchmarks(["folder:plain"], plain, labels="unused")
    found = evaluate(model, benchmark, CONFIG.model_copy(update={"bootstrap": 20}))
    assert not found.retrieved
    assert (found.reranked, found.gain) == (Recall({}), None)
    np.testing.assert_array_equal(found.reranked_QK, result[1].reranked_QK)
    table = predictions_table(benchmark, found, 3).to_pandas()
    assert table["positive"].isna().all()
    assert table["metres"].notna().all()
    assert found.as_dict()["recall"] is None
    assert {name for name in found.metrics() if "recall" in name} == set()
    for results in ([found], [found, result[1]], [result[1], found]):
        assert [results_table(one).row_count for one in results] == [3 if one.gain else 2 for one in results]
        write_results(tmp_path / "results.json", results, model="m")
        write_csv(tmp_path / "results.csv", results)
        assert set(pd.read_csv(tmp_path / "results.csv")["labelled"]) == {one.num_labelled or 0 for one in results} | (
            {QUERIES} if len(results) == 2 else set()
        )


def test_recall_counts_the_labelled_queries_alone(plain: Path, model: PlaceModel) -> None:
    benchmark = load("folder:plain", plain)
    labelled_Q = np.array([True, False, True, False])
    some = replace(benchmark, labelled_Q=labelled_Q)
    found = evaluate(model, some, CONFIG)
    hits = [bool(np.isin(found.predictions_QK[q, :3], POSITIVES[q]).any()) for q in (0, 2)]
    assert found.retrieved[3] == 100 * np.mean(hits)
    assert (found.num_labelled, found.num_queries) == (2, 4)
    positive = predictions_table(some, found, 1).to_pandas().query("stage == 'retrieved'")["positive"]
    assert positive.isna().tolist() == [False, True, False, True]


def test_msls_files_hold_a_line_of_keys_for_each_query(result: tuple[Benchmark, Result], tmp_path: Path) -> None:
    benchmark, found = result
    assert write_submission(tmp_path, benchmark, found) == []
    both = write_submission(tmp_path, replace(benchmark, submission="msls", name="msls_test/oslo"), found)
    assert [path.name for path in both] == ["msls_test-oslo-retrieved.csv", "msls_test-oslo-re-ranked.csv"]
    for path, ids_QK in zip(both, (found.predictions_QK, found.reranked_QK), strict=True):
        assert ids_QK is not None
        lines = [line.split(" ") for line in path.read_text().splitlines()]
        stems = [Path(name).stem for name in NAMES["database"]]
        assert [line[0] for line in lines] == [Path(name).stem for name in NAMES["queries"]]
        assert [line[1:] for line in lines] == [[stems[i] for i in row] for row in ids_QK.tolist()]


def test_kept_features_say_which_row_is_which_image(plain: Path, tmp_path: Path, model: PlaceModel) -> None:
    benchmark = load("folder:plain", plain)
    config = CONFIG.model_copy(update={"features": tmp_path})
    for _ in range(2):
        evaluate(model, benchmark, config, cache=FeatureCache([benchmark], tmp_path))
    tables = {table["role"][0]: table for table in map(pd.read_parquet, tmp_path.glob("*/images.parquet"))}
    assert {role: table["image"].tolist() for role, table in tables.items()} == {
        "database": [str(path) for path in benchmark.database],
        "queries": [str(path) for path in benchmark.queries],
    }
    swapped = replace(benchmark, database=benchmark.queries, queries=benchmark.database)
    swapped = replace(swapped, positive_offsets=np.arange(DATABASE + 1), positive_ids=np.zeros(DATABASE, dtype=int))
    evaluate(model, swapped, config, cache=FeatureCache([swapped], tmp_path))
    (folder,) = (path.parent for path in tmp_path.glob("*/images.parquet") if len(pd.read_parquet(path)) == DATABASE)
    table = pd.read_parquet(folder / "images.parquet")
    assert set(table["role"]) == {"database, queries"}
    stored = StoredFeatures(folder, [(0, 4), (4, 8), (8, 9)])
    for row, shard, shard_row in table[["row", "shard", "shard_row"]].itertuples(index=False):
        number = int(shard.split("-")[1].split(".")[0])
        np.testing.assert_array_equal(
            stored.descriptors(row, row + 1)[0], stored.shards[number]["descriptors"][shard_row]
        )
