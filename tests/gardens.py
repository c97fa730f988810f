"""`python -m tests.gardens RUNS`: one rank of several `rerankvpr eval` commands, which read each image once.

RUNS is a JSON of [port of the group's store, arguments of eval] for each command.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

import torch

from configs.schema import RerankConfig
from eval import forward
from model.network import PlaceModel

FORWARD = {"layer", "facet", "saliency_layer", "saliency", "include_cls", "hierarchy"}  # what a forward pass reads


class ReadOnce:
    """Stands for the reading of a forward pass: an image is read once at the same facets."""

    def __init__(self) -> None:
        self.read, self.known = forward.read_local, {}

    def __call__(self, model: PlaceModel, inputs: torch.Tensor, config: RerankConfig) -> tuple[torch.Tensor, ...]:
        facets = config.model_dump_json(include=FORWARD)
        keys = [hashlib.sha256(image.numpy().tobytes()).hexdigest() + facets for image in inputs]
        if new := [i for i, key in enumerate(keys) if key not in self.known]:
            outputs = self.read(model, inputs[new], config)
            self.known |= {keys[i]: image for i, *image in zip(new, *outputs, strict=True)}
        return tuple(map(torch.stack, zip(*(self.known[key] for key in keys), strict=True)))


if __name__ == "__main__":
    from launch import cli

    forward.read_local = once = ReadOnce()
    made = []  # images that were read by the end of each command
    for port, arguments in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(port)
        if status := cli.main(["eval", *arguments]):
            sys.exit(status)
        made.append(len(once.known))
    assert made[-1] < 1.2 * made[0], f"images read by command: {made}; all are to be the first one's but a few"
