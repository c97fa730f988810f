"""Recall over a grid of saliency and match thresholds, from one pass over stored features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.files import write_whole
from configs.progress import OnProgress, untold
from configs.ranks import on_all_ranks
from configs.reading import read_regular, reading
from configs.schema import RerankConfig
from eval.benchmarks.benchmark import Benchmark
from eval.evaluate import FirstStage
from eval.features import StoredFeatures
from eval.matching import mutual_matches, score_matches, similarities
from eval.pairs import Candidates, pair_blocks
from eval.recall import recall_at
from eval.rerank import fuse, reorder
from eval.rerank_rule import rerank_rule

SALIENCY = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
MATCH = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)


@dataclass(frozen=True)
class Sweep:
    """Match scores [S, M, Q, T] at each pair of thresholds, and the salient patches [S, Q] of each query.

    With `match_weight` saliency, the sum of their saliency.
    """

    saliency: tuple[float, ...]
    match: tuple[float, ...]
    scores_SMQT: NDArray[np.float32]
    patches_SQ: NDArray[np.float64]

    def recall(
        self,
        benchmark: Benchmark,
        predictions_QK: NDArray[np.int64],
        similarities_QK: NDArray[np.float32],
        global_weight: float,
        k: int,
    ) -> NDArray[np.float64]:
        """Recall@k in percent [S, M]; the point at a run's own thresholds is that run's recall."""
        depth = self.scores_SMQT.shape[3]
        out_SM = np.zeros((len(self.saliency), len(self.match)))
        for s, patches_Q in enumerate(self.patches_SQ):
            for m in range(len(self.match)):
                key = fuse(self.scores_SMQT[s, m], similarities_QK[:, :depth], patches_Q, global_weight)
                out_SM[s, m] = recall_at(reorder(key, predictions_QK), benchmark, [k])[k]
        return out_SM


@torch.inference_mode()
def sweep_thresholds(
    queries: StoredFeatures,
    database: StoredFeatures,
    candidates_QT: NDArray[np.int64],
    config: RerankConfig,
    device: torch.device,
    *,
    saliency: Sequence[float] = SALIENCY,
    match: Sequence[float] = MATCH,
    on_progress: OnProgress = untold,
) -> Sweep:
    """Scores at all thresholds: each pair of images is multiplied once, and its maxima taken once a saliency.

    Saliency below what was stored cannot be swept: those thresholds are left out. Equal on every rank.
    """
    stored = config.saliency_thresh
    swept = tuple(s for s in saliency if stored is None or s >= stored)
    scores_SMQT = torch.zeros(len(swept), len(match), *candidates_QT.shape, device=device)
    patches_SQ = torch.zeros(len(swept), len(candidates_QT), dtype=torch.float64, device=device)
    pairs = Candidates(queries, np.arange(len(candidates_QT)), database, candidates_QT)
    with on_all_ranks():
        for block in pair_blocks(pairs, max(1, config.memory_mb // 2), device, on_progress):
            own, others = block.queries, block.candidates
            sim_BNTM = similarities(own.codes_BMC, others.codes_BMC.unflatten(0, (len(own.count_B), -1)))
            salient_BTM = others.saliency_BM.unflatten(0, (len(own.count_B), -1))
            for s, thresh in enumerate(swept):
                # The stored threshold keeps all that is stored: saliency in fp16 may have been rounded onto it.
                own_BN, other_BTM = own.saliency_BM > thresh, salient_BTM > thresh
                if thresh == stored:
                    own_BN, other_BTM = own.saliency_BM >= 0, salient_BTM >= 0
                mass_BN = own.saliency_BM * own_BN if config.match_weight == "saliency" else own_BN
                patches_SQ[s, block.rows] = mass_BN.double().sum(dim=1)
                found = mutual_matches(sim_BNTM * own_BN[:, :, None, None] * other_BTM[:, None], 0.0)
                for m, least in enumerate(match):
                    kept = replace(found, matched_BNT=found.matched_BNT & (found.cosine_BNT > least))
                    scores_SMQT[s, m, block.rows, block.columns] = score_matches(kept, own, others, config)
    dist.all_reduce(scores_SMQT)
    dist.all_reduce(patches_SQ)
    return Sweep(swept, tuple(match), scores_SMQT.cpu().numpy(), patches_SQ.cpu().numpy())


@dataclass(frozen=True)
class SweptRecall:
    """Recall@k in percent at each pair of thresholds of one benchmark, and what it was made with."""

    benchmark: str
    k: int
    retrieved: float  # without re-ranking
    saliency: list[float]
    match: list[float]
    recall: list[list[float]]  # a row for each saliency threshold
    own: list[float]  # the settings' own saliency and match thresholds; saliency 0 if all patches are kept
    rule: str  # of the re-ranking

    def write(self, path: Path) -> None:
        """As JSON; the file appears whole or not at all."""
        write_whole(path, json.dumps(asdict(self), indent=1))


def sweep_recall(
    found: FirstStage, benchmark: Benchmark, config: RerankConfig, k: int, device: torch.device
) -> SweptRecall:
    """Recall@k over the grid, from a benchmark's features and candidates; the same on every rank, which all call it."""
    candidates_QT = found.predictions_QK[:, : config.top_k]
    sweep = sweep_thresholds(found.queries, found.database, candidates_QT, config, device)
    recall_SM = sweep.recall(benchmark, found.predictions_QK, found.similarities_QK, config.global_weight, k)
    return SweptRecall(
        benchmark=benchmark.name,
        k=k,
        retrieved=recall_at(found.predictions_QK, benchmark, [k])[k],
        saliency=list(sweep.saliency),
        match=list(sweep.match),
        recall=recall_SM.tolist(),
        own=[config.saliency_thresh or 0.0, config.nn_match_thresh],
        rule=rerank_rule(config),
    )


def read_swept(path: Path) -> SweptRecall:
    """What `SweptRecall.write` wrote. Raises ValueError naming the file if that is not what it holds."""
    with reading(path, "a sweep of rerankvpr eval --sweep"):
        swept = SweptRecall(**json.loads(read_regular(path)))
        shape = np.array(swept.recall, dtype=np.float64).shape
        if shape != (len(swept.saliency), len(swept.match)) or 0 in shape or len(swept.own) != 2:
            raise ValueError(f"{shape} recalls of {len(swept.saliency)} x {len(swept.match)} thresholds")
        np.array([swept.retrieved, *swept.own, *swept.saliency, *swept.match], dtype=np.float64)
    return swept
