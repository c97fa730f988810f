"""Arrays of objects out of `.npy` files: pickles of arrays, lists, numbers and texts, and of nothing else.

NumPy's own classes never see the pickle. Their `__setstate__` trusts it, and a list of another length than the shape
crashes the process. What the pickle says of an array is kept as plain values, and becomes an array once it fits.
"""

from __future__ import annotations

import math
import pickle
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

_PACKAGES = ("numpy.core", "numpy._core")
_ORDERS = "<>|="
_PLAIN = (int, float, str, bytes, type(None), np.generic)


def read_objects(file: BinaryIO) -> NDArray[Any]:
    """The array that is pickled at the position of a file.

    Raises pickle.UnpicklingError for a pickle of anything else, ValueError and others for one that contradicts itself.
    """
    content = _Unpickler(file, encoding="latin1").load()
    if not isinstance(content, _Array):
        raise ValueError(f"a pickled {type(content).__name__}, not an array")
    return content.made()


class _Dtype:
    """A `numpy.dtype` as a pickle tells of it: its name, and its order of bytes."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name
        self.order: Any = "|"

    def __setstate__(self, state: Any) -> None:
        _, self.order, *rest = state
        if any(part is not None for part in rest[:3]):
            raise pickle.UnpicklingError("an array of records")

    def made(self) -> np.dtype[Any]:
        if not isinstance(self.name, str) or len(self.name) > 32 or self.order not in tuple(_ORDERS):
            raise ValueError("an array of no known type")
        return np.dtype(self.name).newbyteorder(self.order)


class _Array:
    """A `numpy.ndarray` as a pickle tells of it."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def made(self) -> NDArray[Any]:
        """The array. Raises ValueError, TypeError or IndexError if what the pickle says of it does not fit together."""
        shape, dtype, is_fortran, data = self.state[-4:]
        if not isinstance(dtype, _Dtype):
            raise ValueError("an array without a type")
        kind = dtype.made()
        if not kind.hasobject:
            return _of_bytes(data, kind, shape, "F" if is_fortran else "C")
        if not isinstance(data, list) or len(data) != math.prod(shape):
            raise ValueError(f"an array of shape {shape} without as many objects")
        objects = np.empty(len(data), dtype=object)
        for number, part in enumerate(data):
            objects[number] = _plain(part)
        return objects.reshape(shape)


def _plain(part: Any) -> Any:
    """A part of an array of objects, its own parts made too."""
    if isinstance(part, _Array):
        return part.made()
    if isinstance(part, list | tuple):
        return [_plain(inner) for inner in part]
    if not isinstance(part, _PLAIN):
        raise pickle.UnpicklingError(f"a {type(part).__name__} in an array")
    return part


def _of_bytes(data: Any, kind: np.dtype[Any], shape: Any, order: Literal["C", "F"] = "C") -> NDArray[Any]:
    content = data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))  # a text of Python 2
    return np.frombuffer(content, kind).reshape(shape, order=order)


def _scalar(dtype: _Dtype, data: Any = b"") -> Any:
    kind = dtype.made()
    return _plain(data) if kind.hasobject else _of_bytes(data, kind, (1,))[0]


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
    """How protocol 5 writes arrays of numbers."""
    array = _Array()
    array.state = (shape, dtype, order == "F", data)
    return array


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode`, which protocol 2 writes bytes with."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding!r:.40}")
    return text.encode(encoding)


def _no_bytes() -> bytes:
    """`bytes()`, which protocol 2 writes for none."""
    return b""


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    **{(f"{package}.multiarray", "_reconstruct"): _Array for package in _PACKAGES},
    **{(f"{package}.multiarray", "scalar"): _scalar for package in _PACKAGES},
    **{(f"{package}.numeric", "_frombuffer"): _frombuffer for package in _PACKAGES},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return _KNOWN[module, name]
