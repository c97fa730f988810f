"""How candidates were re-ranked, in a line, for whoever reads a recall."""

from __future__ import annotations

from configs.schema import RerankConfig


def rerank_rule(config: RerankConfig) -> str:
    """Depth, features, thresholds and score: `top 30, value of block -2, saliency > 0.2, match > 0.65, ...`."""
    depth = f"top {config.top_k}" + ("" if config.when == "always" else f" at most ({config.when})")
    features = f"{config.facet} of block {config.layer}"
    if config.hierarchy:
        features += f", {config.hierarchy} rings"
    if config.project != "none":
        features += f", {config.project} to {config.project_size}"
    salient = "all patches"
    if config.saliency_thresh is not None:
        salient = f"saliency > {config.saliency_thresh:g} ({config.saliency}, block {config.saliency_layer})"
    counted = {"count": "number of matches", "similarity_sum": "sum of their cosines"}[config.score]
    if config.match_weight == "saliency":
        counted += " weighted by saliency"
    if config.geometry == "translation":
        counted += f" on one shift within {config.geometry_cells} patches"
    parts = [depth, features, salient, f"match > {config.nn_match_thresh:g}", counted]
    if config.include_cls:
        parts.insert(3, "with the class token")
    if config.global_weight:
        parts.append(f"global weight {config.global_weight:g}")
    return ", ".join(parts)
