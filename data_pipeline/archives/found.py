"""What archives hold for the rows of a table, put together from the lists of their members."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from configs.files import replacing
from data_pipeline.archives.chunks import chunk_path, chunks_of, read_chunk
from data_pipeline.archives.files import Archive
from data_pipeline.archives.source import NOWHERE, NUMBERS, ArchivedPhotos
from data_pipeline.archives.wanted import Wanted
from data_pipeline.photographs import counted
from data_pipeline.tables import RowTable

LEFT_OUT = "left_out.csv"


@dataclass(frozen=True)
class Found:
    """What archives hold for the rows of a table: `member` [rows] is a number in the other arrays, -1 for none."""

    member: NDArray[np.int64]
    names: pa.Array
    container: NDArray[np.int32]
    numbers: NDArray[np.int64]  # [members, 5], NUMBERS of each
    containers: list[str]
    changed_ns: list[int]
    again: int
    unused: Counter[str]
    others: Counter[str]
    faults: list[str]
    first_name: str

    def photos(self, lines: NDArray[np.int64], shown_as: str, threads: int, retry_s: float) -> ArchivedPhotos:
        """They as a source, by the lines of the table."""
        if len(self.numbers):
            numbers = np.where(self.member[:, None] >= 0, self.numbers[self.member], 0)
            container = np.where(self.member >= 0, self.container[self.member], NOWHERE).astype(np.int32)
        else:
            numbers, container = np.zeros((len(lines), len(NUMBERS)), np.int64), np.full(len(lines), NOWHERE, np.int32)
        return ArchivedPhotos(
            shown=shown_as,
            containers=tuple(self.containers),
            changed_ns=np.array(self.changed_ns, dtype=np.int64),
            lines=lines,
            container=container,
            numbers=numbers,
            threads=threads,
            retry_s=retry_s,
        )

    def leaves_out(self, twice: int) -> bool:
        """Whether a member or a row is not used; `twice` rows name an image that a row before names."""
        return bool(twice or self.again or self.unused or (self.member < 0).any())

    def notes(self, rows: int, twice: int, out: Path) -> list[str]:
        """What is not used and why, and archives that ended early."""
        without = int((self.member < 0).sum())
        reasons = Counter({f"{why}:": count for why, count in self.unused.items()})
        reasons += Counter({"rows without a member:": without, "rows whose image a row before has:": twice})
        reasons += Counter({"members whose name comes again (the last counts):": self.again})
        notes = [f"{fault}; rows without a member count as missing photographs" for fault in self.faults]
        if reasons:
            notes.append(f"left out: {counted(reasons)}; named in {out / LEFT_OUT}")
        if self.others:
            notes.append(f"members that are no photographs: {counted(self.others)}")
        return [f"{rows - without:,} of {rows:,} rows have a member", *notes]


def collect(archives: Sequence[Archive], folder: Path, wanted: Wanted, *, need_spill: bool) -> Found:
    """What the listed members of all archives are to the rows; of members with one name the last counts."""
    member = np.full(len(wanted.keys), -1, dtype=np.int64)
    containers: dict[str, int] = {}
    names, container, numbers, changed_ns = [], [], [], []
    unused: Counter[str] = Counter()
    others: Counter[str] = Counter()
    faults = []
    count = named = 0
    first_name = ""

    def number_of(location: str, when: int) -> int:
        if location not in containers:
            containers[location] = len(containers)
            changed_ns.append(when)
        return containers[location]

    for archive in archives:
        for chunk in chunks_of(folder, archive, need_spill=need_spill):
            _, table = read_chunk(chunk_path(folder, archive, chunk.number))
            if chunk.fault:
                faults.append(f"{archive.name}: {chunk.fault}")
            others.update(chunk.others)
            first_name = first_name or (table["name"][0].as_py() if len(table) else "")
            row, usable = _usable(table)
            unused.update(_reasons(table))
            named += int(usable.sum())
            table, row = table.filter(pa.array(usable)), row[usable]
            spilled = table["spilled"].to_numpy()
            # The spill file's own time is later than the photographs'; the archive's is theirs.
            where = np.full(len(table), NOWHERE, dtype=np.int32)
            if spilled.any():
                where[spilled] = number_of(str(folder / chunk.spill), archive.changed_ns)
            if not archive.is_compressed and not spilled.all():
                where[~spilled] = number_of(archive.location, archive.changed_ns)
            member[row] = np.arange(count, count + len(table))  # of one row twice in a chunk the last stays
            count += len(table)
            names.append(table["name"].combine_chunks())
            container.append(where)
            numbers.append(np.stack([table[name].to_numpy() for name in NUMBERS], 1))
    return Found(
        member=member,
        names=pa.chunked_array(names, pa.string()).combine_chunks() if names else pa.array([], pa.string()),
        container=np.concatenate(container) if container else np.zeros(0, np.int32),
        numbers=np.concatenate(numbers).astype(np.int64) if numbers else np.zeros((0, len(NUMBERS)), np.int64),
        containers=list(containers),
        changed_ns=changed_ns,
        again=named - int((member >= 0).sum()),
        unused=unused,
        others=others,
        faults=faults,
        first_name=first_name,
    )


def _usable(table: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    row = table["row"].to_numpy()
    return row, (row >= 0) & pc.equal(table["why"], "").to_numpy()


def _reasons(table: pa.Table) -> Counter[str]:
    """How many members are not used, by reason; those that no row names have that as theirs."""
    reasons = Counter({why: count for why, count in _counts(table["why"]) if why})
    unnamed = pc.and_(pc.equal(table["row"], -1), pc.equal(table["why"], ""))
    if count := int(pc.sum(unnamed).as_py() or 0):
        reasons["members that no row names"] = count
    return reasons


def _counts(values: pa.ChunkedArray) -> list[tuple[str, int]]:
    return [(entry["values"], entry["counts"]) for entry in pc.value_counts(values).to_pylist()]


def write_left_out(
    out: Path,
    archives: Sequence[Archive],
    folder: Path,
    rows: RowTable,
    twice: Sequence[int],
    found: Found,
    *,
    need_spill: bool,
) -> None:
    """A line for each member and row that is not used, written as they are read."""
    current = -1
    with replacing(out / LEFT_OUT) as partial, partial.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("path", "why"))
        for archive in archives:
            for chunk in chunks_of(folder, archive, need_spill=need_spill):
                _, table = read_chunk(chunk_path(folder, archive, chunk.number))
                for row, name, why in zip(*(table[key].to_pylist() for key in ("row", "name", "why")), strict=True):
                    current += row >= 0 and not why
                    if why or row < 0:
                        lines.writerow((f"{archive.name}: {name}", why or "no row names it"))
                    elif found.member[row] != current:
                        lines.writerow((f"{archive.name}: {name}", "its name comes again, and the last counts"))
        for line in twice:
            lines.writerow((f"{rows.path.name} row {line}", "a row before has its image"))
        paths = rows.columns["path"]
        for number in np.flatnonzero(found.member < 0).tolist():
            lines.writerow((f"{rows.path.name} row {rows.lines[number]}: {paths[number].as_py()}", "no member"))
