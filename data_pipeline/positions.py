"""One door for positions: UTM names, degrees, metres of a map; checked, with distances right over zone borders."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.reading import shown
from data_pipeline.table_cells import hint
from data_pipeline.utm import FALSE_NORTH_M, MEAN_RADIUS_M, Floats, degrees_from_utm, on_ellipsoid, utm_from_degrees
from data_pipeline.zones import is_south, zone_digits, zone_letter

MAP = 0  # a zone's number for metres of a map that names no zone; each number below is a map of its own
FARTHEST_M = 1e10  # from a map's origin
NAME = "@UTM_east@UTM_north@zone@letter@lat@lon@...@.jpg"

_HEADING = 9
_ALL_POSITIVE, _FEW = 0.5, 5
_OF_UTM = "expected 0 to 1,000,000 and 0 to 10,000,000 m"
_DEGREE_DIGITS = 4  # decimals that metres of a name do not have


@dataclass(frozen=True)
class Positions:
    """N positions: `east`, `north` in metres and `zone` (int [N]), `lat`, `lon` in degrees; `notes` on what looks odd.

    Zones are UTM's 1 to 60, with northings from the equator (negative in the south), or maps of their own (`MAP` and
    below), whose degrees are NaN. `in_metres` says that metres were given: distances within a zone are then the map's,
    as the field's protocols have them. A position that nobody knows is NaN in all.
    """

    east: Floats
    north: Floats
    zone: NDArray[np.int64]
    lat: Floats
    lon: Floats
    in_metres: bool
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.zone)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which positions are known, bool [N]."""
        return np.isfinite(self.east)


def from_lat_lon(
    lat: Floats, lon: Floats, where: str | Path, *, lines: Sequence[int] | None = None, missing_ok: bool = False
) -> Positions:
    """Positions from degrees [N]. Raises ValueError naming `where` and the row of the first that is on no map.

    `lines` are the rows' numbers, from 2 (below a header) without it. With `missing_ok` a row may have neither latitude
    nor longitude.
    """
    lat, lon = np.asarray(lat, np.float64), np.asarray(lon, np.float64)
    missing = np.isnan(lat) & np.isnan(lon)
    within = (np.abs(lat) <= 90) & (np.abs(lon) <= 180)
    lines = range(2, len(lat) + 2) if lines is None else lines
    _refuse(~(within | missing) if missing_ok else ~within, where, lines, lambda row: _what_degrees(lat, lon, row))
    zone = np.where(missing, MAP, np.floor((np.nan_to_num(lon) + 180) / 6).astype(np.int64) % 60 + 1)
    east, north = utm_from_degrees(lat, lon, zone)
    return Positions(east, north, zone, lat, lon, False, tuple(_odd_degrees(lat, lon, lines)))


def from_metres(
    east: Floats,
    north: Floats,
    where: str | Path,
    *,
    zone: int = MAP,
    zones: Sequence[str] | None = None,
    lines: Sequence[int] | None = None,
    missing_ok: bool = False,
) -> Positions:
    """Positions from metres [N] of one map: of a UTM zone in the northern hemisphere, or of a map without a name.

    Maps of other numbers (0, -1, -2, ...) are infinitely far apart. `zones` says the UTM zone of each row instead, as
    33, 33N, 33S or 33T; without a letter it is of the north. Raises ValueError as `from_lat_lon` does.
    """
    east, north = np.asarray(east, np.float64), np.asarray(north, np.float64)
    missing = np.isnan(east) & np.isnan(north)
    within = (np.abs(east) <= FARTHEST_M) & (np.abs(north) <= FARTHEST_M)
    lines = range(2, len(east) + 2) if lines is None else lines
    _refuse(
        ~(within | missing) if missing_ok else ~within,
        where,
        lines,
        lambda row: f"east, north are {east[row]:g}, {north[row]:g}; expected metres",
    )
    numbers, notes = np.full(len(east), zone, np.int64), _odd_metres(east, north)
    if zones is not None:
        numbers, north, odd = _in_zones(east, north, zones, where, lines)
        notes += odd
    return Positions(east, north, numbers, *_degrees_of(east, north, numbers), True, tuple(notes))


