"""How a place lies in a tar. Every byte but the photographs' own follows from the index and the source file names."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.listing import FACTS

BLOCK = tarfile.BLOCKSIZE
END_OF_TAR = bytes(2 * BLOCK)

_VIEW_KEYS = (*FACTS, "width", "height")


def sample_key(city: str, city_place_id: int) -> str:
    """A place's key: what WebDataset calls its sample."""
    return f"{city}_{city_place_id:07d}"


def image_member(key: str, view: int) -> str:
    """Name of the member that holds a view."""
    return f"{key}.{view:02d}.jpg"


def json_member(key: str) -> str:
    """Name of the member that describes a place; it follows the place's views."""
    return f"{key}.json"


def header(name: str, size: int) -> bytes:
    """The tar header of a member: owner 0, time 0, mode 644, so that equal content gives equal bytes."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT, "utf-8")


def padding(size: int) -> bytes:
    """The zeros that follow a member of `size` bytes."""
    return bytes(-size % BLOCK)


def place_json(rows: Sequence[Mapping[str, Any]], files: Sequence[str]) -> bytes:
    """The JSON of a place, from its index rows and the names of its source files."""
    views = [{"file": file} | {key: row[key] for key in _VIEW_KEYS} for row, file in zip(rows, files, strict=True)]
    place = {"city": rows[0]["city"], "city_place_id": rows[0]["city_place_id"], "views": views}
    return json.dumps(place, ensure_ascii=False, separators=(",", ":")).encode()


def pack_place(rows: Sequence[dict[str, Any]], jpegs: Sequence[bytes], files: Sequence[str], start: int) -> bytes:
    """A place's members as they lie in a tar from byte `start`; sets view, offset, size and crc32 of its index rows."""
    key = sample_key(rows[0]["city"], rows[0]["city_place_id"])
    parts = []
    for view, (row, jpeg) in enumerate(zip(rows, jpegs, strict=True)):
        row |= {"view": view, "offset": start + BLOCK, "size": len(jpeg), "crc32": zlib.crc32(jpeg)}
        member = [header(image_member(key, view), len(jpeg)), jpeg, padding(len(jpeg))]
        start += sum(map(len, member))
        parts += member
    description = place_json(rows, files)
    parts += [header(json_member(key), len(description)), description, padding(len(description))]
    return b"".join(parts)
