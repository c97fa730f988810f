"""Runs the notebooks of docs/notebooks and writes what they print and draw into them: `make notebooks`.

`make demo` comes first. Cells run in one process, one after the other, as Jupyter runs them, in a folder as deep as the
notebooks' own. What a cell prints, what it hands to `display` (pictures of PIL) and figures of pyplot are its outputs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "docs" / "notebooks"
WIDEST = 1000  # pixels of a picture that is kept
LARGE = 100_000  # bytes from which a figure is of photographs, and kept as a JPEG

mpl.use("Agg")


def run(notebook: Path) -> dict[str, Any]:
    """The notebook with the outputs of its cells. Raises what a cell raises, with the notebook's name as a note."""
    content: dict[str, Any] = json.loads(notebook.read_text())
    shown: list[dict[str, Any]] = []
    names: dict[str, Any] = {"__name__": "__main__", "display": lambda picture: shown.append(_picture(picture))}
    for number, cell in enumerate(cell for cell in content["cells"] if cell["cell_type"] == "code"):
        shown.clear()
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
        lines = said.getvalue().splitlines(keepends=True)
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": lines}] if lines else []
        cell["outputs"] += [*shown, *_figures()]
    return content


def _picture(picture: Image.Image) -> dict[str, Any]:
    """A picture as a cell's output: a JPEG, at most `WIDEST` pixels wide."""
    picture = picture.convert("RGB")
    picture.thumbnail((WIDEST, 10 * WIDEST))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=82, optimize=True)
    return _output("image/jpeg", data.getvalue())


def _figures() -> Iterator[dict[str, Any]]:
    """The open figures of pyplot, which are closed."""
    for number in plt.get_fignums():
        data = io.BytesIO()
        plt.figure(number).savefig(data, dpi=100, metadata={"Software": None})
        plt.close(number)
        yield _output("image/png", data.getvalue()) if data.tell() < LARGE else _picture(Image.open(data))


def _output(kind: str, data: bytes) -> dict[str, Any]:
    return {"output_type": "display_data", "data": {kind: base64.b64encode(data).decode()}, "metadata": {}}


def main(argv: list[str]) -> int:
    """Runs every notebook; each is written once it ran to its end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=ROOT, help="folder that holds the demo's data/ and runs/")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    if not (arguments.home / "runs" / "demo" / "results.json").is_file() and not arguments.check:
        sys.exit(f"{arguments.home} holds no runs/demo; run `make demo` first")
    folder = arguments.home.resolve() / "build" / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        content = run(notebook)
        print(f"{notebook.name}: {sum(len(cell.get('outputs', [])) for cell in content['cells'])} outputs", flush=True)
        if not arguments.check:
            notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
