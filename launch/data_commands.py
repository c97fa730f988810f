"""`rerankvpr shard` and `rerankvpr verify`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from data_pipeline.gsv_cities import read_gsv_cities
from data_pipeline.shards import ShardSummary, write_shards
from data_pipeline.verify import verify_shards
from trainer.progress import progress_bar

SHOWN = 20


@dataclass(frozen=True)
class ShardCommand:
    """Writes a folder in GSV-Cities' native layout as tar shards with an index; run again, it goes on."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder with Images/<City>/ and Dataframes/<City>.csv."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder for shards/ and index.parquet."""
    min_images_per_place: int = 4
    """Places with fewer images are left out and counted."""
    shard_mb: Annotated[int, tyro.conf.arg(name="shard-mb")] = 256
    """Size of a tar in MB (2^20 bytes)."""
    max_bad: float = 0.001
    """Share of images that may be missing or damaged; more stop the run."""


@dataclass(frozen=True)
class VerifyCommand:
    """Checks every byte of a shard set and names what is damaged."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder with shards/ and index.parquet."""


def shard(argv: list[str]) -> int:
    """`rerankvpr shard gsv-cities SRC OUT`."""
    kinds = "gsv-cities"
    if not argv or argv[0] in ("-h", "--help"):
        tyro.cli(ShardCommand, args=["--help"], prog="rerankvpr shard gsv-cities")
    if argv[0] != "gsv-cities":
        raise ValueError(f"shard: unknown kind of data set {argv[0]!r}; known: {kinds}")
    command = tyro.cli(ShardCommand, args=argv[1:], prog="rerankvpr shard gsv-cities")
    describe_shards(Console(), write_shard_set(Console(), command))
    return 0


def write_shard_set(console: Console, command: ShardCommand) -> ShardSummary:
    """Shards a data set under a progress bar."""
    listing = read_gsv_cities(command.source, min_images_per_place=command.min_images_per_place)
    with progress_bar(console, "shard", listing.num_images) as update:
        return write_shards(
            listing,
            command.out,
            shard_bytes=command.shard_mb * 2**20,
            max_bad=command.max_bad,
            on_progress=update,
        )


def describe_shards(console: Console, summary: ShardSummary) -> None:
    """Says what a shard set holds and what was left out."""
    done = "complete already, used again" if summary.was_complete else f"{summary.shards_written} shards written"
    if summary.shards_reused and not summary.was_complete:
        done += f", {summary.shards_reused} from the interrupted run used again"
    console.print(
        f"[bold]shard[/]   {summary.folder}: {summary.places:,} places, {summary.images:,} images; {done}",
        highlight=False,
    )
    if summary.places_left_out:
        console.print(
            f"        left out: {summary.places_left_out:,} places with too few images "
            f"({summary.images_left_out:,} images)",
            highlight=False,
        )
    if summary.bad:
        console.print(f"        {len(summary.bad)} unreadable images left out:", highlight=False)
        for bad in summary.bad[:SHOWN]:
            console.print(f"          {bad}", highlight=False, soft_wrap=True)


def verify(argv: list[str]) -> int:
    """`rerankvpr verify OUT`; status 1 where something is damaged."""
    command = tyro.cli(VerifyCommand, args=argv, prog="rerankvpr verify")
    console = Console()
    with progress_bar(console, "verify") as update:
        faults = verify_shards(command.folder, on_progress=lambda done, total: update(done, total))
    for fault in faults[:SHOWN]:
        print(f"rerankvpr: {fault}", file=sys.stderr)
    if len(faults) > SHOWN:
        print(f"rerankvpr: and {len(faults) - SHOWN} more", file=sys.stderr)
    if faults:
        print(f"rerankvpr: {command.folder} is damaged; delete the named shards and shard again", file=sys.stderr)
        return 1
    console.print(f"{command.folder}: every byte is as it was written", highlight=False)
    return 0
