"""Licences of published weights that must travel with whatever is made from them."""

from __future__ import annotations

from pathlib import Path

from configs.backbones import BackboneSpec

_TEXTS = {"DINOv3 License": "dinov3.md"}


def licence_text(spec: BackboneSpec) -> str:
    """The licence that a copy or a derivative of the backbone's weights must carry; empty if none must.

    DINOv2's weights are under Apache-2.0, of which naming it is enough.
    """
    file = _TEXTS.get(spec.licence)
    return (Path(__file__).parent / file).read_text(encoding="utf-8") if file else ""


def licence_metadata(spec: BackboneSpec) -> dict[str, str]:
    """What the metadata of a file of weights says: the licence by name, and its text if that must travel along."""
    text = licence_text(spec)
    return {"licence": spec.licence} | ({"licence_text": text} if text else {})
