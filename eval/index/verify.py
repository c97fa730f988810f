"""Every byte of an index against its digests."""

from __future__ import annotations

from pathlib import Path

from configs.progress import OnProgress, untold
from eval.features import FeatureError, StoredFeatures
from eval.index.approximate_files import block_files, damaged, trained_path
from eval.index.images import read_images
from eval.index.index import Index, shard_bounds_of
from eval.index.manifest import IndexFault, part_folder, read_manifest, read_part
from eval.verify_features import verify_features


def verify_index(folder: Path, *, on_progress: OnProgress = untold) -> list[str]:
    """What is damaged, a line per file; empty if nothing is. Raises IndexFault where there is no index to check."""
    manifest = read_manifest(folder)
    found: list[str] = []
    for number, name in enumerate(manifest.parts):
        here = part_folder(folder, name)
        try:
            part = read_part(folder, name)
            read_images(here, part.images, in_metres=part.in_metres)
            StoredFeatures(here, shard_bounds_of(part.counts))
            found += damaged(block_files(here, (manifest.approximate or {}).get("factory", ""), part))
        except (IndexFault, FeatureError, OSError) as error:
            found.append(str(error))
        found += [line for line in verify_features(here) if line not in found]
        on_progress(number + 1, len(manifest.parts))
    if (asked := manifest.approximate) is not None:
        found += damaged([(trained_path(folder, asked["factory"]), asked["sha256"])])
    try:
        Index.open(folder).network  # noqa: B018 - read and held against its digest
    except ValueError as error:
        found += [line for line in [str(error)] if line not in found]
    return found
