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

    shards: str = Field(
        "data/shards", description="Shard set: the folder that holds index.parquet, or its URL (https://, s3://)."
    )
    mix: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Further shard sets, and how often an epoch sees their places: 0.5 half of them, 2 all twice.",
    )
    places_per_batch: Positive = Field(64, description="P, places in a global batch (over all ranks).")
    images_per_place: Annotated[int, Field(ge=2)] = Field(4, description="K, views drawn of each place.")
    composition: Literal["city", "mixed"] = Field(
        "city", description="city: a batch comes from one city (GSV-Cities' recipe, harder negatives); mixed: from all."
    )
    repeat: dict[str, Positive] = Field(
        default_factory=dict, description="Times that each place of a city is seen in an epoch, where not once."
    )
    image_size: int = Field(224, description="Side in pixels of the square that images are resized to; multiple of 14.")
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="How images are resized; the field uses both."
    )
    augmentation: Literal["randaugment", "none"] = Field("randaugment", description="Augmentation of training images.")
    augment_ops: NonNegative = Field(3, description="RandAugment: operations applied to an image.")
    augment_magnitude: Annotated[int, Field(ge=0, le=30)] = Field(15, description="RandAugment: strength, 0 to 30.")
    decode: Literal["cpu", "nvjpeg"] = Field(
        "cpu", description="cpu: libjpeg-turbo in threads; nvjpeg: decoded and resized on the rank's NVIDIA GPU."
    )
    decode_threads: NonNegative = Field(
        2, description="Threads a rank decodes JPEGs with; 0 decodes in the training thread."
    )
    prefetch_batches: Positive = Field(2, description="Batches decoded ahead of the training step.")
    read_threads: Positive = Field(
        8, description="Places a rank reads at a time, ahead of the decoder; more hide the latency of a far server."
    )
    read_ahead_mb: NonNegative = Field(64, description="MB (2^20 bytes) of shards a rank reads ahead of the decoder.")
    cache: Path | None = Field(
        None, description="Folder that keeps what was read over a network; ranks of a machine share it."
    )
    cache_gb: Annotated[float, Field(gt=0)] = Field(100.0, description="Bound of data.cache in GB (2^30 bytes).")
    remote_retry_s: Annotated[float, Field(ge=0)] = Field(
        120.0, description="Seconds that a failing read over a network is tried again before the run stops."
    )
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
    finetune: Literal["all", "last_n_blocks", "head"] = Field(
        "last_n_blocks", description="What is trained: everything, the last blocks and the head, or the aggregator."
    )
    finetune_last_n_blocks: NonNegative = Field(
        4, description="Blocks trained, counted from the last; all of them trains the embeddings too."
    )
    frozen_precision: Literal["same", "bf16"] = Field(
        "same", description="Precision of the frozen blocks and embeddings; same is engine.precision."
    )


class MemoryConfig(Section):
    """The memory queue of past descriptors."""

    size: NonNegative = Field(16384, description="M, descriptors kept over all ranks; 0 switches the queue off.")
    start_epoch: Annotated[float, Field(ge=0)] = Field(
        5, description="Epoch (from 0; a fraction is a part of one) from which the queue is filled and used."
    )
    placement: Literal["replicated", "sharded"] = Field(
        "replicated", description="replicated: each rank keeps all M; sharded: M over ranks, the same loss."
    )
    in_batch: Literal["live", "detached"] = Field(
        "live", description="Gradient inside the batch: both sides of a pair, or the anchor's alone (CrossBatchMemory)."
    )
    decay: Literal["exponential", "measured"] = Field(
        "exponential", description="Age weight of a memory negative: exp(-decay_lambda * steps), or measured drift."
    )
    decay_lambda: Annotated[float, Field(ge=0)] = Field(
        0.1, description="Larger forgets faster: half the weight is gone after 0.69 / lambda steps; 0 is no decay."
    )
    drift_every: NonNegative = Field(
        0, description="Steps between measurements of the queue's drift (stored images encoded again); 0 is never."
    )
    drift_images: Positive = Field(32, description="Images encoded again in a measurement, over all ranks and ages.")
    tile_mb: Positive = Field(256, description="Bound in MiB on what a rank's similarities and their gradient hold.")

    @model_validator(mode="after")
    def _measured_needs_measurements(self) -> MemoryConfig:
        if self.decay == "measured" and not self.drift_every:
            raise ValueError("decay measured needs drift_every, the steps between measurements; for example 50")
        return self


