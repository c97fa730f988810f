"""What the host waits for in a training step, by line, on the pretend device that the CPU plays.

The product's own step with augmentation and a queue: the fourth, when what happens once is done.
"""

from __future__ import annotations

from collections import Counter

import torch.distributed as dist
from rich.markup import escape

from benchmarks.report import print_table
from model.network import build_model
from tests.pretend_step import pretend_training_device, recipe_of, steps_elsewhere
from trainer.process_group import start_process_group, stop_process_group

WARM = 3


def waits_of_a_step(zero_stage: int, views: int) -> Counter[tuple[str, str]]:
    """Waits of a step by line, and what each is for; needs a process group."""
    recipe = recipe_of(engine={"zero_stage": zero_stage}, data={"images_per_place": views})
    model = build_model(recipe.model)
    with pretend_training_device() as device:
        steps = steps_elsewhere(recipe, model)
        for _ in range(WARM):
            steps.next()
        device.forget()
        steps.next()
        return Counter((wait.code, wait.what) for wait in device.waits)


def main() -> None:
    """Prints the waits at each ZeRO stage, of 6 places x 3 and x 6 images."""
    start_process_group(600)
    rows = []
    for zero_stage in (0, 1, 2):
        few, many = (waits_of_a_step(zero_stage, views) for views in (3, 6))
        rows += [[str(zero_stage), *map(escape, line), str(few[line]), str(many[line])] for line in sorted(few | many)]
        rows.append([str(zero_stage), "all", "", str(few.total()), str(many.total())])
    dist.barrier()
    print_table("waits of the host in a step", ["ZeRO", "line", "for what", "18 images", "36 images"], rows)
    stop_process_group()


if __name__ == "__main__":
    main()
