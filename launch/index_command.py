"""`rerankvpr index`: a database of photographs, encoded once, that `locate` asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.markup import escape

from configs.flags import parse_flags, parse_known_flags
from configs.plugins import load_plugins
from configs.schema import EncodingConfig
from launch.faults import print_faults
from launch.parts import part_of
from trainer.progress import progress_bar

if TYPE_CHECKING:
    from configs.progress import OnProgress
    from eval.index.build import Built
    from trainer.process_group import Rank

PROG = "rerankvpr index"
SHOWN = 20


@dataclass(frozen=True)
class _Remote:
    """How a shard set behind a URL is read."""

    remote_retry_s: float = field(default=120.0, kw_only=True)
    """Seconds that a failing read of a shard set over http or s3 is tried again."""

    def __post_init__(self) -> None:
        if not self.remote_retry_s >= 0:
            raise ValueError(f"--remote-retry-s {self.remote_retry_s:g}: expected 0 s or more")


@dataclass(frozen=True)
class BuildCommand(_Remote):
    """Encodes the photographs of DB once, into the folder --out; run again, it resumes.

    DB is a folder of photographs (positions from @UTM@ names, else from EXIF), a .csv or .parquet table (path, and lat
    and lon or east and north), a shard set, or a benchmark of `rerankvpr eval --list`, of which the database is taken.

      rerankvpr index build photos/ --checkpoint runs/demo --out city.index

      rerankvpr launch --nproc-per-node 4 -- index build photos/ --checkpoint runs/demo --out city.index
    """

    db: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DB")]
    """Photographs; see above."""
    checkpoint: str
    """The network: a run's folder, a checkpoint, an exported file, a backbone's weights, a model in MLflow."""
    out: Path
    """Folder of the index."""
    factory: str = ""
    """FAISS factory string of an approximate index, such as IVF4096,PQ64; trained once; without it search is exact."""
    params: str = ""
    """Search parameters of the approximate index, such as nprobe=32; the same build with others replaces them."""
    part: str = ""
    """i/n, from 0: encodes every n-th shard of features from the i-th on, as one task of an array; a last run without
    it makes the index."""
    data_root: Path = Path("data")
    """Folder that holds a folder for each benchmark."""
    plugins: tuple[str, ...] = ()
    """Plug-ins to run, files or modules, that the network needs."""
    no_rerank: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Stores descriptors only, no local features: the index is smaller, and `locate` does not re-rank."""
    timeout_s: int = 1800
    """Seconds after which a rank that is silent ends the job."""
    encoding: Annotated[EncodingConfig, tyro.conf.arg(name="")] = field(default_factory=EncodingConfig)


@dataclass(frozen=True)
class AddCommand(_Remote):
    """Encodes the photographs that the index lacks; readers see them once all are in.

    A photograph that the index has by name and bytes is left alone.
    """

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IDX")]
    """Folder of the index."""
    db: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DB")]
    """Photographs, as `rerankvpr index build` takes them."""
    checkpoint: str = ""
    """Network to use, refused if it is not the one that built the index; by default the index's own."""
    part: str = ""
    """i/n, from 0: encodes every n-th shard of features from the i-th on, as one task of an array; a last run without
    it adds them."""
    data_root: Path = Path("data")
    """Folder that holds a folder for each benchmark."""
    plugins: tuple[str, ...] = ()
    """Plug-ins to run, files or modules, that the network needs."""
    timeout_s: int = 1800
    """Seconds after which a rank that is silent ends the job."""


@dataclass(frozen=True)
class InfoCommand:
    """Says what an index holds: photographs, network, pixels, size, what was left out."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IDX")]
    """Folder of the index."""


@dataclass(frozen=True)
class VerifyCommand:
    """Checks every byte of an index against its digests; names what is damaged."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IDX")]
    """Folder of the index."""
    plugins: tuple[str, ...] = ()
    """Plug-ins to run, files or modules, that the network needs."""


@dataclass(frozen=True)
class _Named:
    """What decides the defaults of the other flags."""

    checkpoint: str = ""
    plugins: tuple[str, ...] = ()


