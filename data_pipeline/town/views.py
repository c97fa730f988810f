"""One photograph of a place of the procedural town: the camera, and what stands in the way."""

from __future__ import annotations

import io
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.town.conditions import Conditions, Light, Season
from data_pipeline.town.places import (
    ACCENTS,
    HALF_WIDTH,
    PIXELS_PER_METRE,
    TOP,
    Colour,
    Place,
    Tree,
    grain,
    hiss,
    patch_of,
    shade,
)

WIDTH, HEIGHT = 400, 300
JPEG_QUALITY = 90
EYE = 1.7  # camera height in metres
LAMP_HEIGHT = 5.2

FOLIAGE: dict[Season, tuple[Colour, ...]] = {
    "spring": ((132, 172, 78), (150, 184, 96), (226, 190, 204)),
    "summer": ((66, 110, 54), (80, 124, 62), (58, 98, 60)),
    "autumn": ((202, 124, 44), (186, 84, 40), (214, 168, 62)),
    "winter": (),
    "snow": (),
}
WARM = np.array((1.0, 0.76, 0.46), np.float32)
CLOTHES: tuple[Colour, ...] = (*ACCENTS, (40, 40, 48), (96, 92, 90), (176, 150, 120))
CARS: tuple[Colour, ...] = (
    (186, 190, 194), (40, 42, 48), (236, 236, 234), (140, 34, 36), (44, 66, 110), (92, 104, 96), (204, 168, 60),
)  # fmt: skip
# light on surfaces, sky at the zenith, sky at the horizon
LIGHTS: dict[Light, tuple[Colour, Colour, Colour]] = {
    "cloudy": ((222, 224, 230), (176, 186, 198), (212, 216, 220)),
    "sunny": ((268, 256, 232), (74, 128, 200), (184, 212, 232)),
    "dusk": ((206, 186, 178), (78, 84, 138), (238, 164, 118)),
    "night": ((146, 148, 170), (12, 16, 38), (42, 46, 72)),
}


class Camera:
    """A pinhole at the far side of the street that looks at the facades."""

    def __init__(self, rng: np.random.Generator, conditions: Conditions) -> None:
        self.focal = 262.0 * rng.uniform(0.97, 1.04)
        self.position = np.array([conditions.shift, EYE + rng.uniform(-0.15, 0.25), -conditions.distance])
        yaw, pitch, roll = conditions.yaw, rng.uniform(0.13, 0.17), rng.normal(0, 0.012)
        cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (np.cos, np.sin))
        turn_yaw = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
        turn_pitch = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        turn_roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        self.rotation = turn_roll @ turn_pitch @ turn_yaw
        self.yaw = yaw
        intrinsics = np.array([[self.focal, 0, WIDTH / 2], [0, -self.focal, HEIGHT / 2], [0, 0, 1]])
        view = np.hstack([self.rotation, -(self.rotation @ self.position)[:, None]])
        self.projection = intrinsics @ view

    def project(self, x: float, y: float, z: float) -> tuple[float, float, float]:
        """Pixel column and row of a point, and its pixels per metre."""
        u, v, w = self.projection @ (x, y, z, 1.0)
        return u / w, v / w, self.focal / w

    def warp(
        self, texture: Image.Image, columns: tuple[int, int], origin: tuple[float, float], scale: float
    ) -> Image.Image:
        """The texture of the plane through the world axes `columns` as the camera sees it.

        `origin` is the plane position of the texture's upper left corner; its second axis runs downwards.
        """
        to_texture = np.array([[scale, 0, -scale * origin[0]], [0, -scale, scale * origin[1]], [0, 0, 1]])
        to_plane = np.linalg.inv(self.projection[:, [*columns, 3]])
        m = to_texture @ to_plane
        coefficients = (m / m[2, 2]).flatten()[:8].tolist()
        return texture.transform((WIDTH, HEIGHT), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)


def _stick(
    scene: Image.Image, sprite: Image.Image, camera: Camera, at: tuple[float, float, float], height: float
) -> None:
    """Pastes a sprite that stands `height` metres high with its foot at a point."""
    u, v, scale = camera.project(*at)
    high = round(height * scale)
    wide = round(high * sprite.width / sprite.height)
    if high < 2 or wide < 2 or not -wide < u < WIDTH + wide:
        return
    small = sprite.resize((wide, high), Image.Resampling.BILINEAR)
    scene.paste(small, (round(u - wide / 2), round(v - high)), small)


