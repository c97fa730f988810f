"""A folder of photographs as a telephone leaves them, of the rendered town: what docs/own_city.md starts from.

python -m benchmarks.phone_photos OUT [--places 60] [--views 6] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from data_pipeline.town.phone import Walk, photograph_town
from trainer.progress import progress_bar


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in (("places", 60), ("views", 6), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with progress_bar(Console(), "photographs") as update:
        photograph_town(given.out, Walk(seed=given.seed, places=given.places, views=given.views), update)


if __name__ == "__main__":
    main()
