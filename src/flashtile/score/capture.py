"""Captured values: the arrays and scalars that a function closes over, which stay run-time parameters.

Arrays are read where they lie, in their own element type: NumPy arrays, torch tensors, and whatever
`numpy.asarray` takes. bf16 has no NumPy type, so it is held as its 16 bits. What lies on a GPU (torch, CuPy) is read
by kernels there alone: to look at it from here would make the device and the host wait for each other.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..arrays import device_of
from ..dtypes import check_byte_order
from ..errors import SpecError, described, owned
from .expr import INT_MAX, INT_MIN

# Element -> type in the language, by NumPy's code; bf16 stands apart.
_ELEMENTS = {
    "b1": ("bool", "bool"),
    "i1": ("i8", "int"),
    "i2": ("i16", "int"),
    "i4": ("i32", "int"),
    "i8": ("i64", "int"),
    "u1": ("u8", "int"),
    "u2": ("u16", "int"),
    "u4": ("u32", "int"),
    "u8": ("u64", "int"),
    "f2": ("f16", "float"),
    "f4": ("f32", "float"),
    "f8": ("f64", "float"),
}
UNNAMED = "captured number"
TYPE_OF = {**dict(_ELEMENTS.values()), "bf16": "float"}
_SPELLED = {np.dtype(code).name: element for code, (element, _) in _ELEMENTS.items()} | {"bfloat16": "bf16"}
_READ = "expected bool, an integer, float16, bfloat16, float32 or float64"
_WIDE = ("u32", "i64", "u64")  # may hold what int32 cannot


@dataclass(frozen=True, eq=False)
class ScalarCapture:
    """A captured number; another value runs the same compiled kernel."""

    value: float
    type: str
    name: str = UNNAMED


class Place(NamedTuple):
    """Where an array lies that cannot be read here. Strides in bytes."""

    device: str
    address: int
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ArrayCapture:
    """A captured array, not copied: `array` is its storage (bf16 as uint16), `source` what the caller gave.

    With a `place`, on a GPU, `array` has the shape and the dtype only: its values are zeros, and mean nothing.
    """

    array: np.ndarray
    element: str
    source: Any = field(repr=False)
    name: str = "captured array"
    place: Place | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """By its storage: what the caller gave stays in this process."""
        return ArrayCapture, (self.array, self.element, self.array, self.name, self.place)

    @property
    def device(self) -> str:
        return "cpu" if self.place is None else self.place.device

    @property
    def type(self) -> str:
        return TYPE_OF[self.element]

    @property
    def dtype(self) -> str:
        """The element type as NumPy and torch call it."""
        kind, bits = self.element.rstrip("0123456789"), self.element.lstrip("abcdefghijklmnopqrstuvwxyz")
        return {"i": "int", "u": "uint", "f": "float", "bf": "bfloat"}.get(kind, kind) + bits

    @property
    def rank(self) -> int:
        return self.array.ndim

    def read_at(self, storage: np.ndarray) -> ArrayCapture:
        """The same array where its elements are there. Raises: SpecError for integers that do not fit in int32."""
        _check_integers(storage, self.element, self.name)
        return ArrayCapture(storage, self.element, self.source, self.name)

    def widen(self, raw: np.ndarray, float_type: np.dtype) -> np.ndarray:
        """Stored elements as bool, int32 or float_type."""
        if self.element == "bf16":
            raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return raw.astype({"bool": np.dtype(bool), "int": np.dtype(np.int32), "float": float_type}[self.type])


@dataclass(frozen=True)
class Unread:
    """Stands for an array whose elements come later, row-major, when a call runs that was traced before."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> Any:
        raise ReadTooEarly(
            f"captured array: got index {index!r} while its elements are not known, expected a traced one"
        )


class ReadTooEarly(SpecError):
    """An element was asked for, by an index that is a number, of an array that is not there yet."""


@dataclass(frozen=True)
class Slot:
    """The place of a captured value among a program's run-time parameters: what remains of it in the structure."""

    number: int
    element: str  # of an array; for a scalar its type
    rank: int  # of an array; -1 for a scalar

    @property
    def type(self) -> str:
        return TYPE_OF.get(self.element, self.element)

    def after(self, others: int) -> Slot:
        """The slot that it is behind so many others."""
        return Slot(self.number + others, self.element, self.rank)

    def __str__(self) -> str:
        return f"#{self.number} {self.element}" + (f" rank {self.rank}" if self.rank >= 0 else "")


@dataclass(frozen=True)
class Access:
    """What a load reads, and on which axes the index still has to be clamped into bounds."""

    source: ArrayCapture | Slot
    clamp: tuple[bool, ...]

    def __str__(self) -> str:
        return f"{self.source} clamp {''.join('ny'[c] for c in self.clamp)}"


def is_array(value: Any) -> bool:
    """NumPy, torch, JAX and other arrays, recognised without importing their packages."""
    return isinstance(value, np.ndarray) or (
        hasattr(value, "shape")
        and hasattr(value, "dtype")
        and hasattr(value, "__getitem__")
        and not isinstance(value, (np.generic, type))
    )


def capture(value: Any, name: str = "captured array") -> ArrayCapture:
    """A view of the array for reading.

    Raises: SpecError for a device that no kernel reads, an element type that the language has no type for, and
            integers that do not fit in int32; those on a GPU are not looked at, and wrap.
    """
    if in_graph():
        return _of_compiler(value, name)
    if not _is_ordinary(value):
        if (device := device_of(value)).startswith("cuda"):
            return _on_device(value, name, device)
        if _is_stand_in(value):
            return _without_memory(value, name)
        if "jax" in sys.modules and isinstance(value, sys.modules["jax"].core.Tracer):
            return _without_memory(value, name, TRACED)
    raw, element = _storage(value, name)
    _check_integers(raw, element, name)
    return ArrayCapture(raw, element, value, name)


