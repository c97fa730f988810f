"""Readers of indices of photographs, of stored evaluations and of uploads, each with valid files to mutate."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
from PIL import Image

from configs.schema import Recipe
from eval.index.build import build_index
from eval.index.index import Index
from eval.index.overview import overview
from eval.index.photo_list import list_source
from eval.index.verify import verify_index
from eval.report.locations import as_json
from eval.report.page import report_page
from eval.report.predictions import SCHEMA
from eval.report.stored import read_evaluation
from eval.weights_file import describer_of
from model.network import build_model
from tests.fuzzing import Reader
from tests.networks import speck
from tests.photos import jpeg
from tests.stored_evaluation import write_evaluation

SETTINGS = {"image_size": 28, "batch_size": 2, "rerank": {"top_k": 2, "layer": -1}}
QUERY = "query.jpg"

# Indices.


def _build(folder: Path, **how: str) -> Path:
    """An index of six photographs in a line, a query beside it."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(6):
        (folder / "photos" / f"@{500000 + 100 * i}@4000000@33@T@@@{i}@@@@@@@@.jpg").write_bytes(jpeg(rng))
    (folder / QUERY).write_bytes(jpeg(rng))
    describer = describer_of(build_model(speck()), Recipe(model=speck()), "speck", **SETTINGS)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    build_index(describer, list_source(str(folder / "photos")), folder / "index", **how)
    dist.destroy_process_group()
    return folder / "index"


def _index(folder: Path) -> list[Path]:
    """One that is searched exactly; the files that describe features are not read again."""
    return [file for file in _files(_build(folder)) if file.parent.name != "000000" or file.name != "index.json"]


def _approximate(folder: Path) -> list[Path]:
    """FAISS's files, and those that say what they are."""
    index = _build(folder, factory="IVF2,Flat", params="nprobe=2")
    return [file for file in _files(index) if file.suffix == ".faiss" or file.name in ("index.json", "part.json")]


def _files(index: Path) -> list[Path]:
    return sorted(file for file in index.rglob("*") if file.is_file())


def _read_index(folder: Path, file: Path) -> bool:
    """All of it: checked whole, described, opened, asked."""
    index = folder / "index"
    faults = verify_index(index)
    if not all(fault and "\n" not in fault for fault in faults):
        raise AssertionError(faults)
    overview(index)
    (location,) = Index.open(index, device="cpu").locate(folder / QUERY, top_k=3)
    if location.error:
        raise ValueError(f"{file.parent}: {location.error}")
    json.dumps(as_json(location))
    return bool(faults)


# Evaluations.


def _evaluation(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    for n in range(6):
        for name in (f"queries/q&{n}.jpg", f"database/{n}.jpg"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(jpeg(rng))
    out = write_evaluation(folder / "out", folder, [True, False, None], [True, True, None])
    (out / "values.json").write_text(json.dumps(pq.read_table(out / "predictions.parquet").to_pylist()))
    return [out / "results.json", out / "predictions.parquet", out / "values.json"]


def _values_to_predictions(file: Path) -> None:
    """The table with the values of values.json, as far as its columns hold them."""
    if file.name != "values.json":
        return
    try:
        table = pa.Table.from_pylist(json.loads(file.read_text()), schema=SCHEMA)
    except Exception:  # noqa: BLE001 - no table can hold it
        return
    roots = {"root of town": str(file.parent.parent)}
    pq.write_table(table.replace_schema_metadata(roots), file.with_name("predictions.parquet"))


def _read_evaluation(folder: Path, file: Path) -> bool:
    report_page([read_evaluation(folder / "out")], most_queries=5)
    return False


# Uploads.

HEAD = b'--x\r\nContent-Disposition: form-data; name="photo"; filename="a.jpg"\r\n\r\n'


def _uploads(folder: Path) -> list[Path]:
    """Photographs of several formats, and the body of a request as a whole."""
    _build(folder)
    rng = np.random.default_rng(1)
    pixels = Image.fromarray(rng.integers(0, 256, (24, 31, 3), dtype=np.uint8))
    for name in ("a.png", "a.gif", "a.webp", "a.tif", "a.bmp", "a.ppm", "a.avif"):
        pixels.save(folder / name)
    (folder / "a.jpg").write_bytes(jpeg(rng))
    (folder / "body.bin").write_bytes(HEAD + jpeg(rng) + b"\r\n--x--\r\n")
    return [*sorted(folder.glob("a.*")), folder / "body.bin"]


@functools.cache
def _client(index: Path) -> Any:
    from starlette.testclient import TestClient

    from launch.serve_app import create_app

    opened = Index.open(index, device="cpu")
    return TestClient(create_app(opened, top=2, max_mb=1, max_megapixels=1), base_url="http://127.0.0.1")


def _read_upload(folder: Path, file: Path) -> bool:
    """An answer, or a refusal that says why; an error within the server is raised here."""
    if not file.is_file():
        raise ValueError(f"{file}: uploads have no pipes")
    client, data = _client(folder / "index"), file.read_bytes()
    body = data if file.name == "body.bin" else HEAD + data + b"\r\n--x--\r\n"
    reply = client.post("/api/locate", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    if reply.status_code != 200:
        detail = str(reply.json()["detail"])
        if reply.status_code not in (400, 413, 422):
            raise AssertionError(f"{reply.status_code} {detail}")
        raise ValueError(f"{file}: {detail}")
    reply.json()
    return False


READERS: dict[str, Reader] = {
    "index of photographs": Reader(_index, _read_index, names=lambda _: ["/index"]),
    "approximate index": Reader(_approximate, _read_index, names=lambda _: ["/index"]),
    "evaluation": Reader(_evaluation, _read_evaluation, _values_to_predictions, lambda _: ["/out"]),
}
if importlib.util.find_spec("fastapi"):  # the extra serve
    READERS["uploads"] = Reader(_uploads, _read_upload)
