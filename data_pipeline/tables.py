"""Tables that people make: CSV with commas, semicolons or tabs, or Parquet; columns by their plain names."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.reading import reason, shown
from data_pipeline.table_cells import column_of_numbers

_DELIMITERS = (",", ";", "\t")
_BLOCK, _LONGEST_LINE = 2**24, 2**28


@dataclass(frozen=True)
class RowTable:
    """A table's columns by name, and the line of each row (the header is line 1; in Parquet, row + 2).

    Names are in lower case without spaces around. Cells of a CSV are text without spaces around, None where empty.
    """

    path: Path
    columns: dict[str, pa.Array]
    lines: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lines)

    def text(self, column: str) -> pa.Array:
        """A column as text. Raises ValueError where it is nested."""
        values = self.columns[column]
        if pa.types.is_nested(values.type):
            raise ValueError(f"{self.path}: column {column} is {values.type}; expected text or numbers")
        return values.cast(pa.string())

    def numbers(self, column: str) -> NDArray[np.float64]:
        """A column as float64 [N], NaN where empty. Raises ValueError naming the row of the first that is no number."""
        values = self.columns[column]
        try:
            numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            numbers = None
        empty = values.is_null().to_numpy(zero_copy_only=False)
        if numbers is None or not np.isfinite(numbers[~empty]).all():
            numbers = column_of_numbers(values.to_pylist(), column, self.path, lines=self.lines.tolist())
        return np.asarray(numbers, dtype=np.float64)

    def require(self, names: Collection[str]) -> None:
        """Raises ValueError naming the first column that is not there, and those that are."""
        for name in names:
            if name not in self.columns:
                raise ValueError(f"{self.path}: no column {name}; found {shown(', '.join(self.columns))}")


def read_table_of_rows(path: Path, keep: Callable[[list[str]], Collection[str]] | None = None) -> RowTable:
    """The table in a CSV (its header says whether `,`, `;` or a tab divides columns) or `.parquet` file.

    `keep` gets the names of all columns and returns those that are read, so that a wide table takes little memory.
    Raises FileNotFoundError, or ValueError naming the file and, where one is at fault, the row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a CSV or Parquet table")
    try:
        if path.suffix == ".parquet":
            table = _read_parquet(path, keep)
            lines = np.arange(len(table), dtype=np.int64) + 2
        else:
            table, lines = _read_csv(path, keep)
        table.validate(full=True)  # text is UTF-8
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable table ({reason(error)})") from error
    names = [_bare(name) for name in table.column_names]
    _refuse_twice(path, names)
    if len(table) == 0:
        raise ValueError(f"{path}: no rows; expected one row per image")
    columns = {name: _plain(column.combine_chunks()) for name, column in zip(names, table.columns, strict=True)}
    return RowTable(path, columns, lines)


def _bare(name: str) -> str:
    return name.strip().casefold()


def _refuse_twice(path: Path, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: the column {shown(twice[0])} is there twice")


def _kept(path: Path, names: list[str], keep: Callable[[list[str]], Collection[str]] | None) -> list[int]:
    """Numbers of the columns that are read."""
    bare = [_bare(name) for name in names]
    if keep is None:
        return list(range(len(names)))
    _refuse_twice(path, bare)
    kept = keep(bare)
    return [number for number, name in enumerate(bare) if name in kept]


def _read_parquet(path: Path, keep: Callable[[list[str]], Collection[str]] | None) -> pa.Table:
    if keep is None:
        return pq.read_table(pa.BufferReader(path.read_bytes()))
    with pq.ParquetFile(pa.OSFile(str(path))) as file:
        names = file.schema_arrow.names
        return file.read(columns=[names[number] for number in _kept(path, names, keep)])


def _read_csv(path: Path, keep: Callable[[list[str]], Collection[str]] | None) -> tuple[pa.Table, NDArray[np.int64]]:
    header, full = _full_lines(path)
    delimiter = max(_DELIMITERS, key=header.count)
    names = [name.strip().strip('"').strip() for name in header.split(delimiter)]
    kept = _kept(path, names, keep)
    table = pa.csv.read_csv(
        pa.OSFile(str(path)),
        read_options=pa.csv.ReadOptions(
            column_names=[f"{number}" for number in range(len(names))], skip_rows=int(full[0]) if len(full) else 0
        ),
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            include_columns=[f"{number}" for number in kept],
            column_types={f"{number}": pa.string() for number in kept},
            null_values=[""],
        ),
    )
    rows = full[1:] if len(full) - 1 == len(table) else np.arange(2, len(table) + 2, dtype=np.int64)
    return table.rename_columns([names[number] for number in kept]), rows


def _full_lines(path: Path) -> tuple[str, NDArray[np.int64]]:
    """The first line that is not blank, and the numbers of all such lines; the file is never held as a whole."""
    header, number, numbers, rest = "", 0, array("q"), b""
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK)
            data = (rest + block) if number or rest else block.removeprefix(b"\xef\xbb\xbf")
            lines = data.splitlines(keepends=True)
            rest = lines.pop() if block and lines else b""  # its end may be in the next block
            for line in lines:
                number += 1
                if line.strip():
                    numbers.append(number)
                    header = header if len(numbers) > 1 else line.rstrip(b"\r\n").decode()
            if not block:
                return header, np.array(numbers, dtype=np.int64)
            if len(rest) > _LONGEST_LINE:
                raise ValueError(f"{path}: a line of more than {_LONGEST_LINE} bytes")


def _plain(values: pa.Array) -> pa.Array:
    """Text without spaces around, null where nothing is left; other kinds as they are."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not pa.types.is_string(values.type):
        return values
    trimmed = pc.utf8_trim_whitespace(values)
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)
