"""What `rerankvpr shard photos` prints of positions, so that a size of cells can be chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # help and mistakes should not wait for pyarrow
    from data_pipeline.sources.cells import Grid
    from data_pipeline.sources.photo_folder import CellSurvey


def print_survey(console: Console, survey: CellSurvey, num_images: int, grid: Grid, least: int) -> None:
    """Distances between the photographs, a line per size of cells, and the size that the data suggests."""
    if len(survey.neighbours_m):
        near, median, far = np.quantile(survey.neighbours_m, (0.1, 0.5, 0.9))
        text = f"nearest other photograph: {median:.1f} m in the median, {near:.1f} to {far:.1f} m for 8 of 10"
        if len(survey.errors_m):
            text += f"; the receiver's own error: {np.median(survey.errors_m):.1f} m"
        console.print(text, highlight=False, soft_wrap=True)
    console.print(
        f"{num_images:,} photographs in sectors of {grid.heading_deg:g} degrees, places of {least} images or more:",
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    for column in ("--cell-m", "places", "images used", "images per place"):
        table.add_column(column, justify="right")
    for size in survey.sizes:
        cell = f"{size.cell_m:g}{' *' if size.cell_m == grid.cell_m else ''}"
        used = f"{size.images:,} ({size.images / num_images:.0%})"
        table.add_row(cell, f"{size.places:,}", used, f"{size.images_per_place:g}")
    console.print(table)
    if survey.suggested_m is None:
        console.print(f"no size of cells gives 2 places of {least} images", highlight=False)
    elif survey.suggested_m == grid.cell_m:
        console.print(f"--cell-m {grid.cell_m:g} is what the data suggests", highlight=False)
    else:
        console.print(
            f"[yellow]the data suggests --cell-m {survey.suggested_m:g}[/]; {grid.cell_m:g} is used as asked",
            highlight=False,
        )
