"""What an evaluation of one benchmark found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.recall import Recall


@dataclass(frozen=True)
class Result:
    """Recalls of both stages, their cost, and the predictions that they come from."""

    name: str
    protocol: str
    pixels: str
    """How photographs became pixels."""
    num_database: int
    num_queries: int
    num_without_positive: int
    image_size: int | tuple[int, int]
    precision: str  # of the forward pass
    retrieved: Recall
    predictions_QK: NDArray[np.int64]
    timings: dict[str, float]
    reranked: Recall | None = None
    reranked_QK: NDArray[np.int64] | None = None
    gain: Recall | None = None
    """Re-ranked minus first-stage recall in points, paired; None if no intervals were asked for."""
    mb_per_image: float = 0.0
    kb_local_per_image: float = 0.0
    index: str = "Flat"
    index_agreement: float | None = None
    """Percent of the exact neighbours that an approximate index found."""
    num_left_alone: int = 0
    mean_depth: float = 0.0
    """Candidates matched of a query."""
    notes: tuple[str, ...] = ()
    layout: str = ""
    """What was read of the benchmark's folder."""
    num_labelled: int | None = None
    """Queries with ground truth, which the recalls count; None: all."""
    similarities_QK: NDArray[np.float32] | None = None
    """Cosines of the retrieved predictions."""
    matches_QT: NDArray[np.float32] | None = None
    """Match scores of the first T retrieved predictions, NaN where nothing was matched; None if not re-ranked."""
    rerank: dict[str, Any] | None = None
    """The settings of the re-ranking; None if not re-ranked."""
    rerank_rule: str = ""
    """The same in a line."""

    @property
    def images_per_s(self) -> float:
        """Images encoded in a second."""
        seconds = self.timings.get("extraction_s_per_image", 0.0)
        return 1 / seconds if seconds else 0.0

    def stages(self) -> dict[str, Recall]:
        """What was measured, by name: retrieved and, if there is any, re-ranked and gain."""
        all_of_them = {"retrieved": self.retrieved, "re-ranked": self.reranked, "gain": self.gain}
        return {name: recall for name, recall in all_of_them.items() if recall}

    def as_dict(self) -> dict[str, Any]:
        """All but the predictions, for JSON; recalls, intervals and gains by K."""
        hidden = ("retrieved", "reranked", "gain", "predictions_QK", "reranked_QK", "similarities_QK", "matches_QT")
        gain = self.gain.by_k if self.gain else {}
        return {
            **{key: value for key, value in vars(self).items() if key not in hidden},
            "num_labelled": self.num_queries if self.num_labelled is None else self.num_labelled,
            "recall": self.retrieved.values or None,
            "recall_reranked": self.reranked.values if self.reranked else None,
            "recall_interval": self.retrieved.intervals,
            "reranked_interval": self.reranked.intervals if self.reranked else {},
            "images_per_s": self.images_per_s,
            "gain": {k: (figure.value, *(figure.interval or ())) for k, figure in gain.items()},
        }

    def recalls(self) -> dict[str, float]:
        """Recalls and gains in percent by flat names: `recall_1`, `reranked_recall_1`, `gain_1`."""
        names = {"retrieved": "recall", "re-ranked": "reranked_recall", "gain": "gain"}
        return {
            f"{names[stage]}_{k}": value
            for stage, recall in self.stages().items()
            for k, value in recall.values.items()
        }

    def metrics(self) -> dict[str, float]:
        """Flat figures for a tracker: recalls and what they cost."""
        speed = {"images_per_s": self.images_per_s} if self.images_per_s else {}
        return self.recalls() | self.timings | speed | {"mb_per_image": self.mb_per_image}

    def line(self) -> str:
        """Recalls and gains in one line, with protocol, pixels and precision."""
        what = f"{self.name} ({self.protocol}, {self.pixels}, {self.precision})"
        if not self.retrieved:
            return what
        ks = "/".join(str(k) for k in self.retrieved.by_k)
        text = f"{what} R@{ks} {self.retrieved}"
        if self.reranked:
            text += f", re-ranked {self.reranked}"
        if self.gain:
            text += f" ({'/'.join(f'{value:+.1f}' for value in self.gain.values.values())})"
        return text
