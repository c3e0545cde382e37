"""The dtypes attention is computed in: one table, one row each.

A dtype is known by its name, so arrays of ml_dtypes and torch are recognised without importing either.
NumPy has no bfloat16 of its own: kernels written in NumPy store it as uint16 bits and use the two
conversions at the end of this file.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashtile.errors import wrong


@dataclass(frozen=True, slots=True)
class DType:
    """One row of the table.

    eps is the distance from 1 to the next number (NumPy's convention), tiny the smallest normal number.
    """

    name: str
    itemsize: int  # bytes
    accumulator: str  # name of the dtype of sums, of the softmax and of lse
    numpy: np.dtype[Any]  # how NumPy stores it; bits where NumPy has no such number
    eps: float
    tiny: float
    largest: float


DTYPES: dict[str, DType] = {
    row.name: row
    for row in (
        DType("float64", 8, "float64", np.dtype(np.float64), 2.0**-52, 2.0**-1022, sys.float_info.max),
        DType("float32", 4, "float32", np.dtype(np.float32), 2.0**-23, 2.0**-126, (2 - 2.0**-23) * 2.0**127),
        DType("float16", 2, "float32", np.dtype(np.float16), 2.0**-10, 2.0**-14, 65504.0),
        DType("bfloat16", 2, "float32", np.dtype(np.uint16), 2.0**-7, 2.0**-126, (2 - 2.0**-7) * 2.0**127),
    )
}

# Rows by the dtype objects met so far: NumPy takes microseconds to spell a dtype's name.
_seen: dict[object, DType] = {}


def dtype_of(dtype: object, argument: str = "dtype") -> DType:
    """Find the row of a dtype given as a name, a NumPy dtype or scalar type, or a torch dtype.

    Raises: SpecError, naming `argument`, for any other dtype and for a byte order that is not this machine's.
    """
    try:
        return _seen[dtype]
    except (KeyError, TypeError):  # met for the first time, or not hashable, and so none of ours
        pass
    if isinstance(dtype, np.dtype):
        name = dtype.name
        check_byte_order(dtype, argument)
    elif isinstance(dtype, type):
        name = dtype.__name__  # np.float32, ml_dtypes.bfloat16
    else:
        name = str(dtype).removeprefix("torch.")
    row = DTYPES.get(name)
    if row is None:
        hint = " (np.load reads bfloat16 as this: x.view(ml_dtypes.bfloat16))" if name == "void16" else ""
        raise wrong(argument, f"dtype {name}", "one of " + ", ".join(DTYPES) + hint)
    _seen[dtype] = row
    return row


def check_byte_order(dtype: np.dtype, argument: str) -> None:
    """Raise SpecError for numbers that this machine cannot read where they lie, as big-endian files hold them."""
    if not dtype.isnative:
        got = f"dtype {dtype.name} in foreign byte order ({dtype.str})"
        raise wrong(argument, got, "this machine's byte order: x.astype(x.dtype.newbyteorder('='))")


def widen_bits(bits: np.ndarray) -> np.ndarray:
    """Turn bfloat16 bits (uint16) into float32, exactly. A bfloat16 is the upper half of a float32."""
    wide: np.ndarray = bits.astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 or float64 to the nearest bfloat16, ties to even, as bits (uint16). NaN stays NaN."""
    x = np.asarray(x)
    single = _round_to_odd(x) if x.dtype.itemsize > 4 else x.astype(np.float32)
    bits = single.view(np.uint32)
    # Adding just under half of the dropped part, plus the last kept bit, carries exactly when the value rounds up.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x0040)  # the carry could turn a NaN into -0
    return np.where(np.isnan(single), quiet_nan, rounded).astype(np.uint16)


def _round_to_odd(x: np.ndarray) -> np.ndarray:
    """Narrow to float32 so that a second rounding is exact: truncate, and set the last bit if anything was lost."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        nearest = x.astype(np.float32)
        outward = np.abs(nearest.astype(x.dtype)) > np.abs(x)
        truncated = np.where(outward, np.nextafter(nearest, np.float32(0)), nearest)
        lost = (truncated.astype(x.dtype) != x) & ~np.isnan(x)
    return (truncated.view(np.uint32) | lost.astype(np.uint32)).view(np.float32)
