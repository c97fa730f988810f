"""`rerankvpr shard tars`: photographs out of tars and zips, regrouped by place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from launch.bucket_commands import Remote
from launch.data_commands import Gridded, Writing
from launch.parts import part_of
from trainer.progress import progress_bar

if TYPE_CHECKING:  # help and mistakes should not wait for pyarrow
    from data_pipeline.listing import PlaceListing


@dataclass(frozen=True)
class _Archives:
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SETS... OUT")]
    """Tars and zips, folders or URLs of them (images_{000..499}.tar and *.tar expand), then the folder for shards/."""
    table: Path
    """CSV or Parquet table with a row per photograph: its id or member, and its place or coordinates."""


@dataclass(frozen=True)
class ShardTarsCommand(Remote, Gridded, Writing, _Archives):
    """Regroups the photographs of tars and zips by place, as a table says (GLDv2, OSV-5M); run again, it resumes.

    The archives' members are listed first; photographs are then read by ranges of bytes, or once in sequence and
    through spill files in OUT: an estimate of both is printed, and the faster one taken.
    """

    columns: dict[str, str] = field(default_factory=dict)
    """Columns of the table, as in: image photo_id place landmark lat y. By their usual names without it; - is none."""
    by: Literal["auto", "ranges", "sequence"] = "auto"
    """How photographs are read; compressed tars are always read in sequence."""
    spill_mb: Annotated[int, tyro.conf.arg(name="spill-mb")] = 256
    """MB (2^20 bytes) of photographs held in memory for each spill file."""
    groups: int = 1
    """Groups that cells are dealt out to (in each direction, as cities), so that places of a group do not touch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.paths) < 2:
            raise ValueError("shard tars needs tars or zips and the folder that shards go to: shard tars SETS... OUT")

    @property
    def out(self) -> Path:
        """Folder for shards/ and index.parquet."""
        return Path(self.paths[-1])

    def listing(self) -> PlaceListing:
        from data_pipeline.sources.tars import Reading, read_tars

        console = Console()

        def say(text: str) -> None:
            console.print(escape(text), highlight=False, soft_wrap=True)

        with progress_bar(console, "archives, MB") as update:
            return read_tars(
                self.paths[:-1],
                self.table,
                self.out,
                Reading(self.by, self.read_threads, self.remote_retry_s, self.spill_mb * 2**20),
                columns=self.columns,
                grid=self.grid(),
                min_images_per_place=self.min_images_per_place,
                part=part_of(self.part),
                say=say,
                on_progress=update,
            )

    def finished(self) -> None:
        from data_pipeline.sources.tars import finish

        finish(self.out)
