"""The approximate index of an index: one trained file, and blocks that are copies of it with rows, memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from configs.files import file_sha256, replacing
from configs.ranks import barrier, from_rank_0, on_all_ranks
from configs.reading import reading
from eval.approximate import Trained, check_strings, search_index, set_params, train_index
from eval.exact_scores import best
from eval.features import StoredFeatures, digest
from eval.index.manifest import FILE, IndexFault, Part, part_folder
from eval.search_device import Find, on_gpu
from eval.train_index import sample_of

BLOCK_IMAGES = 1 << 20
DIGEST_THREADS = 8
SHORTLIST = 300  # of what a block finds, scored exactly
SETTING = "--factory"


def trained_path(folder: Path, factory: str) -> Path:
    """File of the trained index."""
    return folder / f"trained-{digest(factory)[:8]}.faiss"


def block_path(here: Path, factory: str, number: int) -> Path:
    """File of a block of a part."""
    return here / f"approximate-{digest(factory)[:8]}-{number:06d}.faiss"


def block_bounds(count: int, size: int = BLOCK_IMAGES) -> list[tuple[int, int]]:
    """First and past-the-last image of each block of a part."""
    return [(first, min(count, first + size)) for first in range(0, count, size)]


def train_once(
    folder: Path, factory: str, params: str, features: StoredFeatures, sha256: str = ""
) -> tuple[Trained, str]:
    """The trained index in `folder` and its SHA-256, made by rank 0 where it is not there; every rank calls this.

    `sha256` is that of an index that has been trained before. Raises ValueError naming the factory string that FAISS
    does not know or has too few photographs to train, IndexFault naming a trained file that is damaged.
    """
    check_strings(factory, params, SETTING)

    def train() -> str:
        file = trained_path(folder, factory)
        if sha256:
            _check([(file, sha256)])
        elif not file.is_file():
            trained = train_index(factory, params, sample_of(factory, features, SETTING), SETTING)
            with replacing(file, durable=True) as partial:
                faiss.write_index(trained.index, str(partial))
        return file_sha256(file)

    found = from_rank_0(train)
    with on_all_ranks():
        trained = Trained(_read(trained_path(folder, factory), mapped=False), params, f"{SETTING} {factory!r}")
    return trained, found


def check_params(folder: Path, factory: str, params: str, sha256: str) -> None:
    """Raises ValueError for parameters that the trained index in `folder` does not have, or if that is damaged."""
    check_strings(factory, params, SETTING)
    _check([(trained_path(folder, factory), sha256)])
    set_params(_read(trained_path(folder, factory), mapped=False), params, f"{SETTING} {factory!r}")


def remove_other_kinds(folder: Path, here: Path, factory: str) -> None:
    """Removes what builds with other factory strings, which did not end, have left of an index's first part."""
    mine = digest(factory)[:8]
    for file in [*folder.glob("trained-*.faiss"), *here.glob("approximate-*.faiss")]:
        if file.name.split("-")[1].removesuffix(".faiss") != mine:
            file.unlink()


def fill(here: Path, factory: str, trained: Trained, features: StoredFeatures) -> list[str]:
    """Writes the blocks of a part that are not there, over ranks; the SHA-256 of each, on every rank."""
    bounds = block_bounds(len(features))
    for number in range(dist.get_rank(), len(bounds), dist.get_world_size()):
        file = block_path(here, factory, number)
        if not file.is_file():
            index = trained.filled(features.descriptors(*bounds[number]))
            with replacing(file, durable=True) as partial:
                faiss.write_index(index, str(partial))
    barrier()
    return from_rank_0(lambda: [file_sha256(block_path(here, factory, number)) for number in range(len(bounds))])


@dataclass(frozen=True)
class Block:
    """A block that is open: its first photograph in the index, how many it holds, and its search."""

    first: int
    images: int
    find: Find


def open_blocks(folder: Path, names: Sequence[str], parts: Sequence[Part], factory: str, params: str) -> list[Block]:
    """All blocks of an index, mapped. Raises IndexFault naming a file that is absent or damaged.

    Each is held against its digest first: FAISS would search a damaged one without a word, or crash on it.
    """
    with reading(folder / FILE, "the description of an index", IndexFault):
        check_strings(factory, params, SETTING)
    files = [block_files(part_folder(folder, name), factory, part) for name, part in zip(names, parts, strict=True)]
    _check([file for of_part in files for file in of_part])
    blocks, before = [], 0
    for name, part, of_part in zip(names, parts, files, strict=True):
        bounds = block_bounds(part.images)
        if len(bounds) != len(of_part):
            raise IndexFault(f"{part_folder(folder, name)}: {len(of_part)} digests of {len(bounds)} blocks")
        for (first, stop), (file, _) in zip(bounds, of_part, strict=True):
            index = _read(file)
            if index.ntotal != stop - first:
                raise IndexFault(f"{file}: {index.ntotal} photographs, expected {stop - first}")
            set_params(index, params, str(file))
            blocks.append(Block(before + first, stop - first, on_gpu(index, file.stat().st_size, index.search)))
        before += part.images
    return blocks


def search_stored(
    blocks: Sequence[Block], features: StoredFeatures, queries_QD: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores float64 [Q, k] and numbers int64 [Q, k]: the best of all blocks, scored by the descriptors themselves."""
    scores_Qk = np.full((len(queries_QD), k), -np.inf)
    ids_Qk = np.full((len(queries_QD), k), -1, dtype=np.int64)
    for block in blocks:
        first = block.first

        def rows_of(ids: NDArray[np.int64], first: int = first) -> NDArray[np.float32]:
            return features.rows(ids + first)

        scores, ids = search_index(block.find, block.images, queries_QD, k, rows_of, shortlist=SHORTLIST)
        ids = np.where(ids >= 0, ids + first, ids)
        both = np.concatenate([scores_Qk, scores], axis=1), np.concatenate([ids_Qk, ids], axis=1)
        scores_Qk, ids_Qk = best(*both, k)
    return scores_Qk, ids_Qk


def damaged(files: Sequence[tuple[Path, str]]) -> list[str]:
    """A line for each file that does not have the SHA-256 given with it."""

    def is_whole(one: tuple[Path, str]) -> bool:
        return one[0].is_file() and file_sha256(one[0]) == one[1]

    with ThreadPoolExecutor(DIGEST_THREADS) as threads:
        whole = list(threads.map(is_whole, files))
    lost = [file for (file, _), is_so in zip(files, whole, strict=True) if not is_so]
    return [f"{file} is damaged or gone; build the index again" for file in lost]


def block_files(here: Path, factory: str, part: Part) -> list[tuple[Path, str]]:
    """The files of the blocks of a part, with their SHA-256."""
    return [(block_path(here, factory, number), sha256) for number, sha256 in enumerate(part.approximate)]


def _check(files: Sequence[tuple[Path, str]]) -> None:
    if lines := damaged(files):
        raise IndexFault(lines[0])


def _read(file: Path, *, mapped: bool = True) -> faiss.Index:
    """An index of FAISS, its inverted lists in the file (`mapped`) or in memory. Raises IndexFault naming the file."""
    with reading(file, "an index of FAISS", IndexFault):
        return faiss.read_index(str(file), faiss.IO_FLAG_MMAP if mapped else 0)
