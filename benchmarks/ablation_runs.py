"""Runs of `benchmarks.ablation`: a training and its evaluations, in a process forked from one that has imported all.

The training is `rerankvpr train`. Its evaluations are the library's `evaluate`, one after the other: they share the
network and, where their settings allow, the features, and draw no report.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import yaml

from configs.files import write_whole
from configs.schema import EvalConfig, Recipe
from eval.benchmarks.benchmark import Benchmark
from eval.recall import first_hits
from eval.report.predictions import RERANKED, RETRIEVED, image_names
from eval.result import Result
from launch import fork_server
from launch.torchrun import preload

KS = (1, 5, 10)
FOUND = "found.json"
LOG = "log.txt"
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Job:
    """A recipe to train, and what its network is judged by; all that comes of it is in `folder`."""

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    benchmarks: tuple[str, ...]
    data_root: Path
    evaluations: Mapping[str, Mapping[str, Any]]  # settings by name
    keep_checkpoints: bool = False

    def found(self) -> dict[str, Any]:
        """Seconds of the training, and hits, depth and seconds of each evaluation, once it has ended well."""
        found: dict[str, Any] = json.loads((self.folder / FOUND).read_text())
        return found

    def fault(self, status: int | None) -> str:
        """Why it ended with this status, in a line; empty if it ended well."""
        if status == 0:
            return ""
        lines = (self.folder / LOG).read_text(errors="replace").split("\n") if (self.folder / LOG).exists() else []
        said = [line.strip() for line in lines if line.strip()]
        how = f"ended by {signal.Signals(-status).name}" if status and status < 0 else f"ended with status {status}"
        return f"{said[-1]} ({how}; {self.folder / LOG})" if said else f"{how}; it printed nothing"


def start_server(recipe: Recipe, threads: int) -> None:
    """Starts the process that jobs are forked from; each computes with `threads` threads. Call it once.

    Raises ValueError where processes cannot be forked so.
    """
    if reason := fork_server.unavailable():
        raise ValueError(reason)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    fork_server.start([*preload(("train",), recipe), "eval.evaluate", "eval.report.predictions", __name__])


def run_jobs(jobs: Sequence[Job], at_once: int) -> Generator[tuple[Job, str]]:
    """Runs jobs, `at_once` side by side; yields each as it ends, with why it failed or an empty text.

    Close it to kill those that run.
    """
    context = multiprocessing.get_context("forkserver")
    waiting = deque(jobs)
    running: dict[int, tuple[Job, ForkServerProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                process = context.Process(target=_forked, args=(job,))
                process.start()
                running[process.sentinel] = job, process
            for sentinel in connection.wait(list(running)):
                assert isinstance(sentinel, int)
                job, process = running.pop(sentinel)
                process.join()
                yield job, job.fault(process.exitcode)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def _forked(job: Job) -> None:
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    fork_server.become_rank([f"rerankvpr:ablation {job.name}"])
    log = os.open(job.folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    if fork_server.served_by and fork_server.served_by.unsafe:
        sys.exit(f"cannot be forked: {fork_server.served_by.unsafe}")
    fork_server.as_a_program(lambda: run(job))


def run(job: Job) -> None:
    """Trains and evaluates; writes what was found. Exits with the training's status if that is not 0."""
    from trainer.command import main as train

    file = job.folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(dict(job.recipe), sort_keys=False))
    began, used = time.monotonic(), time.process_time()
    if status := train([str(file)]):
        sys.exit(status)
    found: dict[str, Any] = {"seconds": time.monotonic() - began, "processor_s": time.process_time() - used}
    for name in GROUP:  # the evaluations are a group of their own
        os.environ.pop(name, None)
    found["evaluations"] = judge(job) if job.evaluations else {}
    write_whole(job.folder / FOUND, json.dumps(found))
    shutil.rmtree(job.folder / "features", ignore_errors=True)
    if not job.keep_checkpoints:
        shutil.rmtree(job.folder / "train" / "checkpoints", ignore_errors=True)


def judge(job: Job) -> dict[str, dict[str, Any]]:
    """What each evaluation of the job's trained network finds, by name; joins a process group of one."""
    from configs.load import load_stored_recipe
    from eval.benchmarks.load import load_benchmarks
    from eval.evaluate import evaluate
    from eval.feature_cache import FeatureCache
    from eval.pixels import as_trained
    from model.lora import merge_lora
    from model.network import build_model
    from trainer.checkpoint import load_model_weights
    from trainer.checkpoint_folder import find_checkpoint
    from trainer.process_group import start_process_group, stop_process_group

    checkpoint = find_checkpoint(job.folder / "train")
    recipe = load_stored_recipe(checkpoint / "recipe.yaml")
    rank = start_process_group(recipe.engine.timeout_s)
    model = build_model(recipe.model.model_copy(update={"weights": "random"}), seed=recipe.seed)
    load_model_weights(model, checkpoint)
    merge_lora(model)
    model.to(rank.device).eval()
    benchmarks, features = load_benchmarks(list(job.benchmarks), job.data_root), job.folder / "features"
    found = {}
    for name, changes in job.evaluations.items():
        began, used = time.monotonic(), time.process_time()
        config = as_trained(changed(recipe.eval, {**changes, "features": features}), recipe.data)
        cache = FeatureCache(benchmarks, features)
        results = [evaluate(model, benchmark, config, cache=cache) for benchmark in benchmarks]
        found[name] = {
            "hits": hits(benchmarks, results),
            "depth": [result.mean_depth for result in results],
            "seconds": time.monotonic() - began,
            "processor_s": time.process_time() - used,
        }
    stop_process_group()
    return found


def changed(config: EvalConfig, changes: Mapping[str, Any]) -> EvalConfig:
    """The settings with some values by key, `key` or `rerank.key`, and no intervals of their own."""
    content = config.model_dump()
    for key, value in {**changes, "bootstrap": 0, "recall_at": list(KS)}.items():
        section, _, name = key.rpartition(".")
        (content[section] if section else content)[name] = value
    return EvalConfig.model_validate(content)


def hits(benchmarks: Sequence[Benchmark], results: Sequence[Result]) -> dict[str, Any]:
    """Of each stage, whether each query has a positive among the first K; queries by benchmark and name."""
    queries: list[list[str]] = []
    by_stage: dict[str, dict[str, list[int]]] = {stage: {str(k): [] for k in KS} for stage in (RETRIEVED, RERANKED)}
    for benchmark, result in zip(benchmarks, results, strict=True):
        queries += [[benchmark.name, name] for name in image_names(benchmark)[1]]
        assert result.reranked_QK is not None
        for stage, found_QK in ((RETRIEVED, result.predictions_QK), (RERANKED, result.reranked_QK)):
            first_Q = first_hits(found_QK, benchmark)
            for k in KS:
                by_stage[stage][str(k)] += (first_Q < k).astype(int).tolist()
    return {"queries": queries, **by_stage}
