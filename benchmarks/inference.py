"""Extraction, re-ranking and exact search on one device, each beside the bare operation that it cannot do without.

Extraction (descriptor, local features, compaction) beside the bare forward pass; re-ranking a query from stored
features beside the matrix products of its similarities; exact search by FAISS beside one matrix product with the rows
and torch's topk. `python -m benchmarks.inference [--json FILE]`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from benchmarks.report import print_table, write_json
from benchmarks.rerank import random_features
from configs.registry import BACKBONES
from configs.schema import ModelConfig, RerankConfig
from data_pipeline.images import normalise
from eval.local_features import compact, grid_of, read_local
from eval.pairs import Candidates
from eval.rerank import score_candidates
from eval.search import search_blocks
from model.network import build_model
from trainer.process_group import start_process_group, stop_process_group


@dataclass(frozen=True)
class Options:
    """What is measured."""

    backbone: str = "vitb14"
    """Backbone, random weights."""
    image_size: int = 322
    """Side of the images in pixels."""
    batch: int = 64
    """Images in a forward pass."""
    precision: str = "bf16"
    """Precision of the forward pass: fp32 or bf16."""
    top: int = 100
    """Candidates of a query."""
    queries: int = 16
    """Queries that are re-ranked."""
    rows: int = 10_000_000
    """Database rows of the search; one block of them is searched again and again."""
    block_rows: int = 1_000_000
    """Rows in a block."""
    size: int = 768
    """Channels of a row."""
    search_queries: int = 1000
    """Queries of the search."""
    repeats: int = 5
    """Times that each is run after one to warm up; the median counts."""
    json: Path | None = None
    """File for the figures, written after each part."""


def median_s(run: Callable[[], object], repeats: int) -> float:
    """Median seconds, the device's work finished."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


@torch.inference_mode()
def extraction(options: Options, device: torch.device) -> tuple[float, float]:
    """Seconds per image of the features and of the bare forward pass."""
    config = ModelConfig.model_validate({"backbone": options.backbone, "weights": "random"})
    model = build_model(config).eval().to(device)
    shape = (options.batch, 3, options.image_size, options.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    pixels = pixels.pin_memory() if device.type == "cuda" else pixels
    rerank = RerankConfig()

    def bare() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            model(normalise(pixels.to(device, non_blocking=True)))

    def features() -> None:
        inputs = normalise(pixels.to(device, non_blocking=True))
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            descriptor_BD, local_BNC, saliency_BN = read_local(model, inputs, rerank)
        compact(local_BNC, saliency_BN, grid_of(model, inputs), rerank).codes_PC.cpu()
        descriptor_BD.float().cpu()

    return median_s(features, options.repeats) / options.batch, median_s(bare, options.repeats) / options.batch


def reranking(options: Options, device: torch.device) -> tuple[float, float]:
    """Seconds per query of matching stored features, and of the matrix products alone."""
    spec = BACKBONES.get("vits14")
    channels, patches = spec.channels, (options.image_size // spec.patch) ** 2
    config = RerankConfig(saliency_thresh=None)
    with tempfile.TemporaryDirectory() as folder:
        database = random_features(Path(folder) / "database", options.top, patches, channels, config.dtype)
        queries = random_features(Path(folder) / "queries", options.queries, patches, channels, config.dtype)
        candidates_QT = np.tile(np.arange(options.top), (options.queries, 1))
        numbers_Q = np.arange(options.queries)
        own = queries.patches(numbers_Q[:1], device).codes_BMC[0].float()
        others = database.patches(candidates_QT[0], device).codes_BMC.flatten(0, 1).float().T.contiguous()
        pairs = Candidates(queries, numbers_Q, database, candidates_QT)
        ours = median_s(lambda: score_candidates(pairs, config, device), options.repeats)
        return ours / options.queries, median_s(lambda: own @ others, options.repeats)


def search(options: Options, device: torch.device) -> tuple[float, float]:
    """Seconds of the exact search of all queries, and of bare products and topk on the same device."""
    generator = np.random.default_rng(0)
    block_ND = generator.standard_normal((options.block_rows, options.size), dtype=np.float32)
    block_ND /= np.linalg.norm(block_ND, axis=1, keepdims=True)
    queries_QD = block_ND[: options.search_queries] + 0.1 * generator.standard_normal(
        (options.search_queries, options.size), dtype=np.float32
    )
    starts = range(0, options.rows, options.block_rows)

    def blocks() -> Iterator[tuple[int, NDArray[np.float32]]]:
        for start in starts:
            yield start, block_ND[: options.rows - start]

    def bare() -> None:
        queries = torch.from_numpy(queries_QD).to(device)
        for _, rows_ND in blocks():
            rows = torch.from_numpy(rows_ND).to(device)
            (queries @ rows.T).topk(min(options.top, len(rows))).indices.cpu()

    def once(run: Callable[[], object]) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    once(lambda: search_blocks(queries_QD, [(0, block_ND[:4096])], options.top))  # libraries load
    return once(lambda: search_blocks(queries_QD, blocks(), options.top)), once(bare)


def main() -> None:
    """Prints one row per part."""
    options = tyro.cli(Options, prog="python -m benchmarks.inference")
    rank = start_process_group(1800)
    figures: dict[str, float] = {}
    rows: list[list[str]] = []
    parts: dict[str, tuple[Callable[[Options, torch.device], tuple[float, float]], str]] = {
        "extraction_s_per_image": (extraction, f"{options.backbone}, {options.image_size} px, {options.precision}"),
        "rerank_s_per_query": (reranking, f"top-{options.top}, {options.image_size} px, 384 channels, all patches"),
        "search_s": (search, f"{options.search_queries} queries in {options.rows:,} x {options.size}"),
    }
    for name, (run, setting) in parts.items():
        ours, bare = run(options, rank.device)
        figures |= {name: ours, f"{name}_bare": bare, f"{name}_over_bare": ours / bare}
        rows.append([name, setting, f"{ours:.5f}", f"{bare:.5f}", f"{ours / bare:.2f}"])
        write_json(options.json, figures)
    print_table(f"inference on {rank.device.type}", ["figure", "setting", "s", "bare, s", "over bare"], rows)
    stop_process_group()


if __name__ == "__main__":
    main()
