"""Sinks and slopes that are infinite or NaN: what the formulas make of them, on every kernel, and in no other head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from inputs import Shape, same_bits, uniform
from kernel_cases import Kernel

import flashtile

SHAPE = Shape(2, 4, 2, 40, 150, 16, 16)
DECODE = Shape(1, 2, 1, 1, 6000, 8, 8)  # few queries, keys in parts
INF, NAN = np.inf, np.nan


def odd_one(value: float, heads: int, other: float) -> np.ndarray:
    """A number a head, of which the first is the odd one."""
    return np.array([value, *[other] * (heads - 1)], np.float32)


def by_numpy(shape: Shape, inputs: Any, sinks: Any = None, slopes: Any = None, offset: int = 0) -> Any:
    """o and lse by the formulas of the page on semantics, as they stand there."""
    q, k, v = (x.astype(np.float64) for x in inputs)
    group = shape.heads // shape.kv_heads
    with np.errstate(all="ignore"):
        s = q @ k.repeat(group, 1).swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        if slopes is not None:
            distance = abs(np.arange(shape.q_len)[:, None] + offset - np.arange(shape.kv_len))
            s = s - slopes.astype(np.float64)[:, None, None] * distance
        total = np.exp(s).sum(-1) + (0 if sinks is None else np.exp(sinks.astype(np.float64))[:, None])
        return np.exp(s) @ v.repeat(group, 1) / total[..., None], np.log(total)


@pytest.mark.parametrize("shape", [SHAPE, DECODE], ids=["tiles", "decode"])
@pytest.mark.parametrize("sink", [INF, -INF, NAN])
def test_sinks(kernel: Kernel, sink: float, shape: Shape) -> None:
    """-inf is no sink; +inf and NaN make every row of the head NaN, as a score of theirs would."""
    inputs = uniform(shape, "float32")
    sinks = odd_one(sink, shape.heads, 0.5)
    got = kernel(*inputs, sinks=sinks, return_lse=True)
    usual = kernel(*inputs, sinks=odd_one(0.5, shape.heads, 0.5), return_lse=True)
    for have, want, other in zip(got, by_numpy(shape, inputs, sinks), usual, strict=True):
        if sink == -INF:
            np.testing.assert_allclose(have[:, 0], want[:, 0], rtol=1e-5, atol=1e-6)
        else:
            assert np.isnan(have[:, 0]).all()
        assert same_bits(have[:, 1:], other[:, 1:])


@pytest.mark.parametrize("sink", [INF, -INF, NAN])
def test_sinks_of_rows_that_see_no_key(kernel: Kernel, sink: float) -> None:
    inputs = uniform(SHAPE, "float32")
    o, lse = kernel(*inputs, mask=lambda b, h, i, j: i < 7, sinks=odd_one(sink, 4, 0.5), return_lse=True)
    alone, rest = (o[:, 0, 7:], lse[:, 0, 7:]), (o[:, 1:, 7:], lse[:, 1:, 7:])
    if sink == -INF:
        assert (alone[0] == 0).all() and (alone[1] == -INF).all()
    else:
        assert np.isnan(alone[0]).all() and np.isnan(alone[1]).all()
    assert (rest[0] == 0).all() and (rest[1] == 0.5).all()


@pytest.mark.parametrize("offset", [3, -60, 500])  # a row's own key is there for all rows, for none, for none
@pytest.mark.parametrize("slope", [INF, -INF, NAN])
def test_slopes(kernel: Kernel, slope: float, offset: int) -> None:
    """A slope times a distance of 0 is NaN unless it is finite; else +inf hides every key, and -inf is a score of
    +inf."""
    inputs = uniform(SHAPE, "float32")
    slopes = odd_one(slope, 4, 0.25)
    options: dict[str, Any] = {"align": offset, "return_lse": True}
    o, lse = kernel(*inputs, alibi_slopes=slopes, **options)
    usual = kernel(*inputs, alibi_slopes=odd_one(0.25, 4, 0.25), **options)
    assert same_bits(o[:, 1:], usual[0][:, 1:]) and same_bits(lse[:, 1:], usual[1][:, 1:])
    if slope == INF and offset != 3:
        assert (o[:, 0] == 0).all() and (lse[:, 0] == -INF).all()
    else:
        assert np.isnan(o[:, 0]).all() and np.isnan(lse[:, 0]).all()
    _, want = by_numpy(SHAPE, inputs, slopes=slopes, offset=offset)
    assert (np.isnan(want) | (want == INF))[:, 0].all() or (want[:, 0] == -INF).all()  # the formula says so, too


@pytest.mark.parametrize("name", ["reference", "vanilla", "cpu"])
@pytest.mark.parametrize(("option", "value"), [(n, x) for n in ("sinks", "alibi_slopes") for x in (INF, -INF, NAN)])
def test_gradients(name: str, option: str, value: float) -> None:
    """NaN reaches gradients of its own head, and of the keys and values that this shares; -inf as a sink none."""
    inputs = uniform(SHAPE, "float32")
    options: dict[str, Any] = {option: odd_one(value, 4, 0.25), "kernel": name}
    if option == "alibi_slopes":
        options["align"] = 0
    o, lse = flashtile.attention(*inputs, return_lse=True, **options)
    given = np.ones_like(o), *inputs, o, lse
    got = flashtile.attention_backward(*given, wrt=("q", "k", "v", option), **options)
    harmless = option == "sinks" and value == -INF
    for x in (got.q, got.k, got.v):
        assert np.isfinite(x[:, 1:]).all()
        assert np.isfinite(x[:, 0]).all() if harmless else np.isnan(x[:, 0]).any()
    own = getattr(got, option)
    assert np.isfinite(own[1:]).all() and (own[1:] != 0).all()
    if harmless:
        assert own[0] == 0
