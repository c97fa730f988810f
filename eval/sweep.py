"""Recall over a grid of saliency and match thresholds, from one pass over stored features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.ranks import on_all_ranks
from configs.schema import RerankConfig
from eval.benchmarks.benchmark import Benchmark
from eval.features import StoredFeatures
from eval.matching import mutual_matches, score_matches, similarities
from eval.recall import recall_at
from eval.rerank import blocks_of, fuse, plan_batches, reorder

SALIENCY = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
MATCH = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)


@dataclass(frozen=True)
class Sweep:
    """Match scores [S, M, Q, T] at each pair of thresholds, and the salient patches [S, Q] of each query."""

    saliency: tuple[float, ...]
    match: tuple[float, ...]
    scores_SMQT: NDArray[np.float32]
    patches_SQ: NDArray[np.int64]

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
    on_progress: Callable[[int], None] | None = None,
) -> Sweep:
    """Scores at all thresholds: each pair of images is multiplied once, and its maxima taken once a saliency.

    Saliency below what was stored cannot be swept: those thresholds are left out. Equal on every rank.
    """
    stored = config.saliency_thresh
    swept = tuple(s for s in saliency if stored is None or s >= stored)
    plan = plan_batches(queries, database, candidates_QT.shape[1], max(1, config.memory_mb // 2), device)
    scores_SMQT = torch.zeros(len(swept), len(match), *candidates_QT.shape, device=device)
    patches_SQ = torch.zeros(len(swept), len(candidates_QT), dtype=torch.int64, device=device)
    blocks = list(blocks_of(len(candidates_QT), plan.queries))
    with on_all_ranks():
        for block in blocks[dist.get_rank() :: dist.get_world_size()]:
            own = queries.patches(np.arange(block.start, block.stop), device)
            for start in range(0, candidates_QT.shape[1], plan.candidates):
                part = slice(start, start + plan.candidates)
                others = database.patches(candidates_QT[block, part].ravel(), device)
                sim_BNTM = similarities(own.codes_BMC, others.codes_BMC.unflatten(0, (len(own.count_B), -1)))
                salient_BTM = others.saliency_BM.unflatten(0, (len(own.count_B), -1))
                for s, thresh in enumerate(swept):
                    # The stored threshold keeps all that is stored: saliency in fp16 may have been rounded onto it.
                    own_BN, other_BTM = own.saliency_BM > thresh, salient_BTM > thresh
                    if thresh == stored:
                        own_BN, other_BTM = own.saliency_BM >= 0, salient_BTM >= 0
                    patches_SQ[s, block] = own_BN.sum(dim=1)
                    masked_BNTM = sim_BNTM * own_BN[:, :, None, None] * other_BTM[:, None]
                    found = mutual_matches(masked_BNTM, 0.0)
                    for m, least in enumerate(match):
                        kept = replace(found, matched_BNT=found.matched_BNT & (found.cosine_BNT > least))
                        scores_SMQT[s, m, block, part] = score_matches(
                            kept,
                            own,
                            others,
                            score=config.score,
                            geometry=config.geometry,
                            geometry_cells=config.geometry_cells,
                        )
            if on_progress:
                on_progress(block.stop)
    dist.all_reduce(scores_SMQT)
    dist.all_reduce(patches_SQ)
    return Sweep(swept, tuple(match), scores_SMQT.cpu().numpy(), patches_SQ.cpu().numpy())


def draw_heat_map(path: Path, recall_SM: NDArray[np.float64], sweep: Sweep, title: str, first_stage: float) -> None:
    """Recall over both thresholds as a picture; the colours are centred on the first stage's recall."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axis = figure.subplots()
    reach = max(1.0, float(np.abs(recall_SM - first_stage).max()))
    shown = axis.imshow(recall_SM, cmap="RdYlGn", vmin=first_stage - reach, vmax=first_stage + reach, aspect="auto")
    for s, row in enumerate(recall_SM):
        for m, value in enumerate(row):
            axis.text(m, s, f"{value:.1f}", ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(sweep.match)), [f"{m:g}" for m in sweep.match])
    axis.set_yticks(range(len(sweep.saliency)), [f"{s:g}" for s in sweep.saliency])
    axis.set_xlabel("nn_match_thresh")
    axis.set_ylabel("saliency_thresh")
    axis.set_title(title, fontsize=9)
    figure.colorbar(shown, label=f"recall in %; yellow is retrieval's {first_stage:.1f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
