"""What a mask hides never matters: NaN in hidden keys, rows that see nothing, tiles that are skipped, sinks alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from inputs import Shape, same_bits, uniform
from kernel_cases import Kernel
from option_cases import MASKS, SHAPE, SINKS, coins, seen

import flashtile
from flashtile.score import causal, coverage, document, padding
from flashtile.score.coverage import EMPTY
from flashtile.score.program import Program
from flashtile.testing import expect

KEYS = ([0], [33, 34, 149], list(range(60, 110)))


@pytest.mark.parametrize("name", MASKS)
def test_hidden_keys_change_no_bit(kernel: Kernel, name: str) -> None:
    """Rows that do not see the poisoned keys keep their bits; rows that see NaN are NaN."""
    options, rule = MASKS[name]
    visible, dtype = seen(rule), ("float32", "bfloat16")[list(MASKS).index(name) % 2]
    inputs = uniform(SHAPE, dtype)
    clean_o, clean_lse = kernel(*inputs, return_lse=True, **options)
    met = spared = 0
    poisons = ("k", np.nan, KEYS[0]), ("v", np.nan, KEYS[1]), ("k", np.inf, KEYS[2]), ("v", -np.inf, KEYS[2])
    for where, poison, keys in poisons:
        if name == "bias" and where == "k":
            continue  # a bias is no mask: -inf added to NaN is NaN; but a score of -inf hides what V holds
        q, k, v = (x.copy() for x in inputs)
        (k if where == "k" else v)[:, :, keys] = poison
        o, lse = kernel(q, k, v, return_lse=True, **options)
        meets = visible[..., keys].any(-1)
        met, spared = met + meets.sum(), spared + (~meets).sum()
        assert same_bits(o[~meets], clean_o[~meets]) and same_bits(lse[~meets], clean_lse[~meets])
        if np.isnan(poison):
            assert np.isnan(o[meets]).all() and (np.isnan(lse[meets]) == (where == "k")).all()
    assert met and spared


@pytest.mark.parametrize("name", MASKS)
def test_masks_agree_with_numpy(name: str) -> None:
    """The same rule as a boolean array gives the same bits on the oracle: it shows the keys that NumPy says."""
    options, rule = MASKS[name]
    if name in ("bias", "score"):
        options = {**options, "softcap": None}
    inputs = uniform(SHAPE, "float32")
    visible = seen(rule)
    ones = np.ones(SHAPE.v, np.float32)
    o, lse = flashtile.attention(inputs[0] * 0, inputs[1], ones, return_lse=True, kernel="reference", **options)
    counted = visible.sum(-1).astype(np.float64)
    with np.errstate(divide="ignore"):
        want = np.log(counted) + (0.5 if name == "bias" else 0)
    np.testing.assert_allclose(lse, want, rtol=1e-6)
    np.testing.assert_array_equal(o[..., 0], counted > 0)


@pytest.mark.parametrize("sink", [None, SINKS, np.stack([SINKS, -SINKS])], ids=["none", "heads", "batch and heads"])
def test_rows_that_see_nothing(kernel: Kernel, sink: Any) -> None:
    """o = 0; lse = -inf, or the sink, for it is all that the denominator has."""
    q, k, v = uniform(SHAPE, "float32")
    options = {} if sink is None else {"sinks": sink}
    for mask in (lambda b, h, i, j: i < 30, lambda b, h, i, j: j > 10**6):
        o, lse = kernel(q, k, v, mask=mask, return_lse=True, **options)
        want = np.broadcast_to(-np.inf if sink is None else np.broadcast_to(sink, (2, 4))[..., None], (2, 4, 40))
        assert (o[:, :, 30:] == 0).all()
        np.testing.assert_allclose(lse[:, :, 30:], want, rtol=1e-6)
        expect(q, k, v, mask=mask, **options)[0].check(o)


def test_bias_of_minus_infinity_empties_a_row(kernel: Kernel) -> None:
    """The same row by a bias; and a huge finite negative bias is an ordinary number."""
    q, k, v = uniform(SHAPE, "float32")
    bias = np.zeros((SHAPE.q_len, 1), np.float32)
    bias[3], bias[4] = -np.inf, -1e30
    o, lse = kernel(q, k, v, bias=bias, return_lse=True)
    plain = kernel(q, k, v)
    assert (o[:, :, 3] == 0).all() and np.isneginf(lse[:, :, 3]).all()
    np.testing.assert_allclose(o[:, :, 4], v.mean(2).repeat(2, 1), atol=1e-5)  # all scores are lost beside -1e30
    np.testing.assert_allclose(lse[:, :, 4], -1e30, rtol=1e-6)
    np.testing.assert_allclose(np.delete(o, [3, 4], 2), np.delete(plain, [3, 4], 2), atol=1e-6)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 6000), (20, 6000), (70, 0)])
def test_sinks_are_counted_once(kernel: Kernel, lengths: tuple[int, int]) -> None:
    """However many tiles and parts the keys are cut into."""
    shape = Shape(1, 2, 1, *lengths, 8, 8)
    q, k, v = uniform(shape, "float32")
    sinks = np.array([4.0, 9.0], np.float32)
    o, lse = kernel(q, k, v, sinks=sinks, return_lse=True)
    plain_o, plain_lse = kernel(q, k, v, return_lse=True)
    joined = np.logaddexp(plain_lse.astype(np.float64), sinks[:, None])
    np.testing.assert_allclose(lse, joined, rtol=1e-6)
    weight = np.exp(plain_lse - joined)[..., None]
    np.testing.assert_allclose(o, plain_o * weight, atol=2e-6)


@pytest.mark.parametrize("name", ["documents", "causal documents", "padding", "function"])
def test_skipped_tiles_are_never_read(name: str) -> None:
    """V is NaN wherever the map says EMPTY for every row of a panel; outputs stay finite and the same, bit for bit."""
    shape = Shape(1, 1, 1, 200, 300, 16, 16)
    ids = np.sort(np.random.default_rng(0).integers(0, 6, 300))
    rules = {
        "documents": document(ids[:200], ids),
        "causal documents": causal() & document(ids[:200], ids),
        "padding": padding([77]),
        "function": lambda b, h, i, j: (i // 50 == j // 50) & (j % 2 == 0),
    }
    q, k, v = uniform(shape, "float32")
    tiles = coverage(Program.of((1, 1, 200, 300), mask=rules[name]), 48, 32).tiles()[0, 0]
    clean = flashtile.attention(q, k, v, mask=rules[name], align=0, kernel="cpu")
    assert (tiles == EMPTY).any()
    for row, kinds in enumerate(tiles):
        poisoned = v.copy()
        for tile in np.flatnonzero(kinds == EMPTY):
            poisoned[:, :, tile * 32 : tile * 32 + 32] = np.nan
        rows = slice(row * 48, row * 48 + 48)
        o = flashtile.attention(q, k, poisoned, mask=rules[name], align=0, kernel="cpu")[:, :, rows]
        assert np.isfinite(o).all() and same_bits(np.ascontiguousarray(o), np.ascontiguousarray(clean[:, :, rows]))


def test_a_mask_that_hides_all_costs_no_product() -> None:
    """Nothing is loaded from K or V of any head: both may be unreadable in effect, NaN throughout."""
    q, k, v = uniform(SHAPE, "float32")
    k[...], v[...] = np.nan, np.nan
    o = flashtile.attention(q, k, v, mask=~padding([10**6, 10**6]), sinks=SINKS)
    assert (o == 0).all()


def test_masks_that_are_arrays_of_one_row_or_column(kernel: Kernel) -> None:
    q, k, v = uniform(SHAPE, "float32")
    for mask in (coins(SHAPE.q_len, 1), coins(SHAPE.heads, 1, 1), np.array(True), coins(1, 1, 1, 1, heads=1.0)):
        o, lse = kernel(q, k, v, mask=mask, return_lse=True)
        full = np.ascontiguousarray(np.broadcast_to(mask, (SHAPE.batch, SHAPE.heads, SHAPE.q_len, SHAPE.kv_len)))
        want_o, want_lse = expect(q, k, v, mask=full)
        want_o.check(o)
        want_lse.check(lse)
