"""The schema of a recipe: every key, its type, its default and the one line that `--help` shows.

Paths are relative to the folder the command runs in. Defaults follow the original RerankVPR where it works; a line says
where they differ and why.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PATCH = 14

Backbone = Literal[
    "vits14", "vitb14", "vitl14", "vitg14", "vits14_reg", "vitb14_reg", "vitl14_reg", "vitg14_reg", "tiny14"
]

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


def _image_side(side: int) -> int:
    if side < PATCH or side % PATCH:
        low = max(PATCH, side // PATCH * PATCH)
        raise ValueError(f"{side} is not a multiple of the patch size {PATCH}; nearest: {low} or {low + PATCH}")
    return side


class Section(BaseModel):
    """Base of every section: unknown keys are refused and instances cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataConfig(Section):
    """Training data: which shards, how a batch is composed, how its images are prepared."""

    shards: Path = Field(Path("data/shards"), description="Shard set: the folder that holds index.parquet.")
    places_per_batch: Positive = Field(64, description="P, places in a global batch (over all ranks).")
    images_per_place: Annotated[int, Field(ge=2)] = Field(4, description="K, views drawn of each place.")
    composition: Literal["city", "mixed"] = Field(
        "city", description="city: a batch comes from one city (GSV-Cities' recipe, harder negatives); mixed: from all."
    )
    repeat: dict[str, Positive] = Field(
        default_factory=dict, description="Times that each place of a city is seen in an epoch, where not once."
    )
    image_size: int = Field(224, description="Side in pixels of the square that images are resized to; multiple of 14.")
    augmentation: Literal["randaugment", "none"] = Field("randaugment", description="Augmentation of training images.")
    augment_ops: NonNegative = Field(3, description="RandAugment: operations applied to an image.")
    augment_magnitude: Annotated[int, Field(ge=0, le=30)] = Field(15, description="RandAugment: strength, 0 to 30.")
    decode_threads: NonNegative = Field(
        2, description="Threads a rank decodes JPEGs with; 0 decodes in the training thread."
    )
    prefetch_batches: Positive = Field(2, description="Batches read ahead of the training step.")
    max_bad_images: NonNegative = Field(
        100, description="Unreadable images that are replaced by another view of the same place before the run stops."
    )

    _check_size = field_validator("image_size")(_image_side)


class ModelConfig(Section):
    """The network: one DINOv2 ViT and an aggregator."""

    backbone: Backbone = Field("vitb14", description="DINOv2 size, with or without registers; tiny14 is for demos.")
    weights: str = Field(
        "timm",
        description="timm: its own download; random; or a file in facebookresearch's key layout (.pth, .safetensors).",
    )
    aggregator: Literal["cls", "gem"] = Field(
        "cls", description="Global descriptor: CLS token or GeM over patch tokens."
    )
    finetune_last_n_blocks: NonNegative = Field(
        4, description="Blocks trained, counted from the last; all of them trains the embeddings too."
    )


class MemoryConfig(Section):
    """The memory queue of past descriptors."""

    size: NonNegative = Field(16384, description="M, descriptors kept over all ranks; 0 switches the queue off.")
    start_epoch: Annotated[float, Field(ge=0)] = Field(
        5, description="Epoch (from 0; a fraction is a part of one) from which the queue is filled and used."
    )
    decay_lambda: Annotated[float, Field(ge=0)] = Field(
        0.1, description="Age weight exp(-lambda * steps) of a memory negative; larger forgets faster, 0 is no decay."
    )