Argument = bool | int | float | str


class LossConfig(Section):
    """Loss and miner, named and defined as in pytorch-metric-learning."""

    name: str = Field(
        "MultiSimilarityLoss",
        description="MultiSimilarityLoss, TripletMarginLoss, ContrastiveLoss or NCALoss, in tiles and with age "
        "weights; any other of pytorch-metric-learning that takes a reference set, without.",
    )
    args: dict[str, Argument] = Field(
        default_factory=dict,
        description="The loss's own arguments; MultiSimilarityLoss: alpha 1, beta 50, base 0 (original: 2, 50, 0.5).",
    )
    miner: str = Field(
        "MultiSimilarityMiner", description="MultiSimilarityMiner, TripletMarginMiner, none; or another of the library."
    )
    miner_args: dict[str, Argument] = Field(
        default_factory=dict, description="The miner's own arguments; MultiSimilarityMiner: epsilon 0.1."
    )


class OptimConfig(Section):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "adam", "sgd"] = Field("adamw", description="adam couples weight decay, sgd has momentum.")
    lr: Annotated[float, Field(gt=0)] = Field(1e-5, description="Peak learning rate.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-2, description="Weight decay; none on norms, biases.")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Decay of the first moment; sgd: momentum.")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="Decay of the second moment.")
    warmup_steps: NonNegative = Field(200, description="Steps of linear warm-up.")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Factor of the rate from each layer to the one below it; 1 gives all layers one rate."
    )
    schedule: Literal["none", "step", "multi_step", "cosine", "cosine_with_restarts", "linear", "exp", "plateau"] = (
        Field(
            "cosine",
            description="Learning rate after warm-up: constant; times gamma every step_size or at each of milestones; "
            "to min_lr_ratio by cosine, once or every step_size, or by line; times gamma each unit; times gamma where "
            "validations bring no better recall.",
        )
    )
    schedule_unit: Literal["epoch", "step"] = Field(
        "epoch", description="Unit of step_size, milestones and exp: epochs, or optimizer steps."
    )
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(0.99, description="Factor of step, multi_step, exp and plateau.")
    plateau_evals: Positive = Field(
        2, description="Validations in a row without a better mean recall at the smallest K after which plateau falls."
    )
    step_size: Positive = Field(1, description="Units between falls of step, and in a cycle of cosine_with_restarts.")
    milestones: list[Positive] = Field(default_factory=list, description="Units at which multi_step falls.")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="Lowest rate of a cosine or line / peak."
    )
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(1.0, description="Global gradient norm limit; 0 is off.")

    @model_validator(mode="after")
    def _multi_step_needs_milestones(self) -> OptimConfig:
        if self.schedule == "multi_step" and not self.milestones:
            raise ValueError("schedule multi_step needs milestones; for example [10, 20]")
        return self