def _in_zones(
    east: Floats, north: Floats, zones: Sequence[str], where: str | Path, lines: Sequence[int]
) -> tuple[NDArray[np.int64], Floats, list[str]]:
    """The zone of each row that has a position, northings from the equator, and notes."""
    known = np.isfinite(east)
    digits = [zone_digits(text) for text in zones]
    letters = [zone_letter(text) for text in zones]
    valid = [d.isdecimal() and len(d) < 3 and 1 <= int(d) <= 60 for d in digits]
    _refuse(
        known & ~np.array(valid, bool),
        where,
        lines,
        lambda row: f"zone is {shown(zones[row])!r}; expected a UTM zone, 1 to 60, with N or S for the hemisphere",
    )
    _refuse(
        known & ~_is_utm(east, north),
        where,
        lines,
        lambda row: f"east, north are {east[row]:.10g}, {north[row]:.10g}; {_OF_UTM}",
    )
    number = np.array([int(d) if ok else MAP for d, ok in zip(digits, valid, strict=True)], np.int64)
    south = np.array([is_south(letter, n) for letter, n in zip(letters, north.tolist(), strict=True)], bool)
    bare = int((known & np.array([not letter for letter in letters], bool)).sum())
    notes = [f"{bare} zones have no letter and are taken to be of the northern hemisphere"] if bare else []
    return np.where(known, number, MAP), np.where(south, north - FALSE_NORTH_M, north), notes


def from_utm_names(names: Sequence[str | Path]) -> Positions:
    """Positions from file names in the field's convention, @UTM_east@UTM_north@zone@letter@...

    The letter is UTM's band or the hemisphere, N or S; an S whose northing is not of band S is the south. Names without
    a zone are of the others' zone if those have but one, or else of one map. Raises ValueError naming the file whose
    coordinates cannot be read or are of no zone, and saying so if they look like degrees.
    """
    fields = [os.path.basename(name).split("@") for name in names]  # noqa: PTH119 - names may be millions
    east, north = (np.array([_named(f, n, name) for f, name in zip(fields, names, strict=True)]) for n in (1, 2))
    zone = np.array([_zone(f, name) for f, name in zip(fields, names, strict=True)], dtype=np.int64)
    known = sorted(set(zone[zone > 0].tolist()))
    notes = []
    if known and (zone == MAP).any():
        if len(known) > 1:
            name = names[int(np.argmax(zone == MAP))]
            raise ValueError(f"{name}: its name holds no UTM zone, and others are of {known}; expected {NAME}")
        notes.append(f"{int((zone == MAP).sum())} names hold no UTM zone and are taken to be of zone {known[0]}")
        zone[:] = known[0]
    if _look_like_degrees(fields, east, north):
        raise ValueError(
            f"{names[0]}: its name's coordinates look like degrees, and so do those of all {len(names)} names; "
            f"expected metres, {NAME} (a table with the columns lat and lon takes degrees)"
        )
    of_utm = zone > 0
    outside = of_utm & ~_is_utm(east, north)
    if outside.any():
        bad = int(np.argmax(outside))
        swapped = " (swapped?)" if east[bad] > 1e6 >= north[bad] >= 0 else ""
        raise ValueError(
            f"{names[bad]}: easting {east[bad]:.10g}, northing {north[bad]:.10g} are of no UTM zone{swapped}; {_OF_UTM}"
        )
    south = of_utm & np.array(
        [is_south(_letter(f), n) for f, n in zip(fields, north.tolist(), strict=True)], dtype=bool
    )
    north = np.where(south, north - FALSE_NORTH_M, north)
    lat, lon = _degrees_of(east, north, zone)
    notes += [*_odd_metres(east, north), *_other_degrees(fields, names, lat, lon)]
    return Positions(east, north, zone, lat, lon, True, tuple(notes))


def metres_between(a: Positions, b: Positions) -> Floats:
    """Metres from each position of `a` to that of `b` [N]; NaN if one is unknown, infinite between two maps.

    On one map both of whose positions were given in metres: the map's distance. Else on WGS84: that of the chord, bent
    to the Earth's radius there; within 1e-6 below 10 km, within 0.6 % anywhere.
    """
    on_map = (a.zone == b.zone) & (a.in_metres and b.in_metres)
    plane = np.hypot(a.east - b.east, a.north - b.north)
    points = _in_space(a), _in_space(b)
    chord = np.linalg.norm(points[0] - points[1], axis=1)
    radius = (np.linalg.norm(points[0], axis=1) + np.linalg.norm(points[1], axis=1)) / 2
    arc = 2 * radius * np.arcsin(np.minimum(chord / (2 * radius), 1.0))
    apart = a.known & b.known & ~on_map & ((a.zone <= MAP) | (b.zone <= MAP))
    return np.where(on_map, plane, np.where(apart, np.inf, arc))


