"""`rerankvpr VERB ...`: the verbs and what they call."""

from __future__ import annotations

import sys
from collections.abc import Callable

from trainer.errors import one_line_errors


def _demo(argv: list[str]) -> int:
    from launch.demo import main

    return main(argv)


def _shard(argv: list[str]) -> int:
    from launch.data_commands import shard

    return shard(argv)


def _verify(argv: list[str]) -> int:
    from launch.data_commands import verify

    return verify(argv)


def _train(argv: list[str]) -> int:
    from trainer.command import main

    return main(argv)


def _launch(argv: list[str]) -> int:
    from launch.torchrun import main

    return main(argv)


def _eval(argv: list[str]) -> int:
    from launch.eval_command import main

    return main(argv)


VERBS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "demo": (_demo, "", "Renders a town, trains on it with two ranks, shows what was learned."),
    "shard": (_shard, "gsv-cities SRC OUT", "Writes a data set as tar shards with an index."),
    "verify": (_verify, "OUT", "Checks every byte of a shard set against its index."),
    "train": (_train, "RECIPE [--section.key value] [--resume]", "Trains a recipe; one process is a group of one."),
    "launch": (
        _launch,
        "--nproc-per-node N [torchrun flags] -- VERB ...",
        "Runs a verb on many processes by torchrun.",
    ),
    "eval": (_eval, "--checkpoint DIR|--weights FILE --benchmarks NAME...", "Recall before and after re-ranking."),
}


def _help() -> None:
    lines = ["rerankvpr: distributed training of visual place recognition, with re-ranking", ""]
    for verb, (_, arguments, text) in VERBS.items():
        lines += [f"  rerankvpr {verb} {arguments}".rstrip(), f"      {text}"]
    lines += [
        "",
        "`rerankvpr VERB --help` shows a verb's flags; RERANKVPR_TRACEBACK=1 shows where an error was raised.",
    ]
    print("\n".join(lines))


def main(argv: list[str]) -> int:
    """Runs a verb and returns the exit status."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        _help()
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        import difflib

        nearest = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.3) or ["--help"]
        print(f"rerankvpr: unknown verb {verb!r}; nearest: {nearest[0]}", file=sys.stderr)
        return 2
    with one_line_errors():
        return VERBS[verb][0](rest)
