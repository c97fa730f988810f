"""`rerankvpr shard` and `rerankvpr verify`."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

from configs.flags import parse_flags
from configs.plugins import described, load_plugins
from configs.recipe_flags import named_plugins
from configs.registry import SOURCES
from data_pipeline.shard_options import SHARD_BYTES, ShardOptions
from launch.faults import print_faults
from launch.parts import part_of
from trainer.progress import progress_bar

if TYPE_CHECKING:  # help and mistakes should not wait for pyarrow
    from data_pipeline.listing import PlaceListing
    from data_pipeline.shards import ShardSummary
    from data_pipeline.sources.cells import Grid

SHOWN = 20
LEFT_OUT = "left_out.csv"


@dataclass(frozen=True)
class Writing:
    """How tars are written, for every kind of source."""

    min_images_per_place: int = 4
    """Places with fewer images are left out and counted."""
    shard_mb: Annotated[int, tyro.conf.arg(name="shard-mb")] = SHARD_BYTES // 2**20
    """Size of a tar in MB (2^20 bytes)."""
    max_bad: float = ShardOptions.max_bad
    """Share of images that may be missing or damaged; more stop the run."""
    max_side: int | None = ShardOptions.max_side
    """Longer side in pixels that larger photographs are scaled to; by default every photograph keeps its bytes."""
    quality: int = ShardOptions.quality
    """JPEG quality of the photographs that are scaled or converted."""
    convert: bool = ShardOptions.convert
    """Write what is no JPEG (PNG, WebP, TIFF, HEIC, ...) as a JPEG; without it such photographs are refused."""
    shuffle: int | None = None
    """Seed that shuffles the places of each city, for readers that go through the tars in order."""
    workers: int = ShardOptions.workers
    """Processes that write tars at a time."""
    threads: int | None = ShardOptions.threads
    """Threads that read and check photographs, over all workers; by default one per core."""
    plugins: tuple[str, ...] = ()
    """Your code, files (my_vpr.py) or modules, that adds kinds of data sets; see docs/extending.md."""
    part: str | None = None
    """i/n, from 0: every n-th tar from the i-th on, as one task of an array; a last run without it writes the index."""

    def listing(self) -> PlaceListing:
        """The source's places."""
        raise NotImplementedError

    def finished(self) -> None:
        """Called when the set is complete, to remove what it was made from on the way."""


@dataclass(frozen=True)
class Gridded:
    """How coordinates become places.

    An image is of the place of its cell and, if it has a heading, of the sector that it looks into.
    """

    cell_m: float = 10.0
    """Side of the square cells in metres whose images are of one place."""
    heading_deg: float = 30.0
    """Width of the sectors that headings are divided in; 360 ignores them."""
    groups: int = 5
    """Groups that cells are dealt out to (in each direction, as cities), so that places of a group do not touch."""
    focal_m: float = 0.0
    """EigenPlaces: metres from a cell's centre to its focal points; what looks at one is a place (own: 10; 0: off)."""

    def grid(self) -> Grid:
        from data_pipeline.sources.cells import Grid

        return Grid(self.cell_m, self.heading_deg, self.groups, self.focal_m)


@dataclass(frozen=True)
class Places:
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """What to shard; see above."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for shards/ and index.parquet."""


@dataclass(frozen=True)
class ShardCommand(Writing, Places):
    """Writes GSV-Cities' layout (Images/<City>/, Dataframes/<City>.csv) as tar shards; run again, it resumes."""

    cities: tuple[str, ...] = ()
    """Cities to take; by default all."""

    def listing(self) -> PlaceListing:
        from data_pipeline.sources.gsv_cities import read_gsv_cities

        return read_gsv_cities(
            self.source, min_images_per_place=self.min_images_per_place, cities=list(self.cities) or None
        )


@dataclass(frozen=True)
class ShardUtmCommand(Gridded, Writing, Places):
    """Writes a folder of photographs named @UTM_east@UTM_north@...@.jpg as tar shards; run again, it resumes."""

    city: str = ""
    """Name of the city; by default the folder's."""

    def listing(self) -> PlaceListing:
        from data_pipeline.sources.utm_folder import read_utm_folder

        return read_utm_folder(
            self.source, city=self.city, grid=self.grid(), min_images_per_place=self.min_images_per_place
        )


