"""`rerankvpr shard manifest` and `shard bucket`: photographs as single files, here or behind URLs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from launch.data_commands import Gridded, Places, Writing
from trainer.progress import progress_bar

if TYPE_CHECKING:  # help and mistakes should not wait for pyarrow
    from data_pipeline.listing import PlaceListing
    from data_pipeline.remote_source import Bucket


@dataclass(frozen=True)
class Remote:
    """How files behind URLs are read."""

    read_threads: int = 16
    """Photographs fetched at a time over http and s3."""
    remote_retry_s: float = 120.0
    """Seconds that a failing read over http or s3 is tried again."""

    def __post_init__(self) -> None:
        if self.read_threads < 1 or self.remote_retry_s < 0:
            raise ValueError(
                f"--read-threads {self.read_threads} --remote-retry-s {self.remote_retry_s:g}: expected 1 thread or "
                "more, 0 s or more"
            )

    def bucket(self, root: str) -> Bucket:
        """Files below a URL, or of URLs of their own."""
        from data_pipeline.remote_source import Bucket

        return Bucket(root, self.read_threads, self.remote_retry_s)


@dataclass(frozen=True)
class ShardManifestCommand(Remote, Gridded, Writing, Places):
    """Writes what a CSV or Parquet table lists (path, place, and city, lat, lon, year, month, northdeg if known).

    A table without the column place has lat and lon (or east and north, in metres): places are then cells. Paths may be
    URLs, or keys below --root s3://bucket/folder.
    """

    root: str | None = None
    """Folder or URL (s3://, http://, ...) that the table's paths start from; the table's own folder without it."""
    groups: int = 1
    """Groups that cells are dealt out to (in each direction, as cities), so that places of a group do not touch."""

    def listing(self) -> PlaceListing:
        from data_pipeline.sources.manifest import read_manifest
        from data_pipeline.storage import is_remote

        bucket = self.bucket(self.root or "")
        return read_manifest(
            self.source,
            root=bucket if self.root and is_remote(self.root) else Path(self.root) if self.root else None,
            grid=self.grid(),
            min_images_per_place=self.min_images_per_place,
            bucket=bucket,
        )


@dataclass(frozen=True)
class _Bucket:
    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """A bucket's folder, such as s3://megascenes/images."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for shards/ and index.parquet."""


@dataclass(frozen=True)
class ShardBucketCommand(Remote, Writing, _Bucket):
    """Writes the photographs of a bucket (MegaScenes), a folder each place, as tar shards; run again, it resumes."""

    depth: int = 1
    """Levels below the URL at which a folder is a place, with all below it: 2 for images/000/001/."""
    city: str = ""
    """Name of the city; by default the folder's."""

    def listing(self) -> PlaceListing:
        from data_pipeline.sources.bucket import read_bucket

        with progress_bar(Console(), "folders") as update:
            return read_bucket(
                self.bucket(self.url),
                depth=self.depth,
                city=self.city,
                min_images_per_place=self.min_images_per_place,
                on_progress=update,
            )
