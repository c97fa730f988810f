"""A pretend accelerator: real numbers on the CPU in tensors that say they are elsewhere and keep away from CPU tensors.

Inside `pretend_device()` device "meta" is such a device (autograd accepts it, and "cuda" would need a driver). A tensor
of it meets a CPU tensor only where CUDA allows that: a number (0-dim), or an index tensor, whose copy the host waits
for. Each time the host would wait for a GPU is noted with file and line: a value read (`item`, `tolist`, a condition),
a size that depends on values (`nonzero`, a boolean mask, `unique`), a copy back, a copy there unless it is non-blocking
and from pinned memory.

`pretend_device(numerics=False)` computes nothing: tensors there have shapes alone, so that a network of any size runs
in seconds. Reading a value gives 0, and a collective operation is reported to `Device.watcher`, not run.
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch._C._distributed_c10d import FakeWork, Work
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parent.parent
OURS = ("memory", "model", "trainer", "data_pipeline", "eval", "launch", "configs", "tests", "benchmarks")
HERE = torch.device("meta")
INSIDE_TORCH = {
    *("_tensor.py", "overrides.py", "_ops.py", "_python_dispatch.py", "functional.py", "_compile.py"),
    "eval_frame.py",
}

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero}
VALUES_GIVE_SIZES = {
    *(aten.nonzero, aten.masked_select, aten._unique, aten._unique2, aten.unique_consecutive, aten.unique_dim),
    *(aten.bincount, aten.argwhere),
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
COPIES = {aten._to_copy, aten.copy_, aten.copy, aten._copy_from}


@dataclass(frozen=True)
class Wait:
    """A place where the host waits, and for what."""

    what: str
    file: str  # the innermost file of the project
    line: int
    library: str  # the innermost file and line of a library beneath it; empty if the project waits itself

    @property
    def code(self) -> str:
        """`file: the line's text`, which outlives a change above it."""
        return f"{self.file}: {linecache.getline(str(ROOT / self.file), self.line).strip()}"

    def __str__(self) -> str:
        by = f" (in {self.library})" if self.library else ""
        return f"{self.file}:{self.line}: {self.what}{by}"


class Watcher(Protocol):
    """An observer of what happens on a device."""

    def made(self, held: torch.Tensor) -> None:
        """A tensor, or a view of one, is there."""

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An operation, on tensors as they are `held`."""

    def collective(self, func: Any, args: tuple[Any, ...]) -> None:
        """An operation of torch.distributed."""


@dataclass
class Device:
    """What a pretend device has seen."""

    waits: list[Wait] = field(default_factory=list)
    num_operations: int = 0
    numerics: bool = True  # False: tensors have shapes alone
    watcher: Watcher | None = None
    copied: Callable[[torch.Tensor], object] | None = None  # is given what each copy from the host holds
    _pinned: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    @property
    def inner(self) -> torch.device:
        """Where tensors are held."""
        return torch.device("cpu" if self.numerics else "meta")

    def by_code(self) -> Counter[str]:
        """Waits of each line of the project."""
        return Counter(wait.code for wait in self.waits)

    def table(self) -> str:
        """One line for each place, most waits first."""
        counted = Counter(str(wait) for wait in self.waits)
        return "\n".join(f"{count:4d}  {place}" for place, count in counted.most_common())

    def forget(self) -> None:
        """Starts counting anew."""
        self.waits.clear()
        self.num_operations = 0

    def wait(self, what: str) -> None:
        """Notes a wait of the line of the project that runs."""
        frame, library = sys._getframe(1), ""
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in OURS and file != Path(__file__):
                self.waits.append(Wait(what, file.relative_to(ROOT).as_posix(), frame.f_lineno, library))
                return
            if not library and file != Path(__file__) and file.name not in INSIDE_TORCH:
                library = f"{'/'.join(file.parts[-2:])}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        self.waits.append(Wait(what, "?", 0, library))

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Calls the memory of a CPU tensor pinned."""
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether its memory was called that."""
        return tensor.untyped_storage().data_ptr() in self._pinned


_current: list[Device] = []


