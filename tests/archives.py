"""GLDv2's and OSV-5M's layouts at small size: many tiny JPEGs, the same as loose files and in tars and zips."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.shard_options import ShardOptions
from data_pipeline.shards import write_shards
from data_pipeline.sources.manifest import read_manifest
from tests.photos import contents, jpeg

SMALL = ShardOptions(shard_bytes=20_000, threads=2)


@functools.cache
def _bases() -> list[bytes]:
    rng = np.random.default_rng(5)
    return [jpeg(rng) for _ in range(40)]


def photo(number: int, filling: int = 0) -> bytes:
    """A small JPEG whose bytes no other number has; a comment of its own stands behind its first two bytes."""
    base, comment = _bases()[number % 40], f"photograph {number}".encode() + bytes(filling)
    return base[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + base[2:]


@dataclass(frozen=True)
class Sets:
    """A set of photographs: `table` names them for archives, `loose_table` by their paths below `loose`."""

    loose: Path
    table: Path
    loose_table: Path
    archives: Path

    filling: int = 0

    def photo(self, name: str) -> bytes:
        """The bytes of a photograph."""
        return photo(self._number[name], self.filling)

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    @functools.cached_property
    def names(self) -> list[str]:
        """The photographs' paths, in the order of the table."""
        return [line.split(",")[0] for line in self.loose_table.read_text().splitlines()[1:]]

    def expected(self, out: Path, options: ShardOptions = SMALL) -> dict[str, bytes]:
        """What sharding the loose files gives."""
        write_shards(read_manifest(self.loose_table, root=self.loose), out, options)
        return of_set(out)


def of_set(out: Path) -> dict[str, bytes]:
    """The tars and the index of a set, by name."""
    return {name: data for name, data in contents(out).items() if name.startswith(("shards/", "index."))}


def _write(
    folder: Path, names: list[str], table: list[str], loose_table: list[str], filling: int = 0, is_loose: bool = True
) -> Sets:
    loose = folder / "loose"
    for number, name in enumerate(names if is_loose else []):
        path = loose / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number, filling))
    sets = Sets(loose, folder / "train.csv", folder / "paths" / "train.csv", folder / "archives", filling)
    sets.archives.mkdir(parents=True)
    sets.loose_table.parent.mkdir()
    sets.table.write_text("\n".join(table) + "\n")
    sets.loose_table.write_text("\n".join(loose_table) + "\n")
    return sets


def gldv2(
    folder: Path, *, images: int = 120, tars: int = 4, landmarks: int = 25, filling: int = 0, is_loose: bool = True
) -> Sets:
    """Landmarks scattered over images_000.tar ... with members a/b/c/id.jpg; train.csv of id, url, landmark_id."""
    rng = np.random.default_rng(0)
    ids = [hashlib.sha256(f"{number}".encode()).hexdigest()[:16] for number in range(images)]
    places = rng.integers(0, landmarks, images).tolist()
    names = [f"{key[0]}/{key[1]}/{key[2]}/{key}.jpg" for key in ids]
    table = [f"{key},http://example.org/{key}.jpg,{place}" for key, place in zip(ids, places, strict=True)]
    loose = [f"{name},{place}" for name, place in zip(names, places, strict=True)]
    sets = _write(folder, names, ["id,url,landmark_id", *table], ["path,place", *loose], filling, is_loose)
    for number in range(tars):
        write_tar(sets.archives / f"images_{number:03d}.tar", sets, names[number::tars])
    return sets


def osv5m(folder: Path, *, images: int = 120, archives: int = 4, webdataset: bool = False) -> Sets:
    """Numbers as ids and positions of 12 spots: zips 00.zip of 00/id.jpg, or WebDataset tars of id.jpg and id.json."""
    rng = np.random.default_rng(1)
    spots = [(round(48 + 0.001 * spot, 4), round(2 + 0.001 * spot, 4)) for spot in range(12)]
    at = [spots[spot] for spot in rng.integers(0, 12, images).tolist()]
    ids = [str(10**15 + 7919 * number) for number in range(images)]
    parts = [number % archives for number in range(images)]
    names = [f"{key}.jpg" if webdataset else f"{part:02d}/{key}.jpg" for key, part in zip(ids, parts, strict=True)]
    table = [f"{key},{lat},{lon},FR,Saint Denis" for key, (lat, lon) in zip(ids, at, strict=True)]
    loose = [f"{name},{lat},{lon}" for name, (lat, lon) in zip(names, at, strict=True)]
    sets = _write(folder, names, ["id,latitude,longitude,country,city", *table], ["path,lat,lon", *loose])
    for number in range(archives):
        some = names[number::archives]
        if webdataset:
            write_tar(sets.archives / f"{number:02d}.tar", sets, some, beside=".json")
        else:
            method = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            with zipfile.ZipFile(sets.archives / f"{number:02d}.zip", "w", method) as file:
                for name in some:
                    file.writestr(name, sets.photo(name))
    return sets


def write_tar(path: Path, sets: Sets, names: list[str], *, beside: str = "", mode: str = "w") -> None:
    """A tar of loose files; with `beside`, each with a JSON of that suffix."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name in names:
            add(tar, name, sets.photo(name))
            if beside:
                add(tar, str(Path(name).with_suffix(beside)), json.dumps({"name": name}).encode())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member of these bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
