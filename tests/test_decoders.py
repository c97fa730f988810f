"""Photographs of every format as a person sees them: Pillow's pixels, upright; what is none of them is refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data_pipeline.decoders import MAX_PIXELS, decode_rgb, format_of
from data_pipeline.images import decode

ORIENTATION = 0x0112


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _picture(mode: str = "RGB", width: int = 61, height: int = 47) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    if mode in ("RGBA", "LA"):
        image = image.convert("RGBA")
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    return image.convert(mode)


def _as_pillow(data: bytes) -> torch.Tensor:
    image: Image.Image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P",),
    "AVIF": ("RGB", "RGBA", "L"),
    "TIFF": ("RGB", "CMYK"),
    "BMP": ("RGB", "P"),
    "PPM": ("RGB", "L"),
}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG 4:4:4": ("RGB", {"subsampling": 0}),
    "JPEG progressive": ("RGB", {"progressive": True}),
    "JPEG restarts": ("RGB", {"restart_marker_blocks": 2}),
    "JPEG of RGB": ("RGB", {"keep_rgb": True}),
    "PNG palette transparent": ("P", {"transparency": 3}),
    "PNG grey transparent": ("L", {"transparency": 100}),
    "WEBP lossless": ("RGB", {"lossless": True}),
    "WEBP lossless alpha": ("RGBA", {"lossless": True}),
    "GIF transparent": ("P", {"transparency": 3}),
    "GIF grey": ("L", {"interlace": 1}),
    "TIFF packed": ("RGB", {"compression": "tiff_lzw"}),
}
KINDS = {f"{kind} {mode}": (mode, {}) for kind, modes in MODES.items() for mode in modes} | WAYS
WITH_EXIF = [f"{kind} RGB" for kind in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")]
WITH_EXIF += ["JPEG CMYK", "PNG P", "WEBP lossless alpha", "TIFF packed"]


@pytest.mark.parametrize("name", KINDS)
def test_a_photograph_is_what_pillow_shows(name: str) -> None:
    mode, options = KINDS[name]
    data = _saved(_picture(mode), name.split()[0], **options)
    assert torch.equal(decode_rgb(data), _as_pillow(data))
    assert format_of(data) == name.split()[0]


@pytest.mark.parametrize("name", WITH_EXIF)
def test_every_orientation_is_upright(name: str) -> None:
    mode, options = KINDS[name]
    shapes = set()
    for orientation in range(1, 9):
        data = _saved(_picture(mode), name.split()[0], exif=_oriented(orientation), **options)
        image = decode_rgb(data)
        assert torch.equal(image, _as_pillow(data)), orientation
        shapes.add(tuple(image.shape[1:]))
        for interpolation in ("bilinear", "bicubic"):  # resized from turned memory as from any other
            resized = Image.fromarray(image.permute(1, 2, 0).numpy())
            plain = decode(_saved(resized, "PNG"), 28, interpolation)
            assert torch.equal(decode(data, 28, interpolation), plain)
    assert shapes == {(47, 61), (61, 47)}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_upright(orientation: int) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    data = _saved(_picture(), "HEIF", exif=_oriented(orientation), quality=90)
    assert torch.equal(decode_rgb(data), _as_pillow(data))
    assert format_of(data) == "HEIF"


def test_heic_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline import decoders

    decoders._heic.cache_clear()
    monkeypatch.setattr(decoders, "reads_heic", lambda: False)
    with pytest.raises(ValueError, match=r"HEIC.*pip install 'rerankvpr\[heic\]'"):
        decode_rgb(struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(100))
    decoders._heic.cache_clear()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("factor", [257, 256])
def test_16_bits_are_their_8_bit_self(kind: str, factor: int) -> None:
    grey = np.asarray(_picture("L"))
    data = _saved(Image.fromarray(grey.astype(np.uint16) * factor), kind)
    expected = np.rint(grey.astype(float) * factor / 257).astype(np.uint8)
    for plane in decode_rgb(data):
        assert np.array_equal(plane.numpy(), expected)


def test_16_bits_of_colour_are_their_8_bit_self() -> None:
    pixels = np.asarray(_picture())
    assert torch.equal(
        decode_rgb(_png(pixels.astype(">u2") * 257, 16, 2)), torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    )


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(pixels: np.ndarray, bits: int, colour_type: int) -> bytes:
    """What Pillow does not write: PNGs of 16-bit colours."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _app1(payload: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload


