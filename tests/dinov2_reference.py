"""DINOv2's forward pass in plain torch, from the published definition and over the published keys; no timm, no modules.

Oquab et al., DINOv2 (TMLR 2024), and Darcet et al., Vision Transformers Need Registers (ICLR 2024). How the position
table is resized is part of the published models: facebookresearch/dinov2's hub builds them with `interpolate_offset`
0.1 and no antialiasing, those with registers with offset 0 and antialiasing.
"""

import torch
import torch.nn.functional as F

PATCH = 14
EPS = 1e-6


def reference_embeddings(state: dict[str, torch.Tensor], images_B3HW: torch.Tensor) -> torch.Tensor:
    """Tokens [B, T, C] that enter the first block: class, registers, patches."""
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    map_BChw = F.conv2d(images_B3HW, weight, bias, stride=PATCH)
    rows, columns = map_BChw.shape[-2:]
    positions_1NC = state["pos_embed"]
    side = round((positions_1NC.shape[1] - 1) ** 0.5)
    grid_1Css = positions_1NC[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    if (rows, columns) == (side, side):
        grid_1Chw = grid_1Css
    elif "register_tokens" in state:
        grid_1Chw = F.interpolate(grid_1Css, size=(rows, columns), mode="bicubic", antialias=True)
    else:
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid_1Chw = F.interpolate(grid_1Css, scale_factor=scale, mode="bicubic", antialias=False)
    tokens = [state["cls_token"] + positions_1NC[:, :1]]
    if "register_tokens" in state:
        tokens.append(state["register_tokens"])
    tokens = [token.expand(len(images_B3HW), -1, -1) for token in tokens]
    return torch.cat([*tokens, (map_BChw + grid_1Chw).flatten(2).transpose(1, 2)], dim=1)


def reference_tokens(state: dict[str, torch.Tensor], images_B3HW: torch.Tensor, heads: int) -> torch.Tensor:
    """Tokens [B, T, C] after the final norm."""
    x_BTC = reference_embeddings(state, images_B3HW)
    channels = x_BTC.shape[-1]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    for block in (
        {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"blocks.{i}.")} for i in range(depth)
    ):
        y_BTC = F.layer_norm(x_BTC, (channels,), block["norm1.weight"], block["norm1.bias"], EPS)
        qkv_BTX = y_BTC @ block["attn.qkv.weight"].T + block["attn.qkv.bias"]
        q_BhTd, k_BhTd, v_BhTd = (p.unflatten(2, (heads, -1)).transpose(1, 2) for p in qkv_BTX.split(channels, dim=2))
        attention_BhTT = (q_BhTd @ k_BhTd.transpose(2, 3) * (channels // heads) ** -0.5).softmax(dim=-1)
        y_BTC = (attention_BhTT @ v_BhTd).transpose(1, 2).flatten(2)
        x_BTC = x_BTC + (y_BTC @ block["attn.proj.weight"].T + block["attn.proj.bias"]) * block["ls1.gamma"]
        y_BTC = F.layer_norm(x_BTC, (channels,), block["norm2.weight"], block["norm2.bias"], EPS)
        if "mlp.w12.weight" in block:  # SwiGLU
            gate_BTH, value_BTH = (y_BTC @ block["mlp.w12.weight"].T + block["mlp.w12.bias"]).chunk(2, dim=-1)
            y_BTC = F.silu(gate_BTH) * value_BTH @ block["mlp.w3.weight"].T + block["mlp.w3.bias"]
        else:
            hidden_BTH = F.gelu(y_BTC @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
            y_BTC = hidden_BTH @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]
        x_BTC = x_BTC + y_BTC * block["ls2.gamma"]
    return F.layer_norm(x_BTC, (channels,), state["norm.weight"], state["norm.bias"], EPS)
