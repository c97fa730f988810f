"""Folders and tables as people have them: each is read as its owner means it, or refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from eval.benchmarks.load import load_benchmarks
from tests import forked
from tests.networks import backbone

CASES = Path(os.environ.get("RERANKVPR_TEST_CASES", ""))
pytestmark = pytest.mark.skipif(
    "RERANKVPR_TEST_CASES" not in os.environ or not (CASES / "nogt.csv").is_file(),
    reason="RERANKVPR_TEST_CASES names no folder with such data",
)

# Spec: queries, queries with ground truth, what the protocol or the layout says.
READ = {
    "folder:plain": (10, 10, "images/test/{database,queries}"),
    "folder:no_images_test": (10, 10, "{database,queries}, @UTM_east"),
    "folder:nolabels": (10, 0, "no ground truth"),
    "manifest:nogt.csv": (10, 0, "no ground truth"),
    "manifest:partial_gt.csv": (10, 5, "5 of 10 queries"),
    "folder:own_vprbench": (6, 6, "{ref,query}, ground_truth_new.npy"),
    "folder:suffixes": (10, 10, "images/test/{database,queries}"),
    "folder:2024-05-01T10:30": (10, 10, "images/test/{database,queries}"),
}


@pytest.mark.slow
def test_every_case_is_evaluated_and_its_predictions_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(backbone("tiny14").state_dict(), tmp_path / "tiny.safetensors")
    specs = [f"{kind}:{CASES / path}" for kind, _, path in (spec.partition(":") for spec in READ)]
    flags = ("--weights", "tiny.safetensors", "--image-size", "42", "--bootstrap", "0", "--recall-at", "1")
    more = ("--data-root", str(CASES), "--pictures", "0", "--out", "out", "--benchmarks", *specs)
    done = forked.run(tmp_path, "rerankvpr", "eval", *flags, *more, environment={"COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert len(results) == len(READ)
    for result, (spec, (queries, labelled, said)) in zip(results, READ.items(), strict=True):
        assert (result["num_queries"], result["num_labelled"]) == (queries, labelled), spec
        assert said in f"{result['protocol']} {result['layout']}", spec
        assert bool(result["recall"]) == bool(labelled), spec
    recalls = {result["name"]: (result["recall"], result["recall_reranked"]) for result in results}
    assert recalls["plain"] == recalls["no_images_test"] != recalls["partial_gt"]
    predictions = pd.read_parquet(tmp_path / "out/predictions.parquet")
    assert predictions.groupby(["benchmark", "stage"]).size().sum() == 2 * sum(count for count, _, _ in READ.values())
    assert "5 of 10 queries have ground truth and count" in done.stdout


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("folder:lonlat_names", "coordinates look like degrees"),
        ("manifest:latlon_range.csv", r"latlon_range\.csv, row 2: lat, lon are 148\.0035974, 9\.0804331"),
        ("manifest:comma_decimal.csv", r"comma_decimal\.csv, row 2: lat is '48,0035974'; a decimal comma; write 48\.0"),
        ("folder:nolabels", "has no ground truth"),
    ],
)
def test_what_is_plainly_wrong_is_refused(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        load_benchmarks([spec], CASES)
    assert "\n" not in str(caught.value)
