"""What an index holds, in lines for a person."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eval.features import shard_path
from eval.index.approximate_files import SHORTLIST
from eval.index.images import FILE, read_images
from eval.index.manifest import part_folder, read_manifest, read_part
from eval.pixels import pixel_rule

SHOWN = 10


def overview(folder: Path) -> list[tuple[str, str]]:
    """Pairs of what and how much. Raises IndexFault where there is no index that can be read."""
    manifest = read_manifest(folder)
    config, model, parts = manifest.config(), manifest.model(), [read_part(folder, name) for name in manifest.parts]
    tables = [
        read_images(part_folder(folder, name), part.images, in_metres=part.in_metres)
        for name, part in zip(manifest.parts, parts, strict=True)
    ]
    located = sum(int(table.positions.known.sum()) for table in tables)
    dated = sum(int((~np.isnat(table.times)).sum()) for table in tables)
    sizes = [
        shard_path(part_folder(folder, name), number).stat().st_size
        for name, part in zip(manifest.parts, parts, strict=True)
        for number in range(len(part.counts))
    ]
    per_image = sum(sizes) / max(1, manifest.images)
    lines = [
        ("photographs", f"{manifest.images:,}, of which {located:,} with a position, {dated:,} with a time"),
        ("network", f"{model.backbone} with {model.aggregator}, {manifest.precision}"),
        ("weights", manifest.weights),
        ("pixels", pixel_rule(config)),
        ("local features", f"{config.rerank.dtype}, block {config.rerank.layer}" if config.rerank.enabled else "none"),
        ("size", f"{sum(sizes) / 2**20:,.1f} MiB in {len(sizes):,} shards, {per_image / 1000:,.1f} kB per photograph"),
    ]
    if (asked := manifest.approximate) is not None:
        params = f" ({asked['params']})" if asked["params"] else ""
        lines.append(("search", f"{asked['factory']}{params}, the first {SHORTLIST} scored exactly"))
    else:
        lines.append(("search", "exact"))
    if (learned := manifest.verdict) is not None:
        told = f"confidence above {learned['threshold']:.4f}, learned on {learned['sample']} photographs"
        lines.append(("in the map", f"{told}, each without those within {learned['apart']}"))
    else:
        lines.append(("in the map", "no verdict: the index is too small to teach one"))
    for name, part in zip(manifest.parts, parts, strict=True):
        table = part_folder(folder, name) / FILE
        lines.append((f"part {name}", f"{part.images:,} photographs of {part.root} ({table})"))
        lines += [("", note) for note in part.notes]
        if part.left_out:
            lines.append(("", f"{len(part.left_out):,} photographs were left out:"))
            lines += [("", f"  {photo}: {reason}") for photo, reason in part.left_out[:SHOWN]]
    return lines
