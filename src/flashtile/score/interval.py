"""Intervals: what a value can be over a tile, as arrays of bounds, one element a tile.

Float bounds are computed in the type that the kernel computes in. Rounding is monotone, so the bounds of an
exactly rounded operation enclose every value the kernel can get; functions that kernels approximate are
widened. An interval that says too much is right, only slower: the tile counts as PARTIAL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .expr import INT_MAX, INT_MIN

Array = np.ndarray


class Interval(NamedTuple):
    """Values in [lo, hi], or NaN where `nan`.

    Bools are uint8 0 and 1 (lo: certainly true, hi: possibly true); ints are int64 that holds int32 values.
    """

    lo: Array
    hi: Array
    nan: Array | bool = False

    @property
    def single(self) -> Array:
        """Where the value is known."""
        return (self.lo == self.hi) & ~np.asarray(self.nan)


def wrap(lo: Array, hi: Array) -> Interval:
    """Exact integer bounds of an int32 result: where they leave int32 the result wraps and may be anything."""
    out = (lo < INT_MIN) | (hi > INT_MAX)
    return Interval(np.where(out, INT_MIN, lo), np.where(out, INT_MAX, hi))


def truth(certain: Array, possible: Array) -> Interval:
    return Interval(np.asarray(certain).astype(np.uint8), np.asarray(possible).astype(np.uint8))


def hull(x: Interval, y: Interval) -> Interval:
    """The least interval that holds both."""
    return Interval(np.minimum(x.lo, y.lo), np.maximum(x.hi, y.hi), either(x.nan, y.nan))


def corners(op: Callable[[Array, Array], Array], x: Interval, y: Interval) -> tuple[Array, Array]:
    """Least and greatest of op at the four ends; a NaN (0 * inf) counts as 0, which lies between its neighbours."""
    ends = [op(a, b) for a in (x.lo, x.hi) for b in (y.lo, y.hi)]
    if np.asarray(ends[0]).dtype.kind == "f":
        ends = [np.where(np.isnan(e), e.dtype.type(0), e) for e in ends]
    return np.minimum.reduce(np.broadcast_arrays(*ends)), np.maximum.reduce(np.broadcast_arrays(*ends))


def anything(like: Array) -> Interval:
    """No knowledge of a float."""
    dtype = np.asarray(like).dtype
    shape = np.shape(like)
    return Interval(np.full(shape, -np.inf, dtype), np.full(shape, np.inf, dtype), np.full(shape, True))


def unless(known: Interval, unknown: Array) -> Interval:
    """The float interval, or anything where `unknown`."""
    inf = known.lo.dtype.type(np.inf)
    return Interval(np.where(unknown, -inf, known.lo), np.where(unknown, inf, known.hi), either(known.nan, unknown))


def monotone(function: Callable[[Array], Array], x: Interval, *, ulps: int = 0) -> Interval:
    """An increasing function; where a kernel approximates it, the bounds give way by so many ulp."""
    dtype, (lo, hi) = x.lo.dtype, (function(x.lo), function(x.hi))
    if ulps:
        info = np.finfo(dtype)
        lo = lo - (np.abs(lo) * (ulps * info.eps) + info.tiny)
        hi = hi + (np.abs(hi) * (ulps * info.eps) + info.tiny)
    lo, hi = np.where(np.isnan(lo), -np.inf, lo), np.where(np.isnan(hi), np.inf, hi)
    return Interval(lo.astype(dtype), hi.astype(dtype), x.nan)


def infinite(x: Interval) -> Array:
    return np.isinf(x.lo) | np.isinf(x.hi)


def holds_zero(x: Interval) -> Array:
    return (x.lo <= 0) & (x.hi >= 0)


def either(a: Array | bool, b: Array | bool) -> Array | bool:
    """Logical or of two `nan` fields."""
    return b if a is False else a if b is False else np.logical_or(a, b)
