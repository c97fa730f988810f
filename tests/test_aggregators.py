"""Aggregators: their sizes, the formulas of their papers, their authors' files, and 16 bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from configs.registry import AGGREGATORS, BACKBONES
from configs.schema import ModelConfig
from model.aggregators.salad import transport
from model.network import build_model, meta_model
from model.projection import whitening
from model.weights import WeightsError, infer_backbone
from tests.networks import AGGREGATORS as SMALL
from tests.networks import backbone
from trainer.aggregator_cost import aggregator_cost

NARROW = replace(BACKBONES.get("tiny14"), channels=16)


def tiny(aggregator: str, **changes: object) -> ModelConfig:
    fields = {"backbone": "tiny14", "weights": "random", "finetune_last_n_blocks": 2, "aggregator": aggregator}
    return ModelConfig.model_validate({**fields, "aggregator_args": SMALL[aggregator], **changes})


@pytest.mark.parametrize(
    ("aggregator", "size", "parameters"),
    [("cls", 768, 0), ("gem", 768, 1), ("salad", 8448, 1_411_009), ("boq", 12288, 8_626_080), ("tokens", 6144, 6144)],
)
def test_sizes_are_the_published_ones(aggregator: str, size: int, parameters: int) -> None:
    """Of ViT-B: SALAD's paper says 1.4 million parameters, BoQ's 8.6, ImAge's 8 tokens of 768."""
    model = meta_model(ModelConfig(backbone="vitb14", weights="random", aggregator=aggregator))
    assert model.descriptor_size == size
    assert sum(parameter.numel() for parameter in model.aggregator.parameters()) == parameters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("aggregator", SMALL)
def test_an_aggregator_trains_in_16_bits(aggregator: str, dtype: torch.dtype) -> None:
    """Value and gradients are those of float64 on the same 16-bit tokens, to the rounding of 16 bits.

    fp16 keeps nothing of GeM's 1e-6 cubed: the gradient of its power would not be finite, and no step ever taken.
    Where layers of 16 bits follow each other (SALAD, BoQ), roundings add up, so that whole tensors are compared.
    """
    torch.manual_seed(0)
    tokens = torch.randn(3, 42, 16, generator=torch.Generator().manual_seed(4)).to(dtype)
    state = None
    found = {}
    for kind in (dtype, torch.float64):
        module = AGGREGATORS.build(aggregator, SMALL[aggregator], NARROW).to(kind)
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        state = state or {key: value.clone() for key, value in module.state_dict().items()}
        module.load_state_dict(state)
        x = tokens.detach().to(kind, copy=True).requires_grad_()
        out = module(x, (3, 13))
        F.normalize(out.double() if kind == torch.float64 else out.float(), dim=-1).pow(3).sum().backward()
        assert x.grad is not None
        used = [p.grad for p in module.parameters() if p.grad is not None]
        found[kind] = [out, x.grad, *used]
    for ours, exact in zip(found[dtype], found[torch.float64], strict=True):
        if aggregator in ("salad", "boq"):
            assert (ours.double() - exact).norm() < 0.06 * exact.norm() + 1e-3
        else:
            torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=1e-4)


def test_transport_shares_patches_out() -> None:
    """After many scalings both sums hold; after three, the scalings are those of Sinkhorn's own formula."""
    score = 3 * torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dustbin = torch.tensor([0.7], dtype=torch.float64)
    share = transport(score, dustbin, 300).exp()
    torch.testing.assert_close(share.sum(dim=2), torch.ones(2, 11).double())
    torch.testing.assert_close(share.sum(dim=1), torch.tensor([1.0, 1, 1, 1, 7]).double().expand(2, -1))
    kernel = torch.cat([score, dustbin.expand(2, 11, 1)], dim=2).exp()
    patches = torch.ones(2, 11).double()
    for _ in range(3):
        clusters = torch.tensor([1.0, 1, 1, 1, 7]).double() / torch.einsum("bnk,bn->bk", kernel, patches)
        patches = 1 / torch.einsum("bnk,bk->bn", kernel, clusters)
    expected = torch.einsum("bnk,bn,bk->bnk", kernel, patches, clusters)
    torch.testing.assert_close(transport(score, dustbin, 3).exp(), expected)


