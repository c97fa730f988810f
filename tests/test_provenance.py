"""What is written of a training: versions and devices, no secret; and no library reports home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from configs.load import recipe_text
from configs.schema import Recipe
from configs.secrets import without_secrets
from trainer.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent


def test_no_library_reports_home() -> None:
    """Outside of tests and CI, where MLflow is silent by itself."""
    look = "import rerankvpr as r; r.prepare_libraries(); import mlflow.telemetry as t; print(t.get_telemetry_client())"
    env = {key: value for key, value in os.environ.items() if key not in ("CI", "PYTEST_CURRENT_TEST")}
    env.pop("MLFLOW_DISABLE_TELEMETRY", None)
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_no_secret_is_kept() -> None:
    assert without_secrets("postgresql://ann:p@ss@host:5432/db?sslmode=x") == "postgresql://host:5432/db"
    assert without_secrets("https://host/set?token=abc and s3://bucket/a@b") == "https://host/set and s3://bucket/a@b"
    assert without_secrets("sqlite:////tmp/mlflow.db") == "sqlite:////tmp/mlflow.db"
    recipe = Recipe.model_validate(
        {
            "data": {"shards": "https://ann:pw1@host/set", "mix": {"https://h/b?key=pw3": 0.5}},
            "tracking": {"uri": "https://bob:pw2@host"},
        }
    )
    text = recipe_text(recipe)
    assert "pw1" not in text
    assert "pw2" not in text
    data = yaml.safe_load(text)["data"]
    assert (data["shards"], data["mix"]) == ("https://host/set", {"https://h/b": 0.5})
    assert Recipe.model_validate(yaml.safe_load(recipe_text(Recipe()))) == Recipe()


def test_provenance_names_commit_versions_and_devices() -> None:
    facts = provenance(world_size=4, device=torch.device("cpu"), data_digest="abc")
    assert facts["version.torch"] == torch.__version__.partition("+")[0]
    assert (facts["world_size"], facts["data.digest"], facts["hosts"]) == ("4", "abc", "1")
    assert all(isinstance(value, str) for value in facts.values())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0 and (ROOT / ".git").exists():
        assert facts["git.commit"] == head.stdout.strip()
        assert facts["git.dirty"] in ("true", "false")
