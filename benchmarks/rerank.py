"""Re-ranking from stored features against re-encoding the candidates of each query; bytes an image against recall.

Re-encoding follows the description of the original RerankVPR: for each query it loads and encodes the query and every
candidate again, one after another, and matches all patches. `python -m benchmarks.rerank [--json FILE]`; with
`--weights` and `--data-root` (a folder that holds gardens_point/) recall at each way of storing is measured as well.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image

from benchmarks.report import print_table, write_json
from configs.schema import EvalConfig, ModelConfig, RerankConfig
from data_pipeline.images import normalise, read_image
from eval.benchmarks import load_benchmarks
from eval.evaluate import FeatureStore, features_of
from eval.extract import extract
from eval.local_features import encode, pca_basis, read_local, salient
from eval.matching import match_scores
from eval.recall import recall_at
from eval.rerank import plan_batches, rerank, score_candidates
from eval.search import search_ranks
from eval.store import StoredFeatures, shard_path, write_shard
from model.network import PlaceModel, build_model

PAIR = "gardens_point/day_right/night_right"
STORES: dict[str, tuple[str, int]] = {
    "fp32": ("fp32", 0),
    "fp16": ("fp16", 0),
    "int8": ("int8", 0),
    "PCA 128, fp16": ("fp16", 128),
    "PCA 128, int8": ("int8", 128),
    "PCA 64, int8": ("int8", 64),
}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    json: Path | None = None
    """File for the figures."""
    backbones: tuple[str, ...] = ("vits14", "vitb14")
    """Backbones (random weights: time does not depend on them); the figures without a suffix are the last one's."""
    image_size: int = 322
    """Side of the images."""
    top: tuple[int, ...] = (10, 100)
    """Candidates of a query."""
    queries: int = 2
    """Queries that are re-ranked by re-encoding; stored features are matched for eight times as many."""
    weights: Path | None = None
    """ViT-S/14 weights for the recall at each way of storing."""
    data_root: Path = Path("data")
    """Folder that holds gardens_point/."""
    features: Path | None = None
    """Folder that keeps the features of the recall part."""
    config: RerankConfig = field(default_factory=RerankConfig)


def main() -> None:
    """Measures and prints."""
    options = tyro.cli(Options, prog="python -m benchmarks.rerank", config=(tyro.conf.FlagConversionOff,))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    figures: dict[str, float] = {}
    rows = []
    for backbone in options.backbones:
        model = build_model(
            ModelConfig.model_validate({"backbone": backbone, "weights": "random", "finetune_last_n_blocks": 0})
        ).eval()
        for top in options.top:
            found = _measure(model, top, options)
            rows.append(
                [
                    f"{backbone}, {options.image_size} px, top-{top}",
                    *(f"{1000 * found[k]:.2f}" for k in ("reencode", "rerank", "matching", "products")),
                    f"{found['reencode'] / found['rerank']:.0f}x",
                    f"{100 * found['products'] / found['matching']:.0f} %",
                ]
            )
            figures[f"speedup_top{top}_{backbone}"] = figures[f"speedup_top{top}"] = found["reencode"] / found["rerank"]
            figures[f"rerank_ms_top{top}_{backbone}"] = 1000 * found["rerank"]
            figures[f"products_share_top{top}_{backbone}"] = found["products"] / found["matching"]
    columns = ["ms/query", "re-encoding", "stored: read, matched", "matching", "products", "speed-up", "products"]
    print_table("Re-ranking a query", columns, rows)
    if options.weights:
        figures |= _bytes_against_recall(options)
    write_json(options.json, figures)
    dist.destroy_process_group()


def _measure(model: PlaceModel, top: int, options: Options) -> dict[str, float]:
    # Random weights say nothing of saliency: all patches are kept, which is the most that matching can cost.
    rerank_config = options.config.model_copy(update={"saliency_thresh": None})
    config = EvalConfig(image_size=options.image_size, rerank=rerank_config, batch_size=8)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        paths = []
        for i in range(top + options.queries):
            image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
            paths.append(Path(name) / f"{i}.jpg")
            image.save(paths[-1])
        database_paths, query_paths = paths[:top], paths[top:]
        candidates_QT = np.tile(np.arange(top), (8 * options.queries, 1))
        database = extract(model, database_paths, config, Path(name) / "database", key="d")
        queries = extract(model, query_paths, config, Path(name) / "queries", key="q")
        numbers = np.arange(8 * options.queries) % options.queries
        device = torch.device("cpu")

        def stored() -> object:
            return score_candidates(queries, numbers, database, candidates_QT, rerank_config, device)

        stored()
        own = queries.patches(numbers[:1], device)
        others = database.patches(candidates_QT[0], device)
        products_NX = others.codes_BMC.flatten(0, 1).T

        def matching() -> object:
            return match_scores(own, others, nn_match_thresh=0.65, score="count", geometry="none", geometry_cells=0)

        def products() -> object:
            return own.codes_BMC[0] @ products_NX

        def reencode() -> object:
            return [_as_the_original(model, query, database_paths, config) for query in query_paths]

        fits = plan_batches(queries, database, top, options.config.memory_mb).candidates == top
        return {
            "reencode": _seconds(reencode, 1) / options.queries,
            "rerank": _seconds(stored, 3) / len(numbers),
            "matching": _seconds(matching, 5),
            "products": _seconds(products, 5),
            "in_one_batch": float(fits),
        }


