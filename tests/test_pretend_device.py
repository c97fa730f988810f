"""The pretend device: it computes as the CPU does, refuses what CUDA refuses, and counts what CUDA would wait for."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.pretend_device import HERE, Elsewhere, pretend_device

X = torch.arange(12.0).reshape(3, 4)

REFUSED: dict[str, Callable[[torch.Tensor], object]] = {
    "a sum with a tensor of the CPU": lambda x: x + X,
    "a product with a matrix of the CPU": lambda x: x @ X.T,
    "a mask of the CPU in masked_fill": lambda x: x.masked_fill(X > 3, 0),
    "a mask of the CPU in where": lambda x: torch.where(X > 3, x, 0),
    "a mask of the device on a tensor of the CPU": lambda x: X[x > 3],
    "an index of the device on a tensor of the CPU": lambda x: X[torch.zeros(2, dtype=torch.int64, device=x.device)],
    "an index of the CPU in gather": lambda x: x.gather(0, torch.zeros(1, 4, dtype=torch.int64)),
    "an index of the CPU in index_select": lambda x: x.index_select(0, torch.zeros(2, dtype=torch.int64)),
    "values of the CPU written by a mask": lambda x: x.masked_scatter_(x > 3, X),
    "rows of the CPU concatenated": lambda x: torch.cat([x, X]),
    "an array of numpy": lambda x: x.numpy(),
    "numpy reading it": lambda x: np.asarray(x),
}

WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "a condition": lambda x: bool(x.isfinite().all()),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "a boolean mask": lambda x: x[x > 3],
    "a boolean mask with values": lambda x: x.__setitem__(x > 3, x[:1, :1].expand(2, 4).flatten()),
    "an index tensor of the CPU": lambda x: x[torch.tensor([0, 2])],
    "writing by an index tensor of the CPU": lambda x: x.__setitem__(torch.tensor([0, 2]), x[:2] + 1),
    "a copy back": lambda x: x.cpu(),
    "a copy back into place": lambda x: torch.empty(3, 4).copy_(x),
    "a copy there": lambda x: X.to(x.device),
    "a copy there that is not from pinned memory": lambda x: X.to(x.device, non_blocking=True),
    "a copy there that blocks": lambda x: X.pin_memory().to(x.device),
    "a copy into place": lambda x: x.copy_(X),
    "torch.tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
}

FREE: dict[str, Callable[[torch.Tensor], object]] = {
    "a number of the CPU": lambda x: x + torch.tensor(2.0),
    "a Python number": lambda x: x * 3,
    "a tensor made there": lambda x: x + torch.arange(4, device=x.device),
    "zeros": lambda x: x.new_zeros(3, 4) + torch.full((4,), 2.0, device=x.device),
    "a copy there from pinned memory": lambda x: X.pin_memory().to(x.device, non_blocking=True),
    "a slice": lambda x: x[1:, ::2].contiguous(),
    "a mask filled": lambda x: x.masked_fill(x > 3, 0),
    "a mask set to a number": lambda x: x.__setitem__(x > 3, 0.0),
    "an index tensor of the device": lambda x: x[torch.arange(2, device=x.device)],
    "a sort": lambda x: x.sort(),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cuda_refuses_is_refused(fault: str) -> None:
    with pretend_device(), pytest.raises((RuntimeError, TypeError)):
        REFUSED[fault](Elsewhere(X.clone()))


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_is_counted_with_its_line(wait: str) -> None:
    with pretend_device() as device:
        WAITS[wait](Elsewhere(X.clone()))
    assert device.waits, wait
    assert {one.file for one in device.waits} == {"tests/test_pretend_device.py"}
    assert all(f'"{wait}": lambda' in one.code for one in device.waits)


@pytest.mark.parametrize("work", FREE)
def test_what_does_not_wait_is_not_counted(work: str) -> None:
    with pretend_device() as device:
        FREE[work](Elsewhere(X.clone()))
    assert not device.waits, device.table()


def test_it_computes_as_the_cpu_does_and_autograd_too() -> None:
    def work(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        x = X.to(device).requires_grad_()
        view = (x * 2)[:, 1:]
        total = (view.softmax(1) @ torch.ones(3, 2, device=device)).pow(2).sum() + torch.eye(3, device=device).sum()
        (gradient,) = torch.autograd.grad(total, x)
        assert x.device == gradient.device == device
        return total.detach().cpu(), gradient.cpu()

    expected = work(torch.device("cpu"))
    with pretend_device():
        found = work(HERE)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_outside_nothing_has_changed() -> None:
    with pretend_device():
        pass
    assert type(torch.zeros(2, device="meta")) is torch.Tensor
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(2, device="meta").item()
