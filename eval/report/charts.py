"""Charts as SVG text that takes its colours from the page: lines, points on a map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 420, 250, 64, 42, 14, 14
ROW = 18  # of a legend
TICKS = 5  # of an axis, about
MARKED = 12  # points of a line up to which each is marked
COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)", "var(--f)")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4")  # so that lines differ without colour too
MOST_POINTS = 600  # of a line
MOST_DOTS = 4000  # of a map


def line_chart(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x: str,
    y: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """An SVG of named lines, each (xs, ys); values that are not finite leave a gap. Empty if no line has two points.

    A chart of one line without a name has no legend.
    """
    kept: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for name, (xs, ys) in lines.items():
        step = max(1, math.ceil(len(xs) / MOST_POINTS))
        one = np.asarray(xs, np.float64)[::step], np.asarray(ys, np.float64)[::step]
        if np.isfinite(one[1]).sum() >= 2:
            kept[name] = one
    if not kept:
        return ""
    every_x = np.concatenate([xs for xs, _ in kept.values()])
    every_y = np.concatenate([ys[np.isfinite(ys)] for _, ys in kept.values()])
    x_low, x_high = x_range or _range(float(every_x.min()), float(every_x.max()))
    y_ticks = _ticks(*(y_range or _range(float(every_y.min()), float(every_y.max()))))
    y_low, y_high = y_ticks[0], y_ticks[-1]
    named = list(kept) != [""]
    parts = [_axes(title, x, y, (x_low, x_high), y_ticks, rows=len(kept) if named else 0)]
    for number, (name, (x_N, y_N)) in enumerate(kept.items()):
        style = f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-dasharray="{DASHES[number % len(DASHES)]}"'
        px = LEFT + (x_N - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        py = HEIGHT - BOTTOM - (y_N - y_low) / (y_high - y_low) * (HEIGHT - BOTTOM - TOP)
        run: list[str] = []
        for one_x, one_y in [*zip(px.tolist(), py.tolist(), strict=True), (math.nan, math.nan)]:
            if math.isfinite(one_y):
                run.append(f"{one_x:.1f},{one_y:.1f}")
            elif run:
                parts.append(f'<polyline points="{" ".join(run)}" fill="none" stroke-width="2" {style}/>')
                if len(px) <= MARKED:
                    parts += [_dot(point, COLOURS[number % len(COLOURS)]) for point in run]
                run = []
        if not named:
            continue
        at = HEIGHT + 8 + ROW * number
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + 26}" y1="{at}" y2="{at}" stroke-width="2" {style}/>')
        parts.append(f'<text x="{LEFT + 32}" y="{at + 4}">{escape(name)}</text>')
    return "".join(parts) + "</svg></figure>"


def _dot(point: str, colour: str) -> str:
    x, y = point.split(",")
    return f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'


def map_chart(points: Mapping[str, NDArray[np.float64]], links_L4: NDArray[np.float64], *, title: str) -> str:
    """An SVG of kinds of points [N, 2] (metres east and north), drawn in their order, and lines (x, y, x, y) to errors.

    A kind's mark differs by shape as well as colour: dots, rings, crosses. Points that are NaN are left out.
    """
    known = {kind: xy[np.isfinite(xy).all(axis=1)] for kind, xy in points.items()}
    every = np.concatenate(list(known.values())) if known else np.zeros((0, 2))
    if len(every) < 2:
        return ""
    low, high = every.min(axis=0), every.max(axis=0)
    span = max(float((high - low).max()), 1.0)
    side = 420 - 20
    height = 20 + side * max(float(high[1] - low[1]) / span, 0.05)

    def place(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        at: NDArray[np.float64] = np.stack(
            [10 + (xy[..., 0] - low[0]) / span * side, height - 10 - (xy[..., 1] - low[1]) / span * side], axis=-1
        )
        return at

    legend = height + ROW * (len(known) + 1) + 4
    parts = [
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 420 {legend:.0f}" role="img" aria-label="{escape(title)}">'
    ]
    for (ax, ay), (bx, by) in place(links_L4.reshape(-1, 2, 2)).tolist():
        if math.isfinite(ax + ay + bx + by):
            parts.append(
                f'<line x1="{ax:.1f}" y1="{ay:.1f}" x2="{bx:.1f}" y2="{by:.1f}" stroke="var(--wrong)" opacity="0.4"/>'
            )
    for number, (kind, xy) in enumerate(known.items()):
        step = max(1, math.ceil(len(xy) / MOST_DOTS))
        parts += [_mark(number, one_x, one_y) for one_x, one_y in place(xy[::step]).tolist()]
        at = height + 12 + ROW * number
        parts.append(f'{_mark(number, 14, at)}<text x="26" y="{at + 4:.0f}">{escape(kind)}: {len(xy):,}</text>')
    at = height + 16 + ROW * len(known)
    parts.append(f'<text x="10" y="{at:.0f}">{span:,.0f} m across</text>')
    return "".join(parts) + "</svg></figure>"


def _mark(kind: int, x: float, y: float) -> str:
    match kind:
        case 0:
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.5" fill="var(--quiet)"/>'
        case 1:
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="none" stroke="var(--right)" stroke-width="2"/>'
        case _:
            a, b, c, d = x - 4, y - 4, x + 4, y + 4
            path = f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}M{a:.1f} {d:.1f}L{c:.1f} {b:.1f}"
            return f'<path d="{path}" stroke="var(--wrong)" stroke-width="2"/>'


def _axes(title: str, x: str, y: str, xs: tuple[float, float], y_ticks: list[float], *, rows: int) -> str:
    low, high = y_ticks[0], y_ticks[-1]
    parts = [
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 4 + ROW * rows}" role="img" aria-label="{escape(title)}">'
    ]
    for value in y_ticks:
        at = HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_short(value)}</text>'
        )
    for value in _ticks(*xs):
        if xs[0] <= value <= xs[1]:
            across = LEFT + (value - xs[0]) / (xs[1] - xs[0]) * (WIDTH - LEFT - RIGHT)
            label = f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_short(value)}</text>'
            parts.append(label)
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text transform="translate(13 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Round values from one at or below `low` to one at or above `high`; each whole number of a short range of them."""
    if low == int(low) and high == int(high) and high - low <= 2 * TICKS:
        return [float(value) for value in range(int(low), int(high) + 1)]
    from matplotlib.ticker import MaxNLocator

    return [float(value) for value in MaxNLocator(TICKS, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def _range(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
