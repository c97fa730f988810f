"""A backbone inside another program's checkpoint is found under its prefix, or what is there instead is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.dinov2 import facebook_layout
from model.weights import WeightsError, infer_backbone, read_weights
from tests.networks import backbone


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return facebook_layout(backbone("tiny14").state_dict())


def _with(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("prefix", "wrapped", "aggregator"),
    [
        ("", "{}", ""),
        ("backbone.model.", "{}", "aggregator.dust_bin"),
        ("backbone.model.", "state_dict", "aggregator.dust_bin"),
        ("module.backbone.", "model_state_dict", "module.aggregator.dust_bin"),
        ("module.", "{}", ""),
        ("backbone.", "teacher", ""),
        ("model.backbone.dino.", "a/b", "model.aggregator.dust_bin"),
    ],
)
def test_a_backbone_is_found_under_its_prefix(
    tmp_path: Path, state: dict[str, torch.Tensor], prefix: str, wrapped: str, aggregator: str
) -> None:
    content: Any = _with(prefix, state)
    if aggregator:
        content |= {aggregator: torch.zeros(1), "classifier.weight": torch.zeros(2)}
    for key in reversed([] if wrapped == "{}" else wrapped.split("/")):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}}}
    torch.save(content, tmp_path / "theirs.ckpt")
    found = read_weights(tmp_path / "theirs.ckpt")
    assert found.keys() == state.keys() | ({"aggregator.dust_bin"} if aggregator else set())
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert infer_backbone(tmp_path / "theirs.ckpt") == "tiny14"
    built = backbone("tiny14", str(tmp_path / "theirs.ckpt")).state_dict()
    assert torch.equal(built["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"encoder.layer.weight": torch.zeros(1), "head": torch.zeros(1)}, r"it holds encoder\.\*, head"),
        ({"state_dict": {"encoder.a": torch.zeros(1), "encoder.b": torch.zeros(1)}}, r"state_dict/encoder\.\* \(2\)"),
        ({"epoch": 3}, "it holds no tensors"),
        ([torch.zeros(1)], "expected a mapping"),
    ],
)
def test_what_holds_no_backbone_is_named(tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "theirs.ckpt")
    with pytest.raises(WeightsError, match=said) as caught:
        infer_backbone(tmp_path / "theirs.ckpt")
    assert "theirs.ckpt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_backbones_are_refused_by_their_prefixes(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    both = {key: value.clone() for part in ("student.", "teacher.") for key, value in _with(part, state).items()}
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(WeightsError, match=r"2 backbones, student\.\*, teacher\.\*; save the state_dict of one"):
        read_weights(tmp_path / "both.safetensors")


@pytest.mark.parametrize("state", [{"pos_\nembed": torch.zeros(1)}, {"a": {"b\n.x": torch.zeros(1)}}])
@pytest.mark.parametrize("read", [lambda file: backbone("tiny14", str(file)), infer_backbone])
def test_a_key_of_two_lines_is_shown_in_one(read: Any, state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"odd\.pth .*\\n") as caught:
        read(tmp_path / "odd.pth")
    assert "\n" not in str(caught.value)
