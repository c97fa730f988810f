"""Every backbone family under every aggregator, in both graph formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export_networks import SIDES, check_tiny
from tests.networks import AGGREGATORS


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("backbone", SIDES)
def test_a_graph_gives_the_engines_descriptors(backbone: str, aggregator: str, suffix: str, tmp_path: Path) -> None:
    check_tiny(tmp_path, backbone, aggregator, suffix)
