"""`rerankvpr show KIND WHAT...`: pictures of what a network sees, and of what a training or an evaluation found."""

from __future__ import annotations

from pathlib import Path

from configs.flags import parse_flags
from launch.show_flags import ShowCommand
from launch.show_images import choose
from launch.show_run import Draw, draws_drift, draws_negatives, draws_sweep

SUFFIXES = (".png", ".svg", ".pdf")
OF_IMAGES = ("attention", "pca", "matches", "similarity")
OF_RUNS = {"negatives": draws_negatives, "drift": draws_drift, "sweep": draws_sweep}


def main(argv: list[str]) -> int:
    """Draws and names the file."""
    command = parse_flags(ShowCommand, argv, prog="rerankvpr show")
    if command.index and command.kind not in OF_IMAGES:
        raise ValueError(f"--index does not go with show {command.kind}; it is of {', '.join(OF_IMAGES)}")
    if command.out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {command.out}: expected a name that ends with one of {', '.join(SUFFIXES)}")
    if command.most < 1:
        raise ValueError(f"--most {command.most}: expected 1 or more")
    draw = OF_RUNS.get(command.kind, _draws_images)(command)
    from configs.files import replacing

    command.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(command.out) as partial:
        drawn = partial.with_name(partial.name + command.out.suffix.lower())  # its suffix says what matplotlib writes
        said = draw(drawn)
        drawn.replace(partial)
    print(f"written: {command.out} ({said})")
    return 0


def _draws_images(command: ShowCommand) -> Draw:
    chosen = choose(command)
    from eval.report import show

    def draw(path: Path) -> str:
        if command.kind == "matches":
            show.draw_matches(path, chosen.describer, chosen.pairs)
        else:
            default = -1 if command.kind == "attention" else -2
            layer = default if command.layer is None else command.layer
            seen = show.see(chosen.describer, chosen.images, layer=layer, facet=command.facet)
            if command.kind == "attention":
                show.draw_attention(path, seen)
            elif command.kind == "pca":
                show.draw_pca(path, seen)
            else:
                show.draw_similarity(path, seen, command.point)
        return str(chosen)

    return draw