@dataclass(frozen=True)
class ShardMslsCommand(Gridded, Writing, Places):
    """Writes MSLS' training folders, [train_val/]<city>/{database,query}, as tar shards; run again, it resumes."""

    cities: tuple[str, ...] = ()
    """Cities to take; by default all."""

    def listing(self) -> PlaceListing:
        from data_pipeline.sources.msls import read_msls

        return read_msls(
            self.source,
            cities=list(self.cities) or None,
            grid=self.grid(),
            min_images_per_place=self.min_images_per_place,
        )


@dataclass(frozen=True)
class ShardPhotosCommand(Gridded, Writing, Places):
    """Writes a folder of photographs whose EXIF holds GPS (a telephone's) as tar shards, places from cells.

    A table shows how near the photographs are to each other and what cells of other sizes would give. Photographs
    without GPS and copies of the same bytes are left out and listed in OUT/left_out.csv.
    """

    city: str = ""
    """Name of the city; by default the folder's."""
    track: Path | None = None
    """Table of time, lat, lon (heading): where photographs without GPS were, by the time in their name or EXIF."""
    track_offset_s: float = 0.0
    """Seconds that the track's clock is ahead of the camera's."""
    fps: float | None = None
    """Frames per second of a video: a frame's time, in the track's seconds, is the last number of its name / fps."""
    heading_deg: float = 60.0
    """Width of the sectors that headings are divided in; 360 ignores them."""
    groups: int = 1
    """Groups that cells are dealt out to (in each direction, as cities), so that places of a group do not touch."""

    def listing(self) -> PlaceListing:
        from data_pipeline.sources.photo_folder import list_photo_folder, read_photo_folder, survey_cells
        from data_pipeline.sources.track import read_track
        from launch.photo_tables import print_survey

        console, track = Console(), None
        if self.track:
            track = read_track(self.track, fps=self.fps, offset_s=self.track_offset_s)
        elif self.fps is not None or self.track_offset_s:
            raise ValueError("--fps and --track-offset-s are for --track, a table of time, lat and lon")
        with progress_bar(console, "EXIF") as update:
            folder = read_photo_folder(self.source, update, track=track)
        survey = survey_cells(folder, self.grid(), self.min_images_per_place)
        print_survey(console, survey, len(folder.names), self.grid(), self.min_images_per_place)
        return list_photo_folder(
            folder, survey, city=self.city, grid=self.grid(), min_images_per_place=self.min_images_per_place
        )


def command_of(kind: str) -> type[Writing]:
    """The command of a kind of data set: a built-in's own, or one with the flags of a plug-in's dataclass.

    Raises ValueError for a kind that is not known, or that is no dataclass with `listing`.
    """
    found = SOURCES.get(kind)
    if isinstance(found, type) and issubclass(found, Writing):
        return found
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and hasattr(found, "listing")):
        raise ValueError(
            f"shard {kind} ({SOURCES.origin(kind)}): expected a dataclass with listing(source, min_images_per_place)"
        )

    def listing(self: Any) -> PlaceListing:
        from data_pipeline.listing import PlaceListing

        try:
            listed = self.settings.listing(self.source, min_images_per_place=self.min_images_per_place)
        except Exception as error:
            raise ValueError(f"shard {kind}: {described(error)}") from error
        if not isinstance(listed, PlaceListing):
            raise ValueError(f"shard {kind}: listing returned {type(listed).__name__}; expected what list_rows returns")
        return listed

    about = {"__doc__": found.__doc__ or f"Writes {kind} as tar shards; run again, it resumes.", "listing": listing}
    settings = ("settings", Annotated[found, tyro.conf.arg(name="")], field(default_factory=found))
    return dataclasses.make_dataclass(
        f"Shard_{found.__name__}", [settings], bases=(Writing, Places), namespace=about, frozen=True
    )


