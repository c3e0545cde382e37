"""Arrays that say they lie on a GPU, for tests on machines without one: CuPy's attributes over NumPy memory, and an
owner of them that keeps a diary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from flashtile.arrays import View


class DeviceArray:
    """What flashtile asks of a CuPy array. Its memory is the host's, so that kernels for the CPU can read it."""

    __module__ = "cupy"

    def __init__(self, array: np.ndarray, device: int = 0) -> None:
        self.array = array
        self.shape, self.strides, self.dtype, self.ndim = array.shape, array.strides, array.dtype, array.ndim
        self.data = SimpleNamespace(ptr=array.ctypes.data)
        self.device = SimpleNamespace(id=device)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.id

    def __getitem__(self, index: Any) -> Any:
        return DeviceArray(self.array[index], self.device.id)

    def __array__(self, *args: Any, **keywords: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")


class Full(Exception):
    """The device has no memory left, says the library."""


class HostOwner:
    """Owner of DeviceArrays, with a stream for each device; `diary` has what was asked of it, in order."""

    name = "cupy"

    def __init__(self) -> None:
        self.diary: list[tuple[Any, ...]] = []
        self.idle = False  # whether the device has passed every mark
        self.full_at: str | None = None  # what fails for want of memory: "empty" or "upload"
        self.active: int | None = None  # the current device
        self.recording = False  # whether a graph captures

    def view(self, x: DeviceArray) -> View:
        return View(x.shape, x.strides, x.dtype, f"cuda:{x.device.id}")

    def key(self, x: DeviceArray) -> Any:
        return x.shape, x.strides, x.dtype, x.device.id

    def number(self, x: DeviceArray) -> int:
        return x.device.id

    def address(self, x: DeviceArray) -> int:
        return x.data.ptr

    @contextlib.contextmanager
    def current(self, x: DeviceArray) -> Iterator[None]:
        self.active = x.device.id
        try:
            yield
        finally:
            self.active = None

    def stream(self, x: DeviceArray) -> int:
        return 0x1000 + x.device.id

    def empty(self, shape: tuple[int, ...], dtype: str, like: DeviceArray) -> DeviceArray:
        result = np.full(shape, 0xFF, np.uint8) if dtype == "uint8" else np.full(shape, np.nan, dtype)
        return self._kept("empty", result, like)

    def zeros(self, shape: tuple[int, ...], dtype: str, like: DeviceArray) -> DeviceArray:
        return self._kept("zeros", np.zeros(shape, dtype), like)

    def upload(self, array: np.ndarray, like: DeviceArray) -> DeviceArray:
        return self._kept("upload", array.copy(), like)

    def download(self, x: DeviceArray) -> np.ndarray:
        self.diary.append(("download", x.shape))
        return x.array

    def passed(self, like: DeviceArray) -> Any:
        self.diary.append(("mark", like.shape))
        return lambda: self.idle

    def capturing(self) -> bool:
        return self.recording

    def spread(self, x: DeviceArray, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        return DeviceArray(np.ascontiguousarray(np.broadcast_to(x.array.astype(dtype), shape)), x.device.id)

    def out_of_memory(self) -> tuple[type[Exception], ...]:
        return (Full,)

    def _kept(self, what: str, array: np.ndarray, like: DeviceArray) -> DeviceArray:
        assert self.active == like.device.id, "memory of a device that is not the current one"
        self.diary.append((what, array.shape))
        if what == self.full_at:
            raise Full(f"no room to {what}")
        return DeviceArray(array, like.device.id)
