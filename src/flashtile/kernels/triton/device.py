"""What the host side asks of a device: memory, and launches in order. Nothing waits for a launch to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from flashtile.kernels.triton.specialisation import Specialisation

SCRATCH_ALIGNMENT = 128  # bytes, of tensor descriptors; what a library allocates is aligned to more


class Pointer(NamedTuple):
    """An address on the device, the Triton name of what lies there, and whoever owns the memory. As an integer, in a
    block of parameters, it is the address."""

    address: int
    element: str
    keep: Any = None

    def __index__(self) -> int:
        return self.address


class Placed(NamedTuple):
    """An array on the device. Strides in elements."""

    pointer: Pointer
    strides: tuple[int, ...]


class Bound(Protocol):
    """A kernel and those of its arguments that are alike at every launch. Safe to launch from many threads."""

    @property
    def specialisation(self) -> Specialisation: ...

    def __call__(self, grid: int, values: Mapping[str, Any]) -> None:
        """Run `grid` programs. values: for each other name of the signature an int, which of a pointer is the address,
        a Pointer, or a tuple of these; names that the kernel does not take are passed over. "scratch" among them: the
        address of what `scratch_bytes` says, which else is asked for at this launch."""
        ...

    def scratch_bytes(self, grid: int) -> int:
        """Bytes that so many programs write for themselves, a multiple of SCRATCH_ALIGNMENT."""
        ...


class Device(Protocol):
    """Every method may be called from any thread; each acts on the caller's stream, in order."""

    def empty(self, count: int, element: str) -> Pointer:
        """Memory for so many elements, aligned to 16 bytes, for as long as the pointer lives."""
        ...

    def array(self, shape: tuple[int, ...], element: str) -> Pointer:
        """A new row-major array of the device's library, which the pointer keeps."""
        ...

    def place(self, array: np.ndarray, element: str) -> Placed:
        """An array of the host where kernels can read it: itself, or a copy. Axes of stride 0 keep it."""
        ...

    def keep(self, array: np.ndarray, element: str) -> Pointer:
        """A row-major array of the host where kernels can read it: one that was kept for an earlier call on this
        stream, with the same contents, or a copy that later calls may find."""
        ...

    def processors(self) -> int:
        """How many programs run at the same time at least: what keeps all of the device busy."""
        ...

    def cache_bytes(self) -> int:
        """Of the memory that all processors read through."""
        ...

    def bind(self, specialisation: Specialisation, fixed: Mapping[str, Any]) -> Bound:
        """A kernel with those of its arguments that are alike at every call of its."""
        ...