class Elsewhere(torch.Tensor):
    """A tensor of the pretend device; `held` are its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=HERE,
            requires_grad=held.requires_grad,
        )
        made.held = held
        if _current and _current[-1].watcher:
            _current[-1].watcher.made(held)
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held})"

    @property
    def data(self) -> torch.Tensor:
        """As any tensor's; set in hooks of backward too, where no mode of functions is active."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        assert isinstance(other, Elsewhere)
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.held = other.held

    @classmethod
    def __torch_dispatch__(  # type: ignore[override, unused-ignore]  # torch declares what it is with none
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _is_mask(index: object) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _check_meeting(func: Any, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: Device) -> None:
    """Raises RuntimeError, as CUDA does, where an operation mixes tensors of host and device."""
    if packet in COPIES:
        return
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    foreign = [one for one in tensors if not isinstance(one, Elsewhere)]
    if packet in INDEXED and isinstance(args[0], Elsewhere):
        given = [one for one in args[1] if one is not None]
        if any(not isinstance(index, Elsewhere) for index in given):
            device.wait("an index tensor of the CPU is copied over")
        foreign = [one for one in foreign if not any(one is index for index in given)]
    if strangers := [one for one in foreign if one.ndim or (packet in INDEXED and one is args[0])]:
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} mixes the pretend device and the CPU "
            f"({[tuple(one.shape) for one in strangers]})"
        )
    if packet in INDEXED and not isinstance(args[0], Elsewhere):
        raise RuntimeError(f"indices should be on the CPU, as the indexed tensor is ({func})")


def _note_waits(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: Device) -> None:
    if packet in READS:
        device.wait("a value is read")
    elif packet in VALUES_GIVE_SIZES or (packet is aten.repeat_interleave and kwargs.get("output_size") is None):
        device.wait("a size depends on values")
    elif packet in INDEXED and any(_is_mask(index) for index in args[1] if index is not None):
        fills = packet in (aten.index_put, aten.index_put_, aten._index_put_impl_) and args[2].numel() == 1
        if not (fills and len(args[1]) == 1):  # CUDA fills behind a single mask without asking how many
            device.wait("a size depends on values")


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    device = _current[-1]
    packet = func.overloadpacket
    device.num_operations += 1
    if func.namespace == "c10d" and device.watcher:
        device.watcher.collective(func, args)
    if func.namespace == "c10d" and not device.numerics:
        done = Work.boxed(FakeWork())
        return done if len(func._schema.returns) == 1 else (args[0], done)
    if packet in (aten._to_copy, aten.copy_):
        return _copy(func, packet, args, kwargs, device)
    _check_meeting(func, packet, args, kwargs, device)
    _note_waits(packet, args, kwargs, device)
    if not device.numerics and (packet in READS or packet in VALUES_GIVE_SIZES):
        return _guessed(packet, args)
    to_host = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if to_host else device.inner}
    kwargs.pop("pin_memory", None)

    def inner(x: Any) -> Any:
        if isinstance(x, Elsewhere):
            return x.held
        return _held(x, device) if isinstance(x, torch.Tensor) else x

    args_inside, kwargs_inside = tree_map(inner, args), tree_map(inner, kwargs)
    out = func(*args_inside, **kwargs_inside)
    if device.watcher:
        device.watcher.ran(func, args_inside, kwargs_inside, out)
    if to_host or not tree_leaves(out):
        return out
    wrapped = tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if func.namespace == "aten" else wrapped


def _held(host: torch.Tensor, device: Device) -> torch.Tensor:
    """What a device holds of a CPU tensor."""
    return host if device.numerics else host.to(device.inner)


def _there(host: torch.Tensor, device: Device) -> torch.Tensor:
    """A CPU tensor on the device, for who is not inside one of its operations."""
    return Elsewhere(host) if device.numerics else host.to(HERE)


def _guessed(packet: Any, args: tuple[Any, ...]) -> Any:
    """What is read of a tensor without numbers. Raises NotImplementedError for a size that depends on them."""
    if packet in VALUES_GIVE_SIZES:
        raise NotImplementedError(f"{packet}: its size depends on values, of which there are none")
    if packet is aten._local_scalar_dense:
        return torch.zeros((), dtype=args[0].dtype).item()
    return packet is aten.equal


