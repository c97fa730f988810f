"""A rank that is stopped (SIGSTOP) in an evaluation is named, and the others end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from model.dinov2 import facebook_layout
from tests.networks import backbone
from tests.photos import jpeg
from tests.training import ROOT, kill_all, ranks_of

IMAGES = 3000


def test_a_rank_that_is_stopped_in_an_evaluation_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(facebook_layout(dict(backbone("tiny14", "random").state_dict())), tmp_path / "tiny.safetensors")
    rng = np.random.default_rng(0)
    for part in ("database", "queries"):
        folder = tmp_path / "town" / "images" / "test" / part
        folder.mkdir(parents=True)
        data = jpeg(rng)
        for number in range(IMAGES):
            (folder / f"@{500000 + number}@4000000@33@T@@@{number}@@@@@@@@.jpg").write_bytes(data)
    flags = ["--weights", str(tmp_path / "tiny.safetensors"), "--backbone", "tiny14", "--benchmarks", "folder:town"]
    flags += ["--data-root", str(tmp_path), "--image-size", "224", "--features", str(tmp_path / "features")]
    launcher = (sys.executable, "-m", "rerankvpr", "launch", "--nproc-per-node", "2", "--shutdown-timeout", "5")
    process = subprocess.Popen(
        [*launcher, "--", "eval", *flags, "--out", str(tmp_path / "out"), "--stall-s", "8"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("features/*/*.safetensors")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks_of(process, "eval")[1].send_signal(signal.SIGSTOP)
        text, _ = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            kill_all(process)
    assert process.returncode != 0
    assert re.search(r"rerankvpr: rank 1.*its process is stopped, or its node is gone.*--stall-s 8", text), text
    assert "Traceback" not in text
