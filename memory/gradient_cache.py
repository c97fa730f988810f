"""Gradient cache (GradCache, Gao et al., 2021): a batch that does not fit is encoded in chunks, its gradient exact.

Accumulating the loss over chunks would change it, since each image's negatives are the batch. Here all chunks are
encoded without autograd, the loss of the whole batch gives what was made of each image its gradient, and each chunk is
encoded again and takes its part. Activations are held for one chunk at a time; the price is a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class GradientCache:
    """What a batch that is encoded in chunks becomes, and its way back."""

    def __init__(
        self, encode: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], chunks: Sequence[torch.Tensor]
    ) -> None:
        """`encode` maps images to descriptors [b, D] and whatever else the loss takes of each image.

        `chunks` are the batch's images, in order. What is not of floating point has no gradient.
        """
        self._encode, self._chunks = encode, chunks
        self._random_states: list[list[torch.Tensor]] = []
        encoded = []
        with torch.no_grad():
            for chunk in chunks:
                self._random_states.append(_random_state(chunk.device))
                encoded.append(encode(chunk))
        self.outputs = tuple(torch.cat(parts) for parts in zip(*encoded, strict=True))
        for output in self.outputs:
            output.requires_grad_(output.is_floating_point())

    def backward(self, loss: torch.Tensor, backward: Callable[[torch.Tensor], None]) -> None:
        """Propagates a loss of `outputs`; `backward` is called once a chunk, with a scalar.

        Each chunk is encoded with the random numbers of its first time, so that dropout repeats itself.
        """
        wanted = [number for number, output in enumerate(self.outputs) if output.requires_grad]
        grads = torch.autograd.grad(loss, [self.outputs[number] for number in wanted])
        sizes = [len(chunk) for chunk in self._chunks]
        by_chunk = zip(*(grad.split(sizes) for grad in grads), strict=True)
        for chunk, state, grads_of_chunk in zip(self._chunks, self._random_states, by_chunk, strict=True):
            after = _random_state(chunk.device)
            _set_random_state(state, chunk.device)
            encoded = self._encode(chunk)
            _set_random_state(after, chunk.device)
            parts = [
                (encoded[number].to(grad.dtype) * grad).sum()
                for number, grad in zip(wanted, grads_of_chunk, strict=True)
            ]
            backward(torch.stack(parts).sum() if len(parts) > 1 else parts[0])


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_random_state(state: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
