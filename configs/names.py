"""Names that people mistype."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def nearest(name: str, known: Collection[str], prefix: str = "", *, listed: int = 24) -> str:
    """The last clause of an error about an unknown name: "nearest: X", or "known: X, Y, ..." if none is near.

    `prefix` precedes the nearest name, for keys of a section; at most `listed` of the known names are written out.
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if close:
        return f"nearest: {prefix}{close[0]}"
    some = list(known)[:listed] or ["none"]
    return f"known: {', '.join(some)}" + (f" and {len(known) - listed} more" if len(known) > listed else "")
