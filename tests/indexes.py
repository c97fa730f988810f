"""A small network for tests of an index."""

from __future__ import annotations

from pathlib import Path

from configs.schema import ModelConfig, Recipe
from eval.describer import Describer
from eval.index.build import build_index
from eval.index.photo_list import list_source
from eval.weights_file import describer_of
from model.network import build_model

TINY = ModelConfig(backbone="tiny14", weights="random", finetune_last_n_blocks=0)


SETTINGS = {"image_size": 56, "batch_size": 2, "rerank": {"top_k": 4}}


def tiny(seed: int = 0, **settings: object) -> Describer:
    """A network of random weights, the same for the same seed, at 56 px."""
    return describer_of(build_model(TINY, seed=seed), Recipe(model=TINY), "tiny", **{**SETTINGS, **settings})


def noise_index(folder: Path, photos: Path, **settings: object) -> Path:
    """An index in `folder` of the database of noise, its seven photographs; needs a process group."""
    out = folder / "noise.index"
    done = build_index(tiny(**settings), list_source(str(photos / "database")), out)
    assert (done.images, done.added, done.left_out) == (7, 7, [])
    return out
