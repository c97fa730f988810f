"""What `rerankvpr plan` says of S, B, L and g on many GPUs, as a table in Markdown: memory and time, by formula."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import tyro

from configs.schema import Recipe
from trainer.parameter_sizes import Sizes
from trainer.plan import Assumed, advice, plan, shortfall

BACKBONES = ("vits14", "vitb14", "vitl14", "vitg14")


@dataclass(frozen=True)
class Options:
    """Prints the plan of each backbone at each number of GPUs; nothing is measured."""

    gpus: list[int] = field(default_factory=lambda: [1, 8, 16, 64])
    """Numbers of GPUs, a rank each."""
    device_gb: float = 80
    """Memory of a GPU."""
    tflops: float = 198
    """Sustained by a GPU: by default 20 % of an H100's bf16 peak."""
    places: int = 30
    """Places a GPU, of 4 images each."""
    finetune: Literal["all", "last_n_blocks"] = "all"
    """What is trained; last_n_blocks is the last 4."""
    zero_stage: Literal[1, 2, 3] = 1
    """ZeRO stage."""
    epoch_places: int = 62_000
    """Places of an epoch (GSV-Cities: about 62,000)."""


def main() -> None:
    """Prints the table."""
    options = tyro.cli(Options)
    print("| backbone | GPUs | images per step | GB per GPU | GB of host per GPU | s per step", end=" ")
    print("| MB sent per step | s per epoch |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for backbone in BACKBONES:
        sizes: Sizes | None = None
        for gpus in options.gpus:
            recipe = Recipe.model_validate(
                {
                    "model": {"backbone": backbone, "weights": "random", "finetune": options.finetune},
                    "data": {"shards": "none", "places_per_batch": options.places * gpus},
                    "engine": {"zero_stage": options.zero_stage, "precision": "bf16"},
                }
            )
            planned = plan(recipe, Assumed(gpus, options.device_gb, options.tflops), sizes)
            sizes = planned.sizes
            images = options.places * recipe.data.images_per_place * gpus
            row = [backbone, str(gpus), str(images), f"{planned.memory.device_peak / 1e9:.1f}"]
            if shortfall(planned):
                row[-1] += f" (too much; {advice(planned)})"
            assert planned.seconds is not None
            epoch_s = math.floor(options.epoch_places / (options.places * gpus)) * planned.seconds
            sent = sum(planned.sent.values()) / 1e6
            row += [f"{planned.memory.host_peak / 1e9:.1f}", f"{planned.seconds:.3f}", f"{sent:.0f}", f"{epoch_s:.0f}"]
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
