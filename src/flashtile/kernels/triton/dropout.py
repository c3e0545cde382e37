"""Dropout: which weights of a tile are kept, by the pinned counter generator, as `score.keep` says for every kernel.

One call of the generator serves eight keys of a row, so it is drawn for an eighth of a tile; what it decides is spread
over the tile as eight bits.

Source: Salmon, Moraes, Dror and Shaw 2011, Parallel Random Numbers: As Easy as 1, 2, 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.score import keep, philox

ROUNDS = tl.constexpr(philox.ROUNDS)
MULTIPLIER_0, MULTIPLIER_2 = (tl.constexpr(m) for m in philox.MULTIPLIERS)
WEYL_0, WEYL_1 = (tl.constexpr(w) for w in philox.WEYL)
KEYS_A_CALL = tl.constexpr(keep.KEYS_A_CALL)
STEPS = tl.constexpr(keep.STEPS)


@triton.jit
def kept(n0, i, head, threshold, seed, KEYS: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Which weights are kept of rows i and keys n0, n0 + 1, ... n0 + KEYS - 1.

    Shapes:  i (m, 1), head, b * H + h, a scalar or (m, 1) -> bool (m, KEYS); KEYS_FIRST: i (1, m) -> (KEYS, m).
             n0 and KEYS are multiples of KEYS_A_CALL.
    """
    group = n0 // KEYS_A_CALL + tl.arange(0, KEYS // KEYS_A_CALL)
    bit = tl.arange(0, KEYS_A_CALL)
    if KEYS_FIRST:
        octets = _octets(group[:, None], i, head, threshold, seed)
        bits = (octets[:, None, :] >> bit[None, :, None]) & 1
        return tl.reshape(bits != 0, [KEYS, i.shape[1]])
    else:
        octets = _octets(group[None, :], i, head, threshold, seed)
        bits = (octets[:, :, None] >> bit[None, None, :]) & 1
        return tl.reshape(bits != 0, [i.shape[0], KEYS])


@triton.jit
def share_of(threshold, ACC: tl.constexpr):
    """The share of the weights that is kept, exactly: what the kept ones are divided by."""
    return 1.0 - threshold.to(ACC) / STEPS


@triton.jit
def _octets(group, i, head, threshold, seed):
    """A bit for each of a group's keys, the first the lowest: whether its weight is kept."""
    w0, w1, w2, w3 = _words(group, i, head, seed)
    low, high = _pair(w0, threshold) | (_pair(w1, threshold) << 2), _pair(w2, threshold) | (_pair(w3, threshold) << 2)
    return low | (high << 4)


@triton.jit
def _pair(word, threshold):
    """Two bits of one word: of its low half, and of its high half."""
    low, high = (word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32)
    return tl.where(low >= threshold, 1, 0) | tl.where(high >= threshold, 2, 0)


@triton.jit
def _words(group, i, head, seed):
    """The generator's four words of the counter (group, i, head, 0)."""
    seed = seed.to(tl.int64)  # the interpreter takes a small one for an int32
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    m0, m2 = tl.full((), MULTIPLIER_0, tl.uint32), tl.full((), MULTIPLIER_2, tl.uint32)
    c0, c1 = group.to(tl.uint32), i.to(tl.uint32)
    c2, c3 = head.to(tl.uint32), tl.zeros_like(c1)
    for _ in tl.static_range(ROUNDS):
        high0, low0 = tl.umulhi(c0, m0), tl.mul(c0, m0, sanitize_overflow=False)
        high2, low2 = tl.umulhi(c2, m2), tl.mul(c2, m2, sanitize_overflow=False)
        c0, c2 = high2 ^ c1 ^ k0, high0 ^ c3 ^ k1
        c1, c3 = low2, low0
        k0 = tl.add(k0, tl.full((), WEYL_0, tl.uint32), sanitize_overflow=False)
        k1 = tl.add(k1, tl.full((), WEYL_1, tl.uint32), sanitize_overflow=False)
    return c0, c1, c2, c3
