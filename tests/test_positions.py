"""Positions: UTM against another series, distances against another formula, and what is refused or suspected aloud."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.positions import (
    Positions,
    from_lat_lon,
    from_metres,
    from_utm_names,
    metres_between,
    suspicions,
    within_radius,
)
from data_pipeline.table_cells import column_of_numbers
from data_pipeline.utm import degrees_from_utm, utm_from_degrees

A, E2 = 6_378_137.0, 1 / 298.257223563 * (2 - 1 / 298.257223563)
LATITUDES = st.floats(-80, 84)
LONGITUDES = st.floats(-180, 180)


def _utm_by_snyder(lat: float, lon: float, zone: int) -> tuple[float, float]:
    """UTM by the series in powers of longitude (J. Snyder, Map Projections, 1987, 8-9 to 8-13): a cm in a zone."""
    phi, away = np.radians(lat), np.radians(lon - (zone * 6 - 183))
    ep2 = E2 / (1 - E2)
    n, t, c = A / np.sqrt(1 - E2 * np.sin(phi) ** 2), np.tan(phi) ** 2, ep2 * np.cos(phi) ** 2
    a = away * np.cos(phi)
    m = A * (
        (1 - E2 / 4 - 3 * E2**2 / 64 - 5 * E2**3 / 256) * phi
        - (3 * E2 / 8 + 3 * E2**2 / 32 + 45 * E2**3 / 1024) * np.sin(2 * phi)
        + (15 * E2**2 / 256 + 45 * E2**3 / 1024) * np.sin(4 * phi)
        - (35 * E2**3 / 3072) * np.sin(6 * phi)
    )
    east = n * (a + (1 - t + c) * a**3 / 6 + (5 - 18 * t + t**2 + 72 * c - 58 * ep2) * a**5 / 120)
    fourth = (5 - t + 9 * c + 4 * c**2) * a**4 / 24
    north = m + n * np.tan(phi) * (a**2 / 2 + fourth + (61 - 58 * t + t**2 + 600 * c - 330 * ep2) * a**6 / 720)
    return 5e5 + 0.9996 * east, 0.9996 * north


def _haversine(lat1: float, lon1: float, lat2: float, lon2: float) -> float:
    p1, p2, dl = np.radians(lat1), np.radians(lat2), np.radians(lon2 - lon1)
    h = np.sin((p2 - p1) / 2) ** 2 + np.cos(p1) * np.cos(p2) * np.sin(dl / 2) ** 2
    return float(2 * 6_371_008.8 * np.arcsin(np.sqrt(h)))


def _near_on_ellipsoid(lat1: float, lon1: float, lat2: float, lon2: float) -> float:
    """By the radii of curvature at the mean latitude: within 1e-6 below 1 km, away from the poles."""
    mid = np.radians((lat1 + lat2) / 2)
    w = 1 - E2 * np.sin(mid) ** 2
    north = A * (1 - E2) / w**1.5 * np.radians(lat2 - lat1)
    east = A / np.sqrt(w) * np.cos(mid) * np.radians(lon2 - lon1)
    return float(np.hypot(north, east))


def _at(lat: float, lon: float) -> Positions:
    return from_lat_lon(np.array([lat]), np.array([lon]), "t.csv")


@given(lat=st.floats(-80, 84), lon=LONGITUDES, aside=st.integers(-1, 1))
def test_utm_round_trips_within_a_hundredth_of_a_millimetre(lat: float, lon: float, aside: int) -> None:
    zone = np.array([(int((lon + 180) // 6) + aside) % 60 + 1])
    east, north = utm_from_degrees(np.array([lat]), np.array([lon]), zone)
    back_lat, back_lon = degrees_from_utm(east, north, zone)
    metres = _near_on_ellipsoid(lat, lon, float(back_lat[0]), lon + (float(back_lon[0]) - lon + 180) % 360 - 180)
    assert metres < 1e-5


@given(lat=st.floats(-75, 75), away=st.floats(-3, 3), zone=st.integers(1, 60))
def test_utm_is_that_of_another_series_within_a_centimetre(lat: float, away: float, zone: int) -> None:
    lon = zone * 6 - 183 + away
    east, north = utm_from_degrees(np.array([lat]), np.array([lon]), np.array([zone]))
    assert np.allclose([east[0], north[0]], _utm_by_snyder(lat, lon, zone), rtol=0, atol=0.01)


@given(lat=st.floats(-79, 79), lon=LONGITUDES, north_m=st.floats(-500, 500), east_m=st.floats(-500, 500))
@example(lat=48.0, lon=12.0, north_m=0.0, east_m=20.0)  # zones 32 and 33
@example(lat=0.0, lon=9.0, north_m=30.0, east_m=0.0)  # both hemispheres
@example(lat=10.0, lon=180.0, north_m=0.0, east_m=40.0)  # over the date line
def test_distances_are_the_ellipsoids_over_zones_and_hemispheres(
    lat: float, lon: float, north_m: float, east_m: float
) -> None:
    lat2, lon2 = lat + north_m / 111_000, lon + east_m / (111_000 * np.cos(np.radians(lat)))
    expected = _near_on_ellipsoid(lat, lon, lat2, lon2)
    got = metres_between(_at(lat, lon), _at(lat2, (lon2 + 180) % 360 - 180))[0]
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(a=st.tuples(LATITUDES, LONGITUDES), b=st.tuples(LATITUDES, LONGITUDES))
def test_far_distances_are_the_haversines_within_the_flattening(a: tuple[float, float], b: tuple[float, float]) -> None:
    assert metres_between(_at(*a), _at(*b))[0] == pytest.approx(_haversine(*a, *b), rel=0.006, abs=1)


@given(data=st.data(), radius_m=st.sampled_from([5.0, 25.0, 60.0]))
def test_within_radius_is_every_pair_measured(data: st.DataObject, radius_m: float) -> None:
    lat, lon = data.draw(st.sampled_from([(48.0, 12.0), (-0.00001, 9.0), (37.7, -122.4), (10.0, 179.9999)]))
    offsets = st.lists(st.tuples(st.integers(-40, 40), st.integers(-40, 40)), min_size=1, max_size=8)
    parts = []
    for _ in range(2):
        drawn = np.array(data.draw(offsets), float)
        lats, lons = lat + drawn[:, 0] / 111_000, lon + drawn[:, 1] / (111_000 * np.cos(np.radians(lat)))
        degrees = from_lat_lon(lats, (lons + 180) % 360 - 180, "t.csv")
        parts.append(_named(degrees) if data.draw(st.booleans()) else degrees)
    queries, database = parts
    for q, ids in enumerate(within_radius(queries, database, radius_m)):
        one = [metres_between(_take(queries, q), _take(database, d))[0] for d in range(len(database))]
        sure = {d for d, metres in enumerate(one) if metres < radius_m - 1e-3}
        allowed = {d for d, metres in enumerate(one) if metres < radius_m + 1e-3}
        assert sure <= set(ids.tolist()) <= allowed
        assert ids.tolist() == sorted(ids.tolist())


def _named(positions: Positions) -> Positions:
    """The positions as names of files in the convention carry them."""
    rows = zip(positions.east, positions.north, positions.zone, positions.lat, strict=True)
    return from_utm_names(
        [
            f"@{e:.4f}@{n + (1e7 if n < 0 else 0):.4f}@{z}@{'S' if n < 0 else 'N'}@@@{i}.jpg"
            for i, (e, n, z, _) in enumerate(rows)
        ]
    )


def _take(p: Positions, row: int) -> Positions:
    s = slice(row, row + 1)
    return Positions(p.east[s], p.north[s], p.zone[s], p.lat[s], p.lon[s], p.in_metres)


def test_a_band_s_is_north_and_a_hemisphere_s_is_south() -> None:
    san_francisco, sydney, band_h = from_utm_names(
        ["@543256.96@4178906.70@10@S@.jpg", "@334873.00@6252266.00@56@S@.jpg", "@334873.00@6252266.00@56H@@@.jpg"]
    ).lat
    assert san_francisco == pytest.approx(37.757, abs=0.01)
    assert sydney == band_h == pytest.approx(-33.86, abs=0.01)


def test_metres_of_one_zone_are_the_maps() -> None:
    near = from_utm_names(["@500000@5000000@32@T@.jpg", "@500025@5000000@32@T@.jpg", "@500025.01@5000000@32@T@.jpg"])
    assert [ids.tolist() for ids in within_radius(_take(near, 0), near, 25.0)] == [[0, 1]]


def test_names_without_a_zone_are_of_the_only_one_or_of_a_map() -> None:
    names = ["@500000@5000000@32@T@.jpg", "@500010@5000000@@@.jpg"]
    both = from_utm_names(names)
    assert both.zone.tolist() == [32, 32]
    assert "1 names hold no UTM zone" in both.notes[0]
    database, queries = from_utm_names(names[:1]), from_utm_names(names[1:])
    assert queries.zone.tolist() == [0]
    assert [ids.tolist() for ids in within_radius(queries, database, 25.0)] == [[0]]
    with pytest.raises(ValueError, match=r"b@500010.*no UTM zone, and others are of \[32, 33\]"):
        from_utm_names([*names[:1], "@500000@5000000@33@T@.jpg", "b@500010@5000000@@@.jpg"])


def test_metres_of_a_table_are_of_the_zones_it_names() -> None:
    east, north = np.array([5e5, 5e5, 5e5, 5e5, np.nan]), np.array([5e6, 6.3e6, 6.3e6, 4e6, np.nan])
    found = from_metres(east, north, "t", zones=["32", "56S", "56 H", "33S", ""], missing_ok=True)
    assert found.zone.tolist() == [32, 56, 56, 33, 0]
    assert found.notes == ("1 zones have no letter and are taken to be of the northern hemisphere",)
    assert found.lat[1] == found.lat[2] == pytest.approx(-33.4, abs=0.1)
    assert found.lat[3] == pytest.approx(36.1, abs=0.1)  # band S, 32 to 40 degrees north
    assert metres_between(found, found)[0] == 0
    for zone in ("61N", "", "north", "0N", "-3N"):
        with pytest.raises(ValueError, match=r"t row 3: zone is .*expected a UTM zone, 1 to 60"):
            from_metres(east[:2], north[:2], "t", zones=["32N", zone])
    with pytest.raises(ValueError, match=r"t row 2: east, north are 2000000, 1; expected 0 to 1,000,000"):
        from_metres(np.array([2e6]), np.array([1.0]), "t", zones=["32N"])


def test_maps_of_their_own_never_meet() -> None:
    zero = np.zeros(1)
    cph, sf = from_metres(zero, zero, "a", zone=0), from_metres(zero, zero, "b", zone=-1)
    assert metres_between(cph, sf)[0] == np.inf
    assert [len(ids) for ids in within_radius(cph, sf, 25.0)] == [0]


@pytest.mark.parametrize(
    ("lat", "lon", "said"),
    [
        (148.0, 9.0, "are the two columns swapped?"),
        (91.0, 200.0, "expected -90 to 90, -180 to 180"),
        (48.0, 351.0, "subtract 360"),
        (480035974.0, 90804331.0, r"degrees times 10\^7"),
        (5316699.85, 505999.91, "name those columns east and north"),
        (np.inf, 9.0, "expected -90 to 90"),
        (np.nan, 9.0, "both of them"),
    ],
)
def test_degrees_on_no_map_are_named_with_their_row(lat: float, lon: float, said: str) -> None:
    with pytest.raises(ValueError, match=rf"mine.csv row 3: lat, lon are .*{said}"):
        from_lat_lon(np.array([48.0, lat]), np.array([9.0, lon]), "mine.csv", missing_ok=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("48,0035974", "a decimal comma; write 48.0035974"),
        ("48° 0' 13\" N", "write decimal degrees"),
        ("inf", "expected a finite number"),
        ("nan", "expected a finite number"),
        ("here", "expected a finite number"),
    ],
)
def test_cells_that_are_no_number_are_named_with_their_row(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"mine.csv row 4: lat is .*{said}"):
        column_of_numbers(["48.1", None, text], "lat", "mine.csv")
    assert np.isnan(column_of_numbers(["", None, float("nan")], "lat", "mine.csv")).all()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["@9.0804343@48.0035987@3@.jpg", "@9.0831165@47.9999999@8@.jpg"], "look like degrees"),
        (["@506000,5@5316300,1@32@U@.jpg"], "a decimal comma; write 506000.5"),
        (["@nan@5316300@32@U@.jpg"], "no UTM coordinates"),
        (["@inf@5316300@32@U@.jpg"], "no UTM coordinates"),
        (["@506000@5316300@61@U@.jpg"], "UTM zone 61"),
        (["@5316300@506000@32@U@.jpg"], r"of no UTM zone \(swapped\?\)"),
        (["plain.jpg"], "no UTM coordinates"),
    ],
)
def test_names_that_hold_no_position_are_refused_by_name(names: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        from_utm_names([f"db/{name}" for name in names])
    assert names[0] in str(error.value)


def test_odd_positions_are_suspected_aloud() -> None:
    lats, lons = np.array([48.0, 0.0, 48.1]), np.array([9.5, 0.0, 9.1])
    assert "1 positions are 0, 0 (first: row 3)" in from_lat_lon(lats, lons, "t").notes[0]
    assert "whole degrees" in from_lat_lon(np.array([48.0, 47.0]), np.array([9.0, 8.0]), "t").notes[0]
    far = from_utm_names(["@0@0@32@U@.jpg", "@506000.00@5316300.00@32@U@.jpg"])
    assert "1 positions are 0, 0, far from the others" in far.notes[0]
    swapped = from_utm_names(["@506000.00@5316300.00@32@U@9.0804344@48.0000000@.jpg"])
    assert "columns confused" in swapped.notes[0]
    assert not from_utm_names(["@506000.00@5316300.00@32@U@48.0000000@9.0804344@.jpg"]).notes


def test_ground_truth_that_anything_satisfies_is_suspected() -> None:
    one_spot = from_lat_lon(np.full(6, 48.5), np.full(6, 9.5), "t")
    all_pairs = [np.arange(6)] * 6
    said = suspicions(all_pairs, 6, one_spot, one_spot)
    assert "100% of all pairs" in said[0]
    assert said[1:] == ["all 6 positions of the database are equal", "all 6 positions of the queries are equal"]
    assert suspicions([np.array([q]) for q in range(6)], 6) == []
