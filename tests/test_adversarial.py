"""Inputs at the edges: values that overflow or are not numbers, rows that see nothing, sizes of zero, huge strides."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inputs import Shape, numpy_dtype, placed, same_bits, uniform
from kernel_cases import Kernel
from numpy.lib.stride_tricks import as_strided

import flashtile
from flashtile import engines
from flashtile.dtypes import DTYPES
from flashtile.kernels.rule import visible
from flashtile.spec import AttentionSpec
from flashtile.testing import Expected, expect, ulp

pytestmark = pytest.mark.core

SHAPE = Shape(1, 2, 1, 70, 90, 20, 24)
RULES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True, "align": "top_left"},
    "causal, bottom right": {"causal": True, "align": "bottom_right"},
    "window": {"window": (9, 4), "align": 12},
    "window, negative scale": {"window": (20, 0), "align": 0, "scale": -0.7},
    "causal, scale zero": {"causal": True, "align": 3, "scale": 0.0},
}
POISON = (np.nan, np.inf, -np.inf)


def _attend(kernel: Kernel, *inputs: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return kernel(*inputs, return_lse=True, **options)


def _check(kernel: Kernel, *inputs: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Output and lse, both by the accuracy rule."""
    o, lse = _attend(kernel, *inputs, **options)
    want_o, want_lse = expect(*inputs, **options)
    want_o.check(o, "output")
    want_lse.check(lse, "lse")
    return o, lse


def _sees(options: dict[str, Any], inputs: tuple[np.ndarray, ...], keys: list[int]) -> np.ndarray:
    """Which rows see any of the keys: bool (S_q,)."""
    spec = AttentionSpec.of(*inputs, **options)
    assert spec.offset is not None
    seen = visible(spec.band, spec.offset, np.arange(spec.q_len), np.array(keys))
    assert seen is not None
    return seen.any(axis=1)


