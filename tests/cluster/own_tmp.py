"""A /tmp of a host's own, as separate machines have it, on one machine: a mount namespace with an empty tmpfs there."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

from tests.cluster.workplace import ROOT


def own_tmp(*shared: Path) -> list[str]:
    """The start of a command that runs with an empty /tmp; of what lies in it `shared` is seen alone, as a network
    file system's folder would be, and this checkout. For root."""
    tmp = Path(tempfile.gettempdir())
    kept = [path for path in (*shared, ROOT) if path.is_relative_to(tmp)]
    steps = ["mount -t tmpfs none /mnt"]
    for i, path in enumerate(kept):
        steps += [f"mkdir /mnt/{i}", f"mount --bind {shlex.quote(str(path))} /mnt/{i}"]
    steps += [f"mount -t tmpfs none {tmp}"]
    for i, path in enumerate(kept):
        steps += [f"mkdir -p {shlex.quote(str(path))}", f"mount --bind /mnt/{i} {shlex.quote(str(path))}"]
    return ["unshare", "--mount", "bash", "-ec", f'{"; ".join(steps)}; exec "$@"', "_"]
