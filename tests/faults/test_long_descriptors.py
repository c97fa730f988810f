"""Descriptors of 8,448 and 12,288 numbers as graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.schema import Recipe
from tests.export_networks import check_graph
from tests.test_long_descriptors import SIDE, made  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_graph_gives_the_engines_descriptors(made: tuple[Path, Recipe, int], suffix: str) -> None:  # noqa: F811
    check_graph(made[0] / "run", SIDE, made[0] / f"net{suffix}")
