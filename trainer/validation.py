"""Evaluation in the middle of training: on the same ranks, with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from configs.schema import EvalConfig
from eval.benchmarks.load import load_benchmarks
from eval.evaluate import FeatureStore, Result, evaluate
from eval.report.pictures import draw_pictures
from trainer.checkpoint import best_recall
from trainer.engine import whole_weights
from trainer.progress import Update, progress_bar
from trainer.tracking import Tracker
from trainer.watchdog import Watchdog


class Validation:
    """The recipe's benchmarks, evaluated with the weights in the engine."""

    def __init__(self, config: EvalConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.benchmarks = load_benchmarks(config.benchmarks, config.data_root)

    def run(
        self,
        engine: Any,
        tracker: Tracker,
        watchdog: Watchdog,
        *,
        label: str,
        step: int,
        rerank: bool,
        pictures: Path | None = None,
    ) -> list[Result]:
        """Results of all benchmarks, printed and tracked; every rank must call this."""
        if not self.benchmarks:
            return []  # at ZeRO-3 the whole weights would be gathered for nothing
        config, main = self.config, dist.get_rank() == 0
        if not rerank:
            config = config.model_copy(update={"rerank": config.rerank.model_copy(update={"enabled": False})})
        results, store = [], FeatureStore(self.benchmarks)
        watchdog.enter("evaluation", step)
        with whole_weights(engine):
            for benchmark in self.benchmarks:
                with progress_bar(self.console, f"{label}: {benchmark.name}", active=main) as update:
                    result = evaluate(
                        engine.module, benchmark, config, on_progress=_watched(update, watchdog), store=store
                    )
                results.append(result)
                params = {"benchmark": benchmark.name, "protocol": result.protocol, "weights": label, "rerank": rerank}
                tracker.evaluation(benchmark.name, step, params, result.metrics())
                if main:
                    self.console.print(f"{label}: {result.line()}", highlight=False, soft_wrap=True)
                if pictures and main:
                    for picture in draw_pictures(pictures / benchmark.name, benchmark, result, engine.module, config):
                        tracker.artifact(picture, f"pictures/{benchmark.name}")
        return results

    def mean_recall(self, results: list[Result]) -> float:
        """Mean over benchmarks of the first-stage recall at the smallest K: what `best` and early stopping go by."""
        k = self.config.recall_at[0]
        return sum(result.recall[k] for result in results) / len(results)


def _watched(update: Update, watchdog: Watchdog) -> Update:
    def both(*args: Any, **kwargs: Any) -> None:
        watchdog.alive()
        update(*args, **kwargs)

    return both


def agreed_best_recall(folder: Path) -> float:
    """`best_recall` as rank 0 reads it; every rank must call this."""
    holder = [best_recall(folder) if dist.get_rank() == 0 else 0.0]
    dist.broadcast_object_list(holder)
    return holder[0]
