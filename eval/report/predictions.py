"""What was found for each query, image by image: tables, and the files that contests take."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.files import replacing, write_whole
from eval.benchmarks.benchmark import Benchmark
from eval.benchmarks.places import metres_to
from eval.result import Result

RETRIEVED, RERANKED = "retrieved", "re-ranked"
CONTEST_K = 20  # the deepest that Mapillary's evaluation looks (mapillary_sls, evaluate.py)

SCHEMA = pa.schema(
    [
        ("benchmark", pa.string()),
        ("stage", pa.string()),
        ("query", pa.string()),
        ("rank", pa.int32()),
        ("image", pa.string()),
        ("score", pa.float32()),
        ("matches", pa.float32()),
        ("metres", pa.float64()),
        ("positive", pa.bool_()),
    ]
)


def predictions_table(benchmark: Benchmark, result: Result, k: int) -> pa.Table:
    """The first k images of each query and stage, best first; one row per stage, query and rank (from 1).

    Columns are SCHEMA's: `score` is the cosine of the descriptors, `matches` the match score of re-ranking (null where
    none was computed), `metres` and `positive` are null where positions and ground truth are unknown. Images are
    named relative to the folder that holds them all, `root` in the schema's metadata.
    """
    root, queries, database = image_names(benchmark)
    stages = {RETRIEVED: result.predictions_QK}
    if result.reranked_QK is not None:
        stages[RERANKED] = result.reranked_QK
    parts = [_stage(benchmark, result, stage, ids_QK, k, queries, database) for stage, ids_QK in stages.items()]
    return pa.concat_tables(parts).replace_schema_metadata({f"root of {benchmark.name}": root})


def _stage(
    benchmark: Benchmark,
    result: Result,
    stage: str,
    ids_QK: NDArray[np.int64],
    k: int,
    queries: list[str],
    database: list[str],
) -> pa.Table:
    found_QK = _first_stage_columns(result.predictions_QK, ids_QK)
    query_R, column_R = np.nonzero(ids_QK[:, :k] >= 0)  # -1: an approximate index found no more
    image_R, first_R = ids_QK[query_R, column_R], found_QK[query_R, column_R]
    score_R = np.full(len(query_R), np.nan, dtype=np.float32)
    if result.similarities_QK is not None:
        score_R = result.similarities_QK[query_R, first_R].astype(np.float32)
    matches_R = np.full(len(query_R), np.nan, dtype=np.float32)
    if result.matches_QT is not None:
        matched = first_R < result.matches_QT.shape[1]
        matches_R[matched] = result.matches_QT[query_R[matched], first_R[matched]]
    metres_R = np.full(len(query_R), np.nan)
    if benchmark.at is not None:
        metres_R = metres_to(benchmark.at, query_R, image_R).round(3)
    positive_R = _are_positive(benchmark, query_R, image_R)
    columns = [
        pa.repeat(benchmark.name, len(query_R)),
        pa.repeat(stage, len(query_R)),
        pa.array(queries, pa.string()).take(query_R),
        pa.array(column_R + 1, pa.int32()),
        pa.array(database, pa.string()).take(image_R),
        pa.array(score_R, from_pandas=True),
        pa.array(matches_R, from_pandas=True),
        pa.array(metres_R, from_pandas=True),
        pa.array(positive_R, mask=~benchmark.is_labelled_Q[query_R]),
    ]
    return pa.table(columns, schema=SCHEMA)


def _first_stage_columns(before_QK: NDArray[np.int64], after_QK: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each prediction of a stage stands in the first stage, [Q, K]: both hold the same images."""
    columns_QK = np.empty_like(before_QK)
    rows_QK = np.arange(len(before_QK))[:, None]
    columns_QK[rows_QK, after_QK.argsort(axis=1, kind="stable")] = before_QK.argsort(axis=1, kind="stable")
    return columns_QK


def _are_positive(benchmark: Benchmark, query_R: NDArray[np.int64], image_R: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each image is a positive of its query."""
    count = len(benchmark.database)
    of_query = np.repeat(np.arange(len(benchmark.queries)), np.diff(benchmark.positive_offsets))
    return np.isin(query_R * count + image_R, of_query * count + benchmark.positive_ids)


def image_names(benchmark: Benchmark) -> tuple[str, list[str], list[str]]:
    """The folder that holds all images, and the names of queries and database images in it, with slashes."""
    both = [benchmark.queries, benchmark.database]
    root = os.path.commonpath({path.absolute().parent for paths in both for path in paths})
    names = [[_text(path.absolute().relative_to(root).as_posix()) for path in paths] for paths in both]
    return _text(root), names[0], names[1]


def _text(name: str) -> str:
    """A name as UTF-8 can hold it."""
    return name.encode("utf-8", "replace").decode("utf-8")


def write_predictions(folder: Path, tables: list[pa.Table]) -> list[Path]:
    """`predictions.parquet` and `predictions.csv` of all benchmarks, each whole or not at all; their paths."""
    metadata = {key: value for table in tables for key, value in (table.schema.metadata or {}).items()}
    table = pa.concat_tables([one.replace_schema_metadata(None) for one in tables]).replace_schema_metadata(metadata)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "predictions.parquet", folder / "predictions.csv"]
    with replacing(paths[0]) as partial:
        pq.write_table(table, partial)
    with replacing(paths[1]) as partial:
        pyarrow.csv.write_csv(table, partial)
    return paths


def write_submission(folder: Path, benchmark: Benchmark, result: Result) -> list[Path]:
    """Files that a contest's server takes, one per stage, in `folder`; none if the benchmark is of no contest.

    MSLS: a line per query, its key and those of the images found, best first, with spaces between
    (github.com/mapillary/mapillary_sls, files/example_msls_im2im_prediction.csv).
    """
    if benchmark.submission != "msls":
        return []
    stages = {RETRIEVED: result.predictions_QK}
    if result.reranked_QK is not None:
        stages[RERANKED] = result.reranked_QK
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for stage, ids_QK in stages.items():
        lines = [
            " ".join([query.stem, *(benchmark.database[number].stem for number in row[:CONTEST_K] if number >= 0)])
            for query, row in zip(benchmark.queries, ids_QK.tolist(), strict=True)
        ]
        paths.append(folder / f"{benchmark.name.replace('/', '-')}-{stage}.csv")
        write_whole(paths[-1], "\n".join(lines) + "\n")
    return paths
