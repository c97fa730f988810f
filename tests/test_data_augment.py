"""Batched augmentation: torchvision's own operations, image by image, bit by bit."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from data_pipeline.augment import BatchedRandAugment, image_seeds, randaugment
from data_pipeline.images import decode, decode_into, empty_batch
from tests.photos import jpeg

SIDE = 42


def by_pillow(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    rng = np.random.default_rng(3)
    photos = [decode(jpeg(rng), SIDE) for _ in range(60)]
    noise = torch.randint(0, 256, (20, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flat = torch.full((4, 3, SIDE, SIDE), 128, dtype=torch.uint8)
    return torch.cat([torch.stack(photos), noise, flat])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [42, 224, 7])
def test_decoding_into_a_slot_is_torchvisions_decoding_and_resize(interpolation: str, side: int) -> None:
    rng = np.random.default_rng(side)
    files = [jpeg(rng) for _ in range(12)]
    square = BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(square, "JPEG")
    files.append(square.getvalue())
    batch_B3HW = empty_batch(len(files), side)
    for out_3HW, file in zip(batch_B3HW, files, strict=True):
        decode_into(out_3HW, file, interpolation)
    mode = InterpolationMode(interpolation)
    for out_3HW, file in zip(batch_B3HW, files, strict=True):
        image = by_pillow(file)
        assert torch.equal(out_3HW, F.resize(image, [side, side], interpolation=mode, antialias=True))
        planes_3HW = torch.empty(3, side, side, dtype=torch.uint8)
        decode_into(planes_3HW, file, interpolation)
        assert torch.equal(planes_3HW, out_3HW)


def seeds_of(images: torch.Tensor) -> list[int]:
    places = torch.arange(len(images))
    return image_seeds(7, 2, places, places % 5)


@pytest.mark.parametrize(("num_ops", "magnitude"), [(3, 15), (1, 4), (2, 30), (0, 15)])
def test_batch_equals_torchvision_image_by_image(images: torch.Tensor, num_ops: int, magnitude: int) -> None:
    seeds = seeds_of(images)
    theirs = v2.RandAugment(num_ops=num_ops, magnitude=magnitude, interpolation=InterpolationMode.BILINEAR)
    expected = []
    for image, seed in zip(images, seeds, strict=True):
        torch.manual_seed(seed)
        expected.append(theirs(image))
    ours = randaugment(images, seeds, num_ops=num_ops, magnitude=magnitude)
    assert torch.equal(ours, torch.stack(expected))


def test_every_operation_and_sign_is_met(images: torch.Tensor) -> None:
    transform = BatchedRandAugment(num_ops=3, magnitude=15)
    drawn = {drawn for seed in seeds_of(images) for drawn in transform.draw(seed, SIDE, SIDE)}
    assert {name for name, _ in drawn} == set(v2.RandAugment._AUGMENTATION_SPACE)
    assert {name for name, magnitude in drawn if magnitude < 0} == {
        name for name, (_, signed) in v2.RandAugment._AUGMENTATION_SPACE.items() if signed
    }


def test_no_random_state_is_touched_and_the_input_is_kept(images: torch.Tensor) -> None:
    state, before = torch.random.get_rng_state(), images.clone()
    randaugment(images, seeds_of(images), num_ops=3, magnitude=15)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(images, before)


def test_bicubic_and_bilinear_resize_are_torchvisions() -> None:
    data = jpeg(np.random.default_rng(1))
    full = by_pillow(data)
    for name in ("bilinear", "bicubic"):
        expected = v2.functional.resize(full, [56, 56], interpolation=InterpolationMode(name), antialias=True)
        assert torch.equal(decode(data, 56, name), expected)
    assert not torch.equal(decode(data, 56, "bilinear"), decode(data, 56, "bicubic"))