def test_salads_published_keys_load(tmp_path: Path) -> None:
    """A file of a whole network, laid out as SALAD's is: 1 x 1 convolutions, and a dropout between two of them."""
    torch.manual_seed(0)

    def layers(out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(128, 16, 1), nn.Dropout(0.3), nn.ReLU(), nn.Conv2d(16, out, 1))

    token = nn.Sequential(nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 8))
    theirs = nn.ModuleDict({"token_features": token, "cluster_features": layers(8), "score": layers(3)}).eval()
    state = {f"aggregator.{key}": value for key, value in theirs.state_dict().items()}
    state["aggregator.dust_bin"] = torch.tensor(0.4)
    vit = backbone("tiny14")
    state |= {f"backbone.model.{key}": value.clone() for key, value in vit.state_dict().items()}
    save_file(state, tmp_path / "salad.safetensors")
    assert infer_backbone(tmp_path / "salad.safetensors") == "tiny14"
    model = build_model(tiny("salad", weights=str(tmp_path / "salad.safetensors"))).eval()
    images = torch.randn(2, 3, 42, 56)
    with torch.inference_mode():
        tokens = vit.eval()(images)
        map_BCHW = tokens[:, 1:].transpose(1, 2).unflatten(2, (3, 4))
        share = transport(theirs["score"](map_BCHW).flatten(2).transpose(1, 2), torch.tensor([0.4]), 3)[..., :3].exp()
        clusters = F.normalize(
            share.transpose(1, 2) @ theirs["cluster_features"](map_BCHW).flatten(2).transpose(1, 2), dim=-1
        )
        expected = F.normalize(torch.cat([F.normalize(token(tokens[:, 0]), dim=-1), clusters.flatten(1)], dim=1), dim=1)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-6)
    with pytest.raises(WeightsError, match=r"token\.2\.weight is"):
        build_model(tiny("salad", weights=str(tmp_path / "salad.safetensors"), aggregator_args={"clusters": 3}))


class TheirBoqLayer(nn.Module):
    """A layer of Bag of Queries in torch's own modules, named as in its checkpoints."""

    def __init__(self, channels: int, queries: int) -> None:
        super().__init__()
        heads = channels // 64
        self.encoder = nn.TransformerEncoderLayer(channels, heads, 4 * channels, dropout=0, batch_first=True)
        self.queries = nn.Parameter(torch.randn(1, queries, channels))
        self.self_attn = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm_q = nn.LayerNorm(channels)
        self.cross_attn = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm_out = nn.LayerNorm(channels)


def test_boqs_published_keys_load(tmp_path: Path) -> None:
    """A file of a whole network, laid out as BoQ's is, and its answer from tokens before the final norm."""
    torch.manual_seed(0)
    theirs = nn.ModuleDict(
        {
            "proj_c": nn.Conv2d(128, 64, 3, padding=1),
            "norm_input": nn.LayerNorm(64),
            "boqs": nn.ModuleList([TheirBoqLayer(64, 4), TheirBoqLayer(64, 4)]),
            "fc": nn.Linear(8, 2),
        }
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    vit = backbone("tiny14")
    state = {f"aggregator.{key}": value for key, value in theirs.state_dict().items()}
    state |= {f"backbone.dino.{key}": value.clone() for key, value in vit.state_dict().items()}
    torch.save(state, tmp_path / "boq.pth")
    model = build_model(tiny("boq", weights=str(tmp_path / "boq.pth"))).eval()
    assert not model.backbone.norm.weight.requires_grad
    images = torch.randn(2, 3, 42, 56)
    with torch.inference_mode():
        map_BCHW = vit.eval()(images, final_norm=False)[:, 1:].transpose(1, 2).unflatten(2, (3, 4))
        x = theirs["norm_input"](theirs["proj_c"](map_BCHW).flatten(2).transpose(1, 2))
        answers = []
        for layer in theirs["boqs"]:
            x = layer.encoder(x)
            q = layer.queries.expand(2, -1, -1)
            q = layer.norm_q(q + layer.self_attn(q, q, q)[0])
            answers.append(layer.norm_out(layer.cross_attn(q, x, x)[0]))
        expected = F.normalize(theirs["fc"](torch.cat(answers, dim=1).transpose(1, 2)).flatten(1), dim=-1)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-6)


