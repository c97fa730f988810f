"""Both ways to the tars on each kind of store, for `benchmarks.loader --stores`: range reads, and whole tars in order.

http is a server in a process of its own that waits 50 ms before each answer; s3 is moto's server, in one too.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.batches import endless, plans_and_loader
from benchmarks.loader_peers import images_per_second
from benchmarks.report import print_table
from configs.schema import DataConfig
from tests.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
LATENCY_MS = 50
STORES = ("local", "http", "s3")
WAYS = ("ranges", "stream")


@contextlib.contextmanager
def served(store: str, folder: Path) -> Iterator[str]:
    """The address of a shard set on a store."""
    if store == "local":
        yield str(folder)
    elif store == "http":
        with _server("tests.http_ranges", str(folder), port := str(free_port()), f"latency={LATENCY_MS}", port=port):
            yield f"http://127.0.0.1:{port}"
    else:
        port = str(free_port())
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            **{"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"},
        }
        with _server("moto.server", "-p", port, port=port):
            boto3: Any = importlib.import_module("boto3")

            client = boto3.client("s3")
            client.create_bucket(Bucket="places")
            for file in folder.rglob("*"):
                if file.is_file():
                    client.upload_file(str(file), "places", f"set/{file.relative_to(folder)}")
            yield "s3://places/set"


@contextlib.contextmanager
def _server(module: str, *arguments: str, port: str) -> Iterator[None]:
    """A server in a process of its own, once it listens."""
    from tests.http_ranges import wait_for_port

    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(int(port))
        yield
    finally:
        process.terminate()
        process.wait()


def measure_stores(
    stores: tuple[str, ...], folder: Path, data: DataConfig, *, images: int, rounds: int
) -> dict[str, float]:
    """Images a second of both ways on each store, the seconds to the first batch, bytes read over bytes used."""
    figures: dict[str, float] = {}
    rows = []
    for store in stores:
        with served(store, folder) as address:
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            first: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way in WAYS:
                    began = time.perf_counter()
                    plans, loader = plans_and_loader(_config(data, address, way))
                    batches = endless(plans, loader)
                    next(batches)
                    first[way].append(time.perf_counter() - began)
                    batch = data.places_per_batch * data.images_per_place
                    rates[way].append(images_per_second(batches, images, batch))
                    batches.close()
                    print(f"  {store}, {way}: {rates[way][-1]:.0f} images/s", flush=True)
            counts = loader.streamed
        rate = {way: median(rates[way]) for way in WAYS}
        for way in WAYS:
            figures |= {f"{store}_{way}_images_per_s": rate[way], f"{store}_{way}_first_s": median(first[way])}
        figures[f"{store}_read_over_used"] = counts.read_bytes / max(1, counts.used_bytes)
        figures[f"{store}_stream_over_ranges"] = rate["stream"] / rate["ranges"]
        rows.append(
            [
                store if store != "http" else f"http, {LATENCY_MS} ms",
                *(f"{rate[way]:,.0f}" for way in WAYS),
                f"{rate['stream'] / rate['ranges']:.2f}",
                *(f"{median(first[way]):.2f}" for way in WAYS),
                f"{figures[f'{store}_read_over_used']:.2f}",
            ]
        )
    print_table(
        f"range reads and tar streams, {data.decode_threads} decoding threads, images/s",
        ["store", "ranges", "stream", "stream / ranges", "first batch, s", "first of stream, s", "read / used"],
        rows,
    )
    return figures


def _config(data: DataConfig, address: str, way: str) -> DataConfig:
    lanes = max(lanes for lanes in range(1, 5) if data.places_per_batch % lanes == 0)
    options = data.model_dump() | {"shards": address, "access": way, "composition": "mixed", "stream_lanes": lanes}
    return DataConfig.model_validate(options)
