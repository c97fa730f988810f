"""A backbone's tensors inside what another program saved: a checkpoint with more in it, keys with more before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from configs.reading import shown

State = dict[str, torch.Tensor]

AGGREGATOR = "aggregator."
# Keys that a ViT's backbone has in facebookresearch's layout and in timm's.
_FIRST, _OTHER = "cls_token", "patch_embed.proj.weight"
_SHOWN = 6


def unwrapped(content: Any) -> State:
    """The tensors of a backbone by its own keys, and those of an aggregator beside it under `aggregator.`.

    `content` is what a file holds: a state_dict, or mappings with one in them (`state_dict`, `model_state_dict`,
    `teacher`, ...), whose keys may have a prefix (`backbone.`, `module.model.`, ...). Other tensors of a network with a
    prefix are left out. Without a backbone in it, the one state_dict that there is comes back as it is. Raises
    ValueError naming what is there if there is none, or several backbones.
    """
    if not isinstance(content, dict):
        raise ValueError("expected a mapping of keys to tensors")
    states = dict(_states(content))
    found = [(place, prefix) for place, state in states.items() for prefix in _prefixes(state)]
    if len(found) > 1:
        places = ", ".join(sorted(shown(f"{place}{prefix}*") for place, prefix in found))
        raise ValueError(f"it holds {len(found)} backbones, {places}; save the state_dict of one")
    if found:
        place, prefix = found[0]
        return _without_prefix(states[place], prefix)
    if list(states) == [""] and len(content) == len(states[""]):
        return states[""]
    raise ValueError(f"expected a mapping of keys to tensors with a backbone's {_FIRST} and {_OTHER}; {told(content)}")


def told(content: Any) -> str:
    """What a file holds instead of a backbone, by the prefixes of its keys."""
    counts: Counter[str] = Counter()
    for place, state in _states(content):
        counts.update(f"{place}{key.partition('.')[0]}" + (".*" if "." in key else "") for key in state)
    if not counts:
        return "it holds no tensors"
    kinds = [f"{shown(kind)} ({count})" if count > 1 else shown(kind) for kind, count in counts.most_common(_SHOWN)]
    return f"it holds {', '.join(kinds)}{', ...' if len(counts) > _SHOWN else ''}"


def _states(content: dict[Any, Any], place: str = "") -> Iterator[tuple[str, State]]:
    """Mappings that hold tensors, by the keys that lead to them."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if tensors:
        yield place, tensors
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, dict) and place.count("/") < 4:
            yield from _states(value, f"{place}{key}/")


def _prefixes(state: State) -> list[str]:
    """What comes before the keys of the backbones of a state_dict."""
    before = [key.removesuffix(_FIRST) for key in state if key == _FIRST or key.endswith(f".{_FIRST}")]
    return [prefix for prefix in before if f"{prefix}{_OTHER}" in state]


def _without_prefix(state: State, prefix: str) -> State:
    if not prefix:
        return state
    parts = prefix.split(".")[:-1]
    outer = [".".join([*parts[:depth], AGGREGATOR]) for depth in range(len(parts))]
    own: State = {}
    for key, tensor in state.items():
        if key.startswith(prefix):
            own[key.removeprefix(prefix)] = tensor
        elif wrapped := next((name for name in outer if key.startswith(name)), ""):
            own[AGGREGATOR + key.removeprefix(wrapped)] = tensor
    return own
