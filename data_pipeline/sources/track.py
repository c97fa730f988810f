"""Positions by time: where a receiver's track was when a photograph, or a frame of a video, was taken."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.reading import reading, shown
from data_pipeline.exif import CameraFacts
from data_pipeline.positions import from_lat_lon
from data_pipeline.tables import read_table_of_rows

EXPECTED = "a table with the columns time, lat and lon"
MOST_GAP_S = 10.0
_MOVED_M = 0.5  # between two points of a track, less says nothing of a direction
_STAMP = re.compile(
    r"(?<!\d)((?:19|20)\d\d)[-_.]?([01]\d)[-_.]?([0-3]\d)[T_ -]?([0-2]\d)[-_.:h]?([0-5]\d)[-_.:m]?([0-5]\d)"
    r"(?:[.,_-]?(\d{1,6}))?(?!\d)"
)


@dataclass(frozen=True)
class Track:
    """Points of a way by time: seconds (ascending), degrees, metres east and north, heading or NaN, each float64 [N].

    Seconds are those of the clock as written, without its zone, or as the table counts them. With `fps` a photograph's
    time is the last number of its name / fps; without it, the time in its EXIF or its name.
    """

    seconds: NDArray[np.float64]
    lat: NDArray[np.float64]
    lon: NDArray[np.float64]
    heading: NDArray[np.float64]
    fps: float | None = None
    offset_s: float = 0.0

    def locate(self, name: str, taken: datetime.datetime | None) -> CameraFacts:
        """Position and heading of a photograph between the two points around its time, or why there are none."""
        second = self._time(name, taken)
        if second is None:
            what = "a number" if self.fps else "a time"
            return CameraFacts(taken=taken, fault=f"no GPS, and {what} neither in EXIF nor in the name")
        after = int(np.searchsorted(self.seconds, second))
        before = after if after < len(self.seconds) and self.seconds[after] == second else after - 1
        if before < 0 or after >= len(self.seconds) or self.seconds[after] - self.seconds[before] > MOST_GAP_S:
            return CameraFacts(taken=taken, fault="no GPS, and the track has no points around its time")
        lat, lon = (float(np.interp(second, self.seconds, degrees)) for degrees in (self.lat, self.lon))
        heading = float(self.heading[before])
        lon = (lon + 180) % 360 - 180
        return CameraFacts(lat, lon, None if np.isnan(heading) else heading % 360, None, taken)

    def _time(self, name: str, taken: datetime.datetime | None) -> float | None:
        stem = Path(name).stem
        if self.fps:
            numbers = re.findall(r"\d+", stem)
            return int(numbers[-1]) / self.fps + self.offset_s if numbers else None
        seconds = time_of_name(stem)
        if seconds is None and taken is not None:
            seconds = _seconds_of(taken)
        return None if seconds is None else seconds + self.offset_s


def read_track(path: Path, *, fps: float | None = None, offset_s: float = 0.0) -> Track:
    """The track in a CSV or Parquet table of time, lat, lon, and heading if known.

    Times are seconds, or as 2024-05-01T10:30:00.5, whose zone is ignored: they are to be of the camera's clock, and
    `offset_s` is added to a photograph's time. Without a heading it is the direction of the way. Raises
    FileNotFoundError, or ValueError naming the row.
    """
    if fps is not None and not 0 < fps <= 1e6:
        raise ValueError(f"--fps {fps:g}: expected frames per second, above 0")
    with reading(path, EXPECTED):
        table = read_table_of_rows(path)
        table.require(["time", "lat", "lon"])
        lines = table.lines.tolist()
        seconds = np.array(
            [_seconds(cell, path, line) for cell, line in zip(table.text("time").to_pylist(), lines, strict=True)]
        )
        at = from_lat_lon(table.numbers("lat"), table.numbers("lon"), path, lines=lines)
        order = np.argsort(seconds, kind="stable")
        lat, lon = at.lat[order], np.unwrap(at.lon[order], period=360)  # over the date line too
        heading = table.numbers("heading")[order] if "heading" in table.columns else _directions(lat, lon)
    return Track(seconds[order], lat, lon, heading, fps, offset_s)


def time_of_name(stem: str) -> float | None:
    """Seconds of the time that a name holds, such as IMG_20240501_103000 or 2024-05-01T10-30-00.250; None for none."""
    found = _STAMP.search(stem)
    if not found:
        return None
    *whole, fraction = found.groups()
    try:
        moment = datetime.datetime(*map(int, whole))  # type: ignore[arg-type]
    except ValueError:
        return None
    return _seconds_of(moment) + (float(f"0.{fraction}") if fraction else 0.0)


def _seconds(text: str | None, path: Path, line: int) -> float:
    cell = (text or "").strip()
    try:
        seconds = float(cell)
    except ValueError:
        try:
            seconds = _seconds_of(datetime.datetime.fromisoformat(cell.replace("Z", "").replace("/", "-")))
        except ValueError:
            seconds = np.nan
    if not np.isfinite(seconds):
        raise ValueError(f"{path} row {line}: time is {shown(cell)!r}; expected seconds, or as 2024-05-01T10:30:00")
    return seconds


def _seconds_of(moment: datetime.datetime) -> float:
    """Seconds since 1970 of a clock's time as written."""
    return moment.replace(tzinfo=datetime.timezone.utc).timestamp()


def _directions(lat: NDArray[np.float64], lon: NDArray[np.float64]) -> NDArray[np.float64]:
    """The direction from each point to the next, degrees clockwise from north; NaN where it hardly moved."""
    north = np.diff(lat) * 111_195.0
    east = np.diff(lon) * 111_195.0 * np.cos(np.radians(lat[:-1]))
    heading = np.where(np.hypot(east, north) >= _MOVED_M, np.degrees(np.arctan2(east, north)) % 360, np.nan)
    return np.append(heading, heading[-1:] if len(heading) else [np.nan])