class LossConfig(Section):
    """Multi-Similarity loss and miner, as pytorch-metric-learning defines them."""

    alpha: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Scale of positive pairs (field: 1; the original: 2)."
    )
    beta: Annotated[float, Field(gt=0)] = Field(50.0, description="Scale of negative pairs.")
    base: float = Field(0.0, description="Similarity margin (field: 0; the original: 0.5).")
    epsilon: Annotated[float, Field(ge=0)] = Field(0.1, description="Miner: slack when pairs are compared.")


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: Annotated[float, Field(gt=0)] = Field(1e-5, description="Peak learning rate.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        1e-2, description="Decoupled weight decay; none on norms, biases."
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Decay of the first moment.")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="Decay of the second moment.")
    warmup_steps: NonNegative = Field(200, description="Steps of linear warm-up.")
    schedule: Literal["none", "cosine", "linear", "exp"] = Field(
        "cosine",
        description="Learning rate after warm-up: constant, to min_lr_ratio by cosine or line, or exp_gamma^epoch.",
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="Last rate of cosine and linear / peak."
    )
    exp_gamma: Annotated[float, Field(gt=0, le=1)] = Field(0.99, description="Factor an epoch of schedule exp.")
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(1.0, description="Global gradient norm limit; 0 is off.")


class EngineConfig(Section):
    """DeepSpeed and the process group."""

    zero_stage: Literal[0, 1, 2] = Field(1, description="ZeRO: 0 replicates, 1 shards optimizer, 2 gradients as well.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Precision of the forward and backward pass."
    )
    timeout_s: Annotated[int, Field(ge=10)] = Field(600, description="Seconds after which a silent rank ends the job.")

    @model_validator(mode="after")
    def _no_bf16_at_stage_0(self) -> EngineConfig:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("bf16 at zero_stage 0 departs from fp32 in DeepSpeed 0.19; use zero_stage 1 or 2")
        return self


class TrainerConfig(Section):
    """How long to train, and what to keep."""

    epochs: Positive = Field(30, description="Epochs.")
    max_steps: NonNegative = Field(0, description="Stop after this many optimizer steps; 0 is no limit.")
    validate_every_epochs: NonNegative = Field(1, description="Epochs between validations; 0 validates never.")
    checkpoint_every_steps: NonNegative = Field(0, description="Steps between checkpoints; 0 is once an epoch.")
    keep_last: Positive = Field(2, description="Newest checkpoints kept, besides the best one.")
    max_skipped_steps: NonNegative = Field(10, description="Steps skipped for a non-finite loss before the run stops.")
    log_every_steps: Positive = Field(1, description="Steps between logged metrics.")


class RerankConfig(Section):
    """Re-ranking of the first candidates by mutual nearest neighbours of local features."""

    enabled: bool = Field(True, description="Re-rank after retrieval.")
    when: Literal["always", "auto"] = Field(
        "always",
        description="auto leaves queries alone whose first-stage margin is one at which matching changes nothing in "
        "the database itself.",
    )
    top_k: Positive = Field(30, description="Candidates re-ranked for each query.")
    layer: int = Field(-2, description="Block whose facet gives local features; negative counts from the last.")
    facet: Literal["attn", "query", "key", "value", "token"] = Field(
        "value", description="What of the block is read out."
    )
    include_cls: bool = Field(False, description="The class token counts as one more patch, always salient.")
    hierarchy: Annotated[int, Field(ge=0, le=4)] = Field(
        0, description="Log-binning: rings of averaged neighbours appended to a patch, channels x (1 + 8 h); 0 is off."
    )
    saliency_layer: int = Field(-1, description="Block whose CLS attention gives saliency.")
    saliency: Literal["logits", "softmax"] = Field(
        "logits",
        description="CLS attention before or after the softmax; one threshold keeps far fewer patches after it.",
    )
    saliency_thresh: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        0.2,
        description="Patches are kept if their min-max normalised CLS attention exceeds this (the original: 0.3); None "
        "keeps all.",
    )
    nn_match_thresh: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.65, description="Least cosine of a mutual nearest neighbour."
    )
    score: Literal["count", "similarity_sum"] = Field(
        "count", description="Number of matches or the sum of their cosines."
    )
    geometry: Literal["none", "translation"] = Field(
        "none", description="translation: only the matches that agree on one shift of the patch grid score."
    )
    geometry_cells: NonNegative = Field(2, description="Patches by which a match may miss the common shift.")
    global_weight: Annotated[float, Field(ge=0)] = Field(
        1.0,
        description="Weight of the global cosine added to score / query's patches; 0, the original's rule, uses it for "
        "ties alone and can lower recall where retrieval is sure.",
    )
    store: Literal["fp32", "fp16", "int8"] = Field("fp16", description="Type of stored local features.")
    project: Literal["none", "pca", "random"] = Field(
        "none", description="Linear projection of local features, fitted on the database (pca) or drawn."
    )
    project_size: Positive = Field(128, description="Channels after projection.")
    memory_mb: Positive = Field(256, description="Most MB that matching holds at a time on a rank.")

    @model_validator(mode="after")
    def _bins_are_of_patches(self) -> RerankConfig:
        if self.include_cls and self.hierarchy:
            raise ValueError("include_cls and hierarchy exclude each other: the class token has no neighbours")
        return self


