"""Every option that changes scores, by the accuracy rule, on every kernel and instruction set."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from inputs import Shape, uniform
from kernel_cases import Kernel
from option_cases import EACH, SHAPE, TOGETHER, numbers

import flashtile
from flashtile.dtypes import DTYPES
from flashtile.score import padding
from flashtile.testing import Expected, assert_gradients_accurate, expect, ulp

CASES = {**TOGETHER, **EACH}
# Each case with one dtype here, so that each dtype meets a quarter of the cases; all of them in the slow sweep.
ONE_DTYPE_EACH = [(name, list(DTYPES)[n % len(DTYPES)]) for n, name in enumerate(EACH)]


@cache
def _case(name: str, dtype: str, shape: Shape) -> tuple[tuple[np.ndarray, ...], dict[str, Any], tuple[Expected, ...]]:
    """Inputs, options and what to expect of them; shared by all kernels."""
    inputs, options = uniform(shape, dtype, size=2.0), CASES[name](shape)
    return inputs, options, expect(*inputs, **options)


def _check(kernel: Kernel, name: str, dtype: str, shape: Shape = SHAPE) -> None:
    inputs, options, (want_o, want_lse) = _case(name, dtype, shape)
    o, lse = kernel(*inputs, return_lse=True, **options)
    want_o.check(o, "output")
    want_lse.check(lse, "lse")


@pytest.mark.parametrize("name", TOGETHER)
def test_options_together(kernel: Kernel, dtype: str, name: str) -> None:
    _check(kernel, name, dtype)


@pytest.mark.parametrize(("name", "element"), ONE_DTYPE_EACH)
def test_each_option(kernel: Kernel, name: str, element: str) -> None:
    _check(kernel, name, element)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 150), (16, 16), (48, 128), (49, 129), (150, 60)])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2)])
def test_ragged_sizes(kernel: Kernel, lengths: tuple[int, int], heads: tuple[int, int]) -> None:
    """One program, whatever the sizes: nothing is compiled anew."""
    shape = Shape(2, *heads, *lengths, 17, 9)
    inputs = uniform(shape, "float32")
    mask, bias = padding([shape.kv_len, shape.kv_len // 2]), numbers(shape.heads, *lengths)
    options: dict[str, Any] = {"softcap": 3.0, "mask": mask, "bias": bias}
    o, lse = kernel(*inputs, return_lse=True, **options)
    want_o, want_lse = expect(*inputs, **options)
    want_o.check(o, "output")
    want_lse.check(lse, "lse")


@pytest.mark.parametrize("element", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("cap", [1e300, 1e39, 1e-39, 1e-300])
def test_a_cap_beyond_the_format_caps_nothing_or_everything(kernel: Kernel, element: str, cap: float) -> None:
    """Also where a score is 0, which times an infinite cap, or its infinite inverse, would be NaN."""
    q, k, v = uniform(Shape(1, 2, 1, 9, 40, 16, 8), element)
    q[:, :, 3] = 0
    o, lse = kernel(q, k, v, softcap=cap, return_lse=True)
    plain = (q, k, v) if cap > 1 else (q * 0, k, v)
    want_o, want_lse = expect(*plain)
    want_o.check(o, "output")
    want_lse.check(lse, "lse")
    if kernel.isa is not None and cap > 1:
        g = flashtile.attention_backward(o, q, k, v, o, lse, softcap=cap, kernel=kernel.name)
        assert_gradients_accurate(g, o, *plain)


@pytest.mark.parametrize("element", ["float32", "float64"])
@pytest.mark.parametrize("sink", [-200.0, 20.0, 33.0, 47.0, 60.0, 75.0, 86.0, 95.0, 120.0, 700.0, 740.0])
def test_a_sink_however_large_only_scales_the_row(kernel: Kernel, element: str, sink: float) -> None:
    """Weights may be too small for the format while the outputs are not; a weight's own error grows with distance.

    Small scores: like lse, such a row repeats the rounding of its scores in full, of which the order of the keys says
    nothing.
    """
    shape = Shape(1, 2, 2, 40, 70, 16, 8)
    q, k, v = uniform(shape, element, size=1.0)
    for values in (v, np.ones_like(v), v * v.dtype.type(1e20)):
        sinks = np.array([sink, sink + 0.37])
        o, lse = kernel(q, k, values, sinks=sinks, return_lse=True)
        want_o, want_lse = expect(q, k, values, sinks=sinks)
        want_o.check(o, "output")
        want_lse.check(lse, "lse")


def test_a_far_sink_by_hand(kernel: Kernel, dtype: str) -> None:
    zeros = np.zeros((2, 4), ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    o = kernel(zeros, zeros, np.ones_like(zeros), sinks=np.array([75.0])).astype(np.float64)
    exact = 2 * math.exp(-75)
    assert np.abs(o - exact).max() <= (exact if dtype == "float16" else 4 * ulp(exact, dtype))  # below its least


def test_keys_in_parts() -> None:
    """Few rows on long keys: the parts of the keys see the same program, and merge to the same result."""
    shape = Shape(1, 1, 1, 20, 4500, 16, 16)
    inputs = uniform(shape, "float32")
    options: dict[str, Any] = {"softcap": 3.0, "mask": lambda b, h, i, j: (j % 5 != i % 5) & (j < 4000)}
    assert flashtile.explain(*inputs, kernel="cpu", **options).plan.splits > 1
    o, lse = flashtile.attention(*inputs, return_lse=True, kernel="cpu", **options)
    want_o, want_lse = expect(*inputs, **options)
    want_o.check(o, "output")
    want_lse.check(lse, "lse")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_option_in_every_dtype(kernel: Kernel, dtype: str, name: str) -> None:
    for shape in (SHAPE, Shape(2, 4, 1, 161, 161, 64, 33)):
        if name != "mask function" or shape is SHAPE:  # its block offsets are those of SHAPE
            _check(kernel, name, dtype, shape)