def within_radius(queries: Positions, database: Positions, radius_m: float) -> list[NDArray[np.int64]]:
    """Database numbers at most `radius_m` metres from each query, ascending; the border counts.

    Metres are those of `metres_between`. A side without zones is taken to be of the other's, if that has but one.
    """
    queries, database = _of_one_map(queries, database), _of_one_map(database, queries)
    near: list[list[NDArray[np.int64]]] = [[] for _ in range(len(queries))]
    if queries.in_metres and database.in_metres:
        for zone in np.unique(queries.zone):
            rows, columns = (np.flatnonzero((p.zone == zone) & p.known) for p in (queries, database))
            for row, ids in _near(_on_map(queries), _on_map(database), rows, columns, radius_m):
                near[row].append(ids)
        if len(np.union1d(queries.zone, database.zone)) == 1:
            return [np.concatenate([*found, np.zeros(0, np.int64)]) for found in near]
    chord = 2 * MEAN_RADIUS_M * np.sin(min(radius_m / (2 * MEAN_RADIUS_M), np.pi / 2))
    rows, columns = (np.flatnonzero(np.isfinite(p.lat)) for p in (queries, database))
    for row, ids in _near(_in_space(queries), _in_space(database), rows, columns, chord):
        other = ids if not (queries.in_metres and database.in_metres) else ids[database.zone[ids] != queries.zone[row]]
        near[row].append(other)
    return [np.sort(np.concatenate([*found, np.zeros(0, np.int64)])) for found in near]


def suspicions(
    positives: Sequence[NDArray[np.int64]],
    num_database: int,
    queries: Positions | None = None,
    database: Positions | None = None,
) -> list[str]:
    """What of a ground truth looks wrong, one line each; nothing where it looks right.

    `positives` are the database numbers of each query; positions, where known, are looked at too.
    """
    notes = []
    pairs = len(positives) * num_database
    share = sum(map(len, positives)) / pairs if pairs else 0.0
    if num_database >= _FEW and share >= _ALL_POSITIVE:
        notes.append(
            f"{share:.0%} of all pairs of a query and a database image are positives: chance alone reaches a recall@1 "
            f"of {share:.0%}; are the coordinates metres, and of more than one spot?"
        )
    for what, positions in (("database", database), ("queries", queries)):
        if positions is None or not positions.known.any():
            continue
        east, north = positions.east[positions.known], positions.north[positions.known]
        if len(east) > 1 and np.ptp(east) == 0 and np.ptp(north) == 0:
            notes.append(f"all {len(east)} positions of the {what} are equal")
        notes += [f"{what}: {note}" for note in positions.notes]
    return notes


def _refuse(wrong: NDArray[np.bool_], where: str | Path, lines: Sequence[int], what: Any) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"{where} row {lines[row]}: {what(row)}")


def _what_degrees(lat: Floats, lon: Floats, row: int) -> str:
    a, b = float(lat[row]), float(lon[row])
    told = f"lat, lon are {a:.10g}, {b:.10g}; expected -90 to 90, -180 to 180"
    if np.isnan(a) or np.isnan(b):
        return f"{told}, both of them"
    for power in (5, 6, 7):
        if 1e4 < abs(a) < 1e10 and a == np.round(a) and b == np.round(b) and abs(a) <= 90 * 10**power >= abs(b) / 2:
            return f"{told} (degrees times 10^{power}? divide by it)"
    if 90 < abs(a) <= 180 and abs(b) <= 90:
        return f"{told} (are the two columns swapped?)"
    if abs(a) <= 90 and 180 < b <= 360:
        return f"{told} (counted to 360? subtract 360 beyond 180)"
    if abs(a) > 1000 or abs(b) > 1000:
        return f"{told} (metres? name those columns east and north)"
    return told


def _is_utm(east: Floats, north: Floats) -> NDArray[np.bool_]:
    return (east >= 0) & (east <= 1e6) & (north >= 0) & (north <= FALSE_NORTH_M)


def _odd_degrees(lat: Floats, lon: Floats, lines: Sequence[int]) -> list[str]:
    notes = []
    known = np.isfinite(lat)
    zero = (lat == 0) & (lon == 0)
    if zero.any() and not zero[known].all():
        first = lines[int(np.argmax(zero))]
        notes.append(f"{int(zero.sum())} positions are 0, 0 (first: row {first}), as of a receiver without a fix")
    if known.sum() > 1 and (lat[known] == np.round(lat[known])).all() and (lon[known] == np.round(lon[known])).all():
        notes.append("all positions are whole degrees, 111 km apart: were their decimals lost?")
    return notes


def _odd_metres(east: Floats, north: Floats) -> list[str]:
    known = np.isfinite(east)
    e, n = east[known], north[known]
    small = len(e) > 1 and (np.abs(e) <= 180).all() and (np.abs(n) <= 180).all()
    notes = []
    if small and 0 < max(np.ptp(e), np.ptp(n)) < 1:
        notes.append("all positions lie within 1 m and below 180: they look like degrees, and are read as metres")
    zero = (e == 0) & (n == 0)
    if zero.any() and max(np.abs(e).max(), np.abs(n).max()) > 1e4:  # a map of one's own may have its origin in it
        notes.append(f"{int(zero.sum())} positions are 0, 0, far from the others")
    return notes


