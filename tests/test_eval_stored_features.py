"""Features on disk: shards whole or absent, damage found where it is read, one writer at a time."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from configs.schema import ModelConfig
from data_pipeline.folder_lock import FolderLock, LockedError
from eval.extract import extract
from eval.features import FeatureError, StoredFeatures, open_folder, shard_bounds, shard_is_whole, shard_path
from eval.verify_features import verify_features
from model.network import PlaceModel, build_model
from tests.stored import store
from tests.test_eval_features import eval_config, write_photos

CPU = torch.device("cpu")
TINY = ModelConfig(backbone="tiny14", weights="random", finetune_last_n_blocks=0)


@pytest.fixture(scope="module")
def model() -> PlaceModel:
    return build_model(TINY).eval()


def test_shards_are_a_matter_of_the_images_alone() -> None:
    for count, batch in ((0, 4), (1, 4), (200, 32), (10_000, 32), (3_000_000, 32)):
        bounds = shard_bounds(count, batch)
        assert [i for first, stop in bounds[:3] for i in (first, stop)][:1] == ([0] if count else [])
        assert sum(stop - first for first, stop in bounds) == count
        assert all(stop - first <= 1024 for first, stop in bounds)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))


def test_features_of_other_weights_and_damaged_ones_are_refused_in_one_line(tmp_path: Path) -> None:
    open_folder(tmp_path, {"key": "abc", "images": 5})
    open_folder(tmp_path, {"key": "abc", "images": 5})
    with pytest.raises(FeatureError, match=r"holds features of other key .abc, asked for xyz"):
        open_folder(tmp_path, {"key": "xyz", "images": 5})
    shard_path(tmp_path, 0).write_bytes(b"nonsense")
    with pytest.raises(FeatureError, match=r"features-000000\.safetensors: not a whole shard of features; remove it"):
        shard_is_whole(shard_path(tmp_path, 0), "abc", 5)
    assert not shard_is_whole(shard_path(tmp_path, 1), "abc", 5)


def flip_sign_bits(path: Path, name: str, element: int, count: int) -> None:
    """Flips the highest bit of some numbers of a tensor in a safetensors file."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[name]
    size = {"F32": 4, "F16": 2, "U8": 1, "I64": 8}[entry["dtype"]]
    start = 8 + length + entry["data_offsets"][0]
    for i in range(element, element + count):
        data[start + (i + 1) * size - 1] ^= 0x80
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["descriptors", "codes", "cell", "saliency", "count", "crc32", "scale"])
def test_a_flipped_bit_in_stored_features_is_found_where_it_is_read_and_by_verify(tmp_path: Path, name: str) -> None:
    images = [torch.randn(n, 4) for n in (5, 3, 4, 6, 2)]
    folder = tmp_path / "kept" / "abc"
    stored = store(folder, images)
    assert verify_features(tmp_path / "kept") == []
    damaged = shard_path(folder, 1)
    flip_sign_bits(damaged, name, 0, 1)

    def read() -> None:
        again = StoredFeatures(folder, stored.bounds)
        again.descriptors()
        again.patches(np.arange(5), CPU)

    with pytest.raises(FeatureError) as error:
        read()
    said = ": not a whole shard of features" if name == "count" else " is damaged"  # a count below 0 has no place
    assert str(error.value).startswith(f"feature shard {damaged}{said}")
    assert "\n" not in str(error.value)
    assert verify_features(tmp_path / "kept") == verify_features(folder) != []
    (line,) = verify_features(folder)
    assert str(damaged) in line
    if name not in ("codes", "cell", "saliency", "scale"):  # what a search reads is found when a run opens it
        with pytest.raises(FeatureError, match=said):
            shard_is_whole(damaged, "test", 2)
    assert shard_is_whole(shard_path(folder, 0), "test", 3)


@pytest.mark.parametrize("name", ["descriptors", "codes", "cell", "saliency", "count", "crc32", "scale"])
def test_a_shard_that_lacks_a_tensor_is_refused_by_name(tmp_path: Path, name: str) -> None:
    stored = store(tmp_path, [torch.randn(n, 4) for n in (5, 3, 4, 6)])
    damaged = shard_path(tmp_path, 1)
    damaged.write_bytes(damaged.read_bytes().replace(f'"{name}"'.encode(), f'"x{name[1:]}"'.encode()))
    with pytest.raises(
        FeatureError, match=rf"^feature shard {damaged}: not a whole shard of features; .*\(no '?{name}"
    ):
        StoredFeatures(tmp_path, stored.bounds)


def test_what_is_read_of_sound_features_is_what_was_written(tmp_path: Path) -> None:
    images = [torch.randn(n, 4) for n in (5, 0, 4)]
    patches = store(tmp_path, images).patches(np.array([2, 1, 0, 2]), torch.device("cpu"))
    assert patches.count_B.tolist() == [4, 0, 5, 4]
    assert torch.equal(patches.codes_BMC[2, :5], images[0].half().float())


def test_features_without_a_digest_are_not_used(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 0)
    save_file({"descriptors": torch.zeros(2, 4)}, path, metadata={"key": "abc"})
    with pytest.raises(FeatureError, match="it has no digest"):
        shard_is_whole(path, "abc", 2)


@pytest.mark.usefixtures("single_process")
def test_two_extractions_do_not_write_to_one_folder(tmp_path: Path, model: PlaceModel) -> None:
    write_photos(tmp_path / "photos", 3, ((60, 40),))
    paths = sorted((tmp_path / "photos").glob("*.jpg"))
    with FolderLock(tmp_path / "kept", "another evaluation"), pytest.raises(LockedError, match="another evaluation"):
        extract(model, paths, eval_config(), tmp_path / "kept", key="abc")
    extract(model, paths, eval_config(), tmp_path / "kept", key="abc")
    with FolderLock(tmp_path / "kept", "another evaluation"):
        assert len(extract(model, paths, eval_config(), tmp_path / "kept", key="abc")) == 3  # complete: it only reads
