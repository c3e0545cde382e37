"""The generator of dropout against Random123's published words, and against a second writing of it in Python's ints."""

from __future__ import annotations

import numpy as np
import pytest

from flashtile.score import dropout_keep, philox
from flashtile.score.keep import Keep

ZEROS, ONES = (0,) * 4, (0xFFFFFFFF,) * 4
PI, PI_KEY = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)

# Random123, tests/kat_vectors: philox4x32, rounds, counter, key, words.
PUBLISHED = [
    (7, ZEROS, ZEROS[:2], "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, ONES, ONES[:2], "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, PI, PI_KEY, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, ZEROS, ZEROS[:2], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
]


def by_ints(counter: tuple[int, ...], key: tuple[int, int], rounds: int) -> list[int]:
    """The paper's definition: L' = low(R * M), R' = high(R * M) xor k xor L, the key bumped between rounds."""
    (r0, l0, r1, l1), bits = counter, 2**32
    for n in range(rounds):
        first, second = divmod(0xD2511F53 * r0, bits), divmod(0xCD9E8D57 * r1, bits)
        k0, k1 = (key[0] + 0x9E3779B9 * n) % bits, (key[1] + 0xBB67AE85 * n) % bits
        r0, l0, r1, l1 = second[0] ^ k0 ^ l0, second[1], first[0] ^ k1 ^ l1, first[1]
    return [r0, l0, r1, l1]


@pytest.mark.parametrize(("rounds", "counter", "key", "published"), PUBLISHED)
def test_published_vectors(rounds: int, counter: tuple[int, ...], key: tuple[int, int], published: str) -> None:
    words = [int(word, 16) for word in published.split()]
    assert by_ints(counter, key, rounds) == words
    assert philox.words(counter, key, rounds).tolist() == words


def test_words_of_arrays() -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (50, 4))
    got = philox.words(tuple(counters.T), PI_KEY)
    assert got.tolist() == [by_ints(tuple(map(int, c)), PI_KEY, 7) for c in counters]


def kept(seed: int, threshold: int, head: int, i: int, j: int) -> bool:
    """The definition of the mask, one weight at a time."""
    word = by_ints((j // 8, i, head, 0), (seed % 2**32, seed // 2**32), 7)[j % 8 // 2]
    return (word >> 16 * (j % 2)) % 2**16 >= threshold


def test_the_mask_is_as_defined() -> None:
    seed, shape = 0xFEDCBA9876543210, (2, 3, 5, 21)
    by_hand = [kept(seed, 19661, b * 3 + h, i, j) for b, h, i, j in np.ndindex(shape)]
    np.testing.assert_array_equal(dropout_keep(shape, 0.3, seed).ravel(), by_hand)  # round(0.3 * 2^16) = 19661
    np.testing.assert_array_equal(dropout_keep(shape[2:], 0.3, seed).ravel(), by_hand[:105])


def test_any_rows_and_keys() -> None:
    """A part of a mask, in any order, is what the whole has there."""
    rng, keep = np.random.default_rng(1), Keep(30000, 7)
    whole = keep.of(5, np.arange(40), np.arange(300))
    rows, keys = rng.permutation(40)[:17], rng.permutation(300)[:101]
    np.testing.assert_array_equal(keep.of(5, rows, keys), whole[np.ix_(rows, keys)])
    assert keep.of(5, rows, keys[:0]).shape == (17, 0)


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 0.9, 1 - 2**-16])
def test_drop_rate(p: float) -> None:
    """Within five standard deviations of a fair draw: rate, and the same of every row and of neighbours' products."""
    mask = dropout_keep((2, 2, 256, 1024), p, seed=3)
    n, spread = mask.size, np.sqrt(p * (1 - p))
    assert abs((~mask).mean() - p) <= 5 * spread / np.sqrt(n)
    if p < 2**-10 or p > 1 - 2**-10:
        return
    z = (~mask - p) / spread
    assert np.abs(z.mean(axis=-1)).max() <= 5.5 / np.sqrt(1024)
    for axis in range(4):
        neighbours = np.moveaxis(z, axis, 0)
        assert abs((neighbours[1:] * neighbours[:-1]).mean()) <= 5 / np.sqrt(neighbours[1:].size)


def test_seeds_and_heads_differ() -> None:
    masks = [dropout_keep((1, 1, 64, 64), 0.5, seed) for seed in (0, 1, 1 << 32, 2**64 - 1)]
    masks += list(dropout_keep((3, 2, 64, 64), 0.5, 0).reshape(6, 1, 1, 64, 64)[1:])
    agree = [(a == b).mean() for n, a in enumerate(masks) for b in masks[:n]]
    assert max(abs(x - 0.5) for x in agree) < 5.5 * 0.5 / 64
