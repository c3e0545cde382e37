"""What the core needs to know of an array, whoever owns it: NumPy, torch, or only a shape that is asked about."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from flashtile.dtypes import dtype_of
from flashtile.errors import owned, wrong

# An ndarray object starts with its reference count and type, then the address of its data: NumPy's C API has fixed
# that since 1.0. Reading it there takes a tenth of the time of `x.ctypes.data`, and a tiny call takes four addresses.

# The words of this process's memory, from address 8 on: nothing lies at address 0.
_words = ctypes.cast(8, ctypes.POINTER(ctypes.c_size_t))
_BEFORE = object.__basicsize__ - 8


def _read_address(x: np.ndarray) -> int:
    return _words[id(x) + _BEFORE >> 3]


def _ask_address(x: np.ndarray) -> int:
    return int(x.ctypes.data)


def _read_addresses(q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray) -> tuple[int, int, int, int]:
    words, before = _words, _BEFORE
    return (
        words[id(q) + before >> 3],
        words[id(k) + before >> 3],
        words[id(v) + before >> 3],
        words[id(o) + before >> 3],
    )


def _ask_addresses(q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray) -> tuple[int, int, int, int]:
    return _ask_address(q), _ask_address(k), _ask_address(v), _ask_address(o)


def _header_is_as_expected() -> bool:
    probes = [np.arange(6)[start:] for start in (0, 3)]
    return all(_read_address(probe) == _ask_address(probe) for probe in probes)


# Another interpreter may lay objects out differently.
address_of, addresses_of = (
    (_read_address, _read_addresses) if _header_is_as_expected() else (_ask_address, _ask_addresses)
)


class View(NamedTuple):
    """An array without its memory. Strides in bytes, any sign, 0 included."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    device: str = "cpu"

    def strides4(self) -> tuple[int, int, int, int]:
        """Byte strides along (B, H, S, D); an absent axis has stride 0, an innermost axis of one element is unit."""
        if len(self.strides) == 4 and self.shape[-1] != 1:  # as most calls have it
            return self.strides
        *outer, inner = self.strides
        if self.shape[-1] == 1:
            inner = dtype_of(self.dtype).itemsize
        b, h, s = [0] * (3 - len(outer)) + outer
        return b, h, s, inner

    def extent(self) -> tuple[int, int]:
        """The bytes [first, last) that the array may touch, counted from its address; (0, 0) if it is empty."""
        return extent_of(self.shape, self.strides, dtype_of(self.dtype).itemsize)

    def may_overlap_itself(self) -> bool:
        """True if two elements may share memory. Each axis must step over everything inside it; an array that
        interleaves axes otherwise is reported too, though its elements may be distinct."""
        if 0 in self.shape:
            return False
        inside = dtype_of(self.dtype).itemsize
        for stride, n in sorted((abs(stride), n) for n, stride in zip(self.shape, self.strides, strict=True) if n > 1):
            if stride < inside:
                return True
            inside = stride * (n - 1) + inside
        return False


def extent_of(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """See View.extent; of elements of whatever kind."""
    if 0 in shape:
        return 0, 0
    spans = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    below = sum(span for span in spans if span < 0)
    above = sum(span for span in spans if span > 0)
    return below, above + itemsize


def check_outside(argument: str, memory: tuple[int, int], read: Iterable[tuple[str, int, int]]) -> None:
    """Raise SpecError if an array spans bytes that are read as something else; memory: its (first, last), read: (name,
    first, last) of each."""
    first, last = memory
    for name, begin, end in read:
        if max(first, begin) < min(last, end):
            raise wrong(argument, f"an array within the memory that {name} spans", "memory of its own")


@functools.lru_cache(maxsize=256)
def contiguous(shape: tuple[int, ...], dtype: Any, device: str = "cpu") -> View:
    """A row-major array that does not exist yet."""
    strides, step = [], dtype_of(dtype).itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return View(tuple(shape), tuple(reversed(strides)), dtype, device)


def is_torch(x: object) -> bool:
    """True for a torch tensor or a subclass of it, without importing torch."""
    return _is_torch(type(x))  # type: ignore[arg-type]  # types are hashable


@functools.lru_cache(maxsize=64)
def _is_torch(kind: type) -> bool:
    return any(base.__module__ == "torch" and base.__name__ == "Tensor" for base in kind.__mro__)


def is_dask(x: object) -> bool:
    """True for an array of Dask, without importing Dask."""
    return any(base.__module__.startswith("dask.array") and base.__name__ == "Array" for base in type(x).__mro__)


def is_stored(x: object) -> bool:
    """True for an array that is read by slices and lies in no memory: Zarr's, HDF5's and their kind."""
    slices = all(hasattr(x, name) for name in ("shape", "dtype", "chunks", "__getitem__"))
    return slices and not isinstance(x, np.ndarray) and not is_dask(x)


def is_lazy(x: object) -> bool:
    """True for either: an array whose values are not in memory yet."""
    return type(x) is not np.ndarray and (is_dask(x) or is_stored(x))


def view_of(x: Any) -> View:
    """Describe a NumPy array or a torch tensor; a View is its own description."""
    if type(x) is View:
        return x
    if type(x) is np.ndarray:
        return View(x.shape, x.strides, x.dtype)
    if is_torch(x):
        size = x.element_size()
        return View(tuple(x.shape), tuple(size * step for step in x.stride()), x.dtype, str(x.device))
    return View(x.shape, x.strides, x.dtype, device_of(x))


# DLPack's device types that a program on the CPU, or on a GPU as torch names it, can read.
_DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 10: "cuda", 11: "cpu", 13: "cuda"}


def device_of(x: Any) -> str:
    """Where an array lies: "cpu", or "cuda:0" and so on (ROCm's devices too, as in torch). Whatever does not say so
    lies on the CPU."""
    if type(x) is np.ndarray:
        return "cpu"
    if isinstance(x, View) or is_torch(x):
        return str(x.device)
    if not hasattr(x, "__dlpack_device__"):
        return "cpu"
    kind, number = x.__dlpack_device__()
    name = _DEVICES.get(int(kind), f"dlpack device type {int(kind)}")
    return name if name == "cpu" else f"{name}:{number}"


def plain(x: Any, argument: str) -> np.ndarray:
    """The array as an ndarray proper, without a copy; memory maps and matrices lose their subclass.

    Raises: SpecError for anything else, and for a masked array, whose mask would be ignored.
    """
    if not isinstance(x, np.ndarray):
        raise wrong(argument, owned(x), "a NumPy array or a torch tensor")
    if isinstance(x, np.ma.MaskedArray):
        raise wrong(argument, "a masked array", "a plain array (fill it; masked elements are not skipped)")
    return np.asarray(x)


class _Memory:
    """What NumPy's array interface asks for; the memory itself belongs to the caller."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def view(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype, *, writable: bool = False
) -> np.ndarray:
    """An array over memory that already exists; nothing is copied.

    Shapes:  any; strides in bytes, of any sign, 0 included; the address may be misaligned.
    Numerics: none; the dtype names the storage (bfloat16 is its bits, uint16).
    Raises:  none of its own: the caller vouches that the memory lives as long as the view.
    """
    if 0 in shape:  # an empty array may come with a null address, which the interface refuses
        return np.empty(shape, dtype)
    where = {"data": (address, not writable), "shape": shape, "strides": strides, "typestr": dtype.str, "version": 3}
    return np.asarray(_Memory(where))