@torch.inference_mode()
def _as_the_original(model: PlaceModel, query: Path, candidates: list[Path], config: EvalConfig) -> list[int]:
    """Order of the candidates, each loaded and encoded for this query alone; its faults are not repeated."""

    def one(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = normalise(read_image(path, config.image_size)[None])
        _, local_BNC, saliency_BN = read_local(model, inputs, config.rerank)
        return local_BNC[0], salient(saliency_BN, config.rerank.saliency_thresh)[0]

    own_NC, own_N = one(query)
    counts = []
    for path in candidates:
        other_MC, other_M = one(path)
        sim_NM = own_NC @ other_MC.T
        best_N, nearest_N = sim_NM.max(dim=1)
        mutual_N = sim_NM.argmax(dim=0)[nearest_N] == torch.arange(len(own_NC))
        counts.append(int((mutual_N & (best_N > config.rerank.nn_match_thresh) & own_N & other_M[nearest_N]).sum()))
    return sorted(range(len(counts)), key=lambda i: -counts[i])


def _seconds(run: Callable[[], object], times: int) -> float:
    """The fastest of a few runs."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _bytes_against_recall(options: Options) -> dict[str, float]:
    """Recall of one pair of traverses with each way of storing, from features that are extracted once."""
    rerank_config = options.config.model_copy(update={"store": "fp32"})
    config = EvalConfig(data_root=options.data_root, rerank=rerank_config, features=options.features)
    (benchmark,) = load_benchmarks([PAIR], options.data_root)
    model = build_model(ModelConfig(backbone="vits14", weights=str(options.weights), finetune_last_n_blocks=0)).eval()
    store = FeatureStore([benchmark])
    database, queries, *_ = features_of(model, benchmark, config, store, lambda *_: None)
    similarities_QK, predictions_QK = search_ranks(
        queries.descriptors(), database.blocks(0, 1, 1 << 30), options.config.top_k
    )
    first_stage = recall_at(predictions_QK, benchmark, [1, 5, 10])
    sample = np.unique(np.linspace(0, len(database) - 1, 64).astype(np.int64))
    patches = database.patches(sample, torch.device("cpu"))
    sample_SC = patches.codes_BMC[patches.saliency_BM >= 0]
    rows = [["not re-ranked", "-", *(f"{v:.1f}" for v in first_stage.values())]]
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        for number, (label, (kind, size)) in enumerate(STORES.items()):
            basis = pca_basis(sample_SC, size) if size else None
            coded = [_recode(f, Path(name) / f"{number}{i}", kind, basis) for i, f in enumerate((database, queries))]
            found = rerank(coded[1], coded[0], predictions_QK, similarities_QK, options.config, torch.device("cpu"))
            recall = recall_at(found.predictions_QK, benchmark, [1, 5, 10])
            kilobytes = coded[0].local_bytes_per_image / 1e3
            rows.append([label, f"{kilobytes:.1f}", *(f"{v:.1f}" for v in recall.values())])
            key = label.replace(", ", "_").replace(" ", "").lower()
            figures |= {f"kb_{key}": kilobytes, f"r1_{key}": recall[1]}
            if recall[1] >= figures["r1_fp32"]:
                figures["kb_per_image"] = min(kilobytes, figures.get("kb_per_image", np.inf))
            shutil.rmtree(coded[0].folder)
    columns = ["stored as", "kB/image", "R@1", "R@5", "R@10"]
    print_table(f"{benchmark.name}, {config.image_size} px, ViT-S/14", columns, rows)
    return figures


def _recode(features: StoredFeatures, folder: Path, kind: str, basis: torch.Tensor | None) -> StoredFeatures:
    """The same features, stored in another way."""
    folder.mkdir(parents=True)
    for number, shard in enumerate(features.shards):
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in shard.items()}
        tensors["codes"], tensors["scale"] = encode(F.normalize(tensors["codes"].float(), dim=1), kind, basis)
        write_shard(shard_path(folder, number), tensors, "recoded")
    return StoredFeatures(folder, features.bounds)


if __name__ == "__main__":
    main()
