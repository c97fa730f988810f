"""Fixtures of the cluster tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from tests.cluster.slurm import Slurm, slurm
from tests.cluster.workplace import rerankvpr, write_workplace

CURVE_STEPS = 250


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its shards and its benchmark."""
    folder = write_workplace(tmp_path_factory.mktemp("cluster"))
    write_shards(read_gsv_cities(folder / "native"), folder / "shards")
    return folder


@pytest.fixture(scope="session")
def unbroken(workplace: Path) -> Path:
    """The output of a training on two ranks of one host that nothing interrupted."""
    flags = ("--trainer.max-steps", str(CURVE_STEPS), "--tracking.enabled", "False", "--eval.benchmarks")
    recipe = str(workplace / "recipe.yaml")
    rerankvpr(workplace, "launch", "--nproc-per-node", "2", "--", "train", recipe, "--output", "unbroken", *flags)
    return workplace / "unbroken"


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM of two virtual nodes."""
    with slurm(tmp_path_factory.mktemp("two") / "slurm", 2) as started:
        yield started


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM of two virtual nodes that binds tasks to cores, each node with a /tmp of its own."""
    with slurm(tmp_path_factory.mktemp("site") / "slurm", 2, like_a_site=tmp_path_factory.getbasetemp()) as started:
        yield started


@pytest.fixture
def four_nodes(tmp_path: Path) -> Iterator[Slurm]:
    """A SLURM of four."""
    with slurm(tmp_path / "slurm", 4) as started:
        yield started


def pytest_configure() -> None:
    """SIGTERM ends a session as Ctrl-C does: what was started is taken down."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
