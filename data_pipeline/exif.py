"""What a camera wrote beside a photograph: where it stood, where it looked, and when."""

from __future__ import annotations

import datetime
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.reading import reading
from data_pipeline.formats import reads_heic

_GPS, _EXIF = 0x8825, 0x8769
_LAT_REF, _LAT, _LON_REF, _LON, _HEADING, _ERROR_M = 1, 2, 3, 4, 17, 31
_TAKEN, _CHANGED = 36867, 306
NO_GPS = "no GPS"


@dataclass(frozen=True)
class CameraFacts:
    """Degrees, heading (clockwise from north), the receiver's error in metres and the time, each None if absent.

    `fault` says why there is no position. A heading from magnetic north is taken as it is. The time is the camera's own
    clock, without a zone.
    """

    lat: float | None = None
    lon: float | None = None
    heading: float | None = None
    error_m: float | None = None
    taken: datetime.datetime | None = None
    fault: str = ""


def read_exif(path: Path) -> CameraFacts:
    """What a photograph's EXIF says; its pixels are not decoded. Raises ValueError, OSError naming the file."""
    from PIL import Image, UnidentifiedImageError

    if reads_heic():
        import pillow_heif

        pillow_heif.register_heif_opener()
    with warnings.catch_warnings(), reading(path, "a readable photograph"):
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                exif = image.getexif()
                gps, inner = (_directory(exif, tag) for tag in (_GPS, _EXIF))
                taken = _time(inner.get(_TAKEN) or exif.get(_CHANGED))
        except UnidentifiedImageError:
            raise ValueError(f"{path}: not a photograph") from None
    lat, lat_fault = _degrees(gps, _LAT, _LAT_REF, {"N": 1, "S": -1}, 90)
    lon, lon_fault = _degrees(gps, _LON, _LON_REF, {"E": 1, "W": -1}, 180)
    fault = lat_fault or lon_fault
    if not fault and lat == lon == 0:
        fault = "GPS 0, 0: a receiver without a fix"
    heading, error_m = _number(gps.get(_HEADING)), _number(gps.get(_ERROR_M))
    if fault:
        return CameraFacts(taken=taken, fault=fault)
    return CameraFacts(lat, lon, None if heading is None else heading % 360, error_m, taken)


def _directory(exif: Any, tag: int) -> dict[int, Any]:
    try:
        return dict(exif.get_ifd(tag))
    except Exception:  # noqa: BLE001 - damaged tags are no tags; the photograph may be whole
        return {}


def _degrees(gps: dict[int, Any], tag: int, ref_tag: int, signs: dict[str, int], most: int) -> tuple[float, str]:
    """Degrees and "", or 0 and what is wrong."""
    if tag not in gps:
        return 0.0, NO_GPS
    parts = gps[tag] if isinstance(gps[tag], tuple | list) else (gps[tag],)
    numbers = [_number(part) for part in parts]
    if not 1 <= len(numbers) <= 3 or any(number is None for number in numbers):
        return 0.0, "GPS that is no number"
    value = sum((number or 0.0) / 60**power for power, number in enumerate(numbers))
    ref = gps.get(ref_tag)
    ref = ref.decode("ascii", "replace") if isinstance(ref, bytes) else str(ref or "")
    sign = signs.get(ref.strip("\0 ").upper()[:1])
    if sign is None:
        return 0.0, "GPS without its hemisphere"
    if not 0 <= value <= most:
        return 0.0, f"GPS beyond {most} degrees"
    return sign * value, ""


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return number if abs(number) < float("inf") else None


def _time(value: Any) -> datetime.datetime | None:
    found = re.match(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)", str(value or ""))
    if not found:
        return None
    try:
        return datetime.datetime(*map(int, found.groups()))  # type: ignore[arg-type]
    except ValueError:
        return None
