"""Evaluation on hosts that have folders of their own, and errors that one rank alone meets."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from configs.ranks import on_all_ranks
from configs.schema import EvalConfig, RerankConfig
from eval.benchmarks.benchmark import Benchmark, make_benchmark
from eval.evaluate import evaluate
from eval.extract import extract
from eval.feature_cache import FeatureCache
from eval.scratch import PREFIX, remove_leftovers
from model.network import build_model
from tests.ranks import on_ranks, shared_folder
from tests.test_eval_features import TINY, write_photos

ERRORS = (SafetensorError, OSError, ValueError, RuntimeError, KeyError, MemoryError, torch.OutOfMemoryError)
CONFIG = EvalConfig(image_size=28, batch_size=2, recall_at=[1], bootstrap=0, rerank=RerankConfig(top_k=3))


def photos() -> tuple[Path, Benchmark]:
    """A folder that all ranks see, with a benchmark of five database images and three queries."""
    folder = shared_folder()
    if dist.get_rank() == 0:
        write_photos(folder / "database", 5)
        write_photos(folder / "queries", 3)
    dist.barrier()
    database, queries = (sorted((folder / part).iterdir()) for part in ("database", "queries"))
    return folder, make_benchmark("three", "frame", database, queries, [np.array([i]) for i in range(3)])


class OwnTemporaryFolder:
    """Inside, this rank's temporary folder is one that no other rank looks into, as on a host of its own."""

    def __enter__(self) -> None:
        self.before = tempfile.tempdir
        tempfile.tempdir = tempfile.mkdtemp(prefix=f"host{dist.get_rank()}-")
        self.folder = Path(tempfile.tempdir)

    def __exit__(self, *_: object) -> None:
        tempfile.tempdir = self.before


def check_hosts_without_a_common_temporary_folder_evaluate_beside_the_output() -> None:
    """The recalls of one host, and nothing is left in the output."""
    folder, benchmark = photos()
    expected = evaluate(build_model(TINY).eval(), benchmark, CONFIG)
    real_exists = Path.exists

    def exists(path: Path, **more: bool) -> bool:
        """A path in another rank's temporary folder is not there: this rank is another host."""
        owners = [part[4 : part.index("-")] for part in path.parts if part.startswith("host")]
        return all(owner == str(dist.get_rank()) for owner in owners) and real_exists(path, **more)

    with OwnTemporaryFolder(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "exists", exists)
        cache = FeatureCache([benchmark], beside=folder / "run")
        found = evaluate(build_model(TINY).eval(), benchmark, CONFIG, cache=cache)
        assert (cache.folder("any key").parent.parent == folder / "run") == (dist.get_world_size() > 1)
        dist.barrier()
        del cache
        dist.barrier()
        assert not list(folder.glob(f"run/{PREFIX}*"))
        if dist.get_world_size() > 1:
            with pytest.raises(ValueError, match=r"rank 1 on \S+ does not see rank 0's temporary folder .*--features"):
                evaluate(build_model(TINY).eval(), benchmark, CONFIG)
    np.testing.assert_array_equal(found.predictions_QK, expected.predictions_QK)
    assert found.reranked == expected.reranked


def check_an_error_of_any_kind_on_one_rank_ends_the_work_on_all() -> None:
    """The rank that met it is named; an error that is nobody's mistake keeps its type where it happened."""
    last = dist.get_world_size() - 1
    mine = dist.get_rank() == last

    def work(kind: type[Exception]) -> None:
        with on_all_ranks():
            if mine:
                raise kind("disk on fire")

    for kind in ERRORS:
        is_mistake = issubclass(kind, SafetensorError | OSError | ValueError)
        keeps_type = mine and (last == 0 or not is_mistake)
        with pytest.raises(kind if keeps_type else ValueError, match="disk on fire") as caught:
            work(kind)
        if not keeps_type:
            name = "" if is_mistake else f"{kind.__name__}: "
            assert str(caught.value).startswith(f"rank {last}: {name}")


def check_a_rank_that_cannot_write_its_shard_ends_all() -> None:
    """The folder of features goes away under the last rank, as on a host that has another one."""
    folder, benchmark = photos()
    last = dist.get_world_size() - 1
    features = folder / "features"
    model = build_model(TINY).eval()
    extract(model, benchmark.queries, CONFIG, features, key="k")
    dist.barrier()
    if dist.get_rank() == last:
        for path in features.glob("features-*"):
            path.unlink()
            path.mkdir()  # a shard cannot be put there
    dist.barrier()
    with pytest.raises((ValueError, OSError), match="features-0"):
        extract(model, benchmark.queries, CONFIG, features, key="k")


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}abc" / "k").mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    remove_leftovers(tmp_path / "absent")


test_on_ranks = on_ranks(__file__)
