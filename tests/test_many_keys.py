"""Sums over a hundred thousand keys keep to the accuracy rule: no chain of roundings may be as long as the keys."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from inputs import Shape, numpy_dtype, uniform
from kernel_cases import Kernel

import flashtile
from flashtile.plan import tiling
from flashtile.testing import expect

KEYS = 100_000
ROWS = 8
COPIES = 6  # of the rows, which are too few for a kernel of the many
PROBLEMS: dict[str, dict[str, Any]] = {
    "flat": {"scale": 1e-3},  # every key counts
    "spread": {"scale": 0.25},
    "sharp": {"scale": 1.0},  # the maximum rises often
    "masked": {"scale": 0.25, "mask": np.arange(KEYS) % 20_000 < 15_000},
    "biased": {"scale": 0.25, "bias": np.linspace(-2, 2, KEYS, dtype=np.float32)[None, None, None]},
}


@pytest.fixture(autouse=True)
def only_fused(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel.name != "cpu":
        pytest.skip("what the rule is taken from")
    monkeypatch.setattr(tiling, "ENOUGH_ITEMS", 1)  # or keys would be split over work items, and merged


def check(kernel: Kernel, problem: tuple[tuple[np.ndarray, ...], dict[str, Any], Any]) -> None:
    (q, k, v), options, (want_o, want_lse) = problem
    rows = np.tile(q, (1, 1, COPIES, 1))
    assert flashtile.explain(rows, k, v, kernel="cpu", **options).plan.splits == 1
    o, lse = kernel(rows, k, v, return_lse=True, **options)
    for n in range(0, rows.shape[2], ROWS):
        want_o.check(o[:, :, n : n + ROWS], "output")
        want_lse.check(lse[:, :, n : n + ROWS], "lse")


@cache
def of_one_sign(dtype: str, name: str) -> Any:
    """Inputs, options and what to expect; as below shared by all instruction sets."""
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 1, n, 8)).astype(numpy_dtype(dtype)) for n in (ROWS, KEYS))
    v = np.abs(rng.standard_normal((1, 1, KEYS, 4))).astype(numpy_dtype(dtype))
    return (q, k, v), PROBLEMS[name], expect(q, k, v, **PROBLEMS[name])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_all_of_one_sign(kernel: Kernel, dtype: str, problem: str) -> None:
    """Values above 0, so that sums grow and errors of one direction with them."""
    check(kernel, of_one_sign(dtype, problem))


@cache
def beside_a_heavy_one(dtype: str, light: float) -> Any:
    q, k, v = uniform(Shape(1, 1, 1, ROWS, KEYS, 4, 4), dtype)
    q[...], k[...], v[...] = 1, -0.25, np.abs(v) + 0.5
    k[..., KEYS // 3, :] = 0
    options = {"scale": float(-np.log(light))}
    return (q, k, v), options, expect(q, k, v, **options)


@pytest.mark.parametrize("light", [1e-5, 1e-7, 1e-9])
def test_light_keys_count_beside_a_heavy_one(kernel: Kernel, dtype: str, light: float) -> None:
    check(kernel, beside_a_heavy_one(dtype, light))


@cache
def rising(dtype: str) -> Any:
    q, k, v = uniform(Shape(1, 1, 1, ROWS, KEYS, 4, 4), dtype)
    q[...], v[...] = 1, np.abs(v) + 0.5
    k[...] = np.linspace(-0.25, 0.25, KEYS)[:, None]
    return (q, k, v), {"scale": 8.0}, expect(q, k, v, scale=8.0)


def test_scores_that_rise_with_every_key(kernel: Kernel, dtype: str) -> None:
    """Every key block brings a new maximum and rescales the sums."""
    check(kernel, rising(dtype))


def test_infinite_values_stay_infinite(kernel: Kernel, dtype: str) -> None:
    q, k, v = uniform(Shape(1, 1, 1, ROWS, 10_000, 8, 4), dtype)
    for key, column, value in ((5, 0, np.inf), (7, 1, -np.inf), (9, 2, np.nan), (6000, 3, np.inf)):
        v[..., key, column] = value
    check(kernel, ((q, k, v), {}, expect(q, k, v)))
