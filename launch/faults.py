"""What verbs print of what `verify` found damaged."""

from __future__ import annotations

import sys
from collections.abc import Sequence

SHOWN = 20


def print_faults(faults: Sequence[object]) -> None:
    """Prints the first faults to stderr, a line each, and how many more there are."""
    for fault in faults[:SHOWN]:
        print(f"rerankvpr: {fault}", file=sys.stderr)
    if len(faults) > SHOWN:
        print(f"rerankvpr: and {len(faults) - SHOWN} more", file=sys.stderr)