@lru_cache(maxsize=64)
def _tree(seed: int, season: Season) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGBA", (150, 210))
    ink = ImageDraw.Draw(image)
    bark = (78, 64, 54, 255)
    ink.polygon([(70, 210), (82, 210), (78, 90), (74, 90)], fill=bark)
    for _ in range(16):
        y, reach, rise = rng.uniform(60, 130), rng.uniform(-58, 58), rng.uniform(20, 60)
        ink.line((76, y, 76 + reach, y - rise), fill=bark, width=3)
        ink.line((76 + reach * 0.6, y - rise * 0.6, 76 + reach * 0.9, y - rise * 1.5), fill=bark, width=2)
        if season == "snow":
            ink.line((76, y - 3, 76 + reach, y - rise - 3), fill=(240, 242, 246, 255), width=2)
    if FOLIAGE[season]:
        leaf = FOLIAGE[season][seed % 3]
        for depth in np.sort(rng.random(130)):
            angle, out = rng.uniform(0, 2 * np.pi), np.sqrt(rng.random()) * 62
            x, y, r = 76 + out * np.cos(angle), 72 + out * np.sin(angle), rng.uniform(4, 13)
            tone = 0.62 + 0.55 * depth - 0.003 * (y - 72)
            ink.ellipse((x - r, y - r, x + r, y + r), fill=(*shade(leaf, tone), 255))
    return image


def _car(colour: Colour, van: bool, lit: bool) -> Image.Image:
    image = Image.new("RGBA", (260, 132 if van else 90))
    ink = ImageDraw.Draw(image)
    base = image.height - 14
    glass, body, dark = (54, 64, 76, 255), (*colour, 255), (*shade(colour, 0.7), 255)
    if van:
        ink.rounded_rectangle((6, 6, 214, base), 10, fill=body)
        ink.polygon([(205, 12), (226, 18), (250, 66), (254, base), (200, base)], fill=body)
        ink.polygon([(212, 24), (224, 26), (240, 62), (212, 62)], fill=glass)
        ink.rectangle((10, 78, 250, 84), fill=dark)
    else:
        ink.rounded_rectangle((4, 34, 256, base), 14, fill=body)
        ink.polygon([(48, 38), (78, 6), (168, 6), (206, 38)], fill=body)
        ink.polygon([(60, 37), (82, 11), (118, 11), (118, 37)], fill=glass)
        ink.polygon([(126, 37), (126, 11), (164, 11), (192, 37)], fill=glass)
        ink.rectangle((6, 54, 254, 58), fill=dark)
    lamp = (255, 244, 190, 255) if lit else (220, 220, 214, 255)
    ink.rectangle((246, base - 28, 255, base - 18), fill=lamp)
    ink.rectangle((5, base - 28, 12, base - 18), fill=(190, 30, 30, 255))
    for x in (56, 204):
        ink.ellipse((x - 22, base - 30, x + 22, base + 14), fill=(26, 26, 28, 255))
        ink.ellipse((x - 11, base - 19, x + 11, base + 3), fill=(150, 152, 156, 255))
    return image


def _person(rng: np.random.Generator, umbrella: bool) -> Image.Image:
    image = Image.new("RGBA", (72, 150))
    ink = ImageDraw.Draw(image)
    coat, trousers = (CLOTHES[rng.integers(len(CLOTHES))] for _ in range(2))
    skin = ((226, 184, 154), (150, 104, 78), (96, 66, 52))[rng.integers(3)]
    stride = rng.uniform(2, 13)
    for side in (-1, 1):
        ink.line((36, 92, 36 + side * stride, 148), fill=(*shade(trousers, 0.8), 255), width=11)
        ink.line((36 + side * 9, 50, 36 + side * 15, 90), fill=(*shade(coat, 0.8), 255), width=8)
    ink.rounded_rectangle((22, 42, 50, 100), 9, fill=(*coat, 255))
    ink.ellipse((26, 16, 46, 42), fill=(*skin, 255))
    ink.pieslice((25, 14, 47, 40), 180, 360, fill=(60, 46, 40, 255))
    if umbrella:
        ink.pieslice((0, 0, 72, 44), 180, 360, fill=(*ACCENTS[rng.integers(len(ACCENTS))], 255))
        ink.line((36, 20, 48, 66), fill=(40, 40, 40, 255), width=3)
    return image