def parse_shard(argv: Sequence[str]) -> Any:
    """The command that the words after `shard` mean, its plug-ins run. Raises ValueError, FlagError."""
    load_plugins(named_plugins(argv, prog="rerankvpr shard") or ())
    if not argv:
        raise ValueError(f"shard needs a kind of data set: {', '.join(SOURCES)}")
    return parse_flags(command_of(argv[0]), argv[1:], prog=f"rerankvpr shard {argv[0]}")


@dataclass(frozen=True)
class VerifyCommand:
    """Checks every byte of a shard set, or of stored features, and names what is damaged."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of this machine with shards/ and index.parquet, or one that eval.features names."""


def shard(argv: list[str]) -> int:
    """`rerankvpr shard KIND SRC OUT`."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: rerankvpr shard KIND SRC OUT [flags]; each kind has its own --help\n")
        load_plugins(named_plugins(argv, prog="rerankvpr shard") or ())
        for kind, of in SOURCES.items():
            print(f"  {kind:<12}{(of.__doc__ or '').splitlines()[0]}")
        return 0
    command = parse_shard(argv)
    describe_shards(Console(), write_shard_set(Console(), command))
    return 0


def write_shard_set(console: Console, command: Any) -> ShardSummary:
    """Shards a data set under a progress bar; the command is `parse_shard`'s."""
    part = part_of(command.part)
    from data_pipeline.listing import shuffle_places
    from data_pipeline.shards import write_shards

    listing = command.listing()
    for note in listing.notes:
        console.print(f"[yellow]{escape(note)}", highlight=False, soft_wrap=True)
    if command.shuffle is not None:
        listing = shuffle_places(listing, command.shuffle)
    with progress_bar(console, "shard", listing.num_images) as update:
        summary = write_shards(
            listing,
            command.out,
            ShardOptions(
                shard_bytes=command.shard_mb * 2**20,
                max_bad=command.max_bad,
                max_side=command.max_side,
                quality=command.quality,
                convert=command.convert,
                threads=command.threads,
                workers=command.workers,
            ),
            part=part,
            on_progress=update,
        )
    if not part:
        command.finished()
    if listing.left_out and not part:
        _write_left_out(console, command.out / LEFT_OUT, listing.left_out)
    return summary


def _write_left_out(console: Console, path: Path, left_out: Sequence[tuple[str, str]]) -> None:
    """The names of what was left out of a folder: the first on the screen, all in a table."""
    from configs.files import write_whole

    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(("path", "why"))
    rows.writerows(left_out)
    write_whole(path, text.getvalue().encode())
    for name, why in left_out[:SHOWN]:
        console.print(f"  {escape(name)}: {escape(why)}", highlight=False, soft_wrap=True)
    console.print(f"  all {len(left_out)} left out: {path}", highlight=False, soft_wrap=True)


def describe_shards(console: Console, summary: ShardSummary) -> None:
    """Says what a shard set holds and what was left out."""
    done = "complete already, used again" if summary.was_complete else f"{summary.shards_written} shards written"
    if summary.shards_reused and not summary.was_complete:
        done += f", {summary.shards_reused} from the interrupted run used again"
    if summary.part:
        done += f" of part {summary.part[0]}/{summary.part[1]}; the index is written by a last run without --part"
    console.print(
        f"[bold]shard[/]   {summary.folder}: {summary.places:,} places, {summary.images:,} images; {done}",
        highlight=False,
    )
    if summary.places_left_out and not summary.part:
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
    command = parse_flags(VerifyCommand, argv, prog="rerankvpr verify")
    from data_pipeline.storage import is_remote
    from data_pipeline.verify import verify_shards
    from eval.verify_features import holds_features, verify_features

    if is_remote(command.folder):
        raise ValueError(f"{command.folder}: verify reads sets of this machine; run it where the set lies")
    console = Console()
    folder = Path(command.folder)
    of_features = holds_features(folder)
    check = verify_features if of_features else verify_shards
    with progress_bar(console, "verify") as update:
        faults = check(folder, on_progress=update)
    print_faults(faults)
    if faults:
        again = "evaluate" if of_features else "shard"
        print(f"rerankvpr: {command.folder} is damaged; delete the named shards and {again} again", file=sys.stderr)
        return 1
    console.print(f"{command.folder}: every byte is as it was written", highlight=False)
    return 0
