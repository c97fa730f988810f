"""`python -m tests.gardens RUNS`: one rank of several `rerankvpr eval` commands, whose forward passes are made once.

RUNS is a JSON of [port of the group's store, arguments of eval] for each command.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

import torch

from configs.schema import RerankConfig
from eval import extract
from model.network import PlaceModel

FORWARD = {"layer", "facet", "saliency_layer", "saliency", "include_cls", "hierarchy"}  # what a forward pass reads


def remember_forward_passes() -> None:
    """Wraps extraction's own reading: a batch that was read before, at the same facets, gives the same tensors."""
    read, known = extract.read_local, {}

    def read_once(model: PlaceModel, inputs: torch.Tensor, config: RerankConfig) -> tuple[torch.Tensor, ...]:
        facets = config.model_dump_json(include=FORWARD)
        key = hashlib.sha256(inputs.numpy().tobytes()).hexdigest() + facets
        if key not in known:
            known[key] = read(model, inputs, config)
        return known[key]

    extract.read_local = read_once


if __name__ == "__main__":
    from launch import cli

    remember_forward_passes()
    for port, arguments in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(port)
        if status := cli.main(["eval", *arguments]):
            sys.exit(status)