class EngineConfig(Section):
    """DeepSpeed and the process group."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="ZeRO: 0 replicates, 1 shards the optimizer, 2 gradients as well, 3 weights as well."
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="Kept in CPU memory: optimizer (state and update), all (weights as well, at zero_stage 3)."
    )
    activation_checkpointing: bool = Field(
        False, description="Trained blocks are run again in the backward pass instead of being kept."
    )
    compile: bool = Field(False, description="Blocks through torch.compile; the first step takes minutes.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Precision of the forward and backward pass."
    )
    gradient_accumulation: Positive = Field(
        1,
        description="Chunks in which a rank encodes its images, for a batch that does not fit: a second forward "
        "pass, the gradient of the whole batch (GradCache).",
    )
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Peak TFLOP/s of a rank's device, which train/mfu is a share of; None: known GPUs alone."
    )
    timeout_s: Annotated[int, Field(ge=10)] = Field(
        600, description="Seconds that a collective operation, and the first step, may take before the job ends."
    )
    stall_s: Annotated[float, Field(ge=0)] = Field(
        300,
        description="Seconds without progress (in data, forward, loss, step, save or evaluation) after which the job "
        "ends and the rank that stalled is named; 0 is never.",
    )

    @model_validator(mode="after")
    def _deepspeed_can_do_it(self) -> EngineConfig:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("bf16 at zero_stage 0 departs from fp32 in DeepSpeed 0.19; use zero_stage 1 or 2")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload optimizer needs zero_stage 1, 2 or 3; DeepSpeed ignores it at 0")
        if self.offload == "all" and self.zero_stage < 3:
            raise ValueError("offload all needs zero_stage 3, where weights are partitioned; or use offload optimizer")
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile at zero_stage 3 can lose gradients in DeepSpeed; use zero_stage 2, or compile false"
            )
        return self


class TrainerConfig(Section):
    """How long to train, and what to keep."""

    epochs: Positive = Field(30, description="Epochs.")
    max_steps: NonNegative = Field(0, description="Stop after this many optimizer steps; 0 is no limit.")
    validate_every_epochs: NonNegative = Field(1, description="Epochs between validations; 0 validates never.")
    checkpoint_every_steps: NonNegative = Field(0, description="Steps between checkpoints; 0 is once an epoch.")
    keep_last: Positive = Field(2, description="Newest checkpoints kept, besides the best one.")
    early_stop_evals: NonNegative = Field(
        0, description="Validations without a better mean recall at the smallest K after which a run ends; 0 is never."
    )
    max_skipped_steps: NonNegative = Field(
        10, description="Steps skipped for a loss or gradient that is not finite before the run stops."
    )
    save_retry_s: Annotated[float, Field(ge=0)] = Field(
        600, description="Seconds that the last checkpoint is tried again where the disk is full or gone."
    )
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
        "translation",
        description="translation: only the matches that agree on one shift of the patch grid score; none: all (the "
        "original).",
    )
    geometry_cells: NonNegative = Field(1, description="Patches by which a match may miss the common shift.")
    global_weight: Annotated[float, Field(ge=0)] = Field(
        0.25,
        description="Weight of the global cosine added to score / query's patches; 0, the original's rule, uses it for "
        "ties alone and can lower recall where retrieval is sure.",
    )
    store: Literal["fp32", "fp16", "int8"] = Field("fp16", description="Type of stored local features.")
    project: Literal["none", "pca", "random"] = Field(
        "none", description="Linear projection of local features, fitted on the database (pca) or drawn."
    )
    project_size: Positive = Field(128, description="Channels after projection.")
    memory_mb: Positive = Field(
        256,
        description="Most MB that matching holds at a time on a rank; on a CPU it takes 24, or what one pair needs.",
    )

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
    resize: Literal["square", "aspect", "native"] = Field(
        "square",
        description="aspect keeps width to height, at the area of the square; native keeps the image's own size; both "
        "in multiples of 14.",
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
        if self.resize != "square" and self.rerank.enabled and self.rerank.facet == "attn":
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
    enabled: bool = Field(
        True, description="Send to MLflow; metrics.jsonl in the output folder has it anyway, for rerankvpr sync."
    )
    system_metrics_every_s: Annotated[float, Field(ge=0)] = Field(
        10.0, description="Seconds between samples of CPU, memory, disk, network and GPUs of rank 0's host; 0 is never."
    )
    log_model: bool = Field(True, description="Log the best network to MLflow at the end: a copy of its weights there.")
    register_as: str = Field("", description="Name in MLflow's registry that the best network becomes a version of.")

    @model_validator(mode="after")
    def _registering_needs_a_model(self) -> TrackingConfig:
        if self.register_as and not self.log_model:
            raise ValueError("register_as needs log_model True")
        return self


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

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        engine, trainer = self.engine, self.trainer
        if self.model.frozen_precision == "bf16" and engine.zero_stage == 3 and engine.precision == "fp32":
            raise ValueError(
                "model.frozen_precision bf16 at engine.zero_stage 3 needs engine.precision bf16: DeepSpeed keeps "
                "partitioned weights in one precision"
            )
        if self.optim.schedule == "plateau" and not (trainer.validate_every_epochs and self.eval.benchmarks):
            raise ValueError(
                "optim.schedule plateau needs validations: eval.benchmarks and trainer.validate_every_epochs"
            )
        return self

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
