"""The element-by-element grid of the system this replaces, on every kernel and instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from inputs import Shape, preset, uniform
from kernel_cases import GRID_PROPERTY, Kernel

from flashtile.dtypes import DTYPES
from flashtile.testing import expect

pytestmark = pytest.mark.core

BATCHES, HEADS, LENGTHS, HEAD_SIZES = (1, 2), (1, 2), (4, 8), (4, 8)
DATA = {"preset": preset, "uniform": uniform}
ELEMENTS = 10_368  # of all outputs: dtypes x data x sum over the sizes of B * H * S * D


def test_element_by_element_grid(kernel: Kernel, record_property: Callable[[str, object], None]) -> None:
    """Every element of every output is held to the accuracy rule; the run's summary prints how many there were."""
    checked = 0
    wrong = []
    for dtype, data, *sizes in itertools.product(DTYPES, DATA, BATCHES, HEADS, LENGTHS, HEAD_SIZES):
        batch, heads, length, head_size = sizes
        q, k, v = DATA[data](Shape(batch, heads, heads, length, length, head_size, head_size), dtype)
        o = kernel(q, k, v)
        try:
            expect(q, k, v)[0].check(o)
        except AssertionError as error:
            wrong.append(f"{dtype} {data} {q.shape}: {error}")
        checked += o.size
    assert not wrong, "\n".join(wrong)
    assert checked == ELEMENTS
    record_property(GRID_PROPERTY, checked)
