"""Sums over a hundred thousand keys keep to the accuracy rule: no chain of roundings may be as long as the keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from inputs import Shape, numpy_dtype, uniform
from kernel_cases import Kernel

from flashtile.testing import expect

KEYS = 100_000
ROWS = 8
COPIES = 220  # of the rows: with so many of them, keys are not split over work items whose results are merged
PROBLEMS: dict[str, dict[str, Any]] = {
    "flat": {"scale": 1e-3},  # every key counts
    "spread": {"scale": 0.25},
    "sharp": {"scale": 1.0},  # the maximum rises often
    "masked": {"scale": 0.25, "mask": np.arange(KEYS) % 20_000 < 15_000},
    "biased": {"scale": 0.25, "bias": np.linspace(-2, 2, KEYS, dtype=np.float32)[None, None, None]},
}


@pytest.fixture(autouse=True)
def only_fused(kernel: Kernel) -> None:
    if kernel.name != "cpu":
        pytest.skip("what the rule is taken from")


def check(kernel: Kernel, q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> None:
    want_o, want_lse = expect(q, k, v, **options)
    o, lse = kernel(np.tile(q, (1, 1, COPIES, 1)), k, v, return_lse=True, **options)
    want_o.check(o[:, :, : q.shape[2]], "output")
    want_lse.check(lse[:, :, : q.shape[2]], "lse")


@pytest.mark.parametrize("problem", PROBLEMS)
def test_all_of_one_sign(kernel: Kernel, dtype: str, problem: str) -> None:
    """Values above 0, so that sums grow and errors of one direction with them."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 1, n, 8)).astype(numpy_dtype(dtype)) for n in (ROWS, KEYS))
    v = np.abs(rng.standard_normal((1, 1, KEYS, 4))).astype(numpy_dtype(dtype))
    check(kernel, q, k, v, **PROBLEMS[problem])


@pytest.mark.parametrize("light", [1e-5, 1e-7, 1e-9])
def test_light_keys_count_beside_a_heavy_one(kernel: Kernel, dtype: str, light: float) -> None:
    q, k, v = uniform(Shape(1, 1, 1, ROWS, KEYS, 4, 4), dtype)
    q[...], k[...], v[...] = 1, -0.25, np.abs(v) + 0.5
    k[..., KEYS // 3, :] = 0
    check(kernel, q, k, v, scale=float(-np.log(light)))


def test_scores_that_rise_with_every_key(kernel: Kernel, dtype: str) -> None:
    """Every key block brings a new maximum and rescales the sums."""
    q, k, v = uniform(Shape(1, 1, 1, ROWS, KEYS, 4, 4), dtype)
    q[...], v[...] = 1, np.abs(v) + 0.5
    k[...] = np.linspace(-0.25, 0.25, KEYS)[:, None]
    check(kernel, q, k, v, scale=8.0)


def test_infinite_values_stay_infinite(kernel: Kernel, dtype: str) -> None:
    q, k, v = uniform(Shape(1, 1, 1, ROWS, 10_000, 8, 4), dtype)
    for key, column, value in ((5, 0, np.inf), (7, 1, -np.inf), (9, 2, np.nan), (6000, 3, np.inf)):
        v[..., key, column] = value
    check(kernel, q, k, v)