def test_learned_tokens_pass_the_last_blocks() -> None:
    """They join before block 2, after class token and registers, and are the descriptor after the final norm."""
    model = build_model(tiny("tokens"), seed=2).eval()
    vit, images = model.backbone, torch.randn(2, 3, 28, 42)
    seen: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda _m, i, _o: seen.append(i[0])) for block in vit.blocks]
    with torch.inference_mode():
        found = model(images)
    for handle in handles:
        handle.remove()
    assert [x.shape[1] for x in seen] == [7, 7, 9, 9]
    with torch.inference_mode():
        x = torch.cat([model.aggregator.tokens.agg_token.expand(2, -1, -1), vit.blocks[1](seen[1])], dim=1)
        expected = vit.norm(vit.blocks[3](vit.blocks[2](x)))[:, :2].flatten(1)
    torch.testing.assert_close(found, F.normalize(expected, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("finetune", ["head", "last_n_blocks"])
def test_frozen_blocks_carry_the_gradient_of_tokens_that_join_before_them(finetune: str) -> None:
    model = build_model(tiny("tokens", finetune=finetune, finetune_last_n_blocks=1, aggregator_args={"block": 1}))
    with_graph = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda _m, _i, out: with_graph.append(out.requires_grad))
    model(torch.randn(2, 3, 28, 28))[0].pow(3).sum().backward()
    assert with_graph == [False, True, True, True]
    assert model.aggregator.tokens.agg_token.grad.abs().max() > 0
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None and "blocks" in name}
    assert trained == ({"3"} if finetune == "last_n_blocks" else set())


@pytest.mark.parametrize(
    ("aggregator", "arguments", "words"),
    [
        ("salad", {"cluster": 3}, "model.aggregator: salad takes no argument 'cluster'; nearest: clusters"),
        ("salad", {"clusters": 0}, "model.aggregator: salad: all arguments are 1 or more"),
        ("boq", {"channels": 100}, "model.aggregator: boq: channels is a multiple of 64"),
        ("tokens", {"block": 4}, "model.aggregator: tokens: block 4: the backbone has 4 blocks; use -4 to 3"),
        ("tokens", {"tokens": 0}, "model.aggregator: tokens: tokens 0: expected 1 or more"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(aggregator: str, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        meta_model(tiny(aggregator, aggregator_args=arguments))
    assert len(str(caught.value).splitlines()) == 1


def test_images_of_too_few_patches_are_refused() -> None:
    model = build_model(tiny("salad", aggregator_args={"clusters": 6}))
    with pytest.raises(ValueError, match="images of 2 x 3 patches; the aggregator needs 7 or more"):
        model(torch.zeros(1, 3, 28, 42))


def test_whitened_descriptors_have_no_correlation_and_come_back_from_a_file(tmp_path: Path) -> None:
    """From more images than numbers, and from fewer; too few are refused."""
    generator = torch.Generator().manual_seed(0)
    for count, channels in ((300, 20), (40, 128)):
        mixed = torch.randn(count, channels, generator=generator) @ torch.randn(channels, channels, generator=generator)
        sample = F.normalize(mixed, dim=-1)
        mean, weight = whitening(sample, 10)
        torch.testing.assert_close(torch.cov(((sample - mean) @ weight.T).T), torch.eye(10), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"model\.projection_dim 40: 40 training images span 39 directions"):
        whitening(sample, 40)

    config = tiny("gem", projection_dim=10)
    model = build_model(config).eval()
    assert model.descriptor_size == 10
    assert not model.projection.weight.requires_grad
    with torch.no_grad():
        model.projection.mean.copy_(mean)
        model.projection.weight.copy_(weight)
    images = torch.randn(2, 3, 28, 28, generator=generator)
    with torch.inference_mode():
        found = model(images)
        model.projects = False
        expected = F.normalize((model(images) - mean) @ weight.T, dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    state = {key.removeprefix("backbone."): value for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "whole.safetensors")
    again = build_model(config.model_copy(update={"weights": str(tmp_path / "whole.safetensors")})).eval()
    assert again.projection_loaded
    with torch.inference_mode():
        assert torch.equal(again(images), found)
    with pytest.raises(ValueError, match=r"model\.projection_dim 129: descriptors have 128 numbers"):
        meta_model(tiny("gem", projection_dim=129))


def test_what_an_aggregator_costs_is_counted_on_no_memory() -> None:
    """SALAD's three perceptrons, and its sum of 128 x 64 over 256 patches, by hand; GeM multiplies no matrices."""
    patches, channels = 256, BACKBONES.get("vitb14").channels
    layers = patches * (2 * channels * 512 + 512 * 64 + 512 * 128) + channels * 512 + 512 * 256
    cost = aggregator_cost(ModelConfig(backbone="vitb14", aggregator="salad"), 257, (16, 16))
    assert cost.flops == 2 * (layers + patches * 64 * 128)
    assert 2 * patches * 512 * 4 < cost.kept < 4 * patches * 512 * 4
    assert aggregator_cost(ModelConfig(aggregator="gem"), 257, (16, 16)).flops == 0
    with pytest.raises(ValueError, match=r"model\.aggregator salad: images of 6 x 6 patches; it needs 65 or more"):
        aggregator_cost(ModelConfig(aggregator="salad"), 37, (6, 6))
