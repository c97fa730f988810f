"""The network: weights in and refused, frozen blocks, facets from the same forward pass."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from configs.registry import BACKBONES
from configs.schema import ModelConfig, RerankConfig
from eval.local_features import read_local
from model.dinov2 import DinoViT, facebook_layout
from model.network import PlaceModel, build_model
from model.weights import WeightsError, infer_backbone
from tests.networks import AGGREGATORS, backbone

SIZES_OF_TIMM = {
    f"vit{letter}14{suffix}": f"vit_{size}_patch14{registers}_dinov2"
    for letter, size in {"s": "small", "b": "base", "l": "large", "g": "giant"}.items()
    for suffix, registers in {"": "", "_reg": "_reg4"}.items()
}


@pytest.fixture(scope="module")
def model() -> PlaceModel:
    return build_model(ModelConfig(backbone="tiny14", weights="random", finetune_last_n_blocks=2)).eval()


def images(n: int = 3, side: int = 56) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def as_facebook(vit: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone().contiguous() for key, value in facebook_layout(vit.state_dict()).items()}


def test_gated_blocks_go_out_and_in_under_facebook_names() -> None:
    """SwiGLU, as ViT-g has it, in a small ViT."""
    vit = timm.create_model("vit_giant_patch14_dinov2", num_classes=0, embed_dim=48, depth=2, num_heads=3, img_size=28)
    state = as_facebook(vit)
    assert {"blocks.0.mlp.w12.weight", "blocks.1.mlp.w3.bias"} <= state.keys()
    assert not any("fc1" in key or "fc2" in key for key in state)
    back = checkpoint_filter_fn(state, vit)
    assert back.keys() == vit.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in vit.state_dict().items())


@pytest.mark.parametrize("name", ["vits14", "vits14_reg"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_facebook_layout_loads(name: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = backbone(name, "random")
    with torch.no_grad():
        for p in source.parameters():
            p.normal_(std=0.02)
    path = tmp_path / f"weights{suffix}"
    state = as_facebook(source)
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert infer_backbone(path) == name
    loaded = backbone(name, str(path))
    for key, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_weights_of_another_size_are_refused_with_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_file(as_facebook(backbone("tiny14", "random")), path)
    with pytest.raises(WeightsError, match=r"cls_token is \(1, 1, 128\), expected \(1, 1, 384\)") as caught:
        backbone("vits14", str(path))
    assert "missing" in str(caught.value)
    assert "blocks.10" in str(caught.value)


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"cls_token": Path("x")}, path)
    with pytest.raises(WeightsError, match="refused"):
        backbone("vits14", str(path))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_damaged_files_are_named(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=path.name):
        backbone("vits14", str(path))


@pytest.mark.parametrize("name", sorted(SIZES_OF_TIMM))
def test_every_size_is_the_one_timm_knows(name: str) -> None:
    with torch.device("meta"):
        ours = DinoViT(BACKBONES.get(name))
        theirs = timm.create_model(SIZES_OF_TIMM[name], img_size=518, num_classes=0, dynamic_img_size=True)
    assert repr(ours.blocks) == repr(theirs.blocks)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("side", [56, 70, 112])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_descriptors_are_unit_float32_at_any_side(side: int, aggregator: str) -> None:
    config = ModelConfig(backbone="tiny14", weights="random", aggregator=aggregator, finetune="all")
    model = build_model(config.model_copy(update={"aggregator_args": AGGREGATORS[aggregator]}))
    descriptor = model(images(2, side))
    assert descriptor.dtype == torch.float32
    assert descriptor.shape == (2, model.descriptor_size)
    torch.testing.assert_close(descriptor.norm(dim=1), torch.ones(2), rtol=0, atol=1e-6)


def test_forward_equals_timm(model: PlaceModel) -> None:
    with torch.inference_mode():
        expected = F.normalize(model.backbone.forward_features(images())[:, 0], dim=-1)
        torch.testing.assert_close(model(images()), expected, rtol=0, atol=1e-6)


def test_frozen_blocks_get_no_gradient_and_no_graph(model: PlaceModel) -> None:
    model.zero_grad()
    entered = []
    handle = model.backbone.blocks[2].register_forward_pre_hook(lambda _m, x: entered.append(x[0].requires_grad))
    model(images()).sum().backward()
    handle.remove()
    assert entered == [False]
    with_gradient = {
        name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None and "blocks" in name
    }
    assert with_gradient == {"2", "3"}
    assert model.backbone.patch_embed.proj.weight.grad is None
    assert model.backbone.norm.weight.grad is not None


def test_too_many_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match="has 4 blocks"):
        build_model(ModelConfig(backbone="tiny14", weights="random", finetune_last_n_blocks=5))


def test_same_seed_same_weights_and_no_trace_on_the_global_generator() -> None:
    config = ModelConfig(backbone="tiny14", weights="random", finetune_last_n_blocks=1)
    before = torch.random.get_rng_state()
    a, b, c = (build_model(config, seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("layer", [0, 2, -1])
def test_facets_are_those_of_the_attention(model: PlaceModel, layer: int) -> None:
    """Values, keys, queries and the CLS row, written out from the block's own input."""
    vit, x = model.backbone, images()
    seen = {}
    block = vit.blocks[layer]
    handle = block.register_forward_hook(lambda _m, i, o: seen.update(input=i[0], output=o))
    with torch.inference_mode():
        out = {
            facet: read_local(model, x, RerankConfig(layer=layer, facet=facet, saliency_layer=layer))
            for facet in ("query", "key", "value", "token")
        }
        handle.remove()
        qkv = block.attn.qkv(block.norm1(seen["input"]))
        q, k, v = qkv.chunk(3, dim=-1)
        expected = {"query": q, "key": k, "value": v, "token": seen["output"]}
        for facet, tokens in expected.items():
            torch.testing.assert_close(out[facet][1], F.normalize(tokens[:, 1:], dim=-1), rtol=0, atol=1e-6)
        heads = block.attn.num_heads
        q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
        logits = q @ k.transpose(-1, -2) / (q.shape[-1] ** 0.5)
        torch.testing.assert_close(out["value"][2], logits[:, :, 0, 1:].mean(dim=1), rtol=1e-5, atol=1e-5)
        assert torch.equal(out["value"][0], model(x))


def test_hooks_are_gone_after_a_read_out(model: PlaceModel) -> None:
    with torch.inference_mode():
        read_local(model, images(1), RerankConfig())
    assert not any(m._forward_hooks for m in model.modules())


def test_bad_layer_is_named(model: PlaceModel) -> None:
    with pytest.raises(ValueError, match="layer 4: the backbone has 4 blocks"):
        read_local(model, images(1), RerankConfig(layer=4))