def _lamp_post() -> Image.Image:
    image = Image.new("RGBA", (40, 260))
    ink = ImageDraw.Draw(image)
    ink.rectangle((18, 20, 21, 260), fill=(52, 56, 58, 255))
    ink.rectangle((14, 236, 25, 260), fill=(52, 56, 58, 255))
    ink.polygon([(10, 4), (29, 4), (25, 26), (14, 26)], fill=(226, 216, 180, 255))
    ink.rectangle((9, 0, 30, 4), fill=(52, 56, 58, 255))
    return image


def _furnish(scene: Image.Image, rng: np.random.Generator, place: Place, now: Conditions, camera: Camera) -> None:
    """Places what belongs to the place, then what happens to pass by, from the facade to the camera."""
    dark = now.light in ("dusk", "night")

    def plant(tree: Tree) -> None:
        _stick(scene, _tree(tree.seed, now.season), camera, (tree.x, 0, tree.z), tree.height)

    for _ in range(rng.poisson(1.6 * now.traffic)):
        spot = (rng.uniform(-12, 12), 0, rng.uniform(-2.2, -0.6))
        _stick(scene, _person(rng, now.weather == "rain"), camera, spot, rng.uniform(1.6, 1.85))
    for tree in place.trees:
        if tree.z <= 0:
            plant(tree)
    for x in place.lamps:
        _stick(scene, _lamp_post(), camera, (x, 0, -2.8), LAMP_HEIGHT)
    slots = np.arange(-13, 13, 5.2) + rng.uniform(-1.5, 1.5)
    for x, z, chance in [(x, -4.4, 0.2 * now.traffic) for x in slots] + [
        (rng.uniform(-9, 9), -7.5, 0.16 * now.traffic)
    ]:
        if rng.random() < chance:
            van = bool(rng.random() < 0.22)
            car = _car(CARS[rng.integers(len(CARS))], van, dark)
            if rng.random() < 0.5:
                car = car.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            _stick(scene, car, camera, (x, 0, z), 2.2 if van else 1.5)
    for _ in range(rng.poisson(0.35 * now.traffic)):
        spot = (rng.uniform(-6, 6), 0, rng.uniform(-9.5, -6))
        _stick(scene, _person(rng, now.weather == "rain"), camera, spot, rng.uniform(1.6, 1.85))


def _lamp_light(place: Place, camera: Camera) -> np.ndarray:
    """float32 [HEIGHT, WIDTH]: a pool of light around every street lamp and its bright head."""
    rows, columns = np.mgrid[1:HEIGHT:4, 1:WIDTH:4].astype(np.float32)
    pools = np.zeros_like(rows)
    for x in place.lamps:
        u, v, scale = camera.project(x, LAMP_HEIGHT - 0.4, -2.8)
        if -150 < u < WIDTH + 150:
            near = (((columns - u) ** 2 + 0.64 * (rows - v) ** 2) / scale**2).astype(np.float32)
            pools += 1 / (1 + near / 4) + 2.5 / (1 + near * 30)
    return np.asarray(Image.fromarray(pools).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))


def _lit_windows(rng: np.random.Generator, place: Place, share: float) -> Image.Image:
    """Half-size RGB texture of the light that windows give."""
    scale = PIXELS_PER_METRE / 2
    image = Image.new("RGB", (round(2 * HALF_WIDTH * scale), round(TOP * scale)))
    ink = ImageDraw.Draw(image)
    warm = ((255, 196, 110), (255, 214, 150), (240, 226, 190), (250, 170, 90))
    for x0, y0, x1, y1 in place.windows[rng.random(len(place.windows)) < share]:
        corners = (x0 + HALF_WIDTH) * scale, (TOP - y1) * scale, (x1 + HALF_WIDTH) * scale, (TOP - y0) * scale
        ink.rectangle(corners, fill=shade(warm[rng.integers(4)], rng.uniform(0.5, 0.95)))
    return image


