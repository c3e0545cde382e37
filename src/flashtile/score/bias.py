"""A stored bias, added to the scores, read in place."""

from __future__ import annotations

from typing import Any

from ..errors import SpecError
from .broadcast import broadcast_reader, check_broadcast
from .capture import capture
from .mask import Score


def bias(array: Any) -> Score:
    """s + array[b, h, i, j], under NumPy broadcasting to (B, H, S_q, S_kv); any float dtype.

    Raises: SpecError for other dtypes and for more than four axes.
    """
    found = capture(array, "bias")
    if found.type != "float":
        raise SpecError(f"bias: got {found.dtype}, expected a float dtype; a boolean mask goes to mask=")
    read = broadcast_reader(found.array.shape, "bias")
    return Score(
        lambda offset: lambda s, b, h, i, j: s + read(array, (b, h, i, j)),
        name="bias",
        fits=lambda shape: check_broadcast(array, shape, "bias"),
    )
