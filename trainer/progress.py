"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from configs.progress import OnProgress, untold

LINE_EVERY_S = 10.0


@contextmanager
def progress_bar(
    console: Console, label: str, total: int | None = None, *, active: bool = True
) -> Iterator[OnProgress]:
    """Yields what shows that `done` of `total` items are finished."""
    if not active:
        yield untold
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=total, note="")

            def show(done: int, total: int | None = None, note: str = "") -> None:
                bar.update(task, completed=done, total=total, note=note)

            yield show
    else:
        shown, said = time.monotonic(), ""

        def line(done: int, total: int | None = total, note: str = "") -> None:
            nonlocal shown, said
            text = f"{label}: {done}{f'/{total}' if total else ''}  {note}".rstrip()
            if text != said and (time.monotonic() - shown > LINE_EVERY_S or done == total):
                shown, said = time.monotonic(), text
                console.print(text, highlight=False)

        yield line
