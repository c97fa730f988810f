"""UTM: degrees on WGS84 to metres of a zone and back, and points in space.

The Krüger series to the fourth power of the third flattening (C. Karney, "Transverse Mercator with an accuracy of a few
nanometers", 2011): below a micrometre within 10 degrees of a zone's meridian.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_AXIS_M, _FLATTENING, _SCALE, _FALSE_EAST_M, FALSE_NORTH_M = 6_378_137.0, 1 / 298.257223563, 0.9996, 5e5, 1e7
MEAN_RADIUS_M = 6_371_008.8
_ECCENTRICITY = np.sqrt(_FLATTENING * (2 - _FLATTENING))
_N = _FLATTENING / (2 - _FLATTENING)
_RECTIFYING_M = _AXIS_M / (1 + _N) * (1 + _N**2 / 4 + _N**4 / 64)
_FORWARD = (
    _N / 2 - 2 * _N**2 / 3 + 5 * _N**3 / 16 + 41 * _N**4 / 180,
    13 * _N**2 / 48 - 3 * _N**3 / 5 + 557 * _N**4 / 1440,
    61 * _N**3 / 240 - 103 * _N**4 / 140,
    49561 * _N**4 / 161280,
)
_INVERSE = (
    _N / 2 - 2 * _N**2 / 3 + 37 * _N**3 / 96 - _N**4 / 360,
    _N**2 / 48 + _N**3 / 15 - 437 * _N**4 / 1440,
    17 * _N**3 / 480 - 37 * _N**4 / 840,
    4397 * _N**4 / 161280,
)


def utm_from_degrees(lat: Floats, lon: Floats, zone: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Eastings and northings [N] in the UTM zones given, metres; northings are negative in the south."""
    sin_lat = np.sin(np.radians(lat))
    with np.errstate(divide="ignore"):  # at a pole
        tangent = np.sinh(np.arctanh(sin_lat) - _ECCENTRICITY * np.arctanh(_ECCENTRICITY * sin_lat))
    away = np.radians(lon - _central_meridian(zone))
    xi, eta = np.arctan2(tangent, np.cos(away)), np.arcsinh(np.sin(away) / np.hypot(tangent, np.cos(away)))
    x, y = eta.copy(), xi.copy()
    for j, a in enumerate(_FORWARD, 1):
        y += a * np.sin(2 * j * xi) * np.cosh(2 * j * eta)
        x += a * np.cos(2 * j * xi) * np.sinh(2 * j * eta)
    return _FALSE_EAST_M + _SCALE * _RECTIFYING_M * x, _SCALE * _RECTIFYING_M * y


def degrees_from_utm(east: Floats, north: Floats, zone: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Latitudes and longitudes [N] of metres in UTM zones; northings of the south are negative."""
    xi = north / (_SCALE * _RECTIFYING_M)
    eta = (east - _FALSE_EAST_M) / (_SCALE * _RECTIFYING_M)
    y, x = xi.copy(), eta.copy()
    for j, b in enumerate(_INVERSE, 1):
        y -= b * np.sin(2 * j * xi) * np.cosh(2 * j * eta)
        x -= b * np.cos(2 * j * xi) * np.sinh(2 * j * eta)
    conformal = np.sin(y) / np.hypot(np.sinh(x), np.cos(y))
    e, tangent = _ECCENTRICITY, conformal / (1 - _ECCENTRICITY**2)
    for _ in range(4):  # Newton's; two steps reach the last digit
        root = np.sqrt(1 + tangent**2)
        sigma = np.sinh(e * np.arctanh(e * tangent / root))
        found = tangent * np.sqrt(1 + sigma**2) - sigma * root
        slope = (1 + (1 - e**2) * tangent**2) / ((1 - e**2) * root)
        tangent = tangent + (conformal - found) / np.sqrt(1 + found**2) * slope
    lon = np.degrees(np.arctan2(np.sinh(x), np.cos(y))) + _central_meridian(zone)
    return np.degrees(np.arctan(tangent)), (lon + 180) % 360 - 180


def on_ellipsoid(lat: Floats, lon: Floats) -> Floats:
    """Degrees as points on WGS84, metres from the Earth's centre [N, 3]."""
    lat, lon = np.radians(lat), np.radians(lon)
    normal = _AXIS_M / np.sqrt(1 - (_ECCENTRICITY * np.sin(lat)) ** 2)
    flat = normal * np.cos(lat)
    up = normal * (1 - _ECCENTRICITY**2) * np.sin(lat)
    return np.stack([flat * np.cos(lon), flat * np.sin(lon), up], axis=1).astype(np.float64)


def _central_meridian(zone: NDArray[np.int64]) -> Floats:
    return zone.astype(np.float64) * 6.0 - 183.0
