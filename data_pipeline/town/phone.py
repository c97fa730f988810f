"""The rendered town as a telephone photographs it: EXIF with GPS and heading, turned, in several formats.

For tests and for the documentation's walk from a folder of photographs to a trained network.
"""

from __future__ import annotations

import datetime
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from configs.progress import OnProgress, untold
from data_pipeline.town.conditions import draw_conditions
from data_pipeline.town.places import build_place
from data_pipeline.town.render import METRES_PER_LAT, METRES_PER_LON, ORIGIN_LAT, ORIGIN_LON
from data_pipeline.town.views import render_view

SPACING_M = 60.0
LARGE = (4000, 3000)  # 12 megapixels
_ORIENTATION, _MODEL, _CHANGED, _EXIF, _GPS, _TAKEN = 0x0112, 0x0110, 0x0132, 0x8769, 0x8825, 0x9003
_TURNED = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


class Odd(NamedTuple):
    """How many photographs are odd, by kind."""

    webp: int = 8
    without_gps: int = 3
    copies: int = 2


_FEW_ODD = Odd()


@dataclass(frozen=True)
class Walk:
    """How many places are photographed how often, and what is odd among the photographs.

    `error_m` is the standard deviation of the receiver's position, north and east, in metres.
    """

    seed: int = 0
    places: int = 60
    views: int = 6
    error_m: float = 2.0
    odd: Odd = _FEW_ODD


def photograph_town(folder: Path, walk: Walk = Walk(), on_progress: OnProgress = untold) -> None:
    """Writes `walk` to `folder` as IMG_<date>_<time>.jpg, a quarter of them stored turned.

    Some are WebP, one is a PNG of 16 bits, one has 12 megapixels, some have no GPS, some are there twice; a text file
    lies beside them.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng([walk.seed, 1])
    total, number = walk.places * walk.views, 0
    counts = walk.odd
    odd, plain = rng.permutation(total), counts.webp + counts.without_gps
    webp, without_gps = set(odd[: counts.webp].tolist()), set(odd[counts.webp : plain].tolist())
    deep, large, *copied = odd[plain : plain + 2 + counts.copies].tolist()
    for place_number in range(walk.places):
        place, bearing = build_place(rng), float(rng.uniform(0, 360))
        along = np.radians(bearing + 90)
        spot = (np.array(divmod(place_number, 10)[::-1]) + rng.uniform(0.2, 0.8, 2)) * SPACING_M
        for _ in range(walk.views):
            now = draw_conditions(rng, "any")
            image: Image.Image = Image.open(io.BytesIO(render_view(place, now, rng)))
            error = rng.normal(0, walk.error_m, 2)
            east = spot[0] + now.shift * np.sin(along) + error[0]
            north = spot[1] + now.shift * np.cos(along) + error[1]
            taken = datetime.datetime(2026, now.month, 1 + number % 28) + datetime.timedelta(
                seconds=36_000 + 37 * number
            )
            turned = (1, 1, 1, 6, 1, 3, 1, 8)[number % 8]
            exif = _exif(taken, turned)
            if number not in without_gps:
                lat, lon = ORIGIN_LAT + north / METRES_PER_LAT, ORIGIN_LON + east / METRES_PER_LON
                _add_gps(exif, lat, lon, (bearing + float(np.degrees(now.yaw))) % 360, 2 * walk.error_m)
            name = f"IMG_{taken:%Y%m%d_%H%M%S}"
            if number in webp:
                path = folder / f"{name}.webp"
                _turn(image, turned).save(path, quality=90, exif=exif)
            elif number == deep:
                path = folder / f"{name}.PNG"
                sixteen = np.asarray(_turn(image, turned).convert("L")).astype(np.uint16) * 257
                Image.fromarray(sixteen).save(path, exif=exif)
            else:
                path = folder / f"{name}.{'JPG' if number % 5 == 0 else 'jpg'}"
                image = image.resize(LARGE) if number == large else image
                _turn(image, turned).save(path, quality=92, exif=exif)
            if number in copied:
                path.with_stem(f"{path.stem} (1)").write_bytes(path.read_bytes())
            number += 1
            on_progress(number, total)
    (folder / "notes.txt").write_text("what I photographed\n")


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    """The image as it is stored if EXIF says that it is to be turned back."""
    how = _TURNED[orientation]
    return image if how is None else image.transpose(how)


def _exif(taken: datetime.datetime, orientation: int) -> Image.Exif:
    exif = Image.Exif()
    stamp = f"{taken:%Y:%m:%d %H:%M:%S}"
    exif[_ORIENTATION], exif[_MODEL], exif[_CHANGED] = orientation, "town phone", stamp
    exif.get_ifd(_EXIF)[_TAKEN] = stamp
    return exif


def _add_gps(exif: Image.Exif, lat: float, lon: float, heading: float, error_m: float) -> None:
    gps = exif.get_ifd(_GPS)
    gps[1], gps[2] = "N" if lat >= 0 else "S", _sexagesimal(abs(lat))
    gps[3], gps[4] = "E" if lon >= 0 else "W", _sexagesimal(abs(lon))
    gps[16], gps[17], gps[31] = "T", round(heading, 2), error_m


def _sexagesimal(degrees: float) -> tuple[float, float, float]:
    minutes = degrees % 1 * 60
    return float(int(degrees)), float(int(minutes)), round(minutes % 1 * 60, 4)
