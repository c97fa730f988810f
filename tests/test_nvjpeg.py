"""JPEGs decoded on a GPU: nearly the pixels of the CPU, also while a training uses and frees memory.

Their chroma has the size of their luma: nvJPEG repeats smaller chroma, where the CPU interpolates.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from data_pipeline.images import decode
from tests.photos import jpeg

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="nvJPEG needs an NVIDIA GPU")

SIDE = 42


def test_nvjpeg_gives_nearly_the_pixels_of_the_cpu() -> None:
    from data_pipeline.nvjpeg import decode_on_gpu, empty_on_gpu

    rng = np.random.default_rng(0)
    files = [jpeg(rng, "4:4:4") for _ in range(5)]
    on_gpu = empty_on_gpu(len(files), SIDE, torch.device("cuda", torch.cuda.current_device()))
    decode_on_gpu(on_gpu, files)
    on_cpu = torch.stack([decode(file, SIDE) for file in files])
    assert (on_gpu.cpu().float() - on_cpu.float()).abs().mean() < 1
    with pytest.raises(ValueError):  # noqa: PT011 (in the words of nvJPEG)
        decode_on_gpu(on_gpu, [*files[:4], files[4][:40]])


@pytest.mark.parametrize("gpu", range(torch.cuda.device_count()))
def test_decoding_and_a_training_leave_each_other_s_memory_alone(gpu: int) -> None:
    """Threads decode ahead while the default stream is always behind: its kernels read memory that it has freed.

    The threads have no current device, as a pool's are not, and the GPU need not be the first.
    """
    from data_pipeline.nvjpeg import decode_on_gpu, empty_on_gpu, hand_over

    device = torch.device("cuda", gpu)
    rng = np.random.default_rng(1)
    files = [jpeg(rng, "4:4:4") for _ in range(8)]
    on_cpu = torch.stack([decode(file, SIDE) for file in files]).float()

    def fill(out_B3HW: torch.Tensor) -> torch.Tensor:
        decode_on_gpu(out_B3HW, files)
        return out_B3HW

    sums, pixels = [], []
    with torch.cuda.device(device), ThreadPoolExecutor(3) as pool:
        for i in range(60):
            ahead = [pool.submit(fill, empty_on_gpu(len(files), SIDE, device)) for _ in range(3)]
            for size in (3 * 400 * 300, 3 * 640 * 480, 8 * 3 * SIDE**2):  # blocks that a decoder would like
                work = torch.full((size,), i % 7, dtype=torch.uint8, device=device)
                torch.cuda._sleep(2_000_000)  # about a millisecond
                sums.append((work.sum(), size * (i % 7)))
                del work
            for future in ahead:
                batch = future.result()
                hand_over(batch)
                torch.cuda._sleep(2_000_000)
                pixels.append((batch.float() - on_cpu.to(device)).abs().mean())
                del batch
        assert all(int(found) == wanted for found, wanted in sums)
        assert max(float(one) for one in pixels) < 1
