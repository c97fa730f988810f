"""Batches on their way to a GPU while it computes: copied one ahead, on a stream of their own."""

from __future__ import annotations

import torch


class CopyStream:
    """Copies from pinned memory to a GPU, beside what the GPU computes meanwhile; the host waits for none of them.

    `begin` and `hand_over` are called by the thread whose stream uses the copies.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def begin(self, host: torch.Tensor) -> torch.Tensor:
        """The tensor on the GPU, to be used only after `hand_over`.

        Its memory comes from the copying stream, which may fill it at once: nothing computed before has to end.
        """
        with torch.cuda.stream(self._stream):
            return host.to(self.device, non_blocking=True)

    def hand_over(self, there: torch.Tensor) -> torch.Tensor:
        """A copy that has begun, for the calling thread's stream: that waits for it, and the host does not.

        The stream is noted as a user of the memory, so that no later copy fills it while a kernel may read it.
        """
        user = torch.cuda.current_stream(self.device)
        user.wait_stream(self._stream)
        there.record_stream(user)
        return there
