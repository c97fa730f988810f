"""The list of benchmarks that `rerankvpr eval --list` shows, for a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from configs.registry import BENCHMARKS
from eval.benchmarks.catalogue import ALIASES, CATALOGUE, Entry
from eval.benchmarks.folders import BASES, PARTS
from eval.benchmarks.named import LAYOUTS

_MANY = 4  # variants of one layout, which need not be told with each


def catalogue_table(data_root: Path) -> Table:
    """Every benchmark with where to get it, the layouts that are read, and what of it lies under `data_root`."""
    table = _grid(f"Benchmarks; data root {data_root}")
    for name, entry in CATALOGUE.items():
        table.add_row(Text(name, style="bold"), _about(entry))
        for number, (key, variant) in enumerate(entry.variants.items()):
            layout = variant.found(data_root / name)
            counts = "{:,} database images, {:,} queries".format(*variant.counts) if variant.counts else "any number"
            lines = [f"{name}/{key}: {counts}" if key else f"{name}: {counts}"]
            if not number or len(entry.variants) <= _MANY:
                lines += [f"reads {layout.expects}" for layout in variant.layouts]
            lines += [f"found: yes: {layout.marker}"] if layout else []
            table.add_row("", Text("\n".join(lines)))
        table.add_row("", "")
    for name in BENCHMARKS:
        if BENCHMARKS.origin(name):
            about = (BENCHMARKS[name].__doc__ or "of a plug-in").strip().splitlines()[0]
            table.add_row(Text(name, style="bold"), Text(about))
    aliases = ", ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    table.add_row("", Text(f"other names: {aliases}"))
    return table


def own_table() -> Table:
    """How data of one's own is given, and the layouts that are read under any name."""
    table = _grid("Data of your own")
    parts = ", ".join(f"{{{database},{queries}}}/" for database, queries in PARTS)
    bases = ", ".join(base for base in BASES if base)
    table.add_row(
        Text("folder:PATH[:METRES]", style="bold"),
        Text(
            f"any folder with {parts}, itself or in {bases}; ground truth: ground_truth_new.npy beside them, or names "
            "like @UTM_east@UTM_north@...@.jpg, or none: predictions without recall"
        ),
    )
    table.add_row(Text("--database DIR --queries DIR", style="bold"), "any two folders")
    table.add_row(
        Text("manifest:FILE[:METRES]", style="bold"),
        Text(
            "a CSV or Parquet table: path, role (database, query) and, where there is ground truth, place | lat, lon | "
            "east, north"
        ),
    )
    table.add_row(
        Text("layout:LAYOUT:PATH", style="bold"),
        "any layout under any name; LAYOUT is one of these, or a benchmark of the list, such as pitts30k/val",
    )
    for name, layout in LAYOUTS.items():
        table.add_row(Text(f"  {name}"), Text(layout.expects))
    return table


def _about(entry: Entry) -> Text:
    text = Text(f"{entry.what}\nget it: {entry.source}")
    return text.append(f"\n! {entry.fault}", style="yellow") if entry.fault else text


def _grid(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(max_width=24, overflow="fold")
    table.add_column(overflow="fold", ratio=1)
    return table
