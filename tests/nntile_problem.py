"""A query tile and its key tiles in NNTile's layout, with what their attention should be."""

from __future__ import annotations

from typing import Any

import numpy as np
from inputs import numpy_dtype

from flashtile import nntile
from flashtile.dtypes import DTYPES
from flashtile.testing import expect, ulp

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
