"""Least and greatest element of a captured array over boxes of indices."""

from __future__ import annotations

import numpy as np

from .capture import ArrayCapture
from .expr import INT_MAX, INT_MIN
from .interval import Interval, anything

# Elements that the reductions may visit in all; beyond, the extremes of the whole array serve every box.
_MOST_WORK = 1 << 27

Axis = tuple[np.ndarray, np.ndarray]  # first and last index of every box along one axis


def range_extremes(source: ArrayCapture, index: list[Axis], float_type: np.dtype) -> Interval:
    """Extremes over the boxes index[0] x index[1] x ..., all of whose indices are in bounds.

    Axis by axis, the distinct ranges are reduced once and shared by all boxes: tiles of a grid have few.
    """
    array = source.array
    if not array.size:
        return _typed(source, np.zeros((), array.dtype), np.zeros((), array.dtype), float_type)
    fixed = [lo is hi and lo.ndim == 0 for lo, hi in index]
    if any(fixed) and not all(fixed):  # a smaller array does
        array = array[tuple(int(lo) if f else slice(None) for (lo, _), f in zip(index, fixed, strict=True))]
        index = [axis for axis, f in zip(index, fixed, strict=True) if not f]
    if all(lo is hi or np.array_equal(lo, hi) for lo, hi in index):
        values = np.asarray(array[tuple(lo for lo, _ in index)])
        return _typed(source, values, values, float_type)
    axes = [_distinct(lo, hi) for lo, hi in index]
    work = array.size // array.shape[-1] * max(array.shape[-1], int((axes[-1][1] - axes[-1][0] + 1).sum()))
    if work > _MOST_WORK:
        return _whole(source, array, index, float_type)
    low = high = array.view(np.uint8) if array.dtype == bool else array
    if source.element == "bf16":  # its bits are not in the order of its values
        low = high = source.widen(array, np.dtype(np.float32))
    for axis in reversed(range(array.ndim)):
        first, last, _ = axes[axis]
        low, high = _reduce(np.minimum, low, first, last, axis), _reduce(np.maximum, high, first, last, axis)
    pick = tuple(which for _, _, which in axes)
    return _typed(source, low[pick], high[pick], float_type)


def unknown(source: ArrayCapture, float_type: np.dtype) -> Interval:
    """The bounds of whatever an array of this type may hold."""
    if source.type == "float":
        return anything(np.zeros((), float_type))
    low, high = (0, 1) if source.type == "bool" else (INT_MIN, INT_MAX)
    return _typed(source, np.asarray(low), np.asarray(high), float_type)


def _distinct(lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct ranges, sorted, and for each box which of them it has."""
    lo, hi = np.broadcast_arrays(lo, hi)
    key = lo.astype(np.int64) << 32 | hi.astype(np.int64)
    unique, which = np.unique(key.ravel(), return_inverse=True)
    return unique >> 32, unique & 0xFFFFFFFF, which.reshape(key.shape)


def _reduce(op: np.ufunc, array: np.ndarray, first: np.ndarray, last: np.ndarray, axis: int) -> np.ndarray:
    """op over array[first[n] : last[n] + 1] along the axis, for every n."""
    if np.array_equal(first, last):
        return np.take(array, first, axis)
    # reduceat reduces between consecutive positions: start, end, start, end, ...; every other result is wanted.
    # An end past the array is left out, since the last segment reaches to the end by itself; only a range that
    # is not the last one and still ends there needs care: its end is brought in by one and the edge element added.
    size = array.shape[axis]
    stop = np.minimum(last + 1, size - 1)
    positions = np.stack([first, stop], 1).ravel()
    reduced = np.take(op.reduceat(array, positions, axis), np.arange(0, positions.size, 2), axis)
    edge = last + 1 == size
    if edge.any():
        shape = [1] * array.ndim
        shape[axis] = -1
        with_edge = op(reduced, np.take(array, [size - 1], axis))
        reduced = np.where(edge.reshape(shape), with_edge, reduced)
    return reduced


def _whole(source: ArrayCapture, array: np.ndarray, index: list[Axis], float_type: np.dtype) -> Interval:
    shape = np.broadcast_shapes(*(lo.shape for lo, _ in index))
    array = source.widen(array, np.dtype(np.float32)) if source.element == "bf16" else array
    return _typed(source, np.full(shape, array.min()), np.full(shape, array.max()), float_type)


def _typed(source: ArrayCapture, low: np.ndarray, high: np.ndarray, float_type: np.dtype) -> Interval:
    """Bounds in the array types of intervals; NaN among the elements means anything may come out."""
    if source.type == "bool":
        return Interval(low.astype(np.uint8), high.astype(np.uint8))
    if source.type == "int":
        return Interval(low.astype(np.int64), high.astype(np.int64))
    if source.element == "bf16" and low.dtype == np.uint16:
        low, high = source.widen(low, np.dtype(np.float32)), source.widen(high, np.dtype(np.float32))
    lo, hi = low.astype(float_type), high.astype(float_type)
    nan = np.isnan(lo)
    inf = float_type.type(np.inf)
    return Interval(np.where(nan, -inf, lo), np.where(nan, inf, hi), nan if nan.any() else False)
