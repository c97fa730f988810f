"""What a place of the procedural town looks like: a row of houses put together from one building kit.

All places share walls, windows, doors, shops, roofs and street furniture; only their arrangement tells places apart.
Lengths are metres: x along the street, y up, z towards the camera's side negative, the origin on the pavement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle, pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1

HALF_WIDTH = 16.0
TOP = 17.0
STREET_DEPTH = 22.0
PAVEMENT = 3.2
PLOT = 5.8  # width that the town gives to a house
PIXELS_PER_METRE = 18
_FINE = 2 * PIXELS_PER_METRE  # drawn at twice the resolution and averaged, which smooths the edges

# the strong colours of a fishing town, so that what a house looks like by day can still be told by night
WALLS: tuple[Colour, ...] = (
    (238, 224, 192), (196, 48, 46), (238, 134, 44), (246, 206, 66), (70, 146, 72), (40, 170, 166), (46, 100, 190),
    (134, 84, 172), (238, 146, 176), (130, 86, 62),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((148, 74, 54), (112, 62, 50), (86, 88, 96), (70, 74, 84), (122, 106, 92), (84, 104, 98))
ACCENTS: tuple[Colour, ...] = (
    (40, 72, 120), (150, 36, 40), (30, 94, 70), (196, 148, 40), (64, 58, 56), (120, 54, 100), (232, 232, 226),
    (206, 100, 40), (50, 130, 150),
)  # fmt: skip
GLASS: Colour = (62, 76, 92)
SIGNS = ("CAFE", "BAKERY", "BOOKS", "HOTEL", "FLOWERS", "CINEMA", "MARKET", "OPTIK", "MUSIC", "TAILOR", "PIZZA", "BANK")
WINDOWS = ("sash", "arched", "shutters", "wide", "balcony", "narrow")
STOREYS = ("shop", "doorway", "garage", "arcade")
ROOF_SHAPES = ("flat", "gable", "mansard", "hip", "stepped")
MATERIALS = ("plaster", "brick", "stone", "timber", "panels")


@dataclass(frozen=True)
class Tree:
    """A street tree that stands for good at its place."""

    x: float
    z: float
    height: float
    seed: int


@dataclass(frozen=True)
class Place:
    """The textures of a place's facade and street plane, and what stands in front of them."""

    facade: Image.Image  # RGBa (colours times alpha), x from -HALF_WIDTH, y from TOP down to 0
    snow: Image.Image  # L, how much snow settles on the facade
    street: Image.Image  # RGBa, z from 0 down to -STREET_DEPTH
    windows: np.ndarray  # [n, 4] boxes that may be lit at night
    lamps: tuple[float, ...]
    trees: tuple[Tree, ...]
    skyline: np.ndarray  # heights in radians above the horizon, over the whole turn


