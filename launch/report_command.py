"""`rerankvpr report FOLDER...`: evaluations as a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from configs.flags import parse_flags


@dataclass(frozen=True)
class ReportCommand:
    """Makes one HTML page of evaluations: tables, curves, queries with what was found for them.

    Several are set against each other: paired differences, and the queries that flipped. The page needs no network and
    holds its pictures.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER...")]
    """Folders that `rerankvpr eval --out` wrote; the first is the one that others are compared with."""
    out: Path | None = None
    """File to write; by default page.html in the folder, or comparison.html in the first of several."""
    queries: int = 150
    """Most queries that are shown of a benchmark: those first that re-ranking or another evaluation changes."""


def main(argv: list[str]) -> int:
    """Writes the page and names it."""
    command = parse_flags(ReportCommand, argv, prog="rerankvpr report")
    if not command.folders:
        raise ValueError("report needs a folder that `rerankvpr eval --out FOLDER` wrote")
    if command.queries < 0:
        raise ValueError(f"--queries {command.queries}: expected 0 or more")
    from configs.files import write_whole
    from eval.report.page import report_page
    from eval.report.stored import read_evaluation

    evaluations = [read_evaluation(folder) for folder in command.folders]
    out = command.out or command.folders[0] / ("comparison.html" if len(evaluations) > 1 else "page.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    page = report_page(evaluations, most_queries=command.queries)
    write_whole(out, page)
    print(f"written: {out} ({len(page) / 1e6:.1f} MB)")
    return 0
