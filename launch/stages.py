"""The words of `launch`, `submit` and `rank`: `FLAGS -- VERB ... [--then [FLAGS --] VERB ...]`.

What is before `--` are the verb's own flags, and what follows is a command line of another verb, kept as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

STAGES = ("shard", "train", "index", "eval")


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """The words before the first `--` and those after it, None if there is none."""
    if "--" not in argv:
        return list(argv), None
    cut = list(argv).index("--")
    return list(argv[:cut]), list(argv[cut + 1 :])


def split_stages(argv: list[str]) -> list[tuple[list[str], list[str]]]:
    """The flags and the verb of each stage."""
    parts: list[list[str]] = [[]]
    for word in argv:
        if word == "--then":
            parts.append([])
        else:
            parts[-1].append(word)
    stages = []
    for part in parts:
        cut = part.index("--") if part and part[0].startswith("-") and "--" in part else -1
        flags, verb = part[: max(cut, 0)], part[cut + 1 :]
        if not verb or verb[0] not in STAGES:
            said = " ".join(verb) or "nothing"
            raise ValueError(f"submit: a stage is one of {', '.join(STAGES)}, got {said!r}")
        stages.append((flags, verb))
    return stages


def resuming(verb: list[str]) -> list[str]:
    """A `train` verb that resumes from its output's newest checkpoint each time that it is started.

    Raises ValueError where it names another checkpoint, which each restart would go back to.
    """
    if "--resume" not in verb:
        return [*verb, "--resume"]
    named = verb[verb.index("--resume") + 1 :][:1]
    if named and named[0] != "auto" and not named[0].startswith("-"):
        raise ValueError(
            f"--resume {named[0]}: a training that may be restarted resumes from its own output's newest checkpoint; "
            f"start it once by `rerankvpr train` with --resume {named[0]}, or leave the folder out"
        )
    return verb
