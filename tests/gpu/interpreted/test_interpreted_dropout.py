"""Dropout in the flash kernel under Triton's interpreter: the definition's mask bit for bit, and the accuracy rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from inputs import Shape, numpy_dtype, same_bits, uniform
from launching import SMALL, attend, check
from test_interpreted_forward import OPTIONS, SHAPE

import flashtile
from flashtile.kernels.triton.specialisation import Tile
from flashtile.score import dropout_keep
from flashtile.score.keep import keep_of

SEED = 0xF23456789ABCDEF1
DROPOUT: dict[str, Any] = {"dropout_p": 0.25, "seed": SEED}
WAYS: dict[str, dict[str, Any]] = {
    "small tiles": {"tile": SMALL},
    "wide tiles, in parts": {"tile": Tile(16, 64), "parts": 2},
    "packed": {"packed": True, "tile": Tile(64, 16)},
}


def weights(dtype: str, way: dict[str, Any], **options: Any) -> np.ndarray:
    """What a kernel makes of 40 equal scores: v is an identity, in two pieces of columns."""
    q, k, _ = uniform(SHAPE._replace(kv_heads=1), dtype, size=0.0)
    pieces = []
    for first in (0, 20):
        eye = np.eye(40)[:, first : first + 20]
        v = np.broadcast_to(eye, (SHAPE.batch, 1, 40, 20)).astype(numpy_dtype(dtype))
        pieces.append(attend(q, k, v, keep=keep_of(**DROPOUT), **way, **options)[0])
    return np.concatenate(pieces, axis=-1).astype(np.float64)


@pytest.mark.parametrize("way", WAYS)
def test_the_mask_is_the_definitions(dtype: str, way: str) -> None:
    """In heads and batches beyond the first, with a seed of 64 bits, whatever the tiles are."""
    mask = dropout_keep((2, 2, 21, 40), 0.25, SEED)
    got = weights(dtype, WAYS[way])
    np.testing.assert_array_equal(got != 0, mask)
    assert np.ptp(got[mask]) == 0 and got[mask][0] == np.asarray(1 / (40 * 0.75), numpy_dtype(dtype))


def test_the_mask_on_what_a_band_shows() -> None:
    seen = np.arange(40) <= np.arange(21)[:, None] + 5
    got = weights("float32", WAYS["small tiles"], **OPTIONS["causal"])
    np.testing.assert_array_equal(got != 0, dropout_keep((2, 2, 21, 40), 0.25, SEED) & seen)


@pytest.mark.parametrize("name", ["dense", "window, an offset a batch", "all together"])
def test_by_the_accuracy_rule(dtype: str, name: str) -> None:
    """As users reach it; lse is without dropout, to the bit."""
    inputs, options = uniform(SHAPE, dtype), {**OPTIONS[name], **DROPOUT}
    o, lse = flashtile.attention(*inputs, kernel="triton", return_lse=True, **options)
    check((o, lse), *inputs, **options)
    assert same_bits(lse, flashtile.attention(*inputs, kernel="triton", return_lse=True, **OPTIONS[name])[1])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite(poison: float) -> None:
    """Times a weight that was dropped it is NaN, since 0 times infinity is; rows that do not see it keep their bits."""
    q, k, v = uniform(Shape(1, 2, 1, 21, 40, 20, 24), "float16")
    options = {**OPTIONS["causal"], **DROPOUT}
    clean, _ = flashtile.attention(q, k, v, kernel="triton", return_lse=True, **options)
    v[0, 0, 20, 3] = poison
    got, lse = flashtile.attention(q, k, v, kernel="triton", return_lse=True, **options)
    check((got, lse), q, k, v, **options)
    assert same_bits(got[:, :, :15], clean[:, :, :15])
    kept = dropout_keep((1, 2, 21, 40), 0.25, SEED)[0, :, 15:, 20]
    assert kept.any() and not kept.all()
