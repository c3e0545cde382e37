"""What the host side asks of a device: memory, and launches in order. Nothing waits for a launch to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from flashtile.kernels.triton.specialisation import Specialisation


class Pointer(NamedTuple):
    """An address on the device, the Triton name of what lies there, and whoever owns the memory."""

    address: int
    element: str
    keep: Any = None


class Placed(NamedTuple):
    """An array on the device. Strides in elements."""

    pointer: Pointer
    strides: tuple[int, ...]


class Device(Protocol):
    """Every method may be called from any thread; each acts on the caller's stream, in order."""

    def empty(self, count: int, element: str) -> Pointer:
        """Memory for so many elements, aligned to 16 bytes, for as long as the pointer lives."""
        ...

    def place(self, array: np.ndarray, element: str) -> Placed:
        """An array of the host where kernels can read it: itself, or a copy. Axes of stride 0 keep it."""
        ...

    def launch(self, specialisation: Specialisation, grid: int, values: Mapping[str, Any]) -> None:
        """Run `grid` programs. values: for each name of the signature an int, a Pointer, or a tuple of these."""
        ...
