"""When and in what light, season and weather a photograph of the town is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Light = Literal["cloudy", "sunny", "dusk", "night"]
Season = Literal["spring", "summer", "autumn", "winter", "snow"]
Weather = Literal["dry", "rain", "fog"]
Kind = Literal["any", "fair"]

MONTHS: dict[Season, tuple[int, ...]] = {
    "spring": (4, 5), "summer": (6, 7, 8), "autumn": (9, 10, 11), "winter": (2, 3), "snow": (12, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Conditions:
    """When and in what weather a photograph is taken, and how far its camera strays from the place's centre."""

    light: Light
    season: Season
    weather: Weather
    month: int
    shift: float  # metres along the street
    distance: float  # metres from the facade
    yaw: float  # radians
    traffic: float  # expected cars and people, 1 is usual

    @property
    def note(self) -> str:
        return f"{self.light}-{self.season}-{self.weather}"


def draw_conditions(rng: np.random.Generator, kind: Kind = "any") -> Conditions:
    """Random conditions: `fair` is by day, dry and in leaf."""
    chances = {"any": (0.3, 0.3, 0.18, 0.22), "fair": (0.5, 0.5, 0, 0)}
    light: Light = ("cloudy", "sunny", "dusk", "night")[rng.choice(4, p=chances[kind])]
    seasons: tuple[Season, ...] = ("spring", "summer", "summer", "autumn", "winter", "snow")
    if kind == "fair":
        seasons = ("spring", "summer")
    season = seasons[rng.integers(len(seasons))]
    weathers: tuple[Weather, ...] = ("dry", "dry", "rain", "fog")
    weather = "dry" if light == "sunny" or kind == "fair" else weathers[rng.integers(4)]
    if season == "snow" and weather == "rain":
        weather = "fog"
    spread = 0.6 if kind == "fair" else 1.0
    return Conditions(
        light=light,
        season=season,
        weather=weather,
        month=int(rng.choice(MONTHS[season])),
        shift=float(rng.uniform(-0.55, 0.55) * spread),
        distance=float(16 + rng.uniform(-0.55, 0.55) * spread),
        yaw=float(rng.uniform(-0.026, 0.026) * spread),
        traffic=0.7 if kind == "fair" else 0.9,
    )
