"""The full node that feeding is reckoned for, and what helps one that decodes too little."""

from __future__ import annotations

GPUS = 8
IMAGES_PER_GPU_S = 3000.0  # ViT-B/14 at 224 px at 40 % of an H100's peak
MORE_DECODING = (
    "ask for more cores (--cpus-per-task), write smaller photographs (`rerankvpr shard --max-side`), or let the GPUs "
    "decode (data.decode nvjpeg)"
)
