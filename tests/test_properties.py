"""What holds for every input: found by drawing shapes, layouts and options, and by what attention is mathematically."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inputs import Shape, numpy_dtype, placed, same_bits, uniform, whole_memory
from kernel_cases import Kernel

import flashtile
from flashtile.dtypes import DTYPES
from flashtile.testing import expect

pytestmark = pytest.mark.core

DTYPE = st.sampled_from(list(DTYPES))
SEED = st.integers(0, 999)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Small problems with any grouping of heads; lengths and head sizes around the edges of vectors and tiles."""
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    length = st.one_of(st.integers(1, 20), st.sampled_from([47, 49, 129]))
    size = st.one_of(st.integers(1, 20), st.sampled_from([33, 64]))
    return Shape(
        draw(st.integers(1, 2)), kv_heads * group, kv_heads, draw(length), draw(length), draw(size), draw(size)
    )


@st.composite
def options(draw: st.DrawFn, batch: int) -> dict[str, Any]:
    """Any combination of the rules on positions, the scale and the alignment."""
    side = st.sampled_from([-1, None, 0, 1, 5, 30])
    offset = st.integers(-40, 140)
    aligns = st.one_of(
        st.sampled_from(["top_left", "bottom_right"]),
        offset,
        st.lists(offset, min_size=batch, max_size=batch).map(np.array),
    )
    return {
        "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.none(), st.tuples(side, side))),
        "align": draw(aligns),
        "scale": draw(st.sampled_from([None, 1.0, -0.3])),
    }


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """How an array of four axes lies in memory: any order of axes, gaps, backwards, misaligned."""
    steps = st.tuples(*[st.sampled_from([1, 1, 2, -1, -3])] * 4)
    return {
        "order": tuple(draw(st.permutations(range(4)))),
        "steps": draw(steps),
        "shift": draw(st.sampled_from([0, 0, 1, 2, 7])),
    }


@given(data=st.data(), dtype=DTYPE, seed=SEED)
def test_any_shape_layout_and_option(kernel: Kernel, data: st.DataObject, dtype: str, seed: int) -> None:
    shape = data.draw(shapes())
    keywords = data.draw(options(shape.batch))
    constant = st.sets(st.integers(0, 2), max_size=2).map(tuple)  # equal products along D would round alike
    q, k, v = (
        placed(x, **data.draw(layouts()), constant=data.draw(constant)) for x in uniform(shape, dtype, seed=seed)
    )
    before = [x.copy() for x in (q, k, v)]
    out = placed(np.zeros((*q.shape[:3], v.shape[3]), numpy_dtype(dtype)), **data.draw(layouts()))
    want_o, want_lse = expect(q, k, v, **keywords)
    o, lse = kernel(q, k, v, out=out, return_lse=True, **keywords)
    assert o is out
    want_o.check(o, "output")
    want_lse.check(lse, "lse")
    for x, was in zip((q, k, v), before, strict=True):
        assert same_bits(x, was)
    out.view(f"u{out.itemsize}")[...] = ~np.zeros(
        (), f"u{out.itemsize}"
    )  # now `out` holds what was between its elements
    assert (whole_memory(out) == 0xFF).all()


@given(shape=shapes(), dtype=DTYPE, seed=SEED)
def test_order_of_keys_does_not_matter(kernel: Kernel, shape: Shape, dtype: str, seed: int) -> None:
    q, k, v = uniform(shape, dtype, seed=seed)
    order = np.random.default_rng(seed).permutation(shape.kv_len)
    allowed_o, allowed_lse = (want.allowed for want in expect(q, k, v))
    o, lse = kernel(q, k, v, return_lse=True)
    other_o, other_lse = kernel(q, k[:, :, order], v[:, :, order], return_lse=True)
    # Each of the two may be off by what is allowed.
    assert np.abs(o.astype(np.float64) - other_o.astype(np.float64)).max() <= 2 * allowed_o
    assert np.abs(lse - other_lse).max() <= 2 * allowed_lse


@given(shape=shapes(), dtype=DTYPE, seed=SEED, shift=st.sampled_from([-16.0, 8.0, 64.0]))
def test_shift_of_all_scores_moves_lse_alone(kernel: Kernel, shape: Shape, dtype: str, seed: int, shift: float) -> None:
    """One more column, 1 in q and `shift` in k, adds a constant to every score."""
    q, k, v = uniform(shape, dtype, seed=seed)
    shifted_q = np.concatenate([q, np.ones_like(q[..., :1])], axis=-1)
    shifted_k = np.concatenate([k, np.full_like(k[..., :1], shift)], axis=-1)
    scale = 0.25
    moved_o, moved_lse = expect(shifted_q, shifted_k, v, scale=scale)
    plain_o, plain_lse = expect(q, k, v, scale=scale)
    o, lse = kernel(shifted_q, shifted_k, v, scale=scale, return_lse=True)
    assert np.abs(o.astype(float) - plain_o.value).max() <= moved_o.allowed + plain_o.allowed
    assert np.abs(lse - scale * shift - plain_lse.value).max() <= moved_lse.allowed + plain_lse.allowed


@given(shape=shapes(), dtype=DTYPE, seed=SEED)
def test_output_lies_among_the_values(kernel: Kernel, shape: Shape, dtype: str, seed: int) -> None:
    q, k, v = uniform(shape, dtype, seed=seed, size=3)
    allowed = expect(q, k, v)[0].allowed
    o = kernel(q, k, v).astype(np.float64)
    each_head = np.repeat(v.astype(np.float64), shape.heads // shape.kv_heads, axis=1)
    assert (o >= each_head.min(axis=2, keepdims=True) - allowed).all()
    assert (o <= each_head.max(axis=2, keepdims=True) + allowed).all()


@given(shape=shapes(), dtype=DTYPE, seed=SEED, causal=st.booleans(), data=st.data())
def test_merged_parts_are_the_whole(
    kernel: Kernel, shape: Shape, dtype: str, seed: int, causal: bool, data: st.DataObject
) -> None:
    """Keys in up to three parts, some of them empty, merged in any order."""
    q, k, v = uniform(shape, dtype, seed=seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, shape.kv_len), min_size=2, max_size=2)))
    ends = [0, *cuts, shape.kv_len]
    parts = [
        kernel(q, k[:, :, a:b], v[:, :, a:b], causal=causal, align=3 - a, return_lse=True)
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    o, lse = flashtile.merge(data.draw(st.permutations(parts)))
    want_o, want_lse = expect(q, k, v, causal=causal, align=3)
    # Each part was rounded to its dtype once more than the whole is: half a unit of the largest value among them.
    largest = float(np.abs(v.astype(np.float64)).max())
    assert np.abs(np.asarray(o, np.float64) - want_o.value).max() <= 2 * want_o.allowed + largest * DTYPES[dtype].eps
    seen = np.isfinite(want_lse.value)
    np.testing.assert_array_equal(np.isneginf(lse), ~seen)
    assert np.abs(lse[seen] - want_lse.value[seen]).max(initial=0) <= 3 * want_lse.allowed
