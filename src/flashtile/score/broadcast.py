"""Stored masks and biases, read in place under NumPy broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import SpecError
from .capture import ArrayCapture, capture


def broadcast_reader(shape: tuple[int, ...], argument: str) -> Callable[[Any, tuple[Any, ...]], Any]:
    """A function (array, (b, h, i, j)) -> element of an array of this shape that broadcasts to four axes.

    An axis of length 1 is read at 0, so that the program does not depend on its variable.
    """
    rank = len(shape)
    if rank > 4:
        raise SpecError(f"{argument}: got shape {shape}, expected one that broadcasts to (B, H, S_q, S_kv)")

    def read(array: Any, position: tuple[Any, ...]) -> Any:
        last = position[4 - rank :]
        return array[tuple(0 if n == 1 else at for n, at in zip(shape, last, strict=True))] if rank else array

    return read


def check_broadcast(array: Any, shape: tuple[int, int, int, int], argument: str) -> ArrayCapture:
    """The array, captured. Raises: SpecError unless its shape broadcasts to (B, H, S_q, S_kv)."""
    found = capture(array, argument)
    got = found.array.shape
    if len(got) > 4 or any(n not in (1, m) for n, m in zip(got[::-1], shape[::-1], strict=False)):
        raise SpecError(f"{argument}: got shape {got}, expected one that broadcasts to (B, H, S_q, S_kv) = {shape}")
    return found
