"""DINOv3 against timm's own model, and facebookresearch's keys."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from configs.backbones import BackboneSpec
from configs.registry import BACKBONES
from configs.schema import ModelConfig, RerankConfig
from eval.local_features import read_local
from model.aggregators.cls import ClsAggregator
from model.backbone import network_of
from model.network import PlaceModel, build_model
from model.weights import WeightsError, infer_backbone
from tests.networks import AGGREGATORS, backbone

NAMES = [name for name in BACKBONES if name.startswith("dinov3")]


def timms(spec: BackboneSpec, **changes: object) -> nn.Module:
    """timm's own model of a size, which pools by mean unless told otherwise."""
    name = spec.published.removeprefix("timm/").partition(".")[0]
    return timm.create_model(name, num_classes=0, global_pool="token", **changes)


@pytest.fixture(params=NAMES)
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, BackboneSpec, nn.Module]:
    """A name, its spec with two narrow blocks of the same kind, and timm's model of those, with values."""
    name, spec = request.param, BACKBONES.get(request.param)
    head = spec.channels // spec.heads
    narrow = replace(spec, depth=2, heads=2, channels=2 * head, hidden=spec.hidden * 2 * head // spec.channels)
    monkeypatch.setitem(BACKBONES._known, name, narrow)
    theirs = timms(spec, depth=2, num_heads=2, embed_dim=2 * head).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return name, narrow, theirs


@pytest.mark.parametrize("name", NAMES)
def test_every_size_is_the_one_timm_knows(name: str) -> None:
    spec = BACKBONES.get(name)
    with torch.device("meta"):
        ours, theirs = network_of(spec)(spec), timms(spec)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert {m.eps for m in ours.modules() if isinstance(m, nn.LayerNorm)} == {spec.norm_eps} == {1e-5}


def test_tokens_and_facets_are_timms(size: tuple[str, BackboneSpec, nn.Module], tmp_path: Path) -> None:
    """Read from timm's file; q and k as its attention multiplies them, with biases and rotated."""
    name, spec, theirs = size
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "timm.safetensors")
    vit = backbone(name, str(tmp_path / "timm.safetensors")).eval()
    used: dict[str, torch.Tensor] = {}
    attend = F.scaled_dot_product_attention

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: object) -> torch.Tensor:
        used.update(query=q, key=k, value=v)
        return attend(q, k, v, **rest)

    images = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        expected = theirs.forward_features(images)
        torch.testing.assert_close(vit(images), expected, rtol=0, atol=2e-5)
        patch.setattr(F, "scaled_dot_product_attention", watched)
        theirs.forward_features(images)  # what its last block used stays
    model = PlaceModel(vit, ClsAggregator(vit.spec))
    logits = (used["query"][:, :, :1] @ used["key"].transpose(2, 3)).mean(dim=1)[:, 0, 5:] * (
        spec.channels // 2
    ) ** -0.5
    with torch.inference_mode():
        for facet in ("query", "key", "value"):
            _, local, saliency = read_local(model, images, RerankConfig(layer=-1, facet=facet, saliency_layer=-1))
            wanted = used[facet].transpose(1, 2).flatten(2)[:, 5:]
            torch.testing.assert_close(local, F.normalize(wanted, dim=-1), rtol=0, atol=1e-5)
            torch.testing.assert_close(saliency, logits, rtol=1e-4, atol=1e-4)


def test_published_keys_go_out_and_in(size: tuple[str, BackboneSpec, nn.Module], tmp_path: Path) -> None:
    name, spec, theirs = size
    vit = backbone(name)
    vit.load_state_dict(theirs.state_dict())
    out = network_of(spec).published_layout(vit.state_dict(), spec)
    assert {"storage_tokens", "rope_embed.periods", "mask_token", "blocks.1.ls2.gamma"} <= out.keys()
    assert ("blocks.0.mlp.w3.weight" in out) == (spec.mlp == "swiglu")
    assert ("blocks.0.attn.qkv.bias_mask" in out) == spec.qkv_bias
    if spec.qkv_bias:
        assert out["blocks.0.attn.qkv.bias"].chunk(3)[1].abs().max() == 0
    torch.testing.assert_close(out["rope_embed.periods"], vit.rope.periods)
    out["local_cls_norm.weight"] = torch.ones(spec.channels)  # of some releases, for their own training
    save_file({key: value.contiguous() for key, value in out.items()}, tmp_path / "out.safetensors")
    assert infer_backbone(tmp_path / "out.safetensors") == name
    back = backbone(name, str(tmp_path / "out.safetensors")).state_dict()
    assert all(torch.equal(back[key], value) for key, value in vit.state_dict().items())


def test_a_file_without_biases_has_them_zero(tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in backbone("tiny16").state_dict().items() if "_bias" not in key}
    save_file(state, tmp_path / "plain.safetensors")
    vit = backbone("tiny16", str(tmp_path / "plain.safetensors"))
    assert vit.blocks[3].attn.q_bias.abs().max() == vit.blocks[0].attn.v_bias.abs().max() == 0
    del state["reg_token"]
    save_file(state, tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match=r"none\.safetensors has no register tokens"):
        backbone("tiny16", str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_it_trains_under_every_aggregator(aggregator: str) -> None:
    """Learned tokens stand before the patches and are not rotated; frozen blocks have no graph."""
    fields = {"backbone": "tiny16", "weights": "random", "finetune_last_n_blocks": 2, "aggregator": aggregator}
    model = build_model(ModelConfig.model_validate({**fields, "aggregator_args": AGGREGATORS[aggregator]})).train()
    images = torch.randn(2, 3, 32, 48)
    descriptors = model(images)
    descriptors[0].pow(3).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {
        n for n, p in model.named_parameters() if not p.requires_grad
    }
    with torch.inference_mode():
        for facet in ("value", "token", "attn"):
            again, local, saliency = read_local(model.eval(), images, RerankConfig(facet=facet, include_cls=True))
            assert local.shape[:2] == (2, 7)
            assert saliency.shape == (2, 6)
            assert torch.equal(again, descriptors)


def test_places_are_rotated_in_float32_whatever_the_weights_are() -> None:
    vit = backbone("tiny16").eval()
    with torch.inference_mode():
        whole = vit.embed(torch.zeros(1, 3, 32, 48))[1]
        half = vit.to(torch.bfloat16).embed(torch.zeros(1, 3, 32, 48, dtype=torch.bfloat16))[1]
    assert half.dtype == torch.float32
    assert torch.equal(whole, half)
