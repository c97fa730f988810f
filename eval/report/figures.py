"""How figures look: colours that the colour-blind tell apart, text that is legible at half size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.files import replacing
from configs.reading import as_utf_8

# Okabe and Ito, "Color Universal Design", 2008.
BLUE, ORANGE, GREEN, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#000000", "#767676"
IN_ORDER = "cividis"  # a map of colours whose lightness rises evenly, for what has an order
HEAT = "inferno"  # one from black over red to yellow, for what is looked at as a picture
AROUND = "PuOr"  # one that is white in its middle
TEXT = 11  # points, at DPI
DPI = 130
LONGEST_NAME = 28  # characters of a file's name in a title


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of that size in inches, with room for its labels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def named_axis(axis: Any, *, title: str, x: str, y: str) -> Any:
    """The axis, with its names and a quiet grid."""
    axis.set_title(title, fontsize=TEXT + 1)
    axis.set_xlabel(x, fontsize=TEXT)
    axis.set_ylabel(y, fontsize=TEXT)
    axis.tick_params(labelsize=TEXT)
    axis.grid(color="#d8d8d8", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return axis


def save_figure(figure: Any, path: Path) -> None:
    """Writes it, whole or not at all, in the format that the name's suffix says; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=DPI)


def short_name(path: Path) -> str:
    """An image's file and the folder that it is in: traverses of a route have files of the same names."""
    folder, name = ("", "", *Path(as_utf_8(str(path))).parts)[-2:]
    if len(name) > LONGEST_NAME:
        half = LONGEST_NAME // 2
        name = f"{name[:half]}...{name[-half:]}"
    return f"{folder}/{name}" if folder else name
