"""JPEGs decoded by nvJPEG on this rank's NVIDIA GPU, in memory that nothing else uses meanwhile.

TorchCodec decodes on the current stream of the thread, which in a pool is GPU 0's default one: where a training's own
kernels run. So all of it runs on one side stream of the right device, whose memory the training's stream does not use,
one call at a time, and each call ends when the device has ended.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import torch
from torchcodec.decoders import decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data_pipeline.decoders import checked_jpeg
from data_pipeline.images import Size, empty_batch

_one_at_a_time = threading.Lock()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def empty_on_gpu(num_images: int, size: Size, device: torch.device) -> torch.Tensor:
    """`empty_batch` of a CUDA device, from the memory that the side stream has freed: for `decode_on_gpu` to fill."""
    with torch.cuda.device(device), torch.cuda.stream(_side_stream(device)):
        return empty_batch(num_images, size, device=str(device))


def hand_over(images_B3HW: torch.Tensor) -> None:
    """Says that the calling thread's stream uses a filled batch: only once it is done may the memory be filled anew."""
    images_B3HW.record_stream(torch.cuda.current_stream(images_B3HW.device))


def decode_on_gpu(out_B3HW: torch.Tensor, jpegs: Sequence[bytes], interpolation: str = "bilinear") -> None:
    """Fills uint8 [B, 3, H, W] of `empty_on_gpu` with JPEGs: decoded by nvJPEG, resized on the device, and done there.

    From any thread. Pixels differ from those of `decode_into` by the rounding of another decoder. Raises ValueError
    where one of the JPEGs cannot be decoded, without saying which.
    """
    device = out_B3HW.device
    encoded = [torch.frombuffer(bytearray(checked_jpeg(jpeg)), dtype=torch.uint8) for jpeg in jpegs]
    stream = _side_stream(device)
    with _one_at_a_time, torch.cuda.device(device), torch.cuda.stream(stream):
        try:
            images = decode_jpeg(encoded, device=device)
            for image, out_3HW in zip(images, out_B3HW, strict=True):
                resized = F.resize(image, list(out_3HW.shape[1:]), interpolation=InterpolationMode(interpolation))
                out_3HW.copy_(resized)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(str(error).splitlines()[0]) from error
        finally:
            stream.synchronize()