def _shadow(rng: np.random.Generator) -> Image.Image:
    """Quarter-size texture of the shadow that the houses across the street cast: 255 in shadow."""
    scale = PIXELS_PER_METRE / 4
    width, height = round(2 * HALF_WIDTH * scale), round(TOP * scale)
    image = Image.new("L", (width, height))
    ink = ImageDraw.Draw(image)
    x, base, slope = 0.0, rng.uniform(0.1, 0.55), rng.uniform(-14, 14)
    while x < width:
        step = rng.uniform(20, 45)
        top = height * (1 - base * rng.uniform(0.6, 1.3))
        ink.polygon([(x + slope, top), (x + step + slope, top), (x + step, height), (x, height)], fill=255)
        x += step
    return image


def _sky(rng: np.random.Generator, place: Place, now: Conditions, camera: Camera, horizon: float) -> np.ndarray:
    """float32 [HEIGHT, WIDTH, 3] of 0..1: gradient, clouds and the skyline."""
    zenith, low = (np.array(c, np.float32) / 255 for c in LIGHTS[now.light][1:])
    if now.weather != "dry" and now.light != "night":
        zenith = 0.35 * zenith + 0.65 * np.float32(zenith.mean())
        low = 0.35 * low + 0.65 * np.float32(low.mean())
    rows, columns = HEIGHT // 4, WIDTH // 4
    up = (1 - 4 * np.arange(rows, dtype=np.float32) / horizon).clip(0, 1)[:, None, None]
    sky = low + (zenith - low) * up**0.8
    cover = {"sunny": 0.9, "cloudy": -0.2, "dusk": 0.3, "night": 0.8}[now.light] + rng.uniform(-0.3, 0.3)
    puffs = Image.fromarray(patch_of(grain(), rng, HEIGHT, WIDTH)).reduce(12)
    clouds = np.asarray(puffs.resize((columns, rows), Image.Resampling.BICUBIC)) - cover
    sky = sky + (low * (1.0 if now.light == "sunny" else 0.86) - sky) * clouds.clip(0, 1)[..., None] * up * 0.9
    smooth = Image.fromarray((sky * 255).clip(0, 255).astype(np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BILINEAR
    )
    sky = np.asarray(smooth, np.float32) / 255
    angles = np.arctan((np.arange(WIDTH) - WIDTH / 2) / camera.focal) + camera.yaw
    heights = place.skyline[(angles / (2 * np.pi) * 720).astype(int) % 720] * camera.focal
    behind = np.arange(HEIGHT)[:, None] > horizon - heights[None]
    sky[behind] = 0.6 * low + 0.4 * np.array((0.35, 0.4, 0.45), np.float32) * low.mean()
    return sky


def _mirror(image: np.ndarray, axis_row: float, strength: float) -> None:
    """Blends what is above a row upside down into what is below it: a wet street."""
    rows = np.arange(int(axis_row), HEIGHT)
    source = (2 * axis_row - rows).astype(int).clip(0, HEIGHT - 1)
    image[rows] += (image[source] - image[rows]) * strength


def _snowfall(rng: np.random.Generator, image: np.ndarray) -> None:
    for size, count in ((1, 160), (2, 60), (3, 14)):
        for x, y in zip(rng.integers(0, WIDTH - 3, count), rng.integers(0, HEIGHT - 3, count), strict=True):
            image[y : y + size, x : x + size] += (0.94 - image[y : y + size, x : x + size]) * 0.8


def _compose(rng: np.random.Generator, place: Place, now: Conditions) -> np.ndarray:
    """The scene as float32 [HEIGHT, WIDTH, 3] before the lens and the sensor."""
    camera = Camera(rng, now)
    facade_at, kerb_row = (-HALF_WIDTH, TOP), camera.project(now.shift, 0, -1.0)[1]
    horizon = camera.project(camera.position[0] + 1e4 * np.tan(now.yaw), EYE, 1e4)[1]
    visible = place.street.crop((0, 0, place.street.width, round((now.distance - 1) * PIXELS_PER_METRE)))
    street = camera.warp(visible, (0, 2), (-HALF_WIDTH, 0), PIXELS_PER_METRE).convert("RGBA")
    scene = Image.new("RGBA", (WIDTH, HEIGHT))
    for tree in place.trees:
        if tree.z > 0:
            _stick(scene, _tree(tree.seed, now.season), camera, (tree.x, 0, tree.z), tree.height)
    scene.alpha_composite(street)
    scene.alpha_composite(camera.warp(place.facade, (0, 1), facade_at, PIXELS_PER_METRE).convert("RGBA"))
    if now.season == "snow":
        settled = np.array(street.getchannel("A"), np.float32) * (0.75 + 0.12 * patch_of(grain(), rng, HEIGHT, WIDTH))
        scene.paste((214, 220, 230), mask=Image.fromarray(settled.clip(0, 240).astype(np.uint8)))
        scene.paste((222, 227, 236), mask=camera.warp(place.snow, (0, 1), facade_at, PIXELS_PER_METRE))
    bare = np.asarray(scene)
    _furnish(scene, rng, place, now, camera)

    pixels = np.asarray(scene, np.float32) / 255
    surface, alpha = pixels[..., :3], pixels[..., 3:]
    light = np.array(LIGHTS[now.light][0], np.float32) / 255 * np.float32(rng.uniform(0.85, 1.15))
    lit = surface * light
    if now.light == "sunny":
        shadow = camera.warp(_shadow(rng), (0, 1), facade_at, PIXELS_PER_METRE / 4)
        lit *= 1 - np.asarray(shadow, np.float32)[..., None] / 255 * np.array((0.38, 0.33, 0.25), np.float32)
    else:
        lit *= np.linspace(1.08, 0.88, HEIGHT, dtype=np.float32)[:, None, None]
    if now.light in ("dusk", "night"):
        share = rng.uniform(0.2, 0.55)
        glow = camera.warp(_lit_windows(rng, place, share), (0, 1), facade_at, PIXELS_PER_METRE / 2)
        windows = np.asarray(glow, np.float32) / 255 * (bare == np.asarray(scene)).all(-1, keepdims=True)
        lit = np.maximum(lit, windows * (0.95 if now.light == "night" else 0.7))
        lit += (
            (surface + 0.06) * (_lamp_light(place, camera) * (0.85 if now.light == "night" else 0.35))[..., None] * WARM
        )
    sky = _sky(rng, place, now, camera, horizon)
    image = sky + (lit - sky) * alpha
    if now.weather == "rain":
        image[int(kerb_row) :] *= 0.8
        _mirror(image, kerb_row, 0.38)
        streaks = patch_of(grain(), rng, HEIGHT // 12, WIDTH)
        soft = np.asarray(Image.fromarray(streaks).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
        image += 0.05 * soft.clip(0, 3)[..., None]
    if now.weather == "fog":
        haze = sky[: max(1, int(horizon * 0.9))].mean((0, 1)) * 1.05
        thick = rng.uniform(0.1, 0.3) * np.linspace(1.1, 0.6, HEIGHT, dtype=np.float32)[:, None, None]
        image += (haze - image) * thick
    if now.season == "snow" and now.weather == "fog":
        _snowfall(rng, image)
    return image


@cache
def _vignette() -> np.ndarray:
    rows, columns = np.linspace(-1, 1, HEIGHT)[:, None], np.linspace(-1, 1, WIDTH)[None]
    return (1 - 0.08 * (rows**2 + columns**2)).astype(np.float32)[..., None]


def render_view(place: Place, now: Conditions, rng: np.random.Generator) -> bytes:
    """One photograph of the place as JPEG bytes, WIDTH x HEIGHT."""
    image = _compose(rng, place, now)
    image *= rng.normal(1, 0.03, 3).astype(np.float32) * np.float32(rng.uniform(0.9, 1.12))
    image *= _vignette()
    noise = {"night": 0.028, "dusk": 0.018}.get(now.light, 0.008)
    image += noise * patch_of(hiss(), rng, HEIGHT, WIDTH)
    photo = Image.fromarray((image * 255).clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
