"""flashtile.merge: any number of partial results, in any order, of NumPy and of torch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import plain
import pytest
from inputs import Shape, numpy_dtype, same_bits, uniform

import flashtile
from flashtile.dtypes import DTYPES
from flashtile.errors import SpecError

TOLERANCE = {"float64": 1e-14, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}


def partials(name: str, cuts: tuple[int, ...] = (3, 4, 9)) -> tuple[list[tuple[Any, Any]], Any, Any]:
    """Partial results over the keys between the cuts, and the exact result."""
    q, k, v = uniform(Shape(2, 3, 3, 5, 16), "float64", size=3)
    edges = (0, *cuts, 16)
    lse_dtype = DTYPES[name].accumulator
    pairs = []
    for begin, end in itertools.pairwise(edges):
        o, lse = plain.attend(q, k[:, :, begin:end], v[:, :, begin:end])
        pairs.append((o.astype(numpy_dtype(name)), lse.astype(lse_dtype)))
    return pairs, *plain.attend(q, k, v)


@pytest.mark.core
def test_any_order_gives_the_whole(dtype: str) -> None:
    pairs, o, lse = partials(dtype)
    for order in itertools.permutations(pairs):
        got_o, got_lse = flashtile.merge(order)
        assert got_o.dtype == numpy_dtype(dtype) and got_lse.dtype == DTYPES[dtype].accumulator
        np.testing.assert_allclose(got_o.astype(np.float64), o, atol=TOLERANCE[dtype])
        np.testing.assert_allclose(got_lse, lse, atol=1e-5 if dtype != "float64" else 1e-14)


@pytest.mark.core
def test_merging_merged_results_is_merging_all() -> None:
    pairs, o, lse = partials("float64")
    got_o, got_lse = flashtile.merge([flashtile.merge(pairs[:2]), flashtile.merge(iter(pairs[2:]))])
    np.testing.assert_allclose(got_o, o, atol=1e-14)
    np.testing.assert_allclose(got_lse, lse, atol=1e-14)


@pytest.mark.core
def test_one_partial_comes_back_bit_for_bit_but_copied(dtype: str) -> None:
    pairs, _, _ = partials(dtype)
    (o, lse), (got_o, got_lse) = pairs[0], flashtile.merge(pairs[:1])
    assert same_bits(o, got_o) and same_bits(lse, got_lse)
    assert not np.shares_memory(o, got_o) and not np.shares_memory(lse, got_lse)


@pytest.mark.core
def test_bits_depend_on_the_row_alone() -> None:
    """Neither the other rows nor where the arrays lie change a row's bits."""
    pairs, _, _ = partials("float32")
    whole = flashtile.merge(pairs)
    part = flashtile.merge([(o[1, 2, 3:], lse[1, 2, 3:][:].copy()) for o, lse in pairs])
    assert same_bits(whole[0][1, 2, 3:], part[0]) and same_bits(whole[1][1, 2, 3:], part[1])
    reverse = flashtile.merge([(o[..., ::-1, ::-1], lse[..., ::-1]) for o, lse in pairs])
    assert same_bits(np.ascontiguousarray(reverse[0][..., ::-1, ::-1]), whole[0])


@pytest.mark.core
def test_empty_partials_add_nothing_whatever_they_hold() -> None:
    pairs, o, lse = partials("float64")
    empty = np.zeros_like(o), np.full_like(lse, -np.inf)
    poisoned = np.full_like(o, np.nan), empty[1]
    got_o, got_lse = flashtile.merge([poisoned, *pairs, empty])
    np.testing.assert_allclose(got_o, o, atol=1e-14)
    np.testing.assert_allclose(got_lse, lse, atol=1e-14)
    for nothing in ([empty], [empty, poisoned], [poisoned]):
        got_o, got_lse = flashtile.merge(nothing)
        assert (got_o == 0).all() and np.isneginf(got_lse).all()


@pytest.mark.core
@pytest.mark.parametrize("height", [1e4, -1e4, 3e38, -3e38])
def test_huge_lse_neither_overflows_nor_vanishes(height: float) -> None:
    o = np.array([[1.0, 2.0]], np.float32)
    lse = np.array([height], np.float32)
    got_o, got_lse = flashtile.merge([(o, lse), (3 * o, lse), (100 * o, np.array([-np.inf], np.float32))])
    np.testing.assert_allclose(got_o, 2 * o, rtol=1e-6)
    np.testing.assert_allclose(got_lse, height + np.log(2), rtol=1e-6)


@pytest.mark.core
@pytest.mark.parametrize("bad", [(np.nan, 0.0), (1.0, np.nan), (1.0, np.inf)])
def test_a_visible_nan_makes_its_row_nan_and_no_other(bad: tuple[float, float]) -> None:
    o, lse = np.ones((2, 3)), np.zeros(2)
    bad_o, bad_lse = o.copy(), lse.copy()
    bad_o[0], bad_lse[0] = bad
    for pairs in ([(o, lse), (bad_o, bad_lse)], [(bad_o, bad_lse), (o, lse)]):
        got_o, got_lse = flashtile.merge(pairs)
        assert np.isnan(got_o[0]).all() and (got_o[1] == 1).all() and got_lse[1] == np.log(2)