@pytest.mark.parametrize(
    "before",
    [
        _app1(b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"),
        _app1(b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>") + b"\xff\xff" + _app1(b"other"),
        b"\xff\xe2" + struct.pack(">H", 1002) + b"ICC_PROFILE\0" + bytes(988),
    ],
    ids=["XMP", "XMP and another, filled", "colour profile"],
)
def test_exif_is_found_behind_other_segments(before: bytes) -> None:
    data = _saved(_picture(), "JPEG", exif=_oriented(6))
    assert torch.equal(decode_rgb(data[:2] + before + data[2:]), _as_pillow(data))


def test_jpegs_without_a_tag_are_as_torchvision_decodes_them() -> None:
    """GSV-Cities' bytes carry no EXIF: what was trained on them stays what it was."""
    io_of_torchvision = pytest.importorskip("torchvision.io")
    if not hasattr(io_of_torchvision, "decode_jpeg"):
        pytest.skip("torchvision has no decoder any more")
    from tests.photos import jpeg

    rng = np.random.default_rng(2)
    for _ in range(50):
        data = jpeg(rng)
        theirs = io_of_torchvision.decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=io_of_torchvision.ImageReadMode.RGB
        )
        ours = decode_rgb(data)
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


def _bomb_jpeg(width: int, height: int) -> bytes:
    data = bytearray(_saved(_picture(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _bomb_png(width: int, height: int) -> bytes:
    data = _saved(_picture(), "PNG")
    header = struct.pack(">II", width, height) + data[24:29]
    return data[:8] + _chunk(b"IHDR", header) + data[33:]


def _bomb_gif(width: int, height: int) -> bytes:
    data = _saved(_picture("P"), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def _bomb_bmp(width: int, height: int) -> bytes:
    data = _saved(_picture(), "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def _bomb_tiff(width: int, height: int) -> bytes:
    data = bytearray(_saved(_picture(), "TIFF"))
    first = struct.unpack("<I", data[4:8])[0]
    for entry in range(struct.unpack("<H", data[first : first + 2])[0]):
        at = first + 2 + 12 * entry
        if (tag := struct.unpack("<H", data[at : at + 2])[0]) in (256, 257):
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, (width, height)[tag - 256])
    return bytes(data)


def _bomb_ppm(width: int, height: int) -> bytes:
    return b"P6\n%d %d\n255\n" % (width, height) + bytes(100)


@pytest.mark.parametrize("bomb", [_bomb_jpeg, _bomb_png, _bomb_gif, _bomb_bmp, _bomb_tiff, _bomb_ppm])
@pytest.mark.parametrize("width", [20_000, 60_000])
def test_a_header_of_too_many_pixels_is_refused_before_they_are_decoded(
    bomb: Callable[[int, int], bytes], width: int
) -> None:
    with pytest.raises(ValueError, match="pixels") as error:
        decode_rgb(bomb(width, 60_000))
    assert "claims" in str(error.value) or "decompression bomb" in str(error.value)
    assert width * 60_000 > MAX_PIXELS


def test_200_megapixels_of_a_phone_are_no_bomb() -> None:
    assert MAX_PIXELS > 16_320 * 12_240
    with pytest.raises(ValueError, match=r"(?!.*(claims|bomb))"):
        decode_rgb(_bomb_png(16_320, 12_240))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "AVIF", "TIFF"])
def test_several_pictures_in_a_file_are_refused(kind: str) -> None:
    data = _saved(_picture(), kind, save_all=True, append_images=[_picture().rotate(90)])
    with pytest.raises(ValueError, match="2 pictures in one file"):
        decode_rgb(data)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "PPM"])
def test_half_a_file_is_refused_in_one_line(name: str) -> None:
    data = _saved(_picture(), name)
    for cut in (4, len(data) // 2):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - in the words of each decoder
            decode_rgb(data[:cut])
        assert "\n" not in str(error.value)
        assert ".cpp" not in str(error.value)


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello", b"\xff\xd8", b"\xff" * 100_000, b"\x89PNG\r\n\x1a\n", b"GIF89a"]
)
def test_what_is_no_photograph_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - in the words of each decoder
        decode_rgb(data)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_white_are_refused(mode: str) -> None:
    depth = Image.fromarray(np.full((4, 5), 70_000, dtype=np.float32 if mode == "F" else np.int32))
    with pytest.raises(ValueError, match="8 or 16 bits"):
        decode_rgb(_saved(depth, "TIFF"))


def test_threads_decode_the_same_pixels() -> None:
    files = [_saved(_picture(mode), name.split()[0], **options) for name, (mode, options) in KINDS.items()]
    alone = [decode_rgb(data) for data in files]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for image, expected in zip(pool.map(decode_rgb, files), alone, strict=True):
                assert torch.equal(image, expected)
