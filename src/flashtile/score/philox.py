"""Philox4x32, the counter generator that dropout draws from: words that depend on a counter and a key alone.

A generator without state, so that whoever needs a number computes it in place, in any order and any number of times.
Seven rounds, the fewest that pass BigCrush.  Source: Salmon, Moraes, Dror and Shaw 2011, Parallel Random Numbers: As
Easy as 1, 2, 3, section 3.3 and table 2.  Its form in machine code is emit_philox.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # of counter words 0 and 2
WEYL = 0x9E3779B9, 0xBB67AE85  # what a round adds to the two key words
WORD = 0xFFFFFFFF


def words(counter: Sequence[np.typing.ArrayLike], key: tuple[int, int], rounds: int = ROUNDS) -> np.ndarray:
    """The four 32-bit words of every counter.

    Shapes:  counter: four integers or integer arrays that broadcast to (...), taken modulo 2^32 -> uint32 (..., 4).
    Numerics: all integer.

    >>> [f"{word:08x}" for word in words((0, 0, 0, 0), (0, 0))]
    ['5f6fb709', '0d893f64', '4f121f81', '4f730a48']
    """
    c0, c1, c2, c3 = (np.asarray(x).astype(np.uint64) & np.uint64(WORD) for x in counter)
    k0, k1 = key
    half = np.uint64(32)
    for _ in range(rounds):
        p0, p1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1 = p1 >> half ^ c1 ^ np.uint64(k0), p1 & np.uint64(WORD)
        c2, c3 = p0 >> half ^ c3 ^ np.uint64(k1), p0 & np.uint64(WORD)
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)
