"""Fixtures that several test modules share."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch.distributed as dist

from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from eval.benchmarks import catalogue
from eval.benchmarks.catalogue import CATALOGUE
from tests.forked import share_server
from tests.gpu import hide_gpus
from tests.photos import SMALL_SHARD, write_gsv_cities, write_noise_benchmark
from tests.ranks import end_groups
from tests.sharing import Sharing, add_options

hide_gpus()
hypothesis.settings.register_profile("patient", deadline=None)  # other processes share the cores
hypothesis.settings.load_profile("patient")

Native = tuple[Path, dict[tuple[str, int], list[Path]]]


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    if (processes := config.getoption("--processes")) > 1:
        config.pluginmanager.register(Sharing(processes, share_server))


@pytest.fixture(scope="module")
def single_process() -> Iterator[None]:
    """A process group of one, as every program of the project has."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups._WORLD_GROUP = None  # type: ignore[attr-defined] # its copy of the group, which it would use in the next one


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a training needs."""
    from tests.training import make_workplace

    folder = tmp_path_factory.mktemp("train")
    make_workplace(folder)
    return folder


@pytest.fixture(scope="session")
def noise_benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a benchmark of noise, to be read only; see `write_noise_benchmark`."""
    folder = tmp_path_factory.mktemp("noise")
    write_noise_benchmark(folder)
    return folder


@pytest.fixture(scope="session")
def groups_of_ranks() -> Iterator[None]:
    """Ends the processes that checks ran in."""
    yield
    end_groups()


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own; skips the test where it cannot be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command for a small tmpfs")
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MiB: room for a few checkpoints."""
    with tmpfs(tmp_path / "disk", "20m") as disk:
        yield disk


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB: room for a few hundred lines."""
    with tmpfs(tmp_path / "tiny_disk", "64k") as disk:
        yield disk


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """Three cities in GSV-Cities' layout, and the files of each place."""
    folder = tmp_path_factory.mktemp("native")
    return folder, write_gsv_cities(folder)


@pytest.fixture(scope="session")
def shard_set(native: Native, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their shard set, of small tars; nobody changes it."""
    out = tmp_path_factory.mktemp("sets") / "set"
    write_shards(read_gsv_cities(native[0]), out, ShardOptions(shard_bytes=SMALL_SHARD))
    return out


@pytest.fixture
def own_native(native: Native, tmp_path: Path) -> Native:
    """A copy of the three cities to damage, and its files."""
    folder = tmp_path / "native"
    shutil.copytree(native[0], folder)
    return folder, {key: [folder / f.relative_to(native[0]) for f in files] for key, files in native[1].items()}


@pytest.fixture
def any_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue without its counts: folders of tests are small."""
    for name, entry in CATALOGUE.items():
        variants = {key: replace(variant, counts=None) for key, variant in entry.variants.items()}
        monkeypatch.setitem(catalogue.CATALOGUE, name, replace(entry, variants=variants))
