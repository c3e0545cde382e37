"""Who owns arrays on a GPU, and what a call asks of that library: torch and CuPy in a few lines each.

JAX has no current stream, and its arrays are not written to: they are lent to torch or CuPy through DLPack, which
orders the work of both, and results go back the same way.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from flashtile.arrays import View, device_of, is_torch, view_of
from flashtile.dtypes import DTYPES, dtype_of
from flashtile.errors import UnavailableError, wrong


class Owner(Protocol):
    """A library whose arrays lie on a GPU."""

    name: str

    def view(self, x: Any) -> View:
        """The array without its memory."""
        ...

    def key(self, x: Any) -> Hashable:
        """What a kernel depends on of an array: equal for arrays that have equal views."""
        ...

    def number(self, x: Any) -> int:
        """The number of the array's device, as CUDA counts."""
        ...

    def address(self, x: Any) -> int: ...

    def current(self, x: Any) -> AbstractContextManager[Any]:
        """Makes the device of an array the current one."""
        ...

    def stream(self, x: Any) -> int:
        """The handle of the stream that is current on the array's device."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """A new row-major array on the device of another, of a dtype by flashtile's name or "uint8"."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """A new row-major array of zeros."""
        ...

    def upload(self, array: np.ndarray, like: Any) -> Any:
        """A row-major copy of a host array on the device of another, made in the order of its stream."""
        ...

    def download(self, x: Any) -> np.ndarray:
        """A copy in host memory of an array of NumPy's dtypes, once the stream has come to it: this waits."""
        ...

    def passed(self, like: Any) -> Callable[[], bool]:
        """A mark at the end of the current stream: whether the device has passed it, asked without waiting."""
        ...

    def capturing(self) -> bool:
        """Whether a CUDA graph records what is put into the current stream, instead of the device running it."""
        ...

    def spread(self, x: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """The array, cast and broadcast, row-major."""
        ...

    def out_of_memory(self) -> tuple[type[Exception], ...]:
        """The errors by which this library says that the device is full."""
        ...


class Torch:
    """torch tensors, of CUDA and of ROCm, which torch also calls cuda."""

    name = "torch"

    def __init__(self) -> None:
        self.torch = torch = importlib.import_module("torch")
        self._dtypes = {name: getattr(torch, name) for name in (*DTYPES, "uint8")}
        self._of_graphs: list[Any] = []
        # The stream's handle without an object of torch's around it, where this torch was built with CUDA.
        self._raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    def view(self, x: Any) -> View:
        return view_of(x)

    def key(self, x: Any) -> Hashable:
        return x.shape, x.stride(), x.dtype, x.get_device()

    def number(self, x: Any) -> int:
        return int(x.get_device())

    def address(self, x: Any) -> int:
        return int(x.data_ptr())

    def current(self, x: Any) -> AbstractContextManager[Any]:
        return self.torch.cuda.device(x.get_device())

    def stream(self, x: Any) -> int:
        if self._raw_stream is not None:
            return int(self._raw_stream(x.get_device()))
        return int(self.torch.cuda.current_stream(x.device).cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        return like.new_empty(shape, dtype=self._dtypes[dtype])

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        return like.new_zeros(shape, dtype=self._dtypes[dtype])

    def upload(self, array: np.ndarray, like: Any) -> Any:
        raw = array.reshape(-1).view(np.uint8)
        host = self.torch.empty(raw.shape, dtype=self.torch.uint8, pin_memory=True)  # a copy from other memory waits
        host.numpy()[:] = raw
        if self.capturing():  # the graph copies from it at every replay
            self._of_graphs.append(host)
        return host.to(like.device, non_blocking=True)

    def download(self, x: Any) -> np.ndarray:
        return x.cpu().numpy()

    def passed(self, like: Any) -> Callable[[], bool]:
        event = self.torch.cuda.Event()
        event.record(self.torch.cuda.current_stream(like.device))
        return event.query

    def capturing(self) -> bool:
        return bool(self.torch.cuda.is_current_stream_capturing())

    def spread(self, x: Any, shape: tuple[int, ...], dtype: str) -> Any:
        return x.to(getattr(self.torch, dtype)).expand(shape).contiguous()

    def out_of_memory(self) -> tuple[type[Exception], ...]:
        return (self.torch.cuda.OutOfMemoryError,)


class CuPy:
    """CuPy arrays."""

    name = "cupy"

    def __init__(self) -> None:
        self.cupy = importlib.import_module("cupy")

    def view(self, x: Any) -> View:
        return View(tuple(x.shape), tuple(x.strides), x.dtype, device_of(x))

    def key(self, x: Any) -> Hashable:
        return x.shape, x.strides, x.dtype, x.device.id

    def number(self, x: Any) -> int:
        return int(x.device.id)

    def address(self, x: Any) -> int:
        return int(x.data.ptr)

    def current(self, x: Any) -> AbstractContextManager[Any]:
        return self.cupy.cuda.Device(x.device.id)

    def stream(self, x: Any) -> int:
        return int(self.cupy.cuda.get_current_stream().ptr)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        # bfloat16 is ml_dtypes', by which q came: its dtype object is known.
        same = dtype != "uint8" and dtype_of(like.dtype).name == dtype
        return self.cupy.empty(shape, like.dtype if same else dtype)

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        result = self.empty(shape, dtype, like)
        result.view("uint8")[...] = 0  # of bfloat16, too, which CuPy has no kernels for
        return result

    def upload(self, array: np.ndarray, like: Any) -> Any:
        return self.cupy.asarray(array.reshape(-1).view(np.uint8))  # through pinned memory, in order

    def download(self, x: Any) -> np.ndarray:
        return self.cupy.asnumpy(x)

    def passed(self, like: Any) -> Callable[[], bool]:
        event = self.cupy.cuda.Event(disable_timing=True)
        event.record(self.cupy.cuda.get_current_stream())
        return lambda: bool(event.done)

    def capturing(self) -> bool:
        return bool(self.cupy.cuda.get_current_stream().is_capturing())

    def spread(self, x: Any, shape: tuple[int, ...], dtype: str) -> Any:
        return self.cupy.ascontiguousarray(self.cupy.broadcast_to(x.astype(dtype, copy=False), shape))

    def out_of_memory(self) -> tuple[type[Exception], ...]:
        return (self.cupy.cuda.memory.OutOfMemoryError,)


OWNERS: dict[str, type[Torch] | type[CuPy]] = {"torch": Torch, "cupy": CuPy}
# Libraries whose arrays are lent to one of the owners: module of the type, module that imports results back.
LENDERS = {"jax": "jax", "jaxlib": "jax"}


def library_of(x: object) -> str:
    """The package that an array's type comes from."""
    return "torch" if is_torch(x) else type(x).__module__.partition(".")[0]


def owner_of(library: str) -> Owner:
    """Who owns the memory of a library's calls.

    Raises: SpecError for a library that is not known, UnavailableError if JAX's arrays cannot be lent to anyone.
    """
    if library in OWNERS:
        return _owner(OWNERS[library])  # type: ignore[arg-type]  # types are hashable
    if library not in LENDERS:
        raise wrong("q", f"an array of {library} on a GPU", "one of torch, CuPy or JAX")
    for name, owner in OWNERS.items():
        if importlib.util.find_spec(name) is not None:
            return _owner(owner)  # type: ignore[arg-type]  # likewise
    raise UnavailableError(f"q: got an array of {LENDERS[library]} on a GPU, expected torch or CuPy beside it")


@functools.cache
def _owner(kind: Any) -> Owner:
    """One for all calls: it holds nothing of them."""
    return kind()


def borrow(owner: Owner, x: Any) -> Any:
    """The array as the owner's, without a copy: itself, or lent to it."""
    if library_of(x) == owner.name or device_of(x) == "cpu":
        return x
    return importlib.import_module(owner.name).from_dlpack(x)


# Inputs that launched kernels may still read: (whether the device has passed them, the arrays).
_held: list[tuple[Callable[[], bool], tuple[Any, ...]]] = []


def hold(owner: Owner, *inputs: Any) -> None:
    """Keep arrays alive until the device has passed the end of the current stream; let go of those that it passed."""
    _held.append((owner.passed(inputs[0]), inputs))
    for entry in tuple(_held):
        if entry[0]():
            with contextlib.suppress(ValueError):  # another thread was faster
                _held.remove(entry)


def give_back(library: str, x: Any) -> Any:
    """A result as an array of the library that the inputs came from, without a copy."""
    if library not in LENDERS:
        return x
    return importlib.import_module(f"{LENDERS[library]}.dlpack").from_dlpack(x)