def _named(fields: list[str], number: int, name: str | Path) -> float:
    try:
        value = float(fields[number])
    except (IndexError, ValueError):
        value = np.nan
    if not math.isfinite(value):
        raw = fields[number] if len(fields) > number else ""
        told = hint(raw) if "," in raw or "°" in raw else f"expected a name like {NAME}"
        raise ValueError(f"{name}: its name holds no UTM coordinates; {told}")
    return value


def _zone(fields: list[str], name: str | Path) -> int:
    """The number of a name's UTM zone; without a letter beside it, in a name of the whole convention alone."""
    text = fields[3].strip() if len(fields) > 4 else ""
    digits = zone_digits(text)
    if not digits.isdecimal() or not (_letter(fields) or len(fields) > _HEADING):
        return MAP
    if not 1 <= int(digits) <= 60:
        raise ValueError(f"{name}: UTM zone {shown(digits)}; zones are 1 to 60")
    return int(digits)


def _letter(fields: list[str]) -> str:
    return zone_letter(*(fields[number] if len(fields) > number else "" for number in (3, 4)))


def _look_like_degrees(fields: list[list[str]], east: Floats, north: Floats) -> bool:
    if len(east) == 0 or not ((np.abs(east) <= 180).all() and (np.abs(north) <= 180).all()):
        return False
    if not ((np.abs(east) <= 90).all() or (np.abs(north) <= 90).all()) or max(np.ptp(east), np.ptp(north)) > 3:
        return False
    digits = [min(len(f[n].partition(".")[2]) for n in (1, 2)) for f in fields]
    return float(np.median(digits)) >= _DEGREE_DIGITS


def _other_degrees(fields: list[list[str]], names: Sequence[str | Path], lat: Floats, lon: Floats) -> list[str]:
    """A note where the degrees in names are not those of their metres by more than a kilometre."""
    told = np.array([(_degree(f, 5), _degree(f, 6)) for f in fields]).reshape(-1, 2)
    valid = (np.abs(told[:, 0]) <= 90) & (np.abs(told[:, 1]) <= 180) & np.isfinite(lat) & told.any(axis=1)
    if not valid.any():
        return []
    away = np.linalg.norm(on_ellipsoid(told[:, 0], told[:, 1]) - on_ellipsoid(lat, lon), axis=1)
    wrong = valid & (away > 1000)
    if not wrong.any():
        return []
    first = int(np.argmax(wrong))
    return [
        f"{int(wrong.sum())} names hold degrees that lie {away[first] / 1000:,.0f} km and more from their metres "
        f"(zone, hemisphere or columns confused?); first: {Path(names[first]).name}"
    ]


def _degree(fields: list[str], number: int) -> float:
    try:
        value = float(fields[number])
    except (IndexError, ValueError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def _degrees_of(east: Floats, north: Floats, zone: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Degrees of metres, NaN on maps that are no UTM zone."""
    lat, lon = np.full(len(zone), np.nan), np.full(len(zone), np.nan)
    of = np.flatnonzero((zone > MAP) & np.isfinite(east))
    lat[of], lon[of] = degrees_from_utm(east[of], north[of], zone[of])
    return lat, lon


def _on_map(positions: Positions) -> Floats:
    return np.stack([positions.east, positions.north], axis=1)


def _in_space(positions: Positions) -> Floats:
    return on_ellipsoid(positions.lat, positions.lon)


def _of_one_map(positions: Positions, others: Positions) -> Positions:
    """The positions, those without a zone in the one zone that the others have."""
    zones = np.unique(others.zone[others.known])
    alone = positions.in_metres and others.in_metres and bool((positions.zone == MAP).all())
    if not (alone and len(zones) == 1 and zones[0] > MAP):
        return positions
    zone = np.full(len(positions), zones[0])
    lat, lon = _degrees_of(positions.east, positions.north, zone)
    return Positions(positions.east, positions.north, zone, lat, lon, True, positions.notes)


def _near(
    queries_QX: Floats, database_DX: Floats, rows: NDArray[np.int64], columns: NDArray[np.int64], radius_m: float
) -> list[tuple[int, NDArray[np.int64]]]:
    """For each query of `rows`, the numbers of `columns` at most `radius_m` away, ascending."""
    if not len(rows) or not len(columns):
        return []
    from scipy.spatial import cKDTree  # type: ignore[import-untyped]

    origin_X = database_DX[columns].mean(axis=0)  # northings are millions of metres: differences keep their digits
    tree = cKDTree(database_DX[columns] - origin_X)
    reach = radius_m * (1 + 1e-12) + 1e-7
    near = tree.query_ball_point(queries_QX[rows] - origin_X, reach, return_sorted=True)
    found = []
    for row, ids in zip(rows.tolist(), near, strict=True):
        ids = columns[np.asarray(ids, dtype=np.int64)]
        found.append((row, ids[((database_DX[ids] - queries_QX[row]) ** 2).sum(axis=1) <= radius_m**2]))
    return found
