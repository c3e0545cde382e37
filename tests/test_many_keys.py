"""Sums over a hundred thousand keys keep to the accuracy rule: no chain of roundings may be as long as the keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from inputs import numpy_dtype
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


@pytest.mark.parametrize("problem", PROBLEMS)
def test_all_of_one_sign(kernel: Kernel, dtype: str, problem: str) -> None:
    """Values above 0, so that sums grow and errors of one direction with them."""
    if kernel.name != "cpu":
        pytest.skip("what the rule is taken from")
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 1, n, 8)).astype(numpy_dtype(dtype)) for n in (ROWS, KEYS))
    v = np.abs(rng.standard_normal((1, 1, KEYS, 4))).astype(numpy_dtype(dtype))
    want_o, want_lse = expect(q, k, v, **PROBLEMS[problem])
    o, lse = kernel(np.tile(q, (1, 1, COPIES, 1)), k, v, return_lse=True, **PROBLEMS[problem])
    want_o.check(o[:, :, :ROWS], "output")
    want_lse.check(lse[:, :, :ROWS], "lse")