def main(argv: list[str]) -> int:
    """`rerankvpr index build|add|info|verify`."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: rerankvpr index VERB ...; each has its own --help\n")
        for verb, (_, arguments, of) in VERBS.items():
            print(f"  rerankvpr index {verb} {arguments}\n      {(of.__doc__ or '').splitlines()[0]}")
        return 0
    if argv[0] not in VERBS:
        from configs.names import nearest

        raise ValueError(f"index: unknown verb {argv[0]!r}; {nearest(argv[0], VERBS)}")
    return VERBS[argv[0]][0](argv[1:])


def build(argv: list[str]) -> int:
    """Builds an index, over the ranks of the process group."""
    named, _ = parse_known_flags(_Named, argv, prog=f"{PROG} build")
    load_plugins(named.plugins)
    default = None
    if named.checkpoint and not {"-h", "--help"} & set(argv):
        encoding = _encoding_of(named.checkpoint)
        default = BuildCommand(db=tyro.MISSING, checkpoint=tyro.MISSING, out=tyro.MISSING, encoding=encoding)
    command = parse_flags(BuildCommand, argv, default=default, prog=f"{PROG} build")
    settings, share = command.encoding.model_dump(), part_of(command.part)
    if command.no_rerank:
        settings["rerank"]["enabled"] = False

    def work(rank: Rank, on_progress: OnProgress) -> Built:
        from eval.index.build import build_index
        from eval.index.photo_list import list_source
        from trainer.pretrained import load

        photos = list_source(command.db, command.data_root, retry_s=command.remote_retry_s)
        describer = load(command.checkpoint, device=rank.device, plugins=command.plugins, **settings)
        how = {"factory": command.factory, "params": command.params}
        return build_index(describer, photos, command.out, **how, share=share, on_progress=on_progress)

    return _on_ranks(command.out, command.timeout_s, share, work)


def add(argv: list[str]) -> int:
    """Adds photographs to an index, over the ranks of the process group."""
    command = parse_flags(AddCommand, argv, prog=f"{PROG} add")
    share = part_of(command.part)
    load_plugins(command.plugins)

    def work(rank: Rank, on_progress: OnProgress) -> Built:
        from eval.index.build import add_to_index
        from eval.index.index import Index
        from eval.index.photo_list import list_source
        from trainer.pretrained import load

        network = load(command.checkpoint, device=rank.device, plugins=command.plugins) if command.checkpoint else None
        index = Index.open(command.index, network=network, device=rank.device)
        photos = list_source(command.db, command.data_root, retry_s=command.remote_retry_s)
        return add_to_index(index.network, photos, command.index, share=share, on_progress=on_progress)

    return _on_ranks(command.index, command.timeout_s, share, work)


def written_folder(argv: list[str]) -> Path | None:
    """The folder that `rerankvpr index` with these words would write to; None if it only reads.

    Raises ValueError for words that it does not take; no checkpoint is read.
    """
    verb = argv[0] if argv else ""
    if verb == "build":
        command = parse_flags(BuildCommand, argv[1:], prog=f"{PROG} build")
        part_of(command.part)
        return command.out
    if verb == "add":
        return parse_flags(AddCommand, argv[1:], prog=f"{PROG} add").index
    return None


def info(argv: list[str]) -> int:
    """Says what an index holds."""
    command = parse_flags(InfoCommand, argv, prog=f"{PROG} info")
    from eval.index.overview import overview

    console = Console()
    for what, text in overview(command.index):
        console.print(f"{what:<16}{escape(text)}", highlight=False, soft_wrap=True)
    return 0


def verify(argv: list[str]) -> int:
    """Checks an index; status 1 where something is damaged."""
    command = parse_flags(VerifyCommand, argv, prog=f"{PROG} verify")
    load_plugins(command.plugins)
    from eval.index.verify import verify_index

    console = Console()
    with progress_bar(console, "verify") as update:
        faults = verify_index(command.index, on_progress=update)
    print_faults(faults)
    if not faults:
        console.print(f"{command.index}: every byte is as it was written", highlight=False, soft_wrap=True)
    return int(bool(faults))


VERBS: dict[str, tuple[Callable[[list[str]], int], str, type]] = {
    "build": (build, "DB --checkpoint C --out IDX", BuildCommand),
    "add": (add, "IDX DB", AddCommand),
    "info": (info, "IDX", InfoCommand),
    "verify": (verify, "IDX", VerifyCommand),
}


def _encoding_of(checkpoint: str) -> EncodingConfig:
    """How the network's training evaluated it, the default of an index; of weights without a recipe, the schema's."""
    path, recipe = Path(checkpoint), None
    if path.is_dir() and not (path / "MLmodel").is_file():
        from configs.load import load_stored_recipe
        from trainer.checkpoint_folder import find_checkpoint
        from trainer.recorded_plugins import note_checkpoint

        found = find_checkpoint(path)
        note_checkpoint(found)  # explains names that only a plug-in knows
        recipe = load_stored_recipe(found / "recipe.yaml")
    elif path.is_file():
        from eval.weights_file import recipe_of

        recipe = recipe_of(path)
    if recipe is None:
        return EncodingConfig()
    return EncodingConfig.model_validate(recipe.eval.model_dump(include=set(EncodingConfig.model_fields)))


def _on_ranks(
    folder: Path, timeout_s: int, part: tuple[int, int] | None, work: Callable[[Rank, OnProgress], Built]
) -> int:
    """Does the work in the process group, its folder held by rank 0, and says what came of it."""
    from data_pipeline.folder_lock import held_by_rank_0
    from trainer.process_group import start_process_group, stop_process_group

    console = Console()
    rank = start_process_group(timeout_s)
    with held_by_rank_0(folder, PROG, part), progress_bar(console, "index", active=rank.is_main) as update:
        built = work(rank, update)
    if rank.is_main:
        _describe(console, built)
    stop_process_group()
    return 0


def _describe(console: Console, built: Built) -> None:
    if built.share:
        i, n = built.share
        text = f"{built.folder}: part {i}/{n} is whole, {built.added:,} photographs; a last run without --part follows"
        console.print(f"[bold]index[/]   {escape(text)}", highlight=False, soft_wrap=True)
        return
    done = f"{built.added:,} encoded" if built.added or not built.was_complete else "complete already, nothing encoded"
    known = f", {built.known:,} known before" if built.known and built.added else ""
    text = f"{built.folder}: {built.images:,} photographs; {done}{known}"
    console.print(f"[bold]index[/]   {escape(text)}", highlight=False, soft_wrap=True)
    for note in built.notes:
        console.print(f"[yellow]        {escape(note)}", highlight=False, soft_wrap=True)
    if built.left_out:
        console.print(f"        {len(built.left_out)} photographs that cannot be read are left out:", highlight=False)
        for name, reason in built.left_out[:SHOWN]:
            console.print(f"          {escape(name)}: {escape(reason)}", highlight=False, soft_wrap=True)
