"""Year and month of photographs, as names and tables write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa

from configs.reading import shown

# 2019-05, 2019-05-01T10:30, 201905, 20190501, 20190501103000; other runs of digits (seconds since 1970) are no dates.
_DATE = re.compile(r"((?:18|19|20)[0-9]{2})-?(0[1-9]|1[0-2])(?:-?(?:0[1-9]|[12][0-9]|3[01])(?:[0-9]{6})?)?(?![0-9])")


def years_and_months(texts: Sequence[str | None], what: str) -> tuple[pa.Array, pa.Array, list[str]]:
    """Years and months (int64 [N], null where none is said), and a note that counts texts which are no dates.

    `what` is what the texts are called, such as "timestamps".
    """
    found = [_DATE.match(text or "") for text in texts]
    odd = [text for text, date in zip(texts, found, strict=True) if text and not date]
    notes = [f"{len(odd)} {what} are no dates and are not used, the first {shown(odd[0])!r}"] if odd else []
    year, month = (pa.array([int(date[part]) if date else None for date in found], pa.int64()) for part in (1, 2))
    return year, month, notes
