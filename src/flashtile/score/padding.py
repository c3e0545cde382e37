"""Per-sequence lengths: keys past the end of their sequence are padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import SpecError, described
from .capture import capture, is_array
from .mask import Mask


def padding(lengths: Any) -> Mask:
    """Key j of batch b is visible iff j < lengths[b]; `lengths` is an integer array (B,)."""
    lengths = per_batch(lengths, "padding", scalar=False)
    return Mask(
        lambda offset: lambda b, h, i, j: j < lengths[b],
        name="padding",
        fits=lambda shape: check_per_batch(lengths, shape, "padding"),
    )


def per_batch(value: Any, argument: str, scalar: bool = True) -> Any:
    """An integer, or an integer array (B,), checked; lists are taken as arrays."""
    if scalar and isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    value = np.asarray(value) if isinstance(value, (list, tuple)) else value
    expected = f"an integer array (B,){' or an integer' if scalar else ''}"
    if not is_array(value):
        raise SpecError(f"{argument}: got {described(value)}, expected {expected}")
    found = capture(value, argument)
    if found.rank != 1 or found.type != "int":
        raise SpecError(f"{argument}: got {found.dtype} of shape {found.array.shape}, expected {expected}")
    return value


def check_per_batch(value: Any, shape: tuple[int, int, int, int], argument: str) -> None:
    """Raise SpecError unless an array has one element for each batch of a call."""
    if is_array(value) and tuple(value.shape) != shape[:1]:
        raise SpecError(f"{argument}: got shape {tuple(value.shape)}, expected (B,) = ({shape[0]},)")