@pytest.mark.parametrize("options", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("where", ["k", "v"])
def test_hidden_keys_change_no_bit(
    kernel: Kernel, dtype: str, options: dict[str, Any], poison: float, where: str
) -> None:
    """Rows that do not see the poisoned keys keep their bits; and some rows see them, so the poison is real."""
    inputs = uniform(SHAPE, dtype)
    clean_o, clean_lse = _attend(kernel, *inputs, **options)
    met = 0
    for keys in ([0], [33, 34], [89], list(range(40, 90))):
        q, k, v = (x.copy() for x in inputs)
        (k if where == "k" else v)[:, :, keys] = poison
        o, lse = _attend(kernel, q, k, v, **options)
        seen = _sees(options, inputs, keys)
        assert same_bits(o[:, :, ~seen], clean_o[:, :, ~seen])
        assert same_bits(lse[:, :, ~seen], clean_lse[:, :, ~seen])
        met += seen.sum()
        if np.isnan(poison):
            assert np.isnan(o[:, :, seen]).all()
            assert np.isnan(lse[:, :, seen]).all() == (where != "v" or not seen.any())
    assert met


@pytest.mark.parametrize("options", RULES.values(), ids=RULES.keys())
def test_huge_hidden_values_change_no_bit(kernel: Kernel, dtype: str, options: dict[str, Any]) -> None:
    inputs = uniform(SHAPE, dtype)
    clean_o, clean_lse = _attend(kernel, *inputs, **options)
    q, k, v = (x.copy() for x in inputs)
    keys = list(range(30, 90))
    k[:, :, keys] = -DTYPES[dtype].largest
    v[:, :, keys] = DTYPES[dtype].largest
    seen = _sees(options, inputs, keys)
    o, lse = _attend(kernel, q, k, v, **options)
    assert (~seen).any()
    assert same_bits(o[:, :, ~seen], clean_o[:, :, ~seen])
    assert same_bits(lse[:, :, ~seen], clean_lse[:, :, ~seen])


@cache
def _poisoned(dtype: str, rule: str, poison: float, where: str) -> tuple[tuple[np.ndarray, ...], tuple[Expected, ...]]:
    """Inputs with one poisoned element, and what to expect of them; shared by all kernels."""
    inputs = uniform(SHAPE, dtype)
    inputs["qkv".index(where)][0, 0, 41, 3] = poison
    return inputs, expect(*inputs, **RULES.get(rule, {}))


@pytest.mark.parametrize("rule", ["dense", "causal", "window", "window, negative scale"])
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_one_visible_poisoned_element(kernel: Kernel, dtype: str, rule: str, poison: float, where: str) -> None:
    """NaN and inf in one element reach just the rows and columns that the oracle says; +inf scores make NaN."""
    inputs, (want_o, want_lse) = _poisoned(dtype, rule, poison, where)
    o, lse = _attend(kernel, *inputs, **RULES.get(rule, {}))
    want_o.check(o, "output")
    want_lse.check(lse, "lse")


def test_score_of_minus_infinity_hides_its_key(kernel: Kernel, dtype: str) -> None:
    """What the key's value is no longer matters, and its row's other keys are weighed as if it were not there."""
    q, k, v = uniform(SHAPE, dtype)
    q[..., 0] = np.abs(q[..., 0].astype(np.float32)) + 0.5
    gone = [3, 50, 51, 89]
    k[:, :, gone, 0] = -np.inf
    clean = _check(kernel, q, k, v)
    for value in (*POISON, DTYPES[dtype].largest):
        v[:, :, gone] = value
        assert all(same_bits(*pair) for pair in zip(_check(kernel, q, k, v), clean, strict=True))
    kept = np.setdiff1d(np.arange(SHAPE.kv_len), gone)
    want_o, want_lse = expect(q, k[:, :, kept], v[:, :, kept])
    want_o.check(clean[0], "output")
    want_lse.check(clean[1], "lse")


@pytest.mark.parametrize("value", [1.0, np.nan, np.inf])
def test_row_whose_scores_are_all_minus_infinity_is_empty(kernel: Kernel, dtype: str, value: float) -> None:
    q, k, v = uniform(SHAPE, dtype)
    q[..., 0], k[..., 0], v[...] = 1, -np.inf, value
    q[:, :, 5, 0] = 0  # 0 * inf: this row alone is NaN
    o, lse = _attend(kernel, q, k, v)
    assert np.isnan(o[:, :, 5]).all() and np.isnan(lse[:, :, 5]).all()
    empty = np.arange(SHAPE.q_len) != 5
    assert (o[:, :, empty] == 0).all() and np.isneginf(lse[:, :, empty]).all()


@pytest.mark.parametrize(("wide", "huge"), [("float64", 1e200), ("float32", 1e30), ("bfloat16", 1e30)])
def test_products_that_overflow(kernel: Kernel, wide: str, huge: float) -> None:
    """Beyond the accumulator's range a score is infinite: of one sign the row is NaN, of the other the key is gone."""
    if kernel.name == "reference":
        pytest.skip("the oracle's range is wider: nothing overflows")
    q, k, v = uniform(SHAPE, wide)
    q[..., 0] = huge
    k[..., 0] = 0
    clean = _attend(kernel, q, k[:, :, 1:], v[:, :, 1:])
    k[:, :, 0, 0] = -huge
    v[:, :, 0] = np.nan
    o, lse = _attend(kernel, q, k, v)
    expect(q, k[:, :, 1:], v[:, :, 1:])[0].check(o, "output")
    np.testing.assert_allclose(lse, clean[1], rtol=1e-5)
    k[:, :, 0, 0] = huge
    o, lse = _attend(kernel, q, k, v)
    assert np.isnan(o).all() and np.isnan(lse).all()


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_huge_scores_pick_one_key(kernel: Kernel, dtype: str, scale: float) -> None:
    """q[i].k[j] = c for i = j and 0 elsewhere: one key takes all the weight, or with a negative scale all but one."""
    size, c = 40, {"float64": 1e150, "float32": 1e15, "float16": 200.0, "bfloat16": 1e15}[dtype]
    q = k = (np.eye(size) * c).astype(numpy_dtype(dtype))[None, None]
    v = uniform(Shape(1, 1, 1, 1, size, 1, 12), dtype)[2]
    o, _ = _check(kernel, q, k, v, scale=scale)
    if scale > 0:
        np.testing.assert_array_equal(o, v)


def test_scores_that_rise_and_fall_by_thousands(kernel: Kernel, dtype: str) -> None:
    """The running maximum jumps up at every block of keys, then stays: old sums vanish, new keys add nothing."""
    kv_len = 600
    climb = np.concatenate([np.arange(300), np.arange(300)[::-1]]) * 8.0
    k = climb.astype(numpy_dtype(dtype)).reshape(1, 1, kv_len, 1)
    q = np.array([1, -1, 0.5, 0]).astype(numpy_dtype(dtype)).reshape(1, 1, 4, 1)
    v = uniform(Shape(1, 1, 1, 1, kv_len, 1, 5), dtype)[2]
    _check(kernel, q, k, v, scale=1.0)


EMPTY = {
    "no keys": (Shape(2, 2, 1, 5, 0, 4, 6), {}),
    "no keys, causal": (Shape(2, 2, 1, 5, 0, 4, 6), {"causal": True, "align": "bottom_right"}),
    "all keys ahead": (Shape(1, 2, 2, 60, 60, 8, 8), {"causal": True, "align": -60}),
    "some rows before all keys": (Shape(1, 2, 2, 60, 60, 8, 8), {"causal": True, "align": -37}),
    "rows past the window": (Shape(1, 1, 1, 80, 30, 8, 8), {"window": (4, 4), "align": 0}),
    "one batch sees nothing": (Shape(2, 1, 1, 9, 20, 8, 8), {"causal": True, "align": np.array([-50, 4])}),
}


@pytest.mark.parametrize(("shape", "options"), EMPTY.values(), ids=EMPTY.keys())
@pytest.mark.parametrize("value", [None, np.nan, np.inf])
def test_rows_without_keys(
    kernel: Kernel, dtype: str, shape: Shape, options: dict[str, Any], value: float | None
) -> None:
    """o = 0 and lse = -inf, whatever stands in the keys, and in memory that `out` brings along."""
    q, k, v = uniform(shape, dtype)
    empty = np.isneginf(expect(q, k, v, **options)[1].value)
    assert empty.any()
    if value is None:
        _check(kernel, q, k, v, **options)
    else:
        k[...], v[...] = value, value
    out = np.full((*shape.q[:3], shape.value_size), np.nan, numpy_dtype(dtype))
    _, lse = kernel(q, k, v, out=out, return_lse=True, **options)
    assert (out[empty] == 0).all()
    np.testing.assert_array_equal(np.isneginf(lse), empty)


@pytest.mark.parametrize("shape", [Shape(batch=0), Shape(q_len=0), Shape(batch=0, q_len=0, kv_len=0)], ids=str)
def test_empty_outputs(kernel: Kernel, dtype: str, shape: Shape) -> None:
    o, lse = _attend(kernel, *uniform(shape, dtype))
    assert o.shape == (*shape.q[:3], shape.value_size) and o.dtype == numpy_dtype(dtype)
    assert lse.shape == shape.q[:3]


NOTHING: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"causal": True, "align": "bottom_right"},
    "program": {"softcap": 3.0, "mask": lambda b, h, i, j: j <= i + 1, "sinks": None},
    "slopes and sinks": {"alibi_slopes": None, "align": 0, "sinks": None},
}


