"""Local features that are there already, of an index's photographs or of a query, as `Describer.match` takes them."""

from __future__ import annotations

import numpy as np
import torch

from eval.describer import LocalImage
from eval.features import StoredFeatures
from eval.given_images import GivenImage, pixels_of
from eval.index.index import Index
from eval.pixels import input_size


def stored_local(index: Index, features: StoredFeatures, number: int, image: GivenImage) -> LocalImage:
    """Photograph `number` of some features made with the settings of `index`, without a forward pass.

    Its `size` is the grid, so that points are counted in patches. `image` is read where its own size decides the grid
    (`eval.resize` aspect or native); raises ValueError or OSError then.
    """
    config, spec = index.config, index.network.spec
    if config.resize == "square":
        sides = input_size(0, 0, config, spec.patch)
    else:
        shape = pixels_of(image, config, spec.patch).image_3HW.shape
        sides = int(shape[1]), int(shape[2])
    grid = spec.grid(*sides)
    patches = features.patches(np.array([number]), torch.device("cpu"))
    count = int(patches.count_B[0])
    return LocalImage(
        descriptor_D=features.descriptors(number, number + 1)[0],
        codes_NC=patches.codes_BMC[0, :count].numpy(),
        cell_N2=patches.cell_BM2[0, :count].numpy(),
        saliency_N=patches.saliency_BM[0, :count].numpy(),
        grid=grid,
        size=grid,
    )
