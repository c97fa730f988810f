"""The files of an evaluation, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eval.report.predictions import RERANKED, RETRIEVED, SCHEMA


def write_evaluation(folder: Path, photos: Path, before: list[Any], after: list[Any]) -> Path:
    """results.json and predictions.parquet of queries whose first candidates are right or wrong as told."""
    rows = []
    for query in range(len(before)):
        for stage, firsts in ((RETRIEVED, before), (RERANKED, after)):
            for rank in (1, 2, 3):
                known = firsts[query] is not None
                is_right = (firsts[query] if rank == 1 else rank == 2) if known else None
                matches = 40.0 - rank if stage == RERANKED else None
                image = f"database/{(query + rank) % 5}.jpg"
                values = (
                    "town",
                    stage,
                    f"queries/q&{query}.jpg",
                    rank,
                    image,
                    0.9 - rank / 10,
                    matches,
                    12.0,
                    is_right,
                )
                rows.append(dict(zip(SCHEMA.names, values, strict=True)))
    table = pa.Table.from_pylist(rows, schema=SCHEMA).replace_schema_metadata({"root of town": str(photos)})
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "predictions.parquet")
    result = {
        "name": "town",
        "protocol": "25 m <of> & each",
        "layout": "images/test/{database,queries}",
        "num_queries": 6,
        "num_database": 5,
        "recall": {"1": 60.0, "3": 100.0},
        "recall_interval": {"1": [20.0, 95.0]},
        "recall_reranked": {"1": 60.0, "3": 100.0},
        "gain": {"1": [0.0, -20.0, 20.0]},
        "timings": {"extraction_s_per_image": 0.02, "retrieval_s_per_query": 0.001, "rerank_s_per_query": 0.002},
        "notes": ["3 files were left out"],
    }
    made = {"by": "rerankvpr eval <x>", "curves": "http://host/?a&b"}
    (folder / "results.json").write_text(json.dumps({"model": "runs/x", "results": [result], "made": made}))
    return folder
