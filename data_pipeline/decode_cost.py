"""What decoding photographs takes of a core, measured on this machine in a moment."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from data_pipeline.images import Size, decode_into, empty_batch

MEASURE_S = 0.3
EXAMPLE_SIZE = (400, 300)  # of GSV-Cities' photographs


def example_jpegs(count: int = 8) -> list[bytes]:
    """JPEGs of seeded noise as large as GSV-Cities' photographs, in pixels and, about, in bytes."""
    rng, jpegs = np.random.default_rng(0), []
    width, height = EXAMPLE_SIZE
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
        data = io.BytesIO()
        Image.fromarray(noisy).save(data, "JPEG", quality=85)
        jpegs.append(data.getvalue())
    return jpegs


def images_per_core_second(photographs: Sequence[bytes], size: Size, interpolation: str = "bilinear") -> float:
    """Photographs that a core decodes and resizes in a second of its own time: other work here does not count."""
    out_3HW = empty_batch(1, size)[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for jpeg in photographs[:2]:
            decode_into(out_3HW, jpeg, interpolation)
        done, began, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < MEASURE_S or not done:
            decode_into(out_3HW, photographs[done % len(photographs)], interpolation)
            done += 1
        return done / max(1e-9, time.process_time() - cpu)
    finally:
        torch.set_num_threads(threads)
