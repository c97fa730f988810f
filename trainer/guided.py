"""The guided matching loss of a step: local features out of its forward pass, and their loss over all ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from configs.image_size import height_width
from configs.schema import Recipe
from eval.local_features import salient
from memory.guided_loss import guided_loss
from model.facets import FacetReader
from model.network import PlaceModel

NAMES = ("loss", "matches", "cosines", "patches")  # of what ranks add up, in the order of `GuidedLoss`


@dataclass(frozen=True)
class Guided:
    """This rank's part of a step's guided loss."""

    loss: torch.Tensor  # weighted, for an engine that averages gradients over ranks
    sums_4: torch.Tensor  # by NAMES; over ranks they add up
    num_places: int  # of the global batch
    num_pairs: int  # of images of a place, in either order, of the global batch


class GuidedTerm:
    """Reads what re-ranking will read (`eval.rerank`), patches alone, and trains it with `loss.guided_weight`."""

    def __init__(self, recipe: Recipe, model: PlaceModel) -> None:
        """Raises ValueError if the backbone has no such facet."""
        rerank = recipe.eval.rerank
        self.weight, self.temperature = recipe.loss.guided_weight, recipe.loss.guided_temperature
        self.match_thresh, self.saliency_thresh = rerank.nn_match_thresh, rerank.saliency_thresh
        self._model = model
        self._reader = FacetReader(
            model.backbone,
            layer=rerank.layer,
            facet=rerank.facet,
            saliency_layer=rerank.saliency_layer,
            saliency=rerank.saliency,
        )

    def attached(self, images_B3HW: torch.Tensor) -> AbstractContextManager[Any]:
        """A `with` for forward and backward of such images: a block that runs again must find its hooks again."""
        rows, columns = self._model.spec.grid(images_B3HW.shape[2], images_B3HW.shape[3])
        return self._reader.attached(rows * columns)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Local features [B, N, C] of the last forward pass, and which patches are salient [B, N].

        Raises ValueError if no trained weight comes before them.
        """
        reader = self._reader
        local_BNC, saliency_BN = reader.local_BNC, reader.saliency_BN.detach()
        del reader.local_BNC, reader.saliency_BN  # else the last step's would be held until the next
        if torch.is_grad_enabled() and not local_BNC.requires_grad:
            raise ValueError(
                f"loss.guided_weight {self.weight}: no trained weight comes before the {reader.facet} of block "
                f"{reader.layer} (eval.rerank.layer), so there is nothing to train; train more blocks"
            )
        return local_BNC, salient(saliency_BN, self.saliency_thresh)

    def __call__(
        self, local_BNC: torch.Tensor, salient_BN: torch.Tensor, place_ids_B: torch.Tensor, place_ids_N: torch.Tensor
    ) -> Guided:
        """The loss; place ids are on the host, of this rank's images and of all, those of a place together."""
        views, views_of_all = (
            torch.unique_consecutive(ids, return_counts=True)[1] for ids in (place_ids_B, place_ids_N)
        )
        found = guided_loss(
            *(local_BNC, salient_BN, views.tolist()), temperature=self.temperature, match_thresh=self.match_thresh
        )
        num_places = len(views_of_all)
        return Guided(
            loss=found.loss * (self.weight * dist.get_world_size() / num_places),
            sums_4=torch.stack([part.detach() for part in found]).float(),
            num_places=num_places,
            num_pairs=int((views_of_all * (views_of_all - 1)).sum()),
        )

    def figures(self, guided: Guided, sums: list[float], num_images: int) -> dict[str, float]:
        """What is logged of the sums over ranks: the loss, matches per pair, their cosine, patches per image."""
        loss, matches, cosines, patches = sums
        return {
            "guided_loss": loss / guided.num_places,
            "guided_matches": matches / max(guided.num_pairs, 1),
            "guided_cosine": cosines / matches if matches else 0.0,
            "guided_patches": patches / num_images,
        }


def guided_bytes(recipe: Recipe, ranks: int) -> float:
    """Bytes of a rank that the guided loss holds: local features, as read, normalised, their gradient; one place's."""
    if not recipe.loss.guided_weight:
        return 0.0
    spec, data = recipe.model.spec, recipe.data
    rows, columns = spec.grid(*height_width(data.image_size))
    patches = rows * columns
    channels = patches if recipe.eval.rerank.facet == "attn" else spec.channels
    images = data.places_per_batch * data.images_per_place / ranks
    return 4.0 * (3 * images * patches * channels + 6 * (data.images_per_place * patches) ** 2)
