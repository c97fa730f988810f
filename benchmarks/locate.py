"""A photograph located in an index of 10^5 others: what search, re-ranking and the answer take beside the forward pass.

`python -m benchmarks.locate [--photographs 100000] [--factory IVF1024,Flat --params nprobe=16] [--json FILE]`. Weights
are random and the index is drawn: every tenth of its shards holds photographs with as many salient patches as real
ones have, near the queries in descriptor and patches, so that they are the candidates; the others have a descriptor
and one patch, and are only searched. The peer is the forward pass of the same photograph in the same process.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro

from benchmarks.report import print_table, write_json
from configs.schema import EvalConfig, ModelConfig
from data_pipeline.positions import from_lat_lon
from eval.describer import Describer
from eval.features import StoredFeatures, shard_path, weights_digest, write_shard
from eval.index.approximate_files import fill, train_once
from eval.index.images import Images, write_images
from eval.index.index import Index, shard_bounds_of
from eval.index.manifest import Manifest, Part, part_folder, settings_of, write_manifest, write_part
from model.network import build_model

PART = "000000"
PER_SHARD = 1024
RICH = 10  # every so many shards hold whole photographs


@dataclass(frozen=True)
class Options:
    """What is measured."""

    photographs: int = 100_000
    """Photographs of the index."""
    backbone: str = "vits14"
    """Backbone, its weights random."""
    image_size: int = 224
    """Side of the images."""
    patches: int = 250
    """Salient patches of a photograph of the index."""
    queries: int = 30
    """Photographs that are located, one at a time."""
    factory: str = ""
    """FAISS factory string of an approximate index; exact search without it."""
    params: str = ""
    """How it is searched."""
    json: Path | None = None
    """File for the figures."""


def main() -> None:
    """Draws an index, locates, prints."""
    options = tyro.cli(Options, prog="python -m benchmarks.locate", description=__doc__)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    network = ModelConfig.model_validate({"backbone": options.backbone, "weights": "random", "aggregator": "gem"})
    describer = Describer(build_model(network).eval(), EvalConfig(image_size=options.image_size), "", network)
    rng = np.random.default_rng(0)
    side = options.image_size
    queries = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(options.queries)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        draw_index(Path(folder), describer, queries, options)
        print(f"index drawn in {time.perf_counter() - began:.0f} s", flush=True)
        index = Index.open(folder, network=describer)
        located(index, queries[0])  # maps and reads what the first search reads
        times = np.array([located(index, query) for query in queries])
    encoding, search, rest = np.median(times, axis=0) * 1000
    worst = (times[:, 1] + times[:, 2]).max() * 1000
    beyond = search + rest
    columns = ["photographs", "forward pass, ms", "search, ms", "re-rank and answer, ms", "beyond, ms (most)", "ratio"]
    row = [f"{encoding:.1f}", f"{search:.1f}", f"{rest:.1f}", f"{beyond:.1f} ({worst:.1f})", f"{beyond / encoding:.2f}"]
    how = options.factory or "exact search"
    title = f"One photograph, {options.backbone}, {options.image_size} px, {options.patches} patches, {how}"
    print_table(title, columns, [[f"{options.photographs:,}", *row]])
    figures = {"forward_ms": encoding, "search_ms": search, "answer_ms": rest, "beyond_ms": beyond, "most_ms": worst}
    write_json(options.json, figures | {"beyond_over_forward": beyond / encoding})
    dist.destroy_process_group()


def located(index: Index, query: np.ndarray) -> tuple[float, float, float]:
    """Seconds of the forward pass, of the search alone, and of what is left of locating one photograph."""
    start = time.perf_counter()
    features, _, _ = index.encode([query], ["query"])
    encoded = time.perf_counter()
    index.search(features.descriptors(), index.config.rerank.top_k)
    searched = time.perf_counter()
    found = index.find(features, 5)
    location = index.location("query", found, 0, 5)
    assert len(location.candidates) == 5
    search = searched - encoded
    return encoded - start, search, time.perf_counter() - searched - search  # find searches again


def draw_index(folder: Path, describer: Describer, queries: list[np.ndarray], options: Options) -> None:
    """Writes an index whose candidates for the queries are whole photographs."""
    here, count = part_folder(folder, PART), options.photographs
    here.mkdir(parents=True)
    local = describer.local(queries)
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    counts = [min(PER_SHARD, count - first) for first in range(0, count, PER_SHARD)]
    for number, images in enumerate(counts):
        is_rich = number % RICH == 0
        near = [local[i] for i in rng.integers(0, len(local), images)]
        descriptors_ND = torch.randn(images, describer.descriptor_size, generator=generator)
        if is_rich:
            own_ND = torch.from_numpy(np.stack([one.descriptor_D for one in near]))
            descriptors_ND = own_ND + 0.02 * descriptors_ND
        patches = options.patches if is_rich else 1
        channels = near[0].codes_NC.shape[1]
        codes_NPC = torch.randn(images, patches, channels, generator=generator)
        if is_rich:
            chosen = [rng.integers(0, len(one.codes_NC), patches) for one in near]
            own = np.stack([one.codes_NC[rows] for one, rows in zip(near, chosen, strict=True)])
            codes_NPC = torch.from_numpy(own) + 0.03 * codes_NPC
        cells = torch.randint(0, near[0].grid[0], (images * patches, 2), generator=generator, dtype=torch.uint8)
        shard = {
            "descriptors": F.normalize(descriptors_ND, dim=1),
            "count": torch.full((images,), patches, dtype=torch.int64),
            "codes": F.normalize(codes_NPC, dim=2).flatten(0, 1).half(),
            "scale": torch.ones(images * patches),
            "cell": cells,
            "saliency": torch.ones(images * patches, dtype=torch.float16),
        }
        write_shard(shard_path(here, number), shard, "drawn")
    positions = from_lat_lon(48 + rng.random(count) / 10, 11 + rng.random(count) / 10, "drawn")
    names = [f"{i:09d}.jpg" for i in range(count)]
    unknown = np.full(count, "NaT", dtype="datetime64[s]")
    write_images(here, Images(names, positions, unknown, np.ones(count, np.int64), np.zeros((count, 32), np.uint8)))
    part, approximate = Part(count, counts, "drawn", in_metres=False), None
    if options.factory:
        features = StoredFeatures(here, shard_bounds_of(counts))
        trained, sha256 = train_once(folder, options.factory, options.params, features)
        part = Part(count, counts, "drawn", in_metres=False, approximate=fill(here, options.factory, trained, features))
        approximate = {"factory": options.factory, "params": options.params, "sha256": sha256}
    write_part(folder, PART, part)
    assert describer.network is not None
    manifest = Manifest(
        images=count,
        parts=[PART],
        weights=weights_digest(describer.model),
        network=describer.network.model_dump(mode="json"),
        precision="fp32",
        settings=settings_of(describer.config),
        approximate=approximate,
    )
    write_manifest(folder, manifest)


if __name__ == "__main__":
    main()