@cache
def grain() -> np.ndarray:
    """A fixed float32 [512, 1024] texture of mean 0 and deviation 1: coarse stains and fine grain."""
    rng = np.random.default_rng(7)
    total = np.zeros((512, 1024), np.float32)
    for step, weight in ((64, 1.0), (16, 0.7), (4, 0.6), (1, 0.5)):
        small = rng.standard_normal((512 // step, 1024 // step)).astype(np.float32)
        total += weight * np.asarray(Image.fromarray(small).resize((1024, 512), Image.Resampling.BICUBIC))
    return (total - total.mean()) / total.std()


@cache
def hiss() -> np.ndarray:
    """A fixed float32 [512, 512, 3] texture of white noise of mean 0 and deviation 1."""
    return np.random.default_rng(8).standard_normal((512, 512, 3), np.float32)


def patch_of(texture: np.ndarray, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random window [height, width, ...] of a texture."""
    y, x = int(rng.integers(0, texture.shape[0] + 1 - height)), int(rng.integers(0, texture.shape[1] + 1 - width))
    return texture[y : y + height, x : x + width]


@cache
def _lettering(text: str) -> Image.Image:
    font = ImageFont.load_default(40)
    left, top, right, bottom = font.getbbox(text)
    letters = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(letters).text((2 - left, 2 - top), text, fill=255, font=font)
    return letters


def shade(colour: Sequence[int], factor: float) -> Colour:
    """The colour made darker (factor < 1) or lighter."""
    r, g, b = (min(255, max(0, round(c * factor))) for c in colour)
    return r, g, b


@dataclass
class Elevation:
    """A drawing board in metres for facade and settled snow."""

    image: Image.Image = field(init=False)
    snow: Image.Image = field(init=False)
    windows: list[Box] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = round(2 * HALF_WIDTH * _FINE), round(TOP * _FINE)
        self.image = Image.new("RGBA", size)
        self.snow = Image.new("L", size)
        self._ink = ImageDraw.Draw(self.image)
        self._snow_ink = ImageDraw.Draw(self.snow)

    def _pixel(self, x: float, y: float) -> Point:
        return (x + HALF_WIDTH) * _FINE, (TOP - y) * _FINE

    def _corners(self, box: Box) -> tuple[float, float, float, float]:
        (left, bottom), (right, top) = self._pixel(box[0], box[1]), self._pixel(box[2], box[3])
        return left, top, max(left, right - 1), max(top, bottom - 1)

    def rect(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self._ink.rectangle(self._corners((x0, y0, x1, y1)), fill=(*colour, 255))

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self._ink.ellipse(self._corners((x0, y0, x1, y1)), fill=(*colour, 255))

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self._ink.polygon([self._pixel(*p) for p in points], fill=(*colour, 255))

    def line(self, start: Point, end: Point, colour: Colour, width: float) -> None:
        self._ink.line(
            [self._pixel(*start), self._pixel(*end)], fill=(*colour, 255), width=max(1, round(width * _FINE))
        )

    def text(self, text: str, box: Box, colour: Colour) -> None:
        left, top, right, bottom = (round(v) for v in self._corners(box))
        letters = _lettering(text)
        scale = min((right - left) / letters.width, (bottom - top) / letters.height)
        letters = letters.resize((max(1, int(letters.width * scale)), max(1, int(letters.height * scale))))
        at = (left + right - letters.width) // 2, (top + bottom - letters.height) // 2
        self.image.paste((*colour, 255), at, letters)

    def snow_on(self, points: Sequence[Point], strength: int = 235) -> None:
        self._snow_ink.polygon([self._pixel(*p) for p in points], fill=strength)

    def ledge(self, x0: float, x1: float, y: float, thickness: float, colour: Colour) -> None:
        """A sill or cornice whose top is at y; snow settles on it."""
        self.rect(x0, y - thickness, x1, y, colour)
        self.rect(x0, y - thickness - 0.06, x1, y - thickness, shade(colour, 0.55))
        self.snow_on([(x0, y - 0.04), (x1, y - 0.04), (x1, y + 0.12), (x0, y + 0.12)])


def _wall(board: Elevation, box: Box, colour: Colour, material: str, storey: float) -> None:
    x0, y0, x1, y1 = box
    board.rect(*box, colour)
    if material in ("brick", "stone"):
        course, length = (0.3, 0.6) if material == "brick" else (0.6, 1.2)
        joint = shade(colour, 1.14 if material == "brick" else 0.84)
        for row, y in enumerate(np.arange(y0 + course, y1, course)):
            board.line((x0, y), (x1, y), joint, 0.03)
            for x in np.arange(x0 + length * (0.5 + row % 2 / 2), x1, length):
                board.line((x, y - course), (x, y), joint, 0.03)
    elif material == "panels":
        for x in np.arange(x0 + 0.8, x1, 0.8):
            board.line((x, y0), (x, y1), shade(colour, 0.86), 0.05)
    elif material == "timber":
        beam = (84, 60, 46)
        for y in np.arange(y0, y1, storey):
            board.line((x0, y), (x1, y), beam, 0.2)
            for a in np.linspace(x0, x1, max(2, round((x1 - x0) / 1.9)) + 1):
                board.line((a, y), (a, min(y1, y + storey)), beam, 0.16)
            board.line((x0, y), (x0 + 1.4, min(y1, y + storey)), beam, 0.14)
            board.line((x1, y), (x1 - 1.4, min(y1, y + storey)), beam, 0.14)
    board.rect(x0, y0, x1, y0 + 0.5, shade(colour, 0.62))
    board.rect(x1 - 0.12, y0, x1, y1, shade(colour, 0.7))


def _pane(board: Elevation, box: Box, bars: int) -> None:
    x0, y0, x1, y1 = box
    board.rect(*box, GLASS)
    slope = min(0.6 * (x1 - x0), y1 - y0)
    board.polygon([(x0, y1), (x0 + slope, y1), (x0, y1 - slope)], shade(GLASS, 1.55))
    board.windows.append(box)
    for i in range(1, bars + 1):
        x = x0 + (x1 - x0) * i / (bars + 1)
        board.line((x, y0), (x, y1), (226, 222, 214), 0.07)


def _window(board: Elevation, x: float, y: float, width: float, height: float, kind: str, trim: Colour) -> None:
    """A window of a kind, centred at x with its sill at y."""
    x0, x1 = x - width / 2, x + width / 2
    frame = (226, 222, 214)
    board.rect(x0 - 0.14, y - 0.1, x1 + 0.14, y + height + 0.14, shade(frame, 0.9) if kind != "wide" else (70, 70, 72))
    if kind == "arched":
        board.ellipse(x0 - 0.14, y + height - width / 2, x1 + 0.14, y + height + width / 2 + 0.14, frame)
        board.ellipse(x0, y + height - width / 2, x1, y + height + width / 2, GLASS)
    _pane(board, (x0, y, x1, y + height), {"wide": 2, "narrow": 0}.get(kind, 1))
    if kind in ("sash", "narrow", "arched"):
        board.line((x0, y + height * 0.55), (x1, y + height * 0.55), frame, 0.08)
    if kind == "shutters":
        for left in (x0 - 0.14 - width * 0.45, x1 + 0.14):
            board.rect(left, y - 0.05, left + width * 0.45, y + height + 0.05, trim)
            for slat in np.arange(y + 0.15, y + height, 0.25):
                board.line((left, slat), (left + width * 0.45, slat), shade(trim, 0.7), 0.05)
    if kind == "balcony":
        board.ledge(x0 - 0.45, x1 + 0.45, y, 0.14, (120, 116, 112))
        for bar in np.linspace(x0 - 0.42, x1 + 0.42, 9):
            board.line((bar, y), (bar, y + 0.85), (44, 44, 48), 0.05)
        board.line((x0 - 0.45, y + 0.85), (x1 + 0.45, y + 0.85), (44, 44, 48), 0.09)
    else:
        board.ledge(x0 - 0.2, x1 + 0.2, y - 0.02, 0.12, (206, 200, 190))
    if kind == "narrow":
        board.rect(x0 - 0.2, y + height + 0.14, x1 + 0.2, y + height + 0.34, trim)


def _door(board: Elevation, x: float, colour: Colour) -> None:
    board.rect(x - 0.75, 0, x + 0.75, 2.65, (206, 200, 190))
    board.rect(x - 0.58, 0, x + 0.58, 2.1, colour)
    _pane(board, (x - 0.58, 2.15, x + 0.58, 2.5), 1)
    for y in (0.3, 1.2):
        board.rect(x - 0.4, y, x - 0.06, y + 0.7, shade(colour, 0.72))
        board.rect(x + 0.06, y, x + 0.4, y + 0.7, shade(colour, 0.72))


def _shop(board: Elevation, rng: np.random.Generator, x0: float, x1: float, trim: Colour) -> None:
    door = rng.uniform(x0 + 0.9, x1 - 0.9)
    board.rect(x0 + 0.2, 0, x1 - 0.2, 2.75, shade(trim, 0.8))
    for left, right in ((x0 + 0.4, door - 0.65), (door + 0.65, x1 - 0.4)):
        if right - left > 0.5:
            _pane(board, (left, 0.55, right, 2.6), int((right - left) / 1.3))
    board.rect(door - 0.5, 0, door + 0.5, 2.5, shade(trim, 0.55))
    _pane(board, (door - 0.36, 0.6, door + 0.36, 2.3), 0)
    board.rect(x0 + 0.15, 2.7, x1 - 0.15, 3.4, trim)
    ink = (244, 240, 228) if sum(trim) < 420 else (50, 44, 44)
    board.text(SIGNS[rng.integers(len(SIGNS))], (x0 + 0.4, 2.8, x1 - 0.4, 3.3), ink)
    if rng.random() < 0.5:
        edges = np.linspace(x0 + 0.2, x1 - 0.2, 2 * max(2, round((x1 - x0) / 0.9)) + 1)
        for i, (a, b) in enumerate(pairwise(edges)):
            board.polygon([(a, 2.7), (b, 2.7), (b, 2.05), (a, 2.05)], trim if i % 2 else (238, 234, 224))
        board.snow_on([(x0 + 0.2, 2.4), (x1 - 0.2, 2.4), (x1 - 0.2, 2.7), (x0 + 0.2, 2.7)], 200)


def _ground_floor(
    board: Elevation, rng: np.random.Generator, x0: float, x1: float, kind: str, trim: Colour, window: str
) -> None:
    if kind == "shop":
        _shop(board, rng, x0, x1, trim)
    elif kind == "garage":
        width = min(3.0, x1 - x0 - 2.2)
        left = rng.uniform(x0 + 0.3, x1 - width - 1.6)
        board.rect(left - 0.12, 0, left + width + 0.12, 2.62, (200, 194, 184))
        board.rect(left, 0, left + width, 2.5, trim)
        for y in np.arange(0.4, 2.5, 0.4):
            board.line((left, y), (left + width, y), shade(trim, 0.7), 0.06)
        _door(board, (left + width + x1) / 2 + 0.1, shade(trim, 0.7))
    elif kind == "arcade":
        for x in np.linspace(x0, x1, max(2, round((x1 - x0) / 2.2)) + 1)[:-1]:
            step = (x1 - x0) / max(2, round((x1 - x0) / 2.2))
            board.rect(x + 0.35, 0, x + step - 0.35, 2.2, (46, 44, 48))
            board.ellipse(x + 0.35, 1.5, x + step - 0.35, 2.9, (46, 44, 48))
            board.windows.append((x + 0.5, 0.6, x + step - 0.5, 2.2))
        board.rect(x0, 3.0, x1, 3.2, trim)
    else:
        slots = np.linspace(x0, x1, max(2, round((x1 - x0) / 2.1)) + 1)
        at = int(rng.integers(len(slots) - 1))
        for i, (a, b) in enumerate(pairwise(slots)):
            if i == at:
                _door(board, (a + b) / 2, trim)
            else:
                _window(board, (a + b) / 2, 1.0, 1.0, 1.4, "sash" if window == "balcony" else window, trim)


def _roof(board: Elevation, x0: float, x1: float, y: float, shape: str, colour: Colour, wall: Colour) -> None:
    middle, width = (x0 + x1) / 2, x1 - x0
    height = min(TOP - 0.2 - y, {"flat": 0.5, "mansard": 2.3, "hip": 1.9}.get(shape, 0.42 * width))
    outline: list[Point]
    if shape == "flat":
        outline = [(x0, y), (x1, y), (x1, y + height), (x0, y + height)]
    elif shape == "gable":
        outline = [(x0 - 0.2, y), (x1 + 0.2, y), (middle, y + height)]
    elif shape == "stepped":
        steps = 4
        rise = [(x0 + width / 2 * i / steps, y + height * k / steps) for i in range(steps) for k in (i, i + 1)]
        outline = [*rise, *((2 * middle - px, py) for px, py in reversed(rise))]
    else:
        inset = 0.7 if shape == "mansard" else 1.8
        outline = [(x0 - 0.2, y), (x1 + 0.2, y), (x1 - inset, y + height), (x0 + inset, y + height)]
    board.snow_on([(px, py + 0.12 * (py > y)) for px, py in outline], 225 if shape in ("mansard", "hip") else 60)
    board.polygon(outline, shade(wall, 0.92) if shape in ("flat", "gable", "stepped") else colour)
    if shape == "gable":
        for a, b in ((outline[0], outline[2]), (outline[2], outline[1])):
            board.line(a, b, colour, 0.4)
        board.snow_on([outline[0], outline[2], outline[1], (middle, y + height - 0.5)])
        _window(board, middle, y + 0.35, 0.8, min(1.1, max(0.5, height - 1.6)), "sash", wall)
    elif shape == "stepped":
        _window(board, middle, y + 0.5, 0.9, 1.1, "narrow", colour)
    elif shape == "flat":
        board.ledge(x0 - 0.1, x1 + 0.1, y + height, 0.2, shade(wall, 1.1))
    else:
        if shape == "mansard":
            for x in np.linspace(x0, x1, max(2, round(width / 2.4)) + 2)[1:-1]:
                board.rect(x - 0.65, y + 0.25, x + 0.65, y + 1.75, (222, 216, 204))
                _pane(board, (x - 0.45, y + 0.4, x + 0.45, y + 1.55), 1)
        board.rect(x1 - 1.9, y + height * 0.5, x1 - 1.3, min(TOP, y + height + 0.7), (120, 76, 62))
    board.ledge(x0 - 0.15, x1 + 0.15, y + 0.1, 0.25, (214, 208, 196))


def _house(board: Elevation, rng: np.random.Generator, x0: float, x1: float, wall: Colour) -> None:
    trim = ACCENTS[rng.integers(len(ACCENTS))]
    window = WINDOWS[rng.integers(len(WINDOWS))]
    storeys = int(rng.integers(1, 5))
    storey = rng.uniform(2.7, 3.1)
    eaves = 3.5 + storeys * storey
    _wall(board, (x0, 0, x1, eaves), wall, MATERIALS[rng.integers(len(MATERIALS))], storey)
    _ground_floor(board, rng, x0, x1, STOREYS[rng.integers(len(STOREYS))], trim, window)
    pitch = rng.uniform(2.7, 3.4) if window == "wide" else rng.uniform(1.7, 2.6)
    across = max(1, int((x1 - x0 - 0.5) / pitch))
    size = {"wide": (1.9, 1.4), "balcony": (1.1, 2.0), "narrow": (0.8, 1.8)}.get(window, (1.0, 1.5))
    for row in range(storeys):
        for x in np.linspace(x0, x1, across + 1)[:-1] + (x1 - x0) / across / 2:
            _window(board, x, 3.5 + row * storey + (0.35 if window == "balcony" else 0.75), *size, window, trim)
    if rng.random() < 0.5:
        board.ledge(x0, x1, 3.55, 0.18, (206, 200, 190))
    _roof(board, x0, x1, eaves, ROOF_SHAPES[rng.integers(len(ROOF_SHAPES))], ROOFS[rng.integers(len(ROOFS))], wall)


def _garden(board: Elevation, rng: np.random.Generator, x0: float, x1: float) -> None:
    height = rng.uniform(1.0, 2.2)
    if rng.random() < 0.5:
        board.rect(x0, 0, x1, height, (156, 120, 100))
        board.ledge(x0, x1, height, 0.15, (196, 188, 176))
    else:
        for x in np.arange(x0, x1, 0.22):
            board.line((x, 0), (x, height), (52, 58, 56), 0.06)
        board.line((x0, height * 0.9), (x1, height * 0.9), (52, 58, 56), 0.1)


def _street(rng: np.random.Generator) -> Image.Image:
    size = round(2 * HALF_WIDTH * PIXELS_PER_METRE), round(STREET_DEPTH * PIXELS_PER_METRE)
    image = Image.new("RGB", size, (104, 104, 108))
    ink = ImageDraw.Draw(image)
    edge = round(PAVEMENT * PIXELS_PER_METRE)
    ink.rectangle((0, 0, size[0], edge), fill=((168, 160, 150), (150, 150, 150), (172, 146, 128))[rng.integers(3)])
    for x in range(0, size[0], 18):
        ink.line((x, 0, x, edge), fill=(134, 128, 122))
    for y in range(0, edge, 14):
        ink.line((0, y, size[0], y), fill=(134, 128, 122))
    ink.rectangle((0, edge, size[0], edge + 4), fill=(196, 192, 186))
    if rng.random() < 0.4:
        left = int(rng.uniform(0.3, 0.7) * size[0])
        for stripe in range(5):
            ink.rectangle((left + stripe * 20, edge + 8, left + stripe * 20 + 10, size[1]), fill=(206, 206, 202))
    middle = edge + round(5.5 * PIXELS_PER_METRE)
    for x in range(int(rng.integers(0, 80)), size[0], 90):
        ink.rectangle((x, middle, x + 45, middle + 3), fill=(206, 206, 200))
    stained = np.asarray(image, np.float32) * (1 + 0.07 * patch_of(grain(), rng, size[1], size[0])[..., None])
    return Image.fromarray(stained.clip(0, 255).astype(np.uint8)).convert("RGBA").convert("RGBa")


def build_place(rng: np.random.Generator) -> Place:
    """A place drawn from the building kit; everything about it comes from `rng`."""
    board = Elevation()
    trees: list[Tree] = []
    walls = cycle(rng.permutation(len(WALLS)))  # neighbours differ
    plots = round(HALF_WIDTH / PLOT) + 1
    edges = PLOT * np.arange(-plots, plots + 1) + rng.uniform(-0.3, 0.3, 2 * plots + 1)
    for x0, x1 in pairwise(edges.tolist()):
        if rng.random() < 0.08:
            _garden(board, rng, x0, x1)
            trees.append(Tree((x0 + x1) / 2, 1.5, rng.uniform(5, 8), int(rng.integers(1 << 30))))
        else:
            _house(board, rng, x0, x1, shade(WALLS[next(walls)], rng.uniform(0.92, 1.06)))
    for spot in np.arange(-HALF_WIDTH + rng.uniform(0, 9), HALF_WIDTH, rng.uniform(8, 13)):
        if rng.random() < 0.3:
            trees.append(Tree(float(spot), -2.4, rng.uniform(4, 6.5), int(rng.integers(1 << 30))))
    lamps = tuple(np.arange(-HALF_WIDTH + rng.uniform(0, 14), HALF_WIDTH, 14).tolist())
    facade = board.image.reduce(2)
    pixels = np.array(facade, dtype=np.float32)
    pixels[..., :3] *= 1 + 0.05 * patch_of(grain(), rng, facade.height, facade.width)[..., None]
    hills = np.interp(np.linspace(0, 24, 720), np.arange(25), rng.uniform(0.02, 0.16, 25))
    blocks = np.repeat(rng.uniform(0, 0.2, 90) * (rng.random(90) < 0.35), 8)
    return Place(
        facade=Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGBa"),
        snow=board.snow.reduce(2),
        street=_street(rng),
        windows=np.array(board.windows),
        lamps=lamps,
        trees=tuple(trees),
        skyline=np.maximum(hills, blocks).astype(np.float32),
    )
