"""NetVLAD's dbStruct out of a MATLAB file, read in a process of its own: scipy's reader crashes on damaged files.

Run as a script, `matlab.py FILE` prints the struct as JSON; it imports nothing of this project.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TIMEOUT_S = 600.0
EXPECTED = "a MATLAB file with dbStruct of dbImage, qImage, utmDb, utmQ"


@dataclass(frozen=True)
class DbStruct:
    """File names and UTM metres [n, 2] of database (`db`) and queries (`q`); the radius in metres, if it has one."""

    names: dict[str, list[str]]
    utm: dict[str, NDArray[np.float64]]
    radius_m: float | None


def read_db_struct(source: Path) -> DbStruct:
    """The dbStruct in a `.mat` file. Raises FileNotFoundError, ValueError saying what is wrong with the file."""
    if not source.is_file():
        raise FileNotFoundError(f"ground truth {source} does not exist")
    command = [sys.executable, str(Path(__file__).resolve()), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"ground truth {source}: not read after {TIMEOUT_S:g} s; expected {EXPECTED}") from None
    return from_output(source, done.returncode, done.stdout, done.stderr)


def from_output(source: Path, status: int, out: bytes, err: bytes) -> DbStruct:
    """What the script's end means. Raises ValueError."""
    if status:
        said = err.decode(errors="replace").strip().splitlines()
        why = (
            f"its reader ended with signal {-status}" if status < 0 else said[-1][:300] if said else f"status {status}"
        )
        raise ValueError(f"ground truth {source}: not {EXPECTED} ({why})")
    content = json.loads(out)
    utm = {part: np.array(rows, dtype=np.float64).reshape(-1, 2) for part, rows in content["utm"].items()}
    return DbStruct(content["names"], utm, content["radius_m"])


def main(file: str) -> int:
    """Prints the struct in `file` as JSON; status 1 and a line on stderr where it is none."""
    from scipy.io import loadmat  # type: ignore[import-untyped]

    try:
        table = loadmat(file, struct_as_record=False, squeeze_me=True)["dbStruct"]
        names = {part: [str(x) for x in np.atleast_1d(getattr(table, f"{part}Image"))] for part in ("db", "q")}
        utm = {}
        for part in names:
            xy = np.atleast_2d(np.asarray(getattr(table, f"utm{part.capitalize()}"), float))
            utm[part] = (xy.T if xy.shape[0] == 2 else xy).tolist()
            if any(len(row) != 2 for row in utm[part]):
                raise ValueError(f"utm{part.capitalize()} has shape {xy.shape}; expected two numbers an image")
        radius = getattr(table, "posDistThr", None)
        text = json.dumps({"names": names, "utm": utm, "radius_m": None if radius is None else float(radius)})
    except Exception as error:  # noqa: BLE001 - whatever damaged bytes make of it, this process is there for it
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    sys.stdout.write(text)
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
