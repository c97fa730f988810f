"""The rows of an index's table, read in blocks and checked: places in a row, the views of each, inside their tars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

READ_COLUMNS = ["place_id", "view", "offset", "size", "crc32", "city", "shard"]
ROWS_AT_ONCE = 2**17  # about 10 MB while they are checked

PER_PLACE = ("place_starts", "place_city", "place_shard")
PER_IMAGE = ("offset", "size", "crc32")
DTYPES = dict.fromkeys((*PER_PLACE, *PER_IMAGE), np.dtype(np.int64)) | {"crc32": np.dtype(np.uint32)}

Block = dict[str, NDArray[Any]]  # a part of each column


class ContradictionError(ValueError):
    """Rows that contradict each other, or what the set's metadata says of them."""


def row_blocks(
    batches: Iterable[pa.RecordBatch],
    shards: Sequence[tuple[str, int]],
    cities: list[str],
    *,
    images: int,
    places: int,
) -> Iterator[Block]:
    """The columns of PER_PLACE and PER_IMAGE a part at a time, from record batches of READ_COLUMNS.

    place_starts has the first row of each place; place_shard is a number in `shards`, which are names and bytes;
    place_city one in `cities`, which is filled in the order of their first rows. Raises ContradictionError
    unless places count from 0 to `places`, the views of each from 0, one city and one tar hold a place, each image is
    inside its tar behind the view before it, and there are `images` rows; ValueError where a number is missing.
    """
    shard_numbers = {name: number for number, name in enumerate(name for name, _ in shards)}
    bytes_of_shard = np.array([size for _, size in shards], dtype=np.int64)
    city_numbers: dict[str, int] = {}
    last = {"place_id": -1, "view": -1, "city": -1, "shard": -1, "end": 0}
    row = place = 0
    for batch in batches:
        if not batch.num_rows:
            continue
        column = {name: _numbers(batch.column(name)) for name in READ_COLUMNS[:5]}
        column["city"] = _codes(batch.column("city"), city_numbers, grows=True)
        column["shard"] = _codes(batch.column("shard"), shard_numbers, grows=False)
        cities[:] = city_numbers
        if int(column["shard"].min()) < 0 or not _inside(column, bytes_of_shard[column["shard"]]):
            raise ContradictionError
        begins = column["view"] == 0
        if not _follow(column, begins, last):
            raise ContradictionError
        first = np.flatnonzero(begins)
        row, place, start = row + batch.num_rows, place + len(first), row
        if row > images or place > places:
            raise ContradictionError
        yield {
            "place_starts": first + start,
            "place_city": column["city"][first],
            "place_shard": column["shard"][first],
            **{name: column[name] for name in PER_IMAGE},
        }
    if (row, place) != (images, places) or not row:
        raise ContradictionError


def _inside(column: Mapping[str, NDArray[Any]], shard_size: NDArray[np.int64]) -> bool:
    """Whether each image is a range of bytes inside its tar."""
    offset, size = column["offset"], column["size"]
    return bool(((offset >= 0) & (size > 0) & (size <= shard_size) & (offset <= shard_size - size)).all())


def _follow(column: Mapping[str, NDArray[Any]], begins: NDArray[np.bool_], last: dict[str, int]) -> bool:
    """Whether each row follows from the one before it; of the first that is `last`, which becomes the last of these."""
    column = {**column, "end": column["offset"] + column["size"]}
    before = {name: np.append(last[name], column[name][:-1]) for name in last}
    last |= {name: int(column[name][-1]) for name in last}
    of_one = (column["city"] == before["city"]) & (column["shard"] == before["shard"])
    of_one &= column["offset"] >= before["end"]
    right = column["place_id"] == before["place_id"] + begins
    right &= column["view"] == np.where(begins, 0, before["view"] + 1)
    right &= begins | of_one
    return bool(right.all())


def _numbers(column: pa.Array) -> NDArray[Any]:
    if column.null_count:
        raise ValueError("a number is missing in a column that has no gaps")
    return column.to_numpy()


def _codes(column: pa.DictionaryArray, numbers: dict[str, int], *, grows: bool) -> NDArray[np.int64]:
    """Each row's number in `numbers`; a name that is not in it is added if it grows, else -1."""
    if column.null_count:
        raise ValueError("a name is missing in a column that has no gaps")
    names = column.dictionary.to_pylist()
    if grows:
        for name in names:
            numbers.setdefault(name, len(numbers))
    number_of = np.array([numbers.get(name, -1) for name in names], dtype=np.int64)
    return number_of[column.indices.to_numpy()]
