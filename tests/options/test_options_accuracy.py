"""Every option that changes scores, by the accuracy rule, on every kernel and instruction set."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from inputs import Shape, uniform
from kernel_cases import Kernel
from option_cases import EACH, SHAPE, TOGETHER, numbers

import flashtile
from flashtile.dtypes import DTYPES
from flashtile.score import padding
from flashtile.testing import Expected, expect

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
