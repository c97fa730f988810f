"""Re-ranking from stored features against re-encoding the candidates of each query; bytes per image against recall.

Re-encoding follows RerankVPR's published code: for each query it loads and encodes the query and every
candidate again, one after another, and matches all patches. Times are CPU time of one thread, so that other work on the
machine counts for little. `OMP_NUM_THREADS=1 python -m benchmarks.rerank [--json FILE]`; with `--weights` and
`--data-root` (a folder that holds gardens_point/) recall at each way of storing is measured as well.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
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
from eval.benchmarks.load import load_benchmarks
from eval.evaluate import features_of
from eval.feature_cache import FeatureCache
from eval.features import Patches, StoredFeatures, shard_bounds, shard_path, write_shard
from eval.local_features import encode, pca_basis, read_local, salient
from eval.matching import match_scores
from eval.pairs import Candidates, plan_batches
from eval.recall import recall_at
from eval.rerank import rerank, score_candidates
from eval.search import search_ranks
from model.network import PlaceModel, build_model

STORES = (("fp32", 0), ("fp16", 0), ("int8", 0), ("fp16", 128), ("int8", 128), ("int8", 64))
"""Types of stored local features, and the channels that PCA leaves of them; 0: all."""


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
    queries: int = 16
    """Queries that are re-ranked from stored features."""
    reencoded: int = 12
    """Images, a query and candidates of it, that are encoded again; their mean stands for all candidates."""
    repeats: int = 5
    """Times that matching from stored features is run; the median is taken."""
    weights: Path | None = None
    """ViT-S/14 weights for the recall at each way of storing."""
    recall_sizes: tuple[int, ...] = (224, 322)
    """Sides at which that recall is measured; `kb_per_image` is the least at which no pair loses R@1 to fp32."""
    pairs: tuple[str, ...] = ("gardens_point/day_right/night_right", "gardens_point/day_right/day_left")
    """Benchmarks of that recall."""
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
        for top, found in _measure(model, options):
            speedup, share = found["reencode"] / found["rerank"], found["matching"] / found["products"]
            rows.append(
                [
                    f"{backbone}, top-{top}",
                    f"{1000 * found['reencode']:.0f}",
                    f"{1000 * found['rerank']:.1f} ({1000 * found['fastest']:.1f} to {1000 * found['slowest']:.1f})",
                    f"{speedup:.0f}x",
                    f"{1000 * found['matching']:.1f}",
                    f"{1000 * found['products']:.1f}",
                    f"{share:.2f}",
                ]
            )
            print(" | ".join(rows[-1]), flush=True)
            figures[f"speedup_top{top}_{backbone}"] = figures[f"speedup_top{top}"] = speedup
            figures[f"rerank_ms_top{top}_{backbone}"] = 1000 * found["rerank"]
            figures[f"reencode_ms_top{top}_{backbone}"] = 1000 * found["reencode"]
            figures[f"matching_over_products_top{top}_{backbone}"] = share
    if rows:
        columns = (
            *("CPU ms/query", "re-encoding", "stored features (range)", "speed-up"),
            *("matching alone", "its matrix products", "ratio"),
        )
        title = f"Re-ranking a query, {options.image_size} px, random weights, all patches, {options.config.dtype}"
        print_table(title, columns, rows)
    if options.weights:
        for side in options.recall_sizes:
            figures |= _bytes_against_recall(side, options)
    write_json(options.json, figures)
    dist.destroy_process_group()


def _measure(model: PlaceModel, options: Options) -> Iterator[tuple[int, dict[str, float]]]:
    # All patches are kept, which is the most that matching can cost.
    rerank_config = options.config.model_copy(update={"saliency_thresh": None})
    config = EvalConfig(image_size=options.image_size, rerank=rerank_config, batch_size=8)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        paths = []
        for i in range(max(options.top) + 3):
            image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
            paths.append(Path(name) / f"{i}.jpg")
            image.save(paths[-1])
        database_paths, query_paths = paths[:-3], paths[-3:]
        # What is stored is one scene under noise, so that every patch has a match: images need not be encoded for it.
        patches, channels = (options.image_size // model.spec.patch) ** 2, model.spec.channels
        database, queries = (
            random_features(Path(name) / part, len(of), patches, channels, options.config.dtype)
            for part, of in (("database", database_paths), ("queries", query_paths))
        )
        numbers, device = np.arange(options.queries) % len(query_paths), torch.device("cpu")
        start = time.process_time()
        _as_the_original(model, query_paths[0], database_paths[: options.reencoded - 1], config)
        an_image = (time.process_time() - start) / options.reencoded
        for top in options.top:
            candidates_QT = np.tile(np.arange(top), (options.queries, 1))
            own = queries.patches(numbers[:1], device)
            plan = plan_batches(queries, database, top, rerank_config.memory_mb, device)
            others = database.patches(candidates_QT[0, : plan.candidates], device)
            products_CX = others.codes_BMC.flatten(0, 1).T

            pairs = Candidates(queries, numbers, database, candidates_QT)

            def stored(pairs: Candidates = pairs) -> object:
                return score_candidates(pairs, rerank_config, device)

            def matching(own: Patches = own, others: Patches = others) -> object:
                return match_scores(own, others, rerank_config)

            def products(own: Patches = own, products_CX: torch.Tensor = products_CX) -> object:
                return own.codes_BMC[0] @ products_CX

            taken = np.array(_seconds(stored, options.repeats)) / options.queries
            batches = top / len(others.codes_BMC)
            yield (
                top,
                {
                    # One image after another, each loaded, encoded and matched: linear in the candidates.
                    "reencode": an_image * (top + 1),
                    "rerank": float(np.median(taken)),
                    "fastest": float(taken.min()),
                    "slowest": float(taken.max()),
                    "matching": batches * float(np.median(_seconds(matching, options.repeats))),
                    "products": batches * float(np.median(_seconds(products, options.repeats))),
                },
            )


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


def random_features(folder: Path, count: int, patches: int, channels: int, kind: str) -> StoredFeatures:
    """Images of one random scene, as extraction writes them: the cosine of a patch with its match is about 0.8."""
    folder.mkdir()
    scene_PC = F.normalize(torch.randn(patches, channels, generator=torch.Generator().manual_seed(0)), dim=1)
    side = round(patches**0.5)
    cell_P2 = torch.stack([torch.arange(patches) // side, torch.arange(patches) % side], dim=1).to(torch.uint8)
    bounds, g = shard_bounds(count, 8), torch.Generator().manual_seed(count)
    for number, (first, stop) in enumerate(bounds):
        noise_BPC = F.normalize(torch.randn(stop - first, patches, channels, generator=g), dim=2)
        codes, scale = encode(F.normalize(scene_PC + 0.5 * noise_BPC, dim=2).flatten(0, 1), kind)
        tensors = {
            "descriptors": torch.zeros(stop - first, channels),
            "count": torch.full((stop - first,), patches),
            "codes": codes,
            "scale": scale,
            "cell": cell_P2.repeat(stop - first, 1),
            "saliency": torch.ones(len(codes)).half(),
        }
        write_shard(shard_path(folder, number), tensors, "random")
    return StoredFeatures(folder, bounds)


def _seconds(run: Callable[[], object], times: int) -> list[float]:
    """CPU seconds of each of a few runs, after one that does not count."""
    run()
    taken = []
    for _ in range(times):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return taken


def _bytes_against_recall(side: int, options: Options) -> dict[str, float]:
    """Mean recall over pairs of traverses with each way of storing, from features that are extracted once."""
    rerank_config = options.config.model_copy(update={"dtype": "fp32"})
    config = EvalConfig(data_root=options.data_root, rerank=rerank_config, features=options.features, image_size=side)
    benchmarks = load_benchmarks(list(options.pairs), options.data_root)
    model = build_model(ModelConfig(backbone="vits14", weights=str(options.weights), finetune_last_n_blocks=0)).eval()
    cache = FeatureCache(benchmarks, options.features)
    with tempfile.TemporaryDirectory() as name:
        coded: dict[tuple[str, Path], StoredFeatures] = {}
        recalls: dict[str, list[list[float]]] = {}
        kilobytes: dict[str, list[float]] = {}
        bases: dict[int, torch.Tensor] = {}
        for benchmark in benchmarks:
            database, queries = features_of(model, benchmark, config, cache, {}, [])
            similarities_QK, predictions_QK = search_ranks(
                queries.descriptors(), database.blocks(0, 1, 1 << 30), options.config.top_k
            )
            recalls.setdefault("", []).append(list(recall_at(predictions_QK, benchmark, [1, 5, 10]).values()))
            for kind, size in STORES:
                label = f"PCA {size}, {kind}" if size else kind
                if size and size not in bases:
                    bases[size] = pca_basis(_sample(database), size)
                for features in (database, queries):
                    if (label, features.folder) not in coded:
                        folder = Path(name) / f"{len(coded)}"
                        coded[label, features.folder] = _recode(features, folder, kind, bases.get(size))
                as_stored = coded[label, database.folder], coded[label, queries.folder]
                args = predictions_QK, similarities_QK, options.config, torch.device("cpu")
                found = rerank(as_stored[1], as_stored[0], *args)
                recalls.setdefault(label, []).append(
                    list(recall_at(found.predictions_QK, benchmark, [1, 5, 10]).values())
                )
                kilobytes.setdefault(label, []).append(as_stored[0].local_bytes_per_image / 1e3)
    rows: list[list[str]] = []
    figures: dict[str, float] = {}
    for label, values in recalls.items():
        means = np.mean(values, axis=0)
        lost = min(own[0] - exact[0] for own, exact in zip(values, recalls["fp32"], strict=True))
        kb = float(np.mean(kilobytes.get(label, [0.0])))
        shown = [f"{kb:.1f}", f"{lost:+.1f}"] if label else ["-", ""]
        rows.append([label or "not re-ranked", shown[0], *(f"{v:.2f}" for v in means), shown[1]])
        if label:
            key = f"{label.replace(', ', '_').replace(' ', '').lower()}_{side}"
            figures |= {f"kb_{key}": kb, f"r1_{key}": float(means[0]), f"r1_least_change_{key}": lost}
            if lost >= 0:
                figures["kb_per_image"] = min(kb, figures.get("kb_per_image", np.inf))
    columns = ["stored as", "kB/image", "R@1", "R@5", "R@10", "least change of R@1 of a pair"]
    print_table(
        f"Gardens Point, mean of {' and '.join(b.name[14:] for b in benchmarks)}, {side} px, ViT-S/14, defaults",
        columns,
        rows,
    )
    return figures


def _sample(features: StoredFeatures) -> torch.Tensor:
    """Patches [S, C] of a spread of images, for a projection."""
    patches = features.patches(np.unique(np.linspace(0, len(features) - 1, 64).astype(int)), torch.device("cpu"))
    return patches.codes_BMC[patches.saliency_BM >= 0]


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
