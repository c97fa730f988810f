"""One page of what was located: pictures, matches, a map; it holds all that it shows and loads nothing."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image

from data_pipeline.photographs import decode_rgb
from eval.describer import Match
from eval.index.index import Index
from eval.index.location import Candidate, Location, Tally
from eval.index.stored_local import stored_local

DRAWN = 100  # photographs with pictures; the others are lines
SIDE = 420  # pixels of a picture's longer side
SMALL = 150
LINES = 80
MAP_SIDE = 260
MAP_DOTS = 2000

STYLE = """
:root { color-scheme: light dark; --in: #2e9e4f; --out: #cc3b3b; --line: #0aa2d6; --soft: #8885 }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 0 0 .5rem; overflow-wrap: anywhere }
section { border-top: 1px solid var(--soft); padding: 1.2rem 0 }
.in { color: var(--in) } .out { color: var(--out) } small, .soft { opacity: .75 }
.pair { width: 100%; max-width: 860px; height: auto; display: block }
.row { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-start; margin-top: .8rem }
figure { margin: 0; max-width: 150px } figure img { max-width: 100%; display: block }
figcaption { font-size: .8rem; overflow-wrap: anywhere } svg line { stroke: var(--line); stroke-opacity: .75 }
"""


class LocatedPage:
    """Writes the page as locations come; `end` closes it."""

    def __init__(self, file: TextIO, index: Index) -> None:
        self.file, self.index, self.count, self.tally = file, index, 0, Tally()
        title = f"Located by {escape(index.folder.name)}"
        file.write(
            "<!doctype html>\n<html lang='en'><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{title}</title><style>{STYLE}</style>\n<h1>{title}</h1>\n"
            f"<p class='soft'>{len(index):,} photographs, {escape(index.describer.pixels)}. "
            "Lines join patches that match and agree on one shift.</p>\n"
        )

    def write(self, path: Path, location: Location) -> None:
        """Adds a photograph."""
        self.count += 1
        self.tally.add(location)
        self.file.write("<section>\n<h2>" + escape(location.query) + " " + _verdict(location) + "</h2>\n")
        if location.error:
            self.file.write(f"<p class='out'>{escape(location.error)}</p>\n")
        elif location.best is None:
            self.file.write("<p>The index is empty.</p>\n")
        else:
            drawn = self.count <= DRAWN and self._draw(path, location, location.best)
            self.file.write(_words(location, candidates=not drawn))
        self.file.write("</section>\n")

    def end(self) -> None:
        """Closes the page."""
        self.file.write(f"<p>{escape(str(self.tally))}</p>\n")
        if self.count > DRAWN:
            self.file.write(f"<p class='soft'>Pictures of the first {DRAWN} of {self.count:,} photographs.</p>\n")
        self.file.write("</html>\n")

    def _draw(self, path: Path, location: Location, best: Candidate) -> bool:
        """Writes the pictures, and whether they show every candidate."""
        files = [self.index.path_of(candidate.number) for candidate in location.candidates]
        if files[0] is not None:
            match, units = None, (1, 1)
            if self.index.config.rerank.enabled:
                stored = stored_local(self.index, self.index.features, best.number, files[0])
                match, units = self.index.describer.match(path, stored), stored.size
            self.file.write(_pair(path, files[0], match, units, location.query, f"1. {_told(best)}"))
        else:
            self.file.write("<p class='soft'>The candidates' files are not on this machine.</p>\n")
        figures = [
            f"<figure>{_picture(file, SMALL, one.name)}<figcaption>{rank}. {escape(_told(one))}</figcaption></figure>"
            for rank, (file, one) in enumerate(zip(files[1:], location.candidates[1:], strict=True), 2)
            if file is not None
        ]
        self.file.write("<div class='row'>" + "".join([*figures, self._map(location)]) + "</div>\n")
        return None not in files

    def _map(self, location: Location) -> str:
        """The index's photographs as dots, candidates as rings, the estimate as a cross; empty without positions."""
        place = location.position
        positions = self.index.images.positions
        if place is None:
            return ""
        here = np.flatnonzero(positions.known & (positions.zone == place.zone))
        here = here[np.linspace(0, len(here) - 1, min(MAP_DOTS, len(here))).astype(int)]
        ours = [one for one in location.candidates if one.zone == place.zone and one.east == one.east]
        points_X2 = np.concatenate(
            [
                np.stack([positions.east[here], positions.north[here]], axis=1),
                np.array([[one.east, one.north] for one in ours]).reshape(-1, 2),
                [[place.east, place.north]],
            ]
        )
        low_2, high_2 = points_X2.min(axis=0), points_X2.max(axis=0)
        scale = (MAP_SIDE - 20) / max(float((high_2 - low_2).max()), 1.0)
        at_X2 = 10 + (points_X2 - low_2) * scale
        at_X2[:, 1] = MAP_SIDE - at_X2[:, 1]
        dots = "".join(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='1.2' fill='#8889'/>" for x, y in at_X2[: len(here)])
        rings = "".join(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='none' stroke='#0aa2d6' stroke-width='1.5'/>"
            for x, y in at_X2[len(here) : -1]
        )
        x, y = at_X2[-1]
        cross = f"<path d='M{x - 6:.1f} {y:.1f}h12M{x:.1f} {y - 6:.1f}v12' stroke='#cc3b3b' stroke-width='2.5'/>"
        told = escape(f"spread {place.spread_m:.0f} m, {place.candidates} candidate(s); {1 / scale * 50:.0f} m")
        bar = f"<path d='M10 {MAP_SIDE - 4}h50' stroke='currentColor'/>"
        return (
            f"<figure style='max-width:{MAP_SIDE}px'><svg width='{MAP_SIDE}' height='{MAP_SIDE}' role='img' "
            f"aria-label='map'>{dots}{rings}{cross}{bar}</svg><figcaption>{told} per bar</figcaption></figure>"
        )


def _verdict(location: Location) -> str:
    if location.in_map is None:
        return ""
    kind, text = ("in", "in the map") if location.in_map else ("out", "uncertain, may not be in the map")
    return f"<small class='{kind}'>{text} (confidence {location.confidence:.3f}, from {location.threshold:.3f})</small>"


def _words(location: Location, *, candidates: bool) -> str:
    """The position, after the candidates if they are not drawn."""
    place, lines = location.position, []
    if candidates:
        told = "; ".join(f"{rank}. {_told(one)}" for rank, one in enumerate(location.candidates, 1))
        lines.append(escape(told))
    if place is not None:
        where = (
            f"{place.lat:.6f}, {place.lon:.6f}" if place.lat == place.lat else f"{place.east:.1f}, {place.north:.1f}"
        )
        lines.append(f"at {where}, spread {place.spread_m:.0f} m ({place.support:.0%} of the weight)")
    return f"<p><small>{'<br>'.join(lines)}</small></p>\n" if lines else ""


def _told(one: Candidate) -> str:
    matches = "" if one.matches is None else f", {one.matches:g} matches"
    apart = "" if not one.apart_m > 0 else f", {one.apart_m:.0f} m away"
    return f"{one.name}: similarity {one.similarity:.3f}{matches}{apart}"


def _picture(file: Path, side: int, name: str) -> str:
    data, width, height = _jpeg(file, side)
    return f"<img src='{data}' width='{width}' height='{height}' alt='{escape(name, quote=True)}'>"


def _jpeg(file: Path, side: int) -> tuple[str, int, int]:
    """A photograph, upright and scaled, as a data URL, with its width and height."""
    image = Image.fromarray(decode_rgb(file.read_bytes()).permute(1, 2, 0).numpy())
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", image.width, image.height


def _pair(query: Path, candidate: Path, match: Match | None, units: tuple[int, int], name: str, told: str) -> str:
    """The query `name` beside its best candidate, with the matches that count as lines; `told` is of the candidate.

    Points in the candidate are counted in `units` of its height and width.
    """
    (left, w, h), (right, v, g) = _jpeg(query, SIDE), _jpeg(candidate, SIDE)
    gap, lines = 12, ""
    if match is not None:
        sides = [_size(query), units[::-1]]
        agreeing = np.flatnonzero(match.agrees_M & np.isfinite(match.points_a_M2).all(axis=1))[:LINES]
        for i in agreeing:
            (ax, ay), (bx, by) = match.points_a_M2[i], match.points_b_M2[i]
            ax, ay, bx, by = ax * w / sides[0][0], ay * h / sides[0][1], bx * v / sides[1][0], by * g / sides[1][1]
            lines += f"<line x1='{ax:.1f}' y1='{ay:.1f}' x2='{w + gap + bx:.1f}' y2='{by:.1f}'/>"
    label = escape(f"{name} and {told}", quote=True)
    return (
        f"<svg class='pair' viewBox='0 0 {w + gap + v} {max(h, g)}' role='img' aria-label='{label}'>"
        f"<image href='{left}' width='{w}' height='{h}'/><image href='{right}' x='{w + gap}' width='{v}' height='{g}'/>"
        f"{lines}</svg>\n<p><small>{escape(told)}</small></p>\n"
    )


def _size(file: Path) -> tuple[int, int]:
    """Width and height of a photograph, upright."""
    shape = decode_rgb(file.read_bytes()).shape
    return int(shape[2]), int(shape[1])
