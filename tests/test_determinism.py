"""The same call gives the same bits: again, with any number of threads, and from many threads at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from inputs import Shape, same_bits, uniform
from kernel_cases import Kernel

from flashtile.engines import direct
from flashtile.kernels import reference
from flashtile.plan import make_plan
from flashtile.spec import AttentionSpec

pytestmark = pytest.mark.core

SHAPE = Shape(2, 8, 2, 200, 310, 48, 40)  # more work than an engine does on the calling thread
OPTIONS = {"dense": {}, "causal": {"causal": True, "align": "bottom_right"}, "window": {"window": (60, 9), "align": 20}}


def _results(kernel: Kernel, inputs: tuple[np.ndarray, ...], options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return kernel(*inputs, return_lse=True, **options)


def test_shape_is_large_enough_for_threads() -> None:
    for options in OPTIONS.values():
        spec = AttentionSpec.of(*uniform(SHAPE, "float32"), **options)
        plan = make_plan(spec, reference.capabilities(spec))
        assert plan.flops > direct.SMALL_FLOPS and plan.items >= 8


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_number_of_threads_changes_no_bit(
    kernel: Kernel, dtype: str, options: dict[str, Any], threads: Callable[[int], None]
) -> None:
    inputs = uniform(SHAPE, dtype)
    threads(1)
    o, lse = _results(kernel, inputs, options)
    for count in (2, 3, 8):
        threads(count)
        again_o, again_lse = _results(kernel, inputs, options)
        assert same_bits(o, again_o) and same_bits(lse, again_lse), f"{count} threads"


def test_calls_at_once_change_no_bit(kernel: Kernel, threads: Callable[[int], None]) -> None:
    threads(2)
    cases = [(uniform(SHAPE, "float32", seed=n), OPTIONS[name]) for n, name in enumerate(OPTIONS)]
    alone = [_results(kernel, *case) for case in cases]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda case: _results(kernel, *case), cases * 4))
    for (o, lse), (want_o, want_lse) in zip(together, alone * 4, strict=True):
        assert same_bits(o, want_o) and same_bits(lse, want_lse)


def test_batch_and_heads_change_no_bit(kernel: Kernel, dtype: str) -> None:
    """A head's result does not depend on what else is in the call."""
    q, k, v = uniform(SHAPE, dtype)
    whole = kernel(q, k, v)
    for b, h in ((0, 0), (1, 5)):
        alone = kernel(q[b, h], k[b, h // 4], v[b, h // 4])
        assert same_bits(alone, np.ascontiguousarray(whole[b, h]))
