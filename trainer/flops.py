"""Floating-point operations of a training step, and the share of a device's peak that they reach (MFU)."""

from __future__ import annotations

import re

import torch

from configs.backbones import BackboneSpec
from configs.image_size import height_width
from configs.schema import ModelConfig, Recipe
from trainer.aggregator_cost import aggregator_cost

# Dense TFLOP/s of one device as its vendor's data sheet gives them, without sparsity: (words of its name, 16-bit tensor
# cores, fp32 outside them). More words come first.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("H100 PCIe", 756, 51),
    ("H100 NVL", 835, 60),
    ("H200 NVL", 835, 60),
    ("GH200", 989, 67),
    ("H100", 989, 67),
    ("H200", 989, 67),
    ("H800", 989, 67),
    ("GB200", 2500, 80),
    ("B200", 2250, 75),
    ("B300", 2250, 75),
    ("A100", 312, 19.5),
    ("A800", 312, 19.5),
    ("A30", 165, 10.3),
    ("A10G", 70, 35),
    ("A10", 125, 31.2),
    ("A40", 149.7, 37.4),
    ("A6000", 154.8, 38.7),
    ("L40S", 362, 91.6),
    ("L40", 181, 90.5),
    ("L4", 121, 30.3),
    ("RTX 6000 Ada", 364.2, 91.1),
    ("V100 PCIE", 112, 14),
    ("V100", 125, 15.7),
    ("T4", 65, 8.1),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71, 35.6),
)
BF16_MISSING = ("V100 PCIE", "V100", "T4")  # no bf16 in hardware


def block_flops(spec: BackboneSpec, side: int | tuple[int, int]) -> float:
    """Operations of one block's forward pass on one image, a multiply-add counted as two.

    Per token and channel: query, key, value and projection 8 channels, an MLP 4 hidden (16 channels at width 4), SwiGLU
    6 hidden; attention 4 tokens.
    """
    tokens, layers = spec.num_tokens(side), {"gelu": 2, "swiglu": 3}[spec.mlp]
    return tokens * spec.channels * (8.0 * spec.channels + 2.0 * layers * spec.hidden + 4.0 * tokens)


def forward_flops(spec: BackboneSpec, side: int | tuple[int, int]) -> float:
    """Operations of a forward pass on one image: the blocks and the patch embedding."""
    embedding = 2.0 * 3 * spec.patch**2 * spec.channels * (spec.num_tokens(side) - spec.num_prefix_tokens)
    return spec.depth * block_flops(spec, side) + embedding


def head_flops(recipe: Recipe) -> float:
    """Operations of the aggregator's forward pass on one training image."""
    spec, size = recipe.model.spec, recipe.data.image_size
    return aggregator_cost(recipe.model, spec.num_tokens(size), spec.grid(*height_width(size))).flops


def num_trained_blocks(model: ModelConfig) -> int:
    """Blocks that gradients go through: trained ones, or those with LoRA."""
    last = model.finetune_last_n_blocks
    return {"all": model.spec.depth, "last_n_blocks": last, "lora": last, "head": 0}[model.finetune]


def block_backward_flops(model: ModelConfig, side: int | tuple[int, int]) -> float:
    """Operations of the backward pass through one trained block on one image.

    Twice those forward; under LoRA once those of the matrices, which get no gradient themselves, and twice those of
    attention. LoRA's own products are left out: rank / channels of the matrices'.
    """
    forward, spec = block_flops(model.spec, side), model.spec
    if model.finetune != "lora":
        return 2 * forward
    attention = 4.0 * spec.num_tokens(side) ** 2 * spec.channels
    return forward + attention


def model_flops(recipe: Recipe) -> float:
    """Operations that training on one image needs: the forward pass, and twice that of the trained part backward.

    What is computed again to save memory is left out: MFU counts the model's work, not the machine's.
    """
    model, side = recipe.model, recipe.data.image_size
    trained, forward = num_trained_blocks(model), forward_flops(model.spec, side)
    head = 3 * head_flops(recipe)
    if trained == model.spec.depth and model.finetune != "lora":
        return 3 * forward + head
    return forward + trained * block_backward_flops(model, side) + head


def step_flops(recipe: Recipe) -> float:
    """Operations that a rank does for each of its images in a step, with what is computed again.

    Activation checkpointing runs trained blocks once more; engine.encode_chunks above 1 the whole network.
    """
    model, side = recipe.model, recipe.data.image_size
    again = 0.0
    if recipe.engine.activation_checkpointing:
        again += num_trained_blocks(model) * block_flops(model.spec, side)
    if recipe.engine.encode_chunks > 1:
        again += forward_flops(model.spec, side) + head_flops(recipe)
    return model_flops(recipe) + again


def peak_tflops(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """Peak TFLOP/s of a GPU by the name that CUDA gives it, at fp32, bf16 or fp16; None where it is not known.

    `tf32` is half the 16-bit figure, on all GPUs that have it.
    """
    words = re.split(r"[\s-]+", device_name.lower())
    if "laptop" in words:
        return None
    for name, half, single in PEAKS:
        if set(name.lower().split()) <= set(words):
            if precision == "bf16" and name in BF16_MISSING:
                return None
            if precision == "fp32" and tf32 and name not in BF16_MISSING:
                return half / 2
            return single if precision == "fp32" else half
    return None


def device_peak_tflops(recipe: Recipe) -> float | None:
    """Peak TFLOP/s of a rank's device: engine.peak_tflops, else that of this process's GPU where it is known."""
    if recipe.engine.peak_tflops:
        return recipe.engine.peak_tflops
    if not torch.cuda.is_available():
        return None
    return peak_tflops(torch.cuda.get_device_name(), recipe.engine.precision, tf32=recipe.engine.tf32)
