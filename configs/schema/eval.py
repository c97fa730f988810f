"""Benchmarks, search and re-ranking."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from configs.image_size import ImageSize
from configs.schema.section import NonNegative, Positive, Section


class RerankConfig(Section):
    """Re-ranking of the first candidates by mutual nearest neighbours of local features."""

    enabled: bool = Field(True, description="Re-rank after retrieval.")
    when: Literal["always", "auto", "adaptive"] = Field(
        "always",
        description="always: top_k candidates of every query; adaptive: as many as their first-stage margins call for; "
        "auto: none where the margin is one at which matching changes nothing. Both learn on the database alone.",
    )
    top_k: Positive = Field(
        30,
        description="Candidates re-ranked for each query (RerankVPR's code: 10; here each image is encoded once, so "
        "depth is cheap).",
    )
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
        description="Patches are kept if their min-max normalised CLS attention exceeds this; None keeps all. "
        "RerankVPR's code has 0.3; docs/results.md says how 0.2 was chosen.",
    )
    nn_match_thresh: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.65, description="Least cosine of a mutual nearest neighbour."
    )
    score: Literal["count", "similarity_sum"] = Field(
        "count", description="Number of matches or the sum of their cosines."
    )
    match_weight: Literal["none", "saliency"] = Field(
        "none", description="saliency: a match counts as much as the mean saliency of its two patches, not as one."
    )
    geometry: Literal["none", "translation"] = Field(
        "translation",
        description="translation: only the matches that agree on one shift of the patch grid score, for a higher "
        "recall; none: all (as RerankVPR's code).",
    )
    geometry_cells: Annotated[int, Field(ge=0, le=1000)] = Field(
        1, description="Patches by which a match may miss the common shift."
    )
    global_weight: Annotated[float, Field(ge=0)] = Field(
        0.25,
        description="Weight of the global cosine added to score / query's patches; 0, the rule of RerankVPR's code, "
        "uses it for ties alone and can lower recall where retrieval is sure.",
    )
    dtype: Literal["fp32", "fp16", "int8"] = Field("fp16", description="Type of stored local features.")
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


class EncodingConfig(Section):
    """How photographs become pixels, descriptors and local features."""

    image_size: ImageSize = Field(
        224,
        description="Side in pixels of the square that images are resized to, or height and width ([322, 434]); "
        "multiples of the patch. 224 is what is trained at; RerankVPR's README and its recipes here say 322.",
    )
    resize: Literal["square", "aspect", "native"] = Field(
        "square",
        description="aspect keeps width to height, at the area of image_size; native keeps the image's own size; both "
        "in multiples of the patch.",
    )
    interpolation: Literal["bilinear", "bicubic"] | None = Field(
        None, description="How images are resized; None: as in the training (data.interpolation)."
    )
    batch_size: Positive = Field(32, description="Images in a forward pass of a rank.")
    precision: Literal["same", "fp32", "bf16"] = Field(
        "same",
        description="Precision of the forward pass: same is engine.precision, in a training and of its checkpoints; in "
        "a training the weights are in that in any case; bf16 of weights in fp32 is autocast.",
    )
    decode_threads: Positive = Field(2, description="Threads a rank reads images with.")
    max_bad: Annotated[float, Field(ge=0, le=1)] = Field(
        0.001,
        description="Share of a benchmark's images that may be missing or damaged: named, counted, a query among them "
        "a miss; more stop the evaluation.",
    )
    rerank: RerankConfig = Field(default_factory=RerankConfig)

    @model_validator(mode="after")
    def _attention_is_of_one_grid(self) -> Self:
        if self.resize != "square" and self.rerank.enabled and self.rerank.facet == "attn":
            raise ValueError("facet attn has a channel a patch, so all images need one size; use resize square")
        return self


class EvalConfig(EncodingConfig):
    """Benchmarks and how they are run."""

    benchmarks: list[str] = Field(
        default_factory=list,
        description="NAME[/VARIANT] of the catalogue (rerankvpr eval --list), folder:PATH[:METRES], "
        "manifest:FILE[:METRES], layout:LAYOUT:PATH.",
    )
    data_root: Path = Field(Path("data"), description="Folder that holds a folder for each benchmark.")
    features: Path | None = Field(
        None,
        description="Folder that keeps features for later runs and unfinished ones (all nodes must see it); None uses "
        "a temporary one.",
    )
    faiss_index: str = Field(
        "Flat", description="FAISS factory string, such as IVF1024,Flat, IVF1024,PQ64 or HNSW32; Flat is exact."
    )
    faiss_params: str = Field("", description="FAISS search parameters of the index, such as nprobe=32 or efSearch=64.")
    search_block_mb: Positive = Field(1024, description="MB of database descriptors that a rank indexes at a time.")
    bootstrap: NonNegative = Field(2000, description="Resamples of the queries for 95 % intervals; 0 gives none.")
    recall_at: list[Positive] = Field(default_factory=lambda: [1, 5, 10], description="The K of recall@K.")
    pictures: NonNegative = Field(8, description="Queries drawn with their candidates, wrong ones first.")

    @field_validator("recall_at")
    @classmethod
    def _ascending(cls, ks: list[int]) -> list[int]:
        if not ks:
            raise ValueError("names no K; for example [1, 5, 10]")
        return sorted(set(ks))
