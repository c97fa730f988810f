"""All photographs that a bucket's folders hold, each folder a place, as in MegaScenes."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from configs.progress import OnProgress, untold
from data_pipeline.formats import SUFFIXES
from data_pipeline.listing import PlaceListing, build_listing, plain_city
from data_pipeline.photo_source import shared_reader
from data_pipeline.photographs import counted
from data_pipeline.remote_source import Bucket
from data_pipeline.sources.manifest import numbers_of_places
from data_pipeline.storage import is_remote, join


def read_bucket(
    bucket: Bucket,
    *,
    depth: int,
    city: str = "",
    min_images_per_place: int = 4,
    on_progress: OnProgress = untold,
) -> PlaceListing:
    """The places of a bucket: its folders `depth` levels below its root, with all photographs below each.

    Progress counts folders, of those that are known by then, with the photographs in them as its note. Raises
    FileNotFoundError where there is no photograph, ValueError for a depth below 1, StorageError.
    """
    url = bucket.root
    if not is_remote(url):
        raise ValueError(f"{url}: expected the URL of a bucket's folder, such as s3://bucket/images")
    if url.startswith(("http://", "https://")):
        raise ValueError(
            f"{url}: http has no lists of folders; give a table of paths: shard manifest TABLE OUT --root {url}"
        )
    if depth < 1:
        raise ValueError(f"depth is {depth}; a place is a folder, 1 level below {url} or more")
    files, sizes, changed_ns, left_out = _listed(bucket, depth, on_progress)
    if not files:
        raise FileNotFoundError(
            f"{url}: no photographs {depth} folders below it ({counted(left_out) or 'nothing there'})"
        )
    order = np.argsort(np.array(files, dtype=object), kind="stable")
    files = [files[number] for number in order.tolist()]
    name = city or plain_city(url.rstrip("/").rpartition("/")[2])
    cities = pa.array([name] * len(files))
    places = pa.array(["/".join(file.split("/")[:depth]) for file in files])
    nulls = {key: pa.nulls(len(files), pa.int64()) for key in ("year", "month", "northdeg")}
    nulls |= {key: pa.nulls(len(files), pa.float64()) for key in ("lat", "lon")}
    images = pa.table(
        {
            "city": cities,
            "place": numbers_of_places(cities, places),
            **nulls,
            "panoid": pa.repeat("", len(files)),
            "file": files,
            "csv": pa.repeat("", len(files)),
            "row": np.arange(len(files)),
        }
    )
    return build_listing(
        replace(bucket, sizes=np.array(sizes, np.int64)[order], changed_ns=np.array(changed_ns, np.int64)[order]),
        images,
        min_images_per_place=min_images_per_place,
        names_say_all=False,
        notes=[f"left out: {counted(left_out)}"] if left_out else [],
    )


def _listed(
    bucket: Bucket, depth: int, on_progress: OnProgress
) -> tuple[list[str], list[int], list[int], Counter[str]]:
    """Photographs `depth` folders below the root or deeper: names, bytes, times; how many files are none, by suffix."""
    reader, root = shared_reader(bucket.retry_s), bucket.root
    files: list[str] = []
    sizes: list[int] = []
    changed_ns: list[int] = []
    left_out: Counter[str] = Counter()
    listed, known = 0, 1
    with ThreadPoolExecutor(bucket.threads, "list") as pool:
        level = [""]
        while level:
            below = []
            answers = pool.map(lambda folder: reader.folder(join(root, folder) if folder else root), level)
            for folder, (inside, folders) in zip(level, answers, strict=True):
                prefix = f"{folder}/" if folder else ""
                below += [f"{prefix}{name}" for name in folders if not name.startswith(".")]
                for name, file in inside.items():
                    suffix = PurePosixPath(name).suffix.lower()
                    if name.startswith("."):
                        left_out["hidden"] += 1
                    elif suffix not in SUFFIXES:
                        left_out[suffix or "no suffix"] += 1
                    elif prefix.count("/") < depth:
                        left_out["above the places' folders"] += 1
                    else:
                        files.append(f"{prefix}{name}")
                        sizes.append(file.size)
                        changed_ns.append(file.changed_ns)
                listed += 1
                on_progress(listed, known + len(below), f"{len(files):,} photographs")
            known += len(below)
            level = below
    return files, sizes, changed_ns, left_out
