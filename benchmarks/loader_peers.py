"""Other ways to the same batches, for `benchmarks.loader`: each is a stream of image batches without end.

Imports nothing of the project, so that another environment can run it:
`python -m benchmarks.loader_peers FOLDER MDS --threads 2 ...` measures MosaicML Streaming and prints images/s.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Batch:
    """What every loader makes."""

    side: int = 224
    """Side in pixels of the images delivered."""
    places: int = 30
    """Places in a batch."""
    views: int = 4
    """Views of each place."""

    @property
    def images(self) -> int:
        """Images in a batch."""
        return self.places * self.views


def images_per_second(batches: Iterator[Any], images: int, batch_size: int) -> float:
    """The rate of a stream after its first two batches, which pay for the start, over at least `images` images."""
    for _ in islice(batches, 2):
        pass
    steps = max(1, images // batch_size)
    began = time.perf_counter()
    for _ in islice(batches, steps):
        pass
    return steps * batch_size / (time.perf_counter() - began)


def bare(jpegs: list[bytes], side: int, threads: int) -> float:
    """torchvision's decoder and resize alone, on bytes in memory: images/s."""

    def decode(jpeg: bytes) -> torch.Tensor:
        image = decode_image(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), mode=ImageReadMode.RGB)
        return F.resize(image, [side, side], antialias=True)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, jpegs[:64]))
        began = time.perf_counter()
        for _ in pool.map(decode, jpegs):
            pass
        return len(jpegs) / (time.perf_counter() - began)


class PandasPlaces(Dataset[torch.Tensor]):
    """A place an item, as the field's loaders read it: K rows of a pandas frame, files and RandAugment by PIL."""

    def __init__(self, folder: Path, side: int, k: int) -> None:
        import pandas as pd

        frames = [pd.read_csv(path) for path in sorted((folder / "Dataframes").glob("*.csv"))]
        for number, frame in enumerate(frames):
            frame["place_id"] += number * 10**5
        rows = pd.concat(frames)
        rows = rows[rows.groupby("place_id")["place_id"].transform("size") >= k]
        self.rows, self.folder, self.k = rows.set_index("place_id"), folder, k
        self.places = pd.unique(self.rows.index)
        self.transform = transforms.Compose(
            [
                transforms.Resize((side, side), interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.RandAugment(num_ops=3, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, item: int) -> torch.Tensor:
        from PIL import Image

        place = self.places[item]
        images = []
        for _, row in self.rows.loc[place].sample(n=self.k).iterrows():
            parts = [str(row["city_id"]), f"{place % 10**5:07d}", f"{row['year']:04d}", f"{row['month']:02d}"]
            parts += [f"{row['northdeg']:03d}", str(row["lat"]), str(row["lon"]), str(row["panoid"])]
            path = self.folder / "Images" / parts[0] / f"{'_'.join(parts)}.jpg"
            images.append(self.transform(Image.open(path).convert("RGB")))
        return torch.stack(images)


def pandas_pil(folder: Path, batch: Batch, threads: int) -> Iterator[torch.Tensor]:
    """torch's DataLoader over single files, in the file order of places as the field's recipe has it."""
    dataset = PandasPlaces(folder, batch.side, batch.views)
    loader = DataLoader(dataset, batch_size=batch.places, num_workers=threads, drop_last=True, persistent_workers=True)
    while True:
        for images in loader:
            yield images.flatten(0, 1)


class _Pick:
    """K views of a webdataset sample, drawn before they are decoded."""

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        views = [key for key in sample if key.endswith(".jpg")]
        drawn = torch.randperm(len(views))[: self.k].tolist()
        return {"__key__": sample["__key__"], **{f"{n}.jpg": sample[views[view]] for n, view in enumerate(drawn)}}


class _Resize:
    """The decoded views of a sample as uint8 [K, 3, side, side]."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, sample: dict[str, Any]) -> torch.Tensor:
        return torch.stack(
            [
                F.resize(image, [self.side, self.side], antialias=True)
                for key, image in sample.items()
                if key.endswith(".jpg")
            ]
        )


def webdataset(shards: Path, batch: Batch, threads: int) -> Iterator[torch.Tensor]:
    """webdataset's own pipeline over the same tars: shuffle, K views of a sample, its decoder, batches, WebLoader."""
    import webdataset as wds

    tars = sorted(str(path) for path in (shards / "shards").glob("*.tar"))
    dataset = (
        wds.WebDataset(tars, shardshuffle=False, resampled=True, seed=0)
        .shuffle(200)
        .map(_Pick(batch.views))
        .decode("torchrgb8")
        .map(_Resize(batch.side))
        .batched(batch.places, collation_fn=torch.cat)
    )
    yield from wds.WebLoader(dataset, batch_size=None, num_workers=threads)


def write_mds(files: list[Path], folder: Path) -> None:
    """The photographs as MosaicML Streaming's shards, their bytes unchanged."""
    from PIL import Image

    with importlib.import_module("streaming").MDSWriter(
        out=str(folder), columns={"image": "jpeg"}, size_limit=2**26
    ) as writer:
        for file in files:
            writer.write({"image": Image.open(file)})


def streaming(folder: Path, side: int, images: int, workers: int) -> Iterator[torch.Tensor]:
    """MosaicML Streaming's dataset, shuffled, its own JPEG decoder, torch's DataLoader."""
    mosaic = importlib.import_module("streaming")

    class Images(mosaic.StreamingDataset):  # type: ignore[name-defined]
        def __getitem__(self, at: Any) -> torch.Tensor:
            return F.resize(F.pil_to_tensor(super().__getitem__(at)["image"].convert("RGB")), [side, side])

    dataset = Images(local=str(folder), shuffle=True, batch_size=images, shuffle_seed=0)
    loader = mosaic.StreamingDataLoader(dataset, batch_size=images, num_workers=workers, drop_last=True)
    while True:
        yield from loader


def main() -> None:
    """Measures MosaicML Streaming on the photographs of a GSV-Cities folder, and prints images/s."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("mds", type=Path)
    for name in ("--side", "--batch", "--threads", "--images"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    shutil.rmtree(options.mds, ignore_errors=True)
    write_mds(sorted((options.source / "Images").rglob("*.jpg")), options.mds)
    stream = streaming(options.mds, options.side, options.batch, options.threads)
    print(f"images/s {images_per_second(stream, options.images, options.batch)}", flush=True)


if __name__ == "__main__":
    main()
