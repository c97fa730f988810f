"""Networks of each aggregator, as `rerankvpr export` writes them for onnxruntime; real weights for torch.export too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs.schema import Recipe
from tests.checkpoints import write_checkpoint
from tests.export_networks import check_graph, check_tiny
from tests.test_eval_gardens import photographs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("backbone", "aggregator"), [("tiny14", "salad"), ("tiny14", "boq"), ("tiny16", "tokens")])
def test_a_graph_gives_the_engines_descriptors(backbone: str, aggregator: str, tmp_path: Path) -> None:
    check_tiny(tmp_path, backbone, aggregator, ".onnx")


@photographs
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_graph_of_real_weights_gives_the_engines_descriptors(suffix: str, tmp_path: Path) -> None:
    """At another size than that of the position table's training."""
    weights = str(Path(os.environ["RERANKVPR_TEST_WEIGHTS"]).resolve())
    write_checkpoint(tmp_path / "run", Recipe.model_validate({"model": {"backbone": "vits14", "weights": weights}}))
    check_graph(tmp_path / "run", 224, tmp_path / f"net{suffix}")
