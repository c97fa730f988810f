"""`rerankvpr locate`: where photographs were taken, by an index."""

from __future__ import annotations

import glob
import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from configs.flags import parse_flags
from configs.plugins import load_plugins
from trainer.progress import progress_bar

if TYPE_CHECKING:
    from eval.index.estimate import Estimate
    from eval.index.index import Index
    from eval.index.location import Candidate, Location

PROG = "rerankvpr locate"


@dataclass(frozen=True)
class LocateCommand:
    """Says for each photograph where it was taken: candidates, a position with its spread, whether to believe it.

    rerankvpr locate a.jpg b.jpg --index city.index

    rerankvpr locate queries/ --index city.index --json found.json --html found.html

    find . -name '*.jpg' | rerankvpr locate - --index city.index
    """

    photos: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PHOTO...")]
    """Files, folders, patterns such as 'walk/*.jpg', or - for names on stdin, one per line, answered as they come."""
    index: Path
    """Folder that `rerankvpr index build` wrote."""
    top: int = 5
    """Candidates shown and written for each photograph."""
    sequence: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The photographs are frames of a video in their order; each is judged with its neighbours."""
    checkpoint: str = ""
    """Network to use, refused if it is not the one that built the index; by default the index's own."""
    plugins: tuple[str, ...] = ()
    """Plug-ins to run, files or modules, that the network needs."""
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Prints errors only and, on a terminal, progress; for use with the files below."""
    json: Path | None = None
    """File for all of it: a JSON array, one photograph per line."""
    csv: Path | None = None
    """File for a row per candidate."""
    geojson: Path | None = None
    """File for a point per photograph, as maps and GIS programs read it; those without degrees have no geometry."""
    pairs: Path | None = None
    """File of hloc's pairs: `query candidate` per line, named as in folder and index."""
    h5: Path | None = None
    """File of hloc's global descriptors, one group per photograph (needs h5py)."""
    html: Path | None = None
    """File for one page with pictures, matches and a map, that needs no network."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"--top {self.top}: expected 1 or more")


def main(argv: list[str]) -> int:
    """Locates photographs; status 1 if one of them could not be read."""
    command = parse_flags(LocateCommand, argv, prog=PROG)
    load_plugins(command.plugins)
    streamed = command.photos == ("-",)
    queries = [] if streamed else _told_apart(list(_queries(command.photos)))
    if not streamed and not queries:
        raise ValueError(f"{' '.join(command.photos)}: no photograph there")
    if streamed and command.sequence:
        raise ValueError("--sequence needs all frames at once; name them instead of reading names from stdin")
    from eval.index.index import Index
    from eval.index.location import Tally
    from eval.report.locations import writers
    from trainer.pretrained import load

    network = load(command.checkpoint, plugins=command.plugins) if command.checkpoint else None
    index = Index.open(command.index, network=network)
    tally, console = Tally(), Console(soft_wrap=True)
    targets = {kind: getattr(command, kind) for kind in ("json", "csv", "geojson", "pairs", "h5", "html")}
    errors = Console(stderr=True)
    answers_scroll = sys.stdout.isatty() and not command.quiet
    with ExitStack() as stack:
        write = stack.enter_context(writers(targets, index))
        is_told = errors.is_terminal and not answers_scroll and not streamed
        update = stack.enter_context(progress_bar(errors, "locate", len(queries), active=is_told))
        for done, (path, location) in enumerate(_located(index, command, queries, streamed=streamed), 1):
            write(path, location)
            update(done, len(queries))
            tally.add(location)
            if location.error:
                print(f"rerankvpr: {location.error}", file=sys.stderr, flush=True)
            elif not command.quiet:
                for line in lines_of(location):
                    console.print(line, highlight=False, markup=False)
    if tally.counts.total() > 1 and not command.quiet:
        console.print(str(tally), highlight=False, markup=False)
    for kind, target in targets.items():
        if target and not command.quiet:
            console.print(f"{kind}: {target}", highlight=False, markup=False)
    return int(tally.counts["not readable"] > 0)


def _queries(photos: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Names, and the files that they are: of a folder all photographs, their names relative to it."""
    for photo in photos:
        path = Path(photo)
        if path.is_dir():
            from data_pipeline.photographs import list_photographs

            listing = list_photographs(path)
            if not listing.names:
                raise ValueError(f"{path}: no photograph in it {listing.note()}".strip())
            if note := listing.note():
                print(f"rerankvpr: {path}: {note}", file=sys.stderr)
            yield from ((name, path / name) for name in listing.names)
        elif not path.exists() and (found := sorted(glob.glob(photo, recursive=True))):  # noqa: PTH207 - any folder
            yield from ((name, Path(name)) for name in found if Path(name).is_file())
        else:
            yield photo, path


def _told_apart(queries: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The queries, under their files' whole names if two of different folders have one name."""
    of_name = dict(queries)
    if all(of_name[name] == path for name, path in queries):
        return queries
    return [(str(path), path) for _, path in queries]


def _located(
    index: Index, command: LocateCommand, queries: list[tuple[str, Path]], *, streamed: bool
) -> Iterator[tuple[Path, Location]]:
    if streamed:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a name of any bytes
        for line in sys.stdin:
            if name := line.rstrip("\n"):
                yield from ((Path(name), one) for one in index.locate_each([name], top_k=command.top))
        return
    names, paths = [name for name, _ in queries], [path for _, path in queries]
    if command.sequence:
        found = iter(index.locate_sequence(paths, names=names, top_k=command.top))
    else:
        found = index.locate_each(paths, names=names, top_k=command.top)
    yield from zip(paths, found, strict=True)


def lines_of(location: Location) -> Iterator[str]:
    """A photograph's answer, in lines for a terminal."""
    verdict = {True: "in the map", False: "uncertain, may not be in the map", None: "no verdict"}[location.in_map]
    held = "" if location.in_map is None else f" (confidence {location.confidence:.3f}, from {location.threshold:.3f})"
    yield f"{location.query}: {verdict}{held}"
    for rank, one in enumerate(location.candidates, 1):
        told = [f"{one.similarity:.4f}"]
        if one.matches is not None:
            told.append(f"{one.matches:g} of {location.patches} patches match")
        if one.apart_m == one.apart_m:
            told.append(_position(one))
            told += [f"{_metres(one.apart_m)} from the first"] if rank > 1 else []
        yield f"  {rank}  {one.name}  {', '.join(told)}"
    if not location.candidates:
        yield "  the index is empty"
    if place := location.position:
        of = f"{place.candidates} candidate{'s' if place.candidates != 1 else ''}, {place.support:.0%} of the weight"
        yield f"  at {_position(place)}, spread {_metres(place.spread_m)} ({of})"


def _position(of: Candidate | Estimate) -> str:
    return f"{of.lat:.6f} {of.lon:.6f}" if of.lat == of.lat else f"{of.east:.1f} E {of.north:.1f} N"


def _metres(metres: float) -> str:
    return f"{metres / 1000:,.1f} km" if metres >= 10_000 else f"{metres:.0f} m"
