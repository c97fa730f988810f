"""Every byte of an index against its digests."""

from __future__ import annotations

from pathlib import Path

from configs.files import file_sha256
from configs.progress import OnProgress, untold
from eval.features import FeatureError, StoredFeatures
from eval.index.approximate_files import block_path, trained_path
from eval.index.images import read_images
from eval.index.index import Index, shard_bounds_of
from eval.index.manifest import IndexFault, Manifest, Part, part_folder, read_manifest, read_part
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
            found += _damaged_blocks(here, manifest, part)
        except (IndexFault, FeatureError, OSError) as error:
            found.append(str(error))
        damaged = verify_features(here)
        found += [line for line in damaged if line not in found]
        on_progress(number + 1, len(manifest.parts))
    if (asked := manifest.approximate) is not None:
        file = trained_path(folder, asked["factory"])
        if not file.is_file() or file_sha256(file) != asked["sha256"]:
            found.append(f"{file} is damaged or gone; build the index again")
    try:
        Index.open(folder).network  # noqa: B018 - read and held against its digest
    except ValueError as error:
        found.append(str(error))
    return found


def _damaged_blocks(here: Path, manifest: Manifest, part: Part) -> list[str]:
    factory = (manifest.approximate or {}).get("factory", "")
    files = [(block_path(here, factory, number), sha256) for number, sha256 in enumerate(part.approximate)]
    return [
        f"{file} is damaged or gone; build the index again"
        for file, sha256 in files
        if not file.is_file() or file_sha256(file) != sha256
    ]
