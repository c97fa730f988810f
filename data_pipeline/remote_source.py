"""Photographs as single files behind URLs: in a bucket, or on a web server."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs.progress import OnProgress, untold
from configs.secrets import without_secrets
from data_pipeline.photo_source import READ_THREADS, RETRY_S, shared_reader
from data_pipeline.storage import is_remote, join

_WORTH_LISTING = 3  # files of one folder, from which on a list of it costs less than asking for each


@dataclass(frozen=True)
class Bucket:
    """Files behind `root`, or URLs of their own; `threads` are fetched at a time, failures tried again for `retry_s`.

    `sizes` and `changed_ns` (int64, by the listing's column row) spare asking for what a list of the bucket has said.
    """

    root: str = ""
    threads: int = READ_THREADS
    retry_s: float = RETRY_S
    sizes: NDArray[np.int64] | None = None
    changed_ns: NDArray[np.int64] | None = None

    def __str__(self) -> str:
        return without_secrets(self.root, is_address=True) if self.root else "URLs of the table"

    @property
    def read_threads(self) -> int:
        return self.threads

    def url(self, file: str) -> str:
        """Where a file lies."""
        return file if is_remote(file) or not self.root else join(self.root, file.removeprefix("./"))

    def stats(self, images: pa.Table, on_progress: OnProgress = untold) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bytes of each file (-1 where there is none) and its last change by the server's clock, in nanoseconds."""
        if self.sizes is not None and self.changed_ns is not None:
            rows = images["row"].to_numpy()
            return self.sizes[rows], self.changed_ns[rows]
        folders: dict[str, list[int]] = {}
        urls = [self.url(file) for file in images["file"].to_pylist()]
        for number, url in enumerate(urls):
            folders.setdefault(url.rpartition("/")[0], []).append(number)
        sizes, changed_ns = np.full(len(urls), -1, dtype=np.int64), np.zeros(len(urls), dtype=np.int64)

        def ask(folder: str, numbers: list[int]) -> None:
            reader = shared_reader(self.retry_s)
            listed = None
            if len(numbers) >= _WORTH_LISTING and not folder.startswith(("http://", "https://")):
                try:
                    listed, _ = reader.folder(folder)
                except FileNotFoundError:
                    return
            for number in numbers:
                try:
                    name = urls[number].rpartition("/")[2]
                    file = reader.stat(urls[number]) if listed is None else listed[name]
                except (FileNotFoundError, KeyError):
                    continue
                sizes[number], changed_ns[number] = file.size, file.changed_ns

        step = 64  # files of one folder that are asked for one by one go to many threads
        pieces = [
            (folder, numbers if not folder.startswith("http") else numbers[start : start + step])
            for folder, numbers in folders.items()
            for start in (range(0, len(numbers), step) if folder.startswith("http") else (0,))
        ]
        done = 0
        with ThreadPoolExecutor(self.threads, "stat") as pool:
            for (_, numbers), _ in zip(pieces, pool.map(lambda piece: ask(*piece), pieces), strict=True):
                done += len(numbers)
                on_progress(done, len(urls))
        return sizes, changed_ns

    def part(self, images: pa.Table) -> Bucket:  # noqa: ARG002
        return Bucket(self.root, self.threads, self.retry_s)

    def read(self, image: Mapping[str, Any]) -> bytes:
        return shared_reader(self.retry_s).read_file(self.url(image["file"]))

    def where(self, image: Mapping[str, Any]) -> str:
        return without_secrets(self.url(image["file"]), is_address=True)