@pytest.mark.parametrize("name", NOTHING)
def test_no_heads_and_head_sizes_of_0(kernel: Kernel, dtype: str, name: str) -> None:
    """In every combination, with lengths and batches of 0: D = 0 gives scores of 0, D_v = 0 still has an lse."""
    for batch, heads, q_len, kv_len, size, values in itertools.product((0, 2), (0, 4), (0, 3), (0, 5), (0, 4), (0, 6)):
        if heads and size and values:
            continue
        q, k, v = uniform(Shape(batch, heads, heads // 2, q_len, kv_len, size, values), dtype)
        logits = np.linspace(-1, 1, heads)
        options = {o: logits if x is None else x for o, x in NOTHING[name].items()}
        o, lse = kernel(q, k, v, return_lse=True, **options)
        want_o, want_lse = expect(q, k, v, **options)
        want_o.check(o)
        want_lse.check(lse)


def test_head_size_0_is_the_mean_of_the_values(kernel: Kernel) -> None:
    v = np.arange(20.0).reshape(1, 1, 5, 4)
    o, lse = kernel(np.ones((1, 1, 3, 0)), np.ones((1, 1, 5, 0)), v, causal=True, align=1, return_lse=True)
    np.testing.assert_allclose(o[0, 0], [v[0, 0, : n + 2].mean(0) for n in range(3)], rtol=1e-15)
    np.testing.assert_allclose(lse[0, 0], np.log([2, 3, 4]), rtol=1e-15)


def test_no_heads_of_keys_need_no_heads_of_queries(kernel: Kernel) -> None:
    assert kernel(np.ones((2, 0, 3, 4)), np.ones((2, 2, 5, 4)), np.ones((2, 2, 5, 6))).shape == (2, 0, 3, 6)


@pytest.mark.parametrize("engine", sorted(name for _, name, available, _ in engines.survey() if available))
def test_no_engine_is_given_nothing_to_cut(engine: str) -> None:
    for shape in (Shape(heads=0, kv_heads=0), Shape(head_size=0), Shape(value_size=0)):
        q, k, v = uniform(shape, "float32")
        assert flashtile.attention(q, k, v, engine=engine).shape == (*shape.q[:3], shape.value_size)
        assert flashtile.explain(q, k, v, engine=engine).engine == "direct"


@pytest.mark.parametrize("where", ["qk", "v", "all"])
def test_denormals(kernel: Kernel, dtype: str, where: str) -> None:
    q, k, v = uniform(Shape(1, 1, 1, 20, 40, 12, 10), dtype)
    tiny = DTYPES[dtype].tiny
    small = [(x.astype(np.float64) * tiny).astype(x.dtype) for x in (q, k, v)]
    assert all(((x != 0) & (np.abs(x) < tiny)).any() for x in small)
    inputs = [s if name in where or where == "all" else x for name, s, x in zip("qkv", small, (q, k, v), strict=True)]
    want = expect(*inputs)[0]
    if dtype == "bfloat16":  # the dot unit may take denormals for zero
        want = dataclasses.replace(want, allowed=want.allowed + tiny)
    want.check(kernel(*inputs))


def test_fp16_product_beyond_its_range(kernel: Kernel) -> None:
    """q.k is 230,400 and the scaled score 28,800: only the unscaled product is more than float16 holds."""
    v = uniform(Shape(1, 1, 1, 1, 50, 64, 9), "float16")[2]
    q, k = np.full((1, 1, 6, 64), 60, np.float16), np.full((1, 1, 50, 64), 60, np.float16)
    _check(kernel, q, k, v)


def test_fp16_score_beyond_its_range(kernel: Kernel) -> None:
    if kernel.name.endswith("vanilla"):
        pytest.skip("the baselines store their scores in float16, where they overflow")
    v = uniform(Shape(1, 1, 1, 1, 50, 64, 9), "float16")[2]
    q, k = np.full((1, 1, 6, 64), 200, np.float16), np.full((1, 1, 50, 64), 200, np.float16)
    mean = np.broadcast_to(v.astype(np.float64).mean(axis=2, keepdims=True), (1, 1, 6, 9))
    Expected(mean, 2 * ulp(np.abs(mean).max(), "float16"), "float16").check(kernel(q, k, v))


def test_fp16_largest_values(kernel: Kernel) -> None:
    """Equal values of 65504 average to 65504: their sum must not be held in float16."""
    q, k, v = uniform(Shape(1, 1, 1, 20, 60, 8, 8), "float16")
    v[...] = 65504
    assert (kernel(q, k, v) == 65504).all()


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
def test_stride_zero(kernel: Kernel, dtype: str, axes: tuple[int, ...]) -> None:
    shape = Shape(2, 2, 2, 30, 50, 12, 12)
    inputs = [placed(x, (0, 1, 2, 3), (1, 1, 1, 1), 0, axes) for x in uniform(shape, dtype)]
    assert all(x.strides[axis] == 0 for x in inputs for axis in axes)
    _check(kernel, *inputs, causal=True, align=15)


@pytest.mark.parametrize("axis", range(4))
def test_negative_strides(kernel: Kernel, dtype: str, axis: int) -> None:
    inputs = [np.flip(x, axis) for x in uniform(Shape(2, 4, 2, 60, 50, 20, 12), dtype)]
    assert all(x.strides[axis] < 0 for x in inputs)
    _check(kernel, *inputs)


@pytest.mark.parametrize("shift", [1, 3, 8])
def test_misaligned_pointers(kernel: Kernel, dtype: str, shift: int) -> None:
    """Also where they end: the last element is the last of its buffer."""
    inputs = [placed(x, (0, 1, 2, 3), (1, 1, 1, 1), shift) for x in uniform(SHAPE, dtype)]
    _check(kernel, *inputs, causal=True, align=20)


def test_read_only_inputs(kernel: Kernel, dtype: str) -> None:
    inputs = uniform(SHAPE, dtype)
    for x in inputs:
        x.flags.writeable = False
    _check(kernel, *inputs)


@pytest.mark.parametrize("axis", range(3))
def test_elements_beyond_32_bits(kernel: Kernel, dtype: str, axis: int, tmp_path: Path) -> None:
    """Offsets of more than 2^31 elements, in sparse files: the three slices of an axis lie 2^30 elements apart."""
    sizes = [2, 3, 3, 5]
    sizes[axis] = 3
    far = Shape(sizes[0], sizes[1], sizes[1], sizes[2], sizes[2], sizes[3], sizes[3])

    def spread(x: np.ndarray, name: str) -> np.ndarray:
        apart = 2**30 + 16
        memory = np.memmap(tmp_path / name, np.uint8, "w+", shape=((x.shape[axis] - 1) * apart + x.size) * x.itemsize)
        strides = list(x.strides)
        strides[axis] = apart * x.itemsize
        view = as_strided(memory.view(x.dtype), x.shape, strides)
        view[...] = x
        return view

    near = uniform(far, dtype)
    q, k, v = (spread(x, name) for x, name in zip(near, "qkv", strict=True))
    assert (q.shape[axis] - 1) * q.strides[axis] > 2**31 * q.itemsize
    out = spread(np.zeros_like(near[0]), "o")
    o, lse = kernel(q, k, v, out=out, return_lse=True)
    want_o, want_lse = expect(*near)
    want_o.check(o, "output")
    want_lse.check(lse, "lse")