class EvalConfig(Section):
    """Benchmarks and how they are run."""

    benchmarks: list[str] = Field(
        default_factory=list,
        description="NAME[/VARIANT] of the catalogue (rerankvpr eval --list), folder:PATH[:METRES], "
        "manifest:FILE[:METRES].",
    )
    data_root: Path = Field(Path("data"), description="Folder that holds a folder for each benchmark.")
    image_size: int = Field(224, description="Side in pixels of the square that images are resized to; multiple of 14.")
    resize: Literal["square", "aspect"] = Field(
        "square", description="aspect keeps width to height, at the area of the square and in multiples of 14."
    )
    batch_size: Positive = Field(32, description="Images in a forward pass of a rank.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Precision of the forward pass.")
    features: Path | None = Field(
        None,
        description="Folder that keeps features for later runs and unfinished ones (all nodes must see it); None uses "
        "a temporary one.",
    )
    index: str = Field(
        "Flat", description="FAISS factory string, such as IVF1024,Flat, IVF1024,PQ64 or HNSW32; Flat is exact."
    )
    index_params: str = Field("", description="FAISS search parameters of the index, such as nprobe=32 or efSearch=64.")
    search_block_mb: Positive = Field(1024, description="MB of database descriptors that a rank indexes at a time.")
    bootstrap: NonNegative = Field(2000, description="Resamples of the queries for 95 % intervals; 0 gives none.")
    decode_threads: Positive = Field(2, description="Threads a rank reads images with.")
    recall_at: list[Positive] = Field(default_factory=lambda: [1, 5, 10], description="The K of recall@K.")
    pictures: NonNegative = Field(8, description="Queries drawn with their candidates, wrong ones first.")
    rerank: RerankConfig = Field(default_factory=RerankConfig)

    _check_size = field_validator("image_size")(_image_side)

    @model_validator(mode="after")
    def _attention_is_of_one_grid(self) -> EvalConfig:
        if self.resize == "aspect" and self.rerank.enabled and self.rerank.facet == "attn":
            raise ValueError("facet attn has a channel a patch, so all images need one size; use resize square")
        return self

    @field_validator("recall_at")
    @classmethod
    def _ascending(cls, ks: list[int]) -> list[int]:
        if not ks:
            raise ValueError("names no K; for example [1, 5, 10]")
        return sorted(set(ks))


class TrackingConfig(Section):
    """MLflow."""

    uri: str = Field("sqlite:///mlflow.db", description="MLflow store or server.")
    experiment: str = Field("rerankvpr", description="MLflow experiment.")
    enabled: bool = Field(True, description="Log to MLflow; metrics go to metrics.jsonl in the output folder anyway.")


class Recipe(Section):
    """A whole training: what `rerankvpr train` runs."""

    name: str = Field("run", description="Name of the run.")
    seed: NonNegative = Field(0, description="Seed of the weights, the order of data and the augmentation.")
    output: Path = Field(Path("runs/run"), description="Folder for checkpoints, metrics and results.")
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{name!r} is not a plain name; letters, digits, '.', '_' and '-' are")
        return name

    def as_flat(self) -> dict[str, Any]:
        """All keys as `section.key: value`, in schema order."""
        flat: dict[str, Any] = {}

        def walk(prefix: str, value: Any) -> None:
            if isinstance(value, Section):
                for key in type(value).model_fields:
                    walk(f"{prefix}{key}.", getattr(value, key))
            else:
                flat[prefix[:-1]] = value

        walk("", self)
        return flat
