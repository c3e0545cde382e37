"""A query tile and its key tiles in NNTile's layout, with what their attention should be."""

from __future__ import annotations

from typing import Any

import numpy as np
from inputs import numpy_dtype

import flashtile
from flashtile import nntile
from flashtile.dtypes import DTYPES
from flashtile.testing import assert_gradients_accurate, expect, ulp

SIZE, BATCH, GROUP, HEADS = 24, 2, 3, 2
QUERIES, KEYS, TILES = 50, 70, 3


def rows_first(x: np.ndarray) -> np.ndarray:
    """[head_size, n_seq, n_batch, kv_group_size, n_head_kv] as (B, H, S, D); logsumexp as (B, H, S)."""
    order = (2, 4, 3, 1, 0) if x.ndim == 5 else (1, 3, 2, 0)
    moved = x.transpose(order)
    return np.ascontiguousarray(moved.reshape(moved.shape[0], -1, *moved.shape[3:]))


class Problem:
    """A query tile and TILES key tiles, with what their attention should be."""

    def __init__(self, dtype: str, mask: str | None = None, value_size: int = SIZE, **options: Any) -> None:
        rng = np.random.default_rng(0)
        kind = numpy_dtype(dtype)
        heads = (BATCH, GROUP, HEADS)

        def drawn(size: int, length: int) -> np.ndarray:
            return np.asfortranarray(rng.uniform(-1, 1, (size, length, *heads)).astype(kind))

        self.q, self.k, self.v = drawn(SIZE, QUERIES), drawn(SIZE, TILES * KEYS), drawn(value_size, TILES * KEYS)
        self.a = np.zeros((value_size, QUERIES, *heads), kind, order="F")
        accumulator = DTYPES[dtype].accumulator
        self.lse = np.full((QUERIES, *heads), -np.inf, accumulator, order="F")
        self.mask, self.dtype = None, dtype
        if mask is not None:
            seen = rng.random((TILES * KEYS, QUERIES)) < 0.7
            seen[:, 7] = False  # a row without a key
            seen[KEYS : 2 * KEYS, 20:] = False  # rows that a key tile adds nothing to
            options["mask"] = seen.T
            stored = kind if mask == "own" else np.dtype(mask)
            self.mask = np.asfortranarray(seen if mask == "bool" else np.where(seen, 0, -np.inf).astype(stored))
        self.expected = expect(*map(rows_first, (self.q, self.k, self.v)), **options)

    def key_tiles(self) -> list[tuple[int, np.ndarray, np.ndarray | None, np.ndarray]]:
        """(first key, K, mask, V) of each."""
        found = []
        for first in range(0, TILES * KEYS, KEYS):
            at = slice(first, first + KEYS)
            mask = None if self.mask is None else np.asfortranarray(self.mask[at])
            found.append((first, np.asfortranarray(self.k[:, at]), mask, np.asfortranarray(self.v[:, at])))
        return found

    def run(self, **options: Any) -> None:
        """On arrays."""
        for first, k, mask, v in self.key_tiles():
            nntile.flash_sdpa_fwd(k, self.q, mask, self.lse, v, self.a, first_key=first, **options)

    def check(self) -> None:
        """By the accuracy rule, to which rounding A once a tile in 16 bits adds half an ulp each time."""
        o, lse = self.expected
        lse.check(rows_first(self.lse), "logsumexp")
        got = rows_first(self.a).astype(o.value.dtype)
        largest = float(np.abs(self.v.astype("float64")).max())  # of any |A| on the way: weights sum to 1
        bound = o.allowed + (TILES * 0.5 * ulp(largest, self.dtype) if DTYPES[self.dtype].itemsize == 2 else 0)
        error = np.abs(got - o.value).max()
        assert np.isfinite(got).all() and error <= bound, f"error {error:.3g}, allowed {bound:.3g}"


K = np.zeros((8, 6, 1, 2, 3), "float32", order="F")
Q = np.zeros((8, 4, 1, 2, 3), "float32", order="F")
LSE = np.zeros((4, 1, 2, 3), "float32", order="F")
MASK = np.zeros((6, 4), "float32", order="F")
VALID = {"K": K, "Q": Q, "mask": MASK, "logsumexp": LSE, "V": K.copy("F"), "A": Q.copy("F")}


class BackwardProblem(Problem):
    """The same with A and logsumexp of all key tiles, a dA, and room for gradients."""

    def __init__(self, dtype: str, mask: str | None = None, wide: bool = False, **options: Any) -> None:
        """wide: gradients in accumulators, where one a call rounds nothing."""
        super().__init__(dtype, mask, 17, **options)
        if self.mask is not None:
            options["mask"] = np.asarray(self.mask if mask == "bool" else self.mask == 0).T
        self.options, rng = options, np.random.default_rng(3)
        o, lse = flashtile.attention(*map(rows_first, (self.q, self.k, self.v)), return_lse=True, **options)
        self.a[...], self.lse[...] = as_tile(o), as_tile(lse)
        self.da = np.asfortranarray(rng.standard_normal(self.a.shape).astype(self.a.dtype))
        kind = self.lse.dtype if wide else self.q.dtype
        self.dq, self.dk, self.dv = (np.zeros_like(x, kind) for x in (self.q, self.k, self.v))

    def gradient_tiles(self) -> list[tuple[int, list[np.ndarray], list[np.ndarray]]]:
        """(first key, [K, mask, V], [dK, dV]) of each, the last two views of the whole where that can be."""
        found = []
        for first, *read in self.key_tiles():
            at = slice(first, first + KEYS)
            found.append((first, read, [np.asfortranarray(x[:, at]) for x in (self.dk, self.dv)]))
        return found

    def run(self, **options: Any) -> None:
        """On arrays."""
        for first, (k, mask, v), (dk, dv) in self.gradient_tiles():
            nntile.flash_sdpa_bwd(
                k, self.q, mask, self.lse, v, self.a, self.da, dk, self.dq, dv, first_key=first, **options
            )
            self.dk[:, first : first + KEYS], self.dv[:, first : first + KEYS] = dk, dv

    def check(self) -> None:
        """By the accuracy rule."""
        q, k, v, do = map(rows_first, (self.q, self.k, self.v, self.da))
        found = flashtile.Gradients(*(rows_first(x.astype(self.q.dtype)) for x in (self.dq, self.dk, self.dv)))
        assert_gradients_accurate(found, do, q, k, v, **self.options)


def as_tile(x: np.ndarray) -> np.ndarray:
    """(B, H, S, D) or (B, H, S) in NNTile's order."""
    split = x.reshape(BATCH, HEADS, GROUP, *x.shape[2:])
    return split.transpose((4, 3, 0, 2, 1) if split.ndim == 5 else (3, 0, 2, 1))
