"""Every kernel against the oracle, by the accuracy rule: output and lse, over shapes, options and dtypes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from inputs import Shape, uniform
from kernel_cases import Kernel

from flashtile.testing import Expected, expect

HEAD_SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 32, 33, 48, 64, 80, 96, 127, 128, 192, 256, 511, 512)
VALUE_SIZES = ((8, 1), (1, 8), (16, 48), (64, 40), (40, 64), (75, 3), (3, 75), (192, 128), (128, 512), (512, 17))
# Lengths on both sides of every tile edge that a kernel may have: vectors of 2 to 16 lanes, blocks of 48 and 128.
LENGTHS = ((1, 1), (1, 300), (2, 3), (7, 9), (16, 16), (17, 15), (47, 48), (48, 127), (49, 128), (95, 129), (130, 257))
GROUPS = ((1, 2, 1), (1, 4, 2), (2, 6, 2), (3, 3, 1), (2, 8, 8))

SHAPES = [
    *(Shape(1, 1, 1, 19, 37, d, d) for d in HEAD_SIZES),
    *(Shape(1, 2, 1, 21, 34, d, dv) for d, dv in VALUE_SIZES),
    *(Shape(1, 1, 1, q_len, kv_len, 24, 20) for q_len, kv_len in LENGTHS),
    *(Shape(b, h, h_kv, 18, 29, 16, 16) for b, h, h_kv in GROUPS),
]

SQUARE, WIDE, TALL = Shape(2, 4, 2, 70, 70, 16, 16), Shape(2, 2, 1, 50, 200, 8, 24), Shape(2, 2, 2, 150, 60, 24, 8)
PER_BATCH = (40, -7)  # as an integer array (B,)
MASKED: list[tuple[Shape, dict[str, Any]]] = [
    (SQUARE, {"causal": True}),
    (SQUARE, {"window": (5, 3)}),
    (SQUARE, {"window": (0, 0)}),
    (SQUARE, {"window": (-1, 9)}),
    (SQUARE, {"window": (17, None), "causal": True}),
    (SQUARE, {"causal": True, "align": PER_BATCH}),
    *(
        (shape, {**rule, "align": align})
        for shape in (WIDE, TALL)
        for rule in ({"causal": True}, {"window": (33, 20)})
        for align in ("top_left", "bottom_right", 45, -45, PER_BATCH)
    ),
    (WIDE, {"window": (3, 150), "causal": True, "align": "bottom_right"}),
    (TALL, {"causal": True, "align": 10**15}),
    (TALL, {"causal": True, "align": -(10**15)}),
    (TALL, {"window": (10**15 + 7, None), "align": 10**15}),
    (Shape(1, 1, 1, 1, 300, 16, 16), {"window": (63, 0), "align": "bottom_right"}),
]


@cache
def _case(
    shape: Shape, dtype: str, size: float, options: tuple[tuple[str, Any], ...]
) -> tuple[tuple[np.ndarray, ...], dict[str, Any], tuple[Expected, Expected]]:
    """Inputs, options and what to expect of them; shared by all kernels."""
    inputs = uniform(shape, dtype, seed=hash(shape) % 1000, size=size)
    keywords = dict(options)
    if isinstance(keywords.get("align"), tuple):
        keywords["align"] = np.array(keywords["align"])
    return inputs, keywords, expect(*inputs, **keywords)


def _check(kernel: Kernel, shape: Shape, dtype: str, size: float = 1.0, **options: Any) -> None:
    """One call with its lse, and the same call without, whose output has the same bits."""
    inputs, keywords, (want_o, want_lse) = _case(shape, dtype, size, tuple(options.items()))
    o, lse = kernel(*inputs, return_lse=True, **keywords)
    want_o.check(o, "output")
    want_lse.check(lse, "lse")
    np.testing.assert_array_equal(kernel(*inputs, **keywords), o)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes(kernel: Kernel, dtype: str, shape: Shape) -> None:
    _check(kernel, shape, dtype)


@pytest.mark.parametrize(
    ("shape", "options"),
    MASKED,
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_masks(kernel: Kernel, dtype: str, shape: Shape, options: dict[str, Any]) -> None:
    _check(kernel, shape, dtype, size=2.0, **options)


@pytest.mark.parametrize("scale", [1.0, 0.013, 3.0, -0.5, 0.0])
def test_scales(kernel: Kernel, dtype: str, scale: float) -> None:
    _check(kernel, Shape(1, 2, 1, 33, 50, 12, 12), dtype, scale=scale, causal=True, align=9)


@pytest.mark.parametrize("size", [0.01, 5.0, 20.0])
def test_sizes_of_values(kernel: Kernel, dtype: str, size: float) -> None:
    _check(kernel, Shape(1, 1, 1, 40, 140, 16, 16), dtype, size=size)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"causal": True, "align": 30}], ids=["dense", "causal"])
def test_precisions_of_fp32(kernel: Kernel, precision: str, options: dict[str, Any]) -> None:
    for shape in (Shape(1, 2, 1, 40, 90, 64, 64), Shape(1, 1, 1, 50, 131, 17, 33)):
        _check(kernel, shape, "float32", precision=precision, **options)


@pytest.mark.parametrize("rank", [2, 3])
def test_fewer_axes(kernel: Kernel, dtype: str, rank: int) -> None:
    inputs = [x[(0,) * (4 - rank)] for x in uniform(Shape(1, 3, 3, 20, 30, 8, 5), dtype)]
    o, lse = kernel(*inputs, return_lse=True)
    assert o.ndim == rank and lse.ndim == rank - 1
    want_o, want_lse = expect(*inputs)
    want_o.check(o, "output")
    want_lse.check(lse, "lse")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 60)}], ids=["dense", "causal", "window"])
@pytest.mark.parametrize("head_size", [16, 64, 128, 256])
def test_long_sequences(kernel: Kernel, dtype: str, head_size: int, options: dict[str, Any]) -> None:
    """Many key blocks: the online softmax rescales often, and errors of sums have room to grow."""
    _check(kernel, Shape(1, 2, 1, 700, 1500, head_size, head_size), dtype, size=2.0, align="bottom_right", **options)


@pytest.mark.slow
@pytest.mark.parametrize("q_len", [*range(1, 34), 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129])
def test_every_length(kernel: Kernel, dtype: str, q_len: int) -> None:
    for kv_len in (*range(1, 18), 31, 32, 33, 127, 128, 129, 255, 256, 257):
        _check(kernel, Shape(1, 1, 1, q_len, kv_len, 24, 24), dtype, causal=True, align="bottom_right")
