"""Facets, saliency and compact local features: what is read of a network, and what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from configs.schema import ModelConfig, RerankConfig
from eval.local_features import NO_CELL, compact, min_max, pca_basis, random_basis, read_local, salient
from model.facets import FACETS, log_bin
from model.network import PlaceModel, build_model

CPU = torch.device("cpu")
TINY = ModelConfig(backbone="tiny14", weights="random", finetune_last_n_blocks=0)


@pytest.fixture(scope="module")
def model() -> PlaceModel:
    return build_model(TINY).eval()


def log_bin_by_loops(local_BNC: torch.Tensor, grid: tuple[int, int], hierarchy: int) -> torch.Tensor:
    rows, columns = grid
    maps = local_BNC.reshape(len(local_BNC), rows, columns, -1)
    out = []
    for y in range(rows):
        for x in range(columns):
            parts = [maps[:, y, x]]
            for k in range(hierarchy):
                reach, half = 3**k, 3**k // 2
                for dy in (-reach, 0, reach):
                    for dx in (-reach, 0, reach):
                        if dy or dx:
                            i, j = min(max(y + dy, 0), rows - 1), min(max(x + dx, 0), columns - 1)
                            window = maps[:, max(0, i - half) : i + half + 1, max(0, j - half) : j + half + 1]
                            parts.append(window.mean(dim=(1, 2)))
            out.append(torch.cat(parts, dim=-1))
    return F.normalize(torch.stack(out, dim=1), dim=-1)


@pytest.mark.parametrize(("grid", "hierarchy"), [((6, 5), 1), ((6, 5), 2), ((1, 4), 2), ((7, 8), 3)])
def test_log_binning_equals_loops(grid: tuple[int, int], hierarchy: int) -> None:
    local = torch.randn(2, grid[0] * grid[1], 3, generator=torch.Generator().manual_seed(1))
    binned = log_bin(local, grid, hierarchy)
    assert binned.shape[2] == 3 * (1 + 8 * hierarchy)
    torch.testing.assert_close(binned, log_bin_by_loops(local, grid, hierarchy))


@pytest.mark.parametrize("facet", FACETS)
@pytest.mark.parametrize("include_cls", [False, True])
def test_every_facet_at_every_layer(model: PlaceModel, facet: str, include_cls: bool) -> None:
    inputs = torch.randn(2, 3, 56, 42, generator=torch.Generator().manual_seed(2))
    seen = []
    for layer in range(len(model.backbone.blocks)):
        config = RerankConfig(facet=facet, layer=layer, include_cls=include_cls)
        with torch.inference_mode():
            descriptor_BD, local_BNC, saliency_BN = read_local(model, inputs, config)
        assert local_BNC.shape == (2, 12 + include_cls, 12 if facet == "attn" else 128)
        assert saliency_BN.shape == (2, 12)
        torch.testing.assert_close(local_BNC.norm(dim=2), torch.ones(2, 12 + include_cls))
        torch.testing.assert_close(descriptor_BD, model(inputs))
        seen.append(local_BNC)
    assert not any(torch.equal(seen[0], other) for other in seen[1:])


def test_attention_facet_and_softmax_saliency_are_rows_of_the_attention(model: PlaceModel) -> None:
    inputs = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(3))
    caught: list[torch.Tensor] = []
    block = model.backbone.blocks[1]
    handle = block.attn.qkv.register_forward_hook(lambda *args: caught.append(args[2]))
    with torch.inference_mode():
        config = RerankConfig(facet="attn", layer=1, saliency_layer=1, saliency="softmax", include_cls=True)
        _, local_BNC, saliency_BN = read_local(model, inputs, config)
        _, _, logits_BN = read_local(model, inputs, RerankConfig(saliency_layer=1))
    handle.remove()
    heads, width = block.attn.num_heads, caught[0].shape[2] // 3
    q, k = (caught[0][0, :, i * width : (i + 1) * width].unflatten(1, (heads, -1)) for i in (0, 1))
    attention = torch.stack([(q[:, h] @ k[:, h].T * block.attn.scale).softmax(1) for h in range(heads)]).mean(0)
    torch.testing.assert_close(local_BNC[0], F.normalize(attention[:, 1:], dim=1))
    torch.testing.assert_close(saliency_BN[0], attention[0, 1:])
    logits = torch.stack([q[0, h] @ k[1:, h].T * block.attn.scale for h in range(heads)]).mean(0)
    torch.testing.assert_close(logits_BN[0], logits)


def test_saliency_is_scaled_in_each_image_and_a_constant_map_is_no_division_by_zero() -> None:
    saliency = torch.tensor([[-4.0, 0.0, -2.0], [10.0, 20.0, 12.9], [3.0, 3.0, 3.0]])
    assert salient(saliency, 0.3).tolist() == [[False, True, True], [False, True, False], [False] * 3]
    assert salient(saliency, None).all()
    assert min_max(saliency)[0].tolist() == [0.0, 1.0, 0.5]


def test_compact_keeps_salient_patches_their_cells_and_their_values() -> None:
    g = torch.Generator().manual_seed(4)
    local = F.normalize(torch.randn(3, 13, 32, generator=g), dim=2)
    saliency = torch.rand(3, 12, generator=g)
    for kind, tolerance in (("fp16", 1e-3), ("int8", 6e-3)):
        config = RerankConfig(dtype=kind, saliency_thresh=0.5, include_cls=True)
        kept = compact(local, saliency, (3, 4), config)
        values = kept.codes_PC.float() * kept.scale_P[:, None]
        keep = min_max(saliency) > 0.5
        assert kept.count_I.tolist() == (1 + keep.sum(dim=1)).tolist()
        assert kept.cell_P2[0].tolist() == [NO_CELL, NO_CELL]
        torch.testing.assert_close(values[1 : kept.count_I[0]], local[0, 1:][keep[0]], rtol=0, atol=tolerance)
        cells = torch.nonzero(keep[0].reshape(3, 4)).tolist()
        assert kept.cell_P2[1 : kept.count_I[0]].tolist() == cells
    assert kept.codes_PC.dtype == torch.int8


def test_pca_keeps_inner_products_and_both_bases_are_orthonormal() -> None:
    g = torch.Generator().manual_seed(6)
    flat = F.normalize(torch.randn(500, 5, generator=g) @ torch.randn(5, 40, generator=g), dim=1)
    basis = pca_basis(flat, 5)
    torch.testing.assert_close((flat @ basis) @ (flat @ basis).T, flat @ flat.T, rtol=1e-4, atol=1e-4)
    for one in (basis, random_basis(40, 12)):
        torch.testing.assert_close(one.T @ one, torch.eye(one.shape[1]), rtol=1e-4, atol=1e-5)
    assert torch.equal(random_basis(40, 12), random_basis(40, 12))
