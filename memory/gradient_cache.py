"""Gradient cache (GradCache, Gao et al., 2021): a batch that does not fit is encoded in chunks, its gradient exact.

Accumulating the loss over chunks would change it, since each image's negatives are the batch. Here all chunks are
encoded without autograd, the loss of the whole batch gives each descriptor its gradient, and each chunk is encoded
again and takes its part. Activations are held for one chunk at a time; the price is a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class GradientCache:
    """Descriptors of a batch encoded in chunks, and their way back."""

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], chunks: Sequence[torch.Tensor]) -> None:
        """`encode` maps images to descriptors [b, D]; `chunks` are the batch's images, in order."""
        self._encode, self._chunks = encode, chunks
        self._random_states: list[list[torch.Tensor]] = []
        encoded = []
        with torch.no_grad():
            for chunk in chunks:
                self._random_states.append(_random_state(chunk.device))
                encoded.append(encode(chunk))
        self.descriptors_BD = torch.cat(encoded).requires_grad_()

    def backward(self, loss: torch.Tensor, backward: Callable[[torch.Tensor], None]) -> None:
        """Propagates a loss of `descriptors_BD`; `backward` is called once a chunk, with a scalar.

        Each chunk is encoded with the random numbers of its first time, so that dropout repeats itself.
        """
        (grad_BD,) = torch.autograd.grad(loss, self.descriptors_BD)
        grads = grad_BD.split([len(chunk) for chunk in self._chunks])
        for chunk, state, grad_bD in zip(self._chunks, self._random_states, grads, strict=True):
            after = _random_state(chunk.device)
            _set_random_state(state, chunk.device)
            descriptors_bD = self._encode(chunk)
            _set_random_state(after, chunk.device)
            backward((descriptors_bD.to(grad_bD.dtype) * grad_bD).sum())


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_random_state(state: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
