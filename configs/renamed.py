"""Names that keys of a recipe had, for recipes and checkpoints that still have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "engine.gradient_accumulation": "engine.encode_chunks",
    "eval.index": "eval.faiss_index",
    "eval.index_params": "eval.faiss_params",
    "eval.rerank.store": "eval.rerank.dtype",
}


def with_present_names(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A stored recipe with every renamed key under its present name, in the same section."""
    out: dict[str, Any] = {}
    for key, value in content.items():
        present = RENAMED.get(f"{prefix}{key}")
        name = present.rpartition(".")[2] if present else key
        out[name] = with_present_names(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
    return out
