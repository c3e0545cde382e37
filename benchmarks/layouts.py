"""Ways in which an array (batch, heads, rows, columns) may lie in memory: the same values, other strides."""

from __future__ import annotations

import numpy as np


def _within(array: np.ndarray, shape: tuple[int, ...], part: tuple[slice, ...]) -> np.ndarray:
    """A copy that is part of a larger array."""
    found = np.zeros(shape, array.dtype)[part]
    found[...] = array
    return found


def heads_last(x: np.ndarray) -> np.ndarray:
    """(batch, rows, heads, columns) in memory, as projections leave it."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def transposed(x: np.ndarray) -> np.ndarray:
    """Columns a row apart: each row's elements lie far from one another."""
    return np.ascontiguousarray(x.swapaxes(2, 3)).swapaxes(2, 3)


def stepped(x: np.ndarray) -> np.ndarray:
    """Every other element."""
    return _within(x, (*x.shape[:3], 2 * x.shape[3]), np.s_[..., ::2])


def backwards(x: np.ndarray) -> np.ndarray:
    """The last row first."""
    return np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1]


def cache(x: np.ndarray) -> np.ndarray:
    """The filled part of something longer."""
    return _within(x, (*x.shape[:2], x.shape[2] + 1000, x.shape[3]), np.s_[:, :, : x.shape[2]])


def shifted(x: np.ndarray) -> np.ndarray:
    """Rows that begin at an odd element: no vector of theirs is aligned."""
    return _within(x, (*x.shape[:3], x.shape[3] + 1), np.s_[..., 1:])


LAYOUTS = {"": np.asarray} | {f.__name__: f for f in (heads_last, transposed, stepped, backwards, cache, shifted)}
