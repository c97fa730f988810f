"""A network made in partitions of ZeRO-3, never whole on a rank, has the values of one made whole."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from configs.schema import ModelConfig
from model.network import build_model
from tests.networks import AGGREGATORS
from tests.ranks import on_ranks

TINY = {"backbone": "tiny14", "weights": "random", "frozen_precision": "bf16"}


def anonymous_bytes() -> int:
    """Memory of this process that no file holds, as Linux counts it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def zero() -> Any:
    """DeepSpeed's ZeRO, set up as trainer.engine does: on the CPU, without the kernel that it would compile first."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed.zero


class Partition:
    """A partition of each module's parameters by DeepSpeed, and the most memory seen while it goes on."""

    def __init__(self) -> None:
        self.init = zero().Init
        self.config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
        }
        self.most = 0

    def __call__(self, module: nn.Module) -> None:
        own = list(module.parameters(recurse=False))
        assert own
        assert not any(parameter.is_meta for parameter in module.parameters())
        self.most = max(self.most, anonymous_bytes())
        self.init(module=module, config_dict_or_path=self.config)


def partition_bytes(parameters: Any) -> int:
    return sum(parameter.ds_tensor.nbytes for parameter in parameters)


def check_partitioned_values_are_those_of_the_whole() -> None:
    for aggregator, arguments in AGGREGATORS.items():
        head = {"aggregator": aggregator, "aggregator_args": arguments, "finetune_last_n_blocks": 2}
        compare_partitioned(ModelConfig.model_validate({**head, **TINY}))


def compare_partitioned(config: ModelConfig) -> None:
    whole = build_model(config, seed=5)
    parts = build_model(config, seed=5, partition=Partition())
    assert parts.device.type == "cpu"
    expected = dict(whole.named_parameters())
    for name, parameter in parts.named_parameters():
        assert parameter.numel() == 0, name
        assert parameter.dtype == parameter.ds_tensor.dtype == expected[name].dtype, name
        with zero().GatheredParameters([parameter]):
            assert torch.equal(parameter, expected[name]), name
    parts.backbone.cast_frozen(torch.float32)
    parts.cast_frozen()  # as after DeepSpeed has cast the network
    for name, parameter in parts.named_parameters():
        with zero().GatheredParameters([parameter]):
            assert torch.equal(parameter, expected[name]), name


def check_a_network_is_never_whole_on_a_rank() -> None:
    """ViT-B/14, 330 MiB: beyond its own partition a rank holds far less than what making it whole first would add."""
    Partition()(nn.Linear(3, 3))  # what DeepSpeed loads on first use
    before, partition = anonymous_bytes(), Partition()
    model = build_model(ModelConfig(backbone="vitb14", weights="random"), partition=partition)
    whole = sum(parameter.ds_numel * 4 for parameter in model.parameters())
    own = partition_bytes(model.parameters())
    assert whole > 300 * 2**20
    assert own < whole / dist.get_world_size() * 1.01
    if dist.get_world_size() > 1:  # what the allocator keeps of freed modules is in it
        assert partition.most - before < own + 0.4 * whole, f"{(partition.most - before) >> 20} MiB at most"
    dist.barrier()


test_on_ranks = on_ranks(__file__)
