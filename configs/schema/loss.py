"""Loss and miner."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from configs.schema.section import Section

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
        description="The loss's own arguments; MultiSimilarityLoss: alpha 1, beta 50, base 0, which VPR trains with "
        "(RerankVPR's code: 2, 50, 0.5, the library's).",
    )
    miner: str = Field(
        "MultiSimilarityMiner", description="MultiSimilarityMiner, TripletMarginMiner, none; or another of the library."
    )
    miner_args: dict[str, Argument] = Field(
        default_factory=dict,
        description="The miner's own arguments; MultiSimilarityMiner: epsilon 0.1; TripletMarginMiner: margin 0.2, the "
        "library's (RerankVPR's code: 0.1).",
    )
    guided_weight: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Weight of the guided matching loss, which trains the local features that re-ranking reads "
        "(docs/memory.md); 0 is off.",
    )
    guided_temperature: Annotated[float, Field(gt=0)] = Field(
        0.1, description="What the guided loss divides cosines by; lower looks at the nearest patches alone."
    )
    set_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="data.composition sets: what the loss of a set is multiplied by before they are added up, by the "
        "set's name; 1 where it is not said.",
    )
