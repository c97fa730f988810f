"""What a block keeps of an image for its backward pass."""

from __future__ import annotations

from configs.backbones import BackboneSpec
from configs.schema import ModelConfig

FP32 = 4
BLOCK_KEEPS = 10  # activations of a block that backward needs, in channels a token, beside those of the MLP


def mlp_widths(spec: BackboneSpec) -> tuple[float, float]:
    """Outputs of a block's first MLP layers, and activations that its MLP keeps for backward, both / channels."""
    width = spec.hidden / spec.channels * {"gelu": 1, "swiglu": 2}[spec.mlp]
    return width, 2 * width


def block_activations(model: ModelConfig, side: int | tuple[int, int], each: int) -> float:
    """Bytes that one trained block keeps of one image for its backward pass, with fused attention.

    In channels a token: inputs of both norms and both layer scales 4, of query-key-value and the MLP 2, query, key,
    value 3, the attention's output 1, the MLP 8 (SwiGLU 32/3); beside them fp32 numbers of norms and attention. Under
    LoRA layer scales keep nothing, and matrices nothing that have no LoRA.
    """
    spec, targets = model.spec, model.lora_targets
    kept = BLOCK_KEEPS + mlp_widths(spec)[1]
    if model.finetune == "lora":
        kept -= 2  # of layer scales
        kept -= 0 if {"q", "k", "v", "qkv"} & {*targets} else 1
        kept -= 0 if "mlp" in targets else 1 + spec.hidden / spec.channels  # inputs of both layers
    return spec.num_tokens(side) * (kept * spec.channels * each + FP32 * (spec.heads + 4))