def _is_ordinary(value: Any) -> bool:
    """Whether it is an array of NumPy's or torch's own, in CPU memory, as in most calls: small ones wait for this."""
    kind = type(value)
    if kind is np.ndarray:
        return True
    if kind.__name__ != "Tensor" or kind.__module__ != "torch" or not value.is_cpu:
        return False
    return not sys.modules["torch"]._C._are_functorch_transforms_active()


def _check_integers(raw: np.ndarray, element: str, name: str) -> None:
    if element in _WIDE and raw.size and not (raw.min() >= INT_MIN and raw.max() <= INT_MAX):
        raise SpecError(f"{name}: got integers from {raw.min()} to {raw.max()}, expected values that fit in int32")


def in_graph() -> bool:
    """Whether torch.compile reads this call, which then does not run: arrays have kinds and shapes, no elements."""
    return "torch" in sys.modules and bool(sys.modules["torch"].compiler.is_dynamo_compiling())


def _of_compiler(value: Any, name: str) -> ArrayCapture:
    """A capture as torch.compile can read it: its tracer asks NumPy arrays, too, as tensors."""
    if not is_array(value):
        raise SpecError(f"{name}: got a {type(value).__name__}, expected a NumPy array or a torch tensor")
    tensor = sys.modules["torch"].as_tensor(value)
    spelled = str(tensor.dtype).removeprefix("torch.")
    if spelled not in _SPELLED:
        raise SpecError(f"{name}: got dtype {spelled}, {_READ}")
    shape: Any = Unread(tuple(tensor.shape), spelled)  # stands for an array
    return ArrayCapture(shape, _SPELLED[spelled], value, name)


def _storage(value: Any, name: str) -> tuple[np.ndarray, str]:
    if type(value).__module__.partition(".")[0] == "torch" or hasattr(value, "__torch_function__"):
        return _torch_storage(value, name)
    if not is_array(value):
        raise SpecError(f"{name}: got {described(value)}, expected a NumPy array or a torch tensor")
    try:
        raw = np.asarray(value)
    except Exception as e:
        raise SpecError(f"{name}: got {described(value)}, expected an array in CPU memory") from e
    check_byte_order(raw.dtype, name)
    if raw.dtype.kind == "V" and raw.dtype.name == "bfloat16":
        return raw.view(np.uint16), "bf16"
    return raw, _element(raw.dtype, name)


def _torch_storage(tensor: Any, name: str) -> tuple[np.ndarray, str]:
    if not tensor.is_cpu:
        raise SpecError(f"{name}: got a tensor on {tensor.device}, expected one in CPU memory or on a GPU")
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        return tensor.view(torch.int16).numpy().view(np.uint16), "bf16"
    try:
        raw = tensor.numpy()
    except (TypeError, RuntimeError) as e:
        got = f"{tensor.dtype} ({tensor.layout})"
        raise SpecError(f"{name}: got {got}, expected a strided bool, integer or float tensor") from e
    return raw, _element(raw.dtype, name)


def _is_stand_in(value: Any) -> bool:
    """Whether an array has no memory to read: one of a transform of torch.func, or of whoever makes a graph."""
    if type(value) is Unread:
        return True
    if "torch" not in sys.modules or not hasattr(value, "data_ptr"):
        return False
    if type(value).__name__ in ("FakeTensor", "FunctionalTensor"):
        return True
    return bool(sys.modules["torch"]._C._are_functorch_transforms_active())  # whatever is computed there is one


TRACED = "a trace of JAX"


def _without_memory(value: Any, name: str, device: str = "cpu") -> ArrayCapture:
    """A capture whose values are not to be looked at: they come when the operator runs."""
    spelled = str(value.dtype).removeprefix("torch.")
    dtype = np.dtype(np.uint16 if spelled == "bfloat16" else spelled)
    element = "bf16" if spelled == "bfloat16" else _element(dtype, name)
    shape = tuple(value.shape)
    shape_only = np.broadcast_to(np.zeros((), dtype), shape)
    strides = [dtype.itemsize * math.prod(shape[n + 1 :]) for n in range(len(shape))] if type(value) is Unread else []
    return ArrayCapture(shape_only, element, value, name, Place(device, 0, tuple(strides)))


def _on_device(value: Any, name: str, device: str) -> ArrayCapture:
    """A capture of a torch or CuPy array on a GPU."""
    if type(value).__module__.partition(".")[0] == "cupy":
        address, strides, spelled = int(value.data.ptr), tuple(value.strides), value.dtype.name
    elif hasattr(value, "data_ptr"):
        size = value.element_size()
        address, strides = value.data_ptr(), tuple(size * n for n in value.stride())
        spelled = str(value.dtype).removeprefix("torch.")
    else:
        got = f"{owned(value)} on {device}"
        raise SpecError(f"{name}: got {got}, expected a torch or CuPy array there, or one in CPU memory")
    if spelled == "bfloat16":
        dtype: np.dtype[Any] = np.dtype(np.uint16)
        element = "bf16"
    else:
        try:
            dtype = np.dtype(spelled)
        except TypeError:  # float8 and the like
            dtype = np.dtype(object)
        element = _element(dtype, name)
    shape_only = np.broadcast_to(np.zeros((), dtype), tuple(value.shape))
    return ArrayCapture(shape_only, element, value, name, Place(device, address, strides))


@functools.lru_cache(maxsize=256)
def _element(dtype: np.dtype, name: str) -> str:
    check_byte_order(dtype, name)
    found = _ELEMENTS.get(dtype.str[1:])
    if found is None:
        raise SpecError(f"{name}: got dtype {dtype}, {_READ}")
    return found[0]
