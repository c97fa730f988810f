"""The lines of a training's `metrics.jsonl` that can be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.reading import reading


def metrics_of_steps(metrics: Path) -> Iterator[dict[str, Any]]:
    """Each line of a `metrics.jsonl` that has a step; one that is cut off or no JSON is passed over, as `sync` does.

    Raises ValueError if the file cannot be read.
    """
    with reading(metrics, "the metrics of a training"):
        lines = metrics.read_text(errors="replace").splitlines()
    for line in lines:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            yield content
