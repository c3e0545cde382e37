"""Dropout: which weights are kept, a bool over (seed, b, h, i, j), the third root beside score and mask.

It is a function of positions alone and not of how a kernel walks over them, so that every kernel, tile size, thread and
direction meets the same mask, and nothing of it is ever stored.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import numpy as np

from ..checks import finite
from ..errors import wrong
from . import philox

KEYS_A_CALL = 8  # one call of the generator gives 4 words, 8 halves, one a key
STEPS = 1 << 16  # of the probability: a weight is judged by 16 bits


@dataclass(frozen=True)
class Keep:
    """The values of one call's dropout: run-time values, whose presence alone is structure.

    threshold  of 2^16: a weight is kept iff its 16 bits, as a number, are not below it; 1 to 2^16 - 1
    seed       64 bits, the generator's key
    """

    threshold: int
    seed: int

    @property
    def dropout_p(self) -> float:
        """The share of the weights that is dropped, exactly."""
        return self.threshold / STEPS

    @property
    def share(self) -> float:
        """The share of the weights that is kept, exactly: what the kept ones are divided by."""
        return 1 - self.threshold / STEPS

    @property
    def key(self) -> tuple[int, int]:
        """The generator's key: the seed's low and high 32 bits."""
        return self.seed & philox.WORD, self.seed >> 32

    def of(self, head: int, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Which weights of one head are kept: head b * H + h, indices (r,), (n,) in any order -> bool (r, n)."""
        groups, column = np.unique(keys // KEYS_A_CALL, return_inverse=True)
        words = philox.words((groups, rows[:, None], head, 0), self.key)  # (r, groups, 4)
        halves = words.astype("<u4", copy=False).view("<u2")  # (r, groups, 8), the low half of a word first
        kept = (halves >= self.threshold).reshape(len(rows), KEYS_A_CALL * len(groups))
        return kept[:, KEYS_A_CALL * column + keys % KEYS_A_CALL]

    def drop(self, p: np.ndarray, head: int, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Weights (r, n) after dropout: 0, or divided by the share that is kept; NaN stays, as 0 * NaN would be."""
        stays = self.of(head, rows, keys) | np.isnan(p)
        return np.where(stays, p / p.dtype.type(self.share), p.dtype.type(0))


def threshold_of(dropout_p: object) -> int:
    """round(dropout_p * 2^16), halves to even. Raises: SpecError unless dropout_p is in [0, 1) and so is what it
    rounds to."""
    p = finite(dropout_p)
    if p is None or not (0 <= p < 1 and round(p * STEPS) < STEPS):
        raise wrong("dropout_p", repr(dropout_p), "a real number in [0, 1), below 1 - 2^-17: it is rounded to 2^-16")
    return round(p * STEPS)


def seed_of(seed: object) -> int:
    """A seed as an int. Raises: SpecError unless it is an integer in [0, 2^64)."""
    whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if not (whole and 0 <= int(seed) < 1 << 64):  # type: ignore[call-overload]  # an integer, if whole
        raise wrong("seed", repr(seed), "an integer in [0, 2^64)")
    return int(seed)  # type: ignore[call-overload]  # likewise


def keep_of(dropout_p: object, seed: object) -> Keep | None:
    """The dropout of a call, None if its probability rounds to 0: then nothing is drawn, and no seed is needed.

    Raises: SpecError for a wrong probability or seed, and for dropout without a seed.
    """
    if seed is None and type(dropout_p) is float and dropout_p == 0:  # as in most calls
        return None
    threshold = threshold_of(dropout_p)
    if seed is None:
        if threshold:
            raise wrong("seed", f"None with dropout_p = {dropout_p!r}", "an integer in [0, 2^64), a new one each step")
        return None
    number = seed_of(seed)
    return Keep(threshold, number) if threshold else None


def dropout_keep(shape: tuple[int, ...], dropout_p: float, seed: int | None = None) -> np.ndarray:
    """The weights that dropout keeps, as every kernel does: a boolean array, True = kept.

    Shapes:  shape (B, H, S_q, S_kv), (H, S_q, S_kv) or (S_q, S_kv), H being the number of query heads -> bool `shape`.
    Options: dropout_p, seed as in `flashtile.attention`.
    Numerics: exact. More rows, keys or batches add to a mask and change nothing of it; so do heads where B = 1.
    Raises:  SpecError naming the argument.
    Source:  docs, "What flashtile computes", dropout.

    >>> dropout_keep((2, 8), 0.5, seed=1).astype(int)
    array([[1, 1, 1, 0, 1, 0, 0, 0],
           [1, 0, 1, 1, 1, 0, 1, 0]])
    """
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if not 2 <= len(sizes) <= 4 or any(not isinstance(n, numbers.Integral) or n < 0 for n in sizes):
        raise wrong("shape", repr(shape), "(B, H, S_q, S_kv), (H, S_q, S_kv) or (S_q, S_kv)")
    kept, out = keep_of(dropout_p, seed), np.ones(sizes, bool)
    if kept is not None:
        rows, keys = (np.arange(n) for n in sizes[-2:])
        for head, place in enumerate(np.ndindex(sizes[:-2])):
            out[place] = kept.of(head, rows, keys)
    return out
