"""Arrays that say they lie on a GPU, for tests on machines without one: CuPy's attributes over NumPy memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


class DeviceArray:
    """What flashtile asks of a CuPy array. Its memory is the host's, so that the interpreter's kernels can read it."""

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