def _copy(func: Any, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: Device) -> Any:
    """A copy inside the device, there, or back."""
    if packet is aten.copy_:
        target, source = args[0], args[1]
        blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        there = isinstance(target, Elsewhere)
        if there != isinstance(source, Elsewhere):
            _note_copy(source if there else target, blocks, device, there=there)
        given = source.held if isinstance(source, Elsewhere) else source
        if not device.numerics and not there and isinstance(source, Elsewhere):
            target.zero_()
        else:
            (target.held if there else target).copy_(_held(given, device) if there else given)
        return target
    source, asked = args[0], kwargs.get("device")
    there = isinstance(source, Elsewhere) if asked is None else torch.device(asked).type == HERE.type
    was_there = isinstance(source, Elsewhere)
    if there != was_there:
        blocks = not kwargs.get("non_blocking", False)
        _note_copy(source, blocks, device, there=there)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
    if was_there and not there and not device.numerics:
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
    made = func(source.held if was_there else _held(source, device) if there else source, **kwargs)
    if there and not was_there and device.copied:
        device.copied(made)
    return Elsewhere(made) if there else made


def _note_copy(host: torch.Tensor, blocks: bool, device: Device, *, there: bool) -> None:
    if not there:
        if blocks or isinstance(host, Elsewhere) or not device.is_pinned(host):
            device.wait("a copy back")
    elif blocks or not device.is_pinned(host):
        device.wait("a host tensor is copied over" + ("" if blocks else ", from memory that is not pinned"))


def moved(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the pretend device; from outside of it, since it is no step's."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Elsewhere(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Elsewhere(buffer)
    return module


class _Dispatch(TorchDispatchMode):
    """Makes what is asked for on the device there, and lets no true meta tensor be born."""

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        if any(isinstance(leaf, Elsewhere) for leaf in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        if asked is not None and torch.device(asked).type == HERE.type:
            device = _current[-1]
            device.num_operations += 1
            if func.overloadpacket is aten._to_copy:
                return _copy(func, aten._to_copy, args, kwargs, device)
            kwargs |= {"device": device.inner}
            kwargs.pop("pin_memory", None)
            return Elsewhere(func(*args, **kwargs))
        if func.namespace == "c10d" and _current[-1].watcher:
            _current[-1].watcher.collective(func, args)
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Functions that make tensors of Python numbers, or ask for memory, without an operation that could be seen."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = _current[-1]
        asked = kwargs.get("device")
        there = asked is not None and torch.device(asked).type == HERE.type
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            data = args[0] if args else kwargs.get("data")
            if there and not isinstance(data, torch.Tensor):
                device.wait("a host tensor is copied over")
                return _there(func(*args, **{**kwargs, "device": "cpu"}), device)
        if func is torch.Tensor.new_tensor and isinstance(args[0], Elsewhere) and not isinstance(args[1], torch.Tensor):
            device.wait("a host tensor is copied over")
            host = torch.tensor(args[1], **{"dtype": args[0].dtype, **kwargs, "device": "cpu"})
            return _there(host, device)
        if func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            device.wait("values are read")
            held = args[0].held
            return (held if device.numerics else torch.zeros(held.shape, dtype=held.dtype)).tolist()
        if func is F.scaled_dot_product_attention and isinstance(args[0], Elsewhere) and not device.numerics:
            # As a GPU does it, without the matrix of attention; torch would give "meta" the plain formula.
            return aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], scale=kwargs.get("scale"))[0]
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(args[0], Elsewhere):
            raise TypeError("can't convert a tensor of the pretend device to numpy; use Tensor.cpu() first")
        if func is torch.Tensor.pin_memory:
            return device.pin(args[0].clone())
        if func is torch.Tensor.is_pinned:
            return device.is_pinned(args[0])
        if func in (torch.empty, torch.zeros, torch.tensor) and kwargs.pop("pin_memory", False):
            return device.pin(func(*args, **kwargs))
        return func(*args, **kwargs)


@contextmanager
def pretend_device(*, numerics: bool = True, watcher: Watcher | None = None) -> Iterator[Device]:
    """Inside, device "meta" (see `HERE`) is a pretend accelerator; its waits are in what this gives."""
    device = Device(numerics=numerics, watcher=watcher)
    _current.append(device)
    autocast = torch.autocast

    def known(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == HERE.type else device_type, *args, **kwargs)

    torch.autocast = known  # type: ignore[assignment,misc]
    try:
        with _Dispatch(), _Functions():
            yield device
    finally:
        torch.autocast = autocast  # type: ignore[misc]
        _current.pop()