@pytest.mark.core
def test_partials_of_attention_merge(kernel: Any) -> None:
    q, k, v = uniform(Shape(1, 4, 2, 20, 33), "float32")
    rules: dict[str, Any] = {"causal": True, "window": (9, -1), "return_lse": True}
    pairs = [
        kernel(q, k[:, :, begin:end], v[:, :, begin:end], align=4 - begin, **rules)
        for begin, end in ((0, 10), (10, 11), (11, 11), (11, 33))
    ]
    o, lse = kernel(q, k, v, align=4, **rules)
    got_o, got_lse = flashtile.merge(pairs)
    np.testing.assert_allclose(got_o, o, atol=1e-5)
    np.testing.assert_allclose(got_lse, lse, atol=1e-5)


def ones(*shape: int, name: str = "float32") -> np.ndarray:
    return np.ones(shape, name)


@pytest.mark.core
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "o_lse_pairs: got no pair, expected at least one"),
        (3, "o_lse_pairs: got 3, expected an iterable of pairs"),
        (np.array(3), "o_lse_pairs: got a ndarray, expected an iterable of pairs"),
        ([ones(2, 3)], r"o_lse_pairs\[0\]: got a ndarray, expected a pair"),
        ([(ones(2, 3),)], r"o_lse_pairs\[0\]: got a tuple, expected a pair"),
        ([([1.0], ones(1))], "o of pair 0: got a list, expected a NumPy array or a torch tensor"),
        ([(ones(3), ones(1))], r"o of pair 0: got shape \(3,\), expected \(B, H, S_q, D_v\)"),
        ([(ones(2, 3), ones(3))], r"lse of pair 0: got shape \(3,\), expected \(2,\)"),
        ([(ones(2, 3), ones(2)), (ones(2, 4), ones(2))], r"o of pair 1: got shape \(2, 4\), expected \(2, 3\)"),
        ([(ones(2, 3), ones(2)), (ones(4, 3), ones(4))], r"o of pair 1: got shape \(4, 3\), expected \(2, 3\)"),
        ([(ones(2, 3), ones(2)), (ones(2, 3, name="f8"), ones(2))], "o of pair 1: got dtype float64, expected float32"),
        ([(ones(2, 3), ones(2)), (ones(2, 3), ones(2, name="f8"))], "lse of pair 1: got dtype float64, expected"),
        ([(ones(2, 3, name="i4"), ones(2))], "o of pair 0: got dtype int32, expected one of"),
    ],
)
def test_bad_pairs(pairs: Any, message: str) -> None:
    with pytest.raises(SpecError, match="^" + message):
        flashtile.merge(pairs)


def test_torch_tensors_merge_as_numpy_arrays_do() -> None:
    torch = pytest.importorskip("torch")
    for name in ("float64", "float32", "float16"):
        pairs, _, _ = partials(name)
        want_o, want_lse = flashtile.merge(pairs)
        o, lse = flashtile.merge([(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs])
        assert o.dtype == getattr(torch, name)
        np.testing.assert_allclose(o.numpy(), want_o, atol=TOLERANCE[name])
        np.testing.assert_allclose(lse.numpy(), want_lse, atol=1e-6)
    o, lse = flashtile.merge([(torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2))] * 2)
    assert o.dtype == torch.bfloat16 and (o == 1).all()
    with pytest.raises(SpecError, match="o of pair 1: got a ndarray, expected a Tensor as in pair 0"):
        flashtile.merge([(torch.ones(2, 3), torch.ones(2)), (ones(2, 3), ones(2))])


def test_gradients_flow_through_a_merge_of_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    pairs = [[torch.from_numpy(x) for x in pair] for pair in partials("float64", cuts=(3, 9))[0]]
    leaves = [x.requires_grad_() for pair in pairs for x in pair]
    assert torch.autograd.gradcheck(lambda *x: flashtile.merge(zip(x[::2], x[1::2], strict=True)), leaves)
    # A partial that saw no key, as left by a tile that a mask emptied, passes no NaN back.
    empty = [torch.full((2, 3), torch.nan), torch.full((2,), -torch.inf)]
    full = [torch.ones(2, 3), torch.zeros(2)]
    for parts in ([empty, full], [empty, empty]):
        leaves = [x.detach().requires_grad_() for pair in parts for x in pair]
        o, lse = flashtile.merge(zip(leaves[::2], leaves[1::2], strict=True))
        torch.autograd.backward([o, lse], [torch.ones_like(o), torch.ones_like(lse)])
        assert all(torch.isfinite(x.grad).all() for x in leaves)
