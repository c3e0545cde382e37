"""The call in progress on a GPU: where kernels find their stream and their memory."""

from __future__ import annotations

import math
import sys
from contextvars import ContextVar
from typing import Any

import numpy as np

from flashtile.dtypes import dtype_of
from flashtile.errors import KernelError
from flashtile.owners import Owner


class Here:
    """The call in progress: where kernels find their stream and their memory."""

    def __init__(self, owner: Owner, like: Any) -> None:
        self.owner, self.like = owner, like
        self.number = owner.number(like)  # as CUDA counts
        self.stream = owner.stream(like)

    @property
    def device(self) -> str:
        return f"cuda:{self.number}"

    def empty(self, shape: tuple[int, ...], dtype: str, what: str) -> Any:
        """A new array of a dtype by its name, or of "uint8".

        Raises: KernelError that says what there was no room for, the library's error as its cause.
        """
        try:
            return self.owner.empty(shape, dtype, self.like)
        except self.owner.out_of_memory() as cause:
            size = 1 if dtype == "uint8" else dtype_of(dtype).itemsize
            raise self._full(what, math.prod(shape) * size, cause) from cause

    def zeros(self, shape: tuple[int, ...], dtype: str, what: str) -> Any:
        """A new array of zeros. Raises: as empty."""
        try:
            return self.owner.zeros(shape, dtype, self.like)
        except self.owner.out_of_memory() as cause:
            raise self._full(what, math.prod(shape) * dtype_of(dtype).itemsize, cause) from cause

    def upload(self, array: np.ndarray, what: str) -> Any:
        """A copy of a host array. Raises: as empty."""
        try:
            return self.owner.upload(np.ascontiguousarray(array), self.like)
        except self.owner.out_of_memory() as cause:
            raise self._full(what, array.nbytes, cause) from cause

    def _full(self, what: str, nbytes: int, cause: Exception) -> KernelError:
        return KernelError(f"{self.device}: no memory for {what}, {nbytes} bytes: {cause}")


_here: ContextVar[Here] = ContextVar("flashtile_device_call")


class calling:
    """Within it, calls run on the device and the current stream of an array. Not by a generator: every call has one."""

    def __init__(self, owner: Owner, like: Any) -> None:
        self._owner, self._like = owner, like
        self._device = owner.current(like)

    def __enter__(self) -> Here:
        self._device.__enter__()
        try:
            here = Here(self._owner, self._like)
        except BaseException:
            self._device.__exit__(*sys.exc_info())
            raise
        self._token = _here.set(here)
        return here

    def __exit__(self, *error: Any) -> None:
        _here.reset(self._token)
        self._device.__exit__(*error)


def here() -> Here:
    """The call in progress on this thread. Raises: LookupError if there is none."""
    return _here.get()


def in_call() -> bool:
    """Whether a call is in progress on this thread."""
    return _here.get(None) is not None
