"""What `engine.overlap` does to a step: one training with it and one without, a step of each in turns, in one run.

The product's own step on made-up images, all blocks of the backbone trained. `python -m benchmarks.step --overlap`
starts the ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from unittest.mock import patch

import torch
import torch.distributed as dist

import trainer.engine
from configs.schema import Recipe
from model.network import build_model
from tests.pretend_step import Steps
from trainer.process_group import Rank, start_process_group, stop_process_group

VIEWS, WARM = 4, 2
ZERO_STAGES = (1, 2)


def recipe_of(backbone: str, places: int, side: int, zero_stage: int, *, overlap: bool) -> Recipe:
    """A training of all blocks, without a queue."""
    return Recipe.model_validate(
        {
            "name": "overlap",
            "output": "unused",
            "data": {
                **{"shards": "none", "places_per_batch": places, "images_per_place": VIEWS, "image_size": side},
                "augmentation": "none",
            },
            "model": {"backbone": backbone, "weights": "random", "finetune": "all"},
            "memory": {"size": 0},
            "engine": {"zero_stage": zero_stage, "overlap": overlap},
            "tracking": {"enabled": False},
        }
    )


def reductions(step: Steps) -> int:
    """Sums over ranks that a step asks for while it goes backward and updates: its buckets, and a few votes."""
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as told:
        step.next()
    return told.call_count


def in_turns(rank: Rank, pair: tuple[Steps, Steps], steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each step of the slowest rank, without and with overlap; who goes first changes from step to step."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM + steps):
        for which in (0, 1) if number % 2 else (1, 0):
            dist.barrier()
            began = time.perf_counter()
            pair[which].next()
            if rank.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = torch.tensor(time.perf_counter() - began, device=rank.device)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            taken[which].append(seconds.item())
    return taken[0][WARM:], taken[1][WARM:]


def main() -> None:
    """Runs as a rank; rank 0 prints the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--places", type=int, required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--buckets", type=int, required=True)
    options = parser.parse_args()
    rank = start_process_group(600)
    figures: dict[str, float] = {}
    for zero_stage in ZERO_STAGES:
        recipes = [
            recipe_of(options.backbone, options.places, options.side, zero_stage, overlap=overlap)
            for overlap in (False, True)
        ]
        models = [build_model(recipe.model) for recipe in recipes]
        # The product's buckets take all of a small network, whose gradients could then be sent after backward alone.
        size = sum(one.numel() for one in models[0].parameters()) // options.buckets
        trainer.engine.BUCKET = trainer.engine.OVERLAPPED = size
        without, beside = (Steps(recipe, model, rank) for recipe, model in zip(recipes, models, strict=True))
        figures[f"zero_{zero_stage}/all_reduces"] = reductions(without)
        figures[f"zero_{zero_stage}/all_reduces_with_overlap"] = reductions(beside)
        plain, overlapped = in_turns(rank, (without, beside), options.steps)
        ratios = [one / other for one, other in zip(overlapped, plain, strict=True)]
        figures |= {
            f"zero_{zero_stage}/step_s": statistics.median(plain),
            f"zero_{zero_stage}/step_s_with_overlap": statistics.median(overlapped),
            f"zero_{zero_stage}/ratio": statistics.median(ratios),
            f"zero_{zero_stage}/ratio_least": min(ratios),
            f"zero_{zero_stage}/ratio_most": max(ratios),
        }
    if rank.is_main:
        print(json.dumps(figures))
    stop_process_group()


if __name__ == "__main__":
    main()
