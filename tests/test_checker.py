"""The checker is checked: it must fail on everything that is wrong, and pass what is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from inputs import Shape, numpy_dtype, uniform

import flashtile
from flashtile import Gradients, testing
from flashtile.gradient_problem import ByIdentity
from flashtile.kernels import reference, vanilla

pytestmark = pytest.mark.core

SHAPE = Shape(1, 2, 1, 9, 13, 8, 5)
AT = (0, 1, 4, 2)  # the element that is spoiled


def _right(dtype: str) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The reference's answer rounded to the dtype, and its inputs."""
    q, k, v = uniform(SHAPE, dtype)
    return testing.expect(q, k, v)[0].value.astype(numpy_dtype(dtype)), (q, k, v)


def _spoil(change: Callable[[np.ndarray, float], object]) -> Callable[[np.ndarray, float], np.ndarray]:
    """A copy of the answer with `change(copy, allowed)` done to it."""

    def spoiled(o: np.ndarray, allowed: float) -> np.ndarray:
        o = o.copy()
        change(o, allowed)
        return o

    return spoiled


def _set(value: float) -> Callable[[np.ndarray, float], np.ndarray]:
    return _spoil(lambda o, _: o.__setitem__(AT, value))


def _shift(times: float) -> Callable[[np.ndarray, float], np.ndarray]:
    return _spoil(lambda o, allowed: o.__setitem__(AT, float(o[AT]) + times * allowed))


WRONG = {
    "NaN": (_set(np.nan), "NaN in one and not the other"),
    "inf": (_set(np.inf), r"\+inf in one and not the other"),
    "-inf": (_set(-np.inf), "-inf in one and not the other"),
    "one element too high": (_shift(2), r"in 1 of 90 elements; at \(0, 1, 4, 2\)"),
    "one element too low": (_shift(-2), r"in 1 of 90 elements; at \(0, 1, 4, 2\)"),
    "all zero": (lambda o, _: np.zeros_like(o), "error over"),
    "all NaN": (lambda o, _: np.full_like(o, np.nan), "NaN in one"),
    "negated": (lambda o, _: -o, "error over"),
    "heads swapped": (lambda o, _: o[:, ::-1], "error over"),
    "a row short": (lambda o, _: o[:, :, 1:], "got shape"),
    "an axis short": (lambda o, _: o[0], "got shape"),
    "an axis more": (lambda o, _: o[None], "got shape"),
    "output and lse": (lambda o, _: (o, o), "got tuple, expected an array"),
    "another dtype": (lambda o, _: o.astype(np.float32 if o.dtype.name != "float32" else np.float64), "got dtype"),
}


def test_right_answer_passes(dtype: str) -> None:
    o, inputs = _right(dtype)
    testing.assert_accurate(o, *inputs)


def test_small_error_passes(dtype: str) -> None:
    o, inputs = _right(dtype)
    allowed = testing.allowed_error(*inputs)
    exact = testing.expect(*inputs)[0].value
    near = (exact + 0.6 * allowed).astype(o.dtype)
    assert (near != o).any()
    testing.assert_accurate(near, *inputs)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_answer_fails(dtype: str, wrong: tuple[Callable[[np.ndarray, float], np.ndarray], str]) -> None:
    spoil, message = wrong
    o, inputs = _right(dtype)
    with pytest.raises(AssertionError, match=message):
        testing.assert_accurate(spoil(o, testing.allowed_error(*inputs)), *inputs)


@pytest.mark.parametrize("times", [2, -2, np.nan, np.inf])
def test_wrong_lse_fails(dtype: str, times: float) -> None:
    q, k, v = uniform(SHAPE, dtype)
    lse = testing.expect(q, k, v)[1]
    right = lse.value.astype(numpy_dtype(lse.dtype))
    testing.assert_accurate(right, q, k, v, kind="lse")
    right[0, 1, 3] += times * lse.allowed
    with pytest.raises(AssertionError, match="lse"):
        testing.assert_accurate(right, q, k, v, kind="lse")


def test_missing_nan_fails() -> None:
    q, k, v = uniform(SHAPE, "float32")
    clean = testing.expect(q, k, v)[0].value.astype(np.float32)
    q[AT[:3]] = np.nan
    with pytest.raises(AssertionError, match="NaN in one and not the other, in 5 of 90"):
        testing.assert_accurate(clean, q, k, v)


def test_missing_infinity_of_lse_fails() -> None:
    q, k, v = uniform(SHAPE, "float32")
    options = {"causal": True, "align": -3}  # the first three rows see no key
    lse = testing.expect(q, k, v, **options)[1].value.astype(np.float32)
    testing.assert_accurate(lse, q, k, v, kind="lse", **options)
    lse[0, 0, 1] = -1e30
    with pytest.raises(AssertionError, match="-inf in one and not the other"):
        testing.assert_accurate(lse, q, k, v, kind="lse", **options)


def test_answer_to_another_question_fails(dtype: str) -> None:
    q, k, v = uniform(SHAPE, dtype, size=3)
    o = testing.expect(q, k, v)[0].value.astype(numpy_dtype(dtype))
    for options in ({"scale": 0.4}, {"causal": True, "align": "bottom_right"}, {"window": (2, 2), "align": 0}):
        with pytest.raises(AssertionError):
            testing.assert_accurate(o, q, k, v, **options)


def test_allowed_error_is_small(dtype: str) -> None:
    """The rule would be void if it allowed much: on ordinary data it is a few units in the last place of 1."""
    q, k, v = uniform(SHAPE, dtype)
    eps = testing.ulp(1.0, dtype)
    assert 0 < testing.allowed_error(q, k, v) < 8 * eps
    assert 0 < testing.allowed_error(q, k, v, kind="lse") < 32 * eps


def test_allowed_error_follows_the_rule() -> None:
    q, k, v = uniform(SHAPE, "float32")
    exact = reference.attend(q, k, v, scale=8**-0.5).o
    errors = [
        np.abs(vanilla.attend(q, k, v, scale=8**-0.5, dtype="float32", order=order).o - exact).max()
        for order in testing.key_orders(SHAPE.kv_len)
    ]
    assert len(set(errors)) > 1  # the orders do sum differently
    two_ulp = 2 * float(np.spacing(np.float32(np.abs(exact).max())))
    assert testing.allowed_error(q, k, v) == pytest.approx(2 * max(errors) + two_ulp, rel=1e-9)


def test_lse_is_allowed_the_rounding_of_a_dot_product() -> None:
    """One key, so that no order of keys shows any error; its lse is its score."""
    q = k = np.ones((1, 1, 1, 64), np.float32)
    assert testing.allowed_error(q, k, q, kind="lse", scale=1.0) == 2 * 2.0**-17 + 8 * 2.0**-24 * 64
    k = k.copy()
    k[..., 1::2] = -1  # the score is 0, but it was a sum of 64 numbers of size 1
    assert testing.allowed_error(q, k, q, kind="lse", scale=1.0) == pytest.approx(8 * 2.0**-24 * 64)


def test_gradient_is_allowed_three_times_the_error() -> None:
    exact = np.array([1.5, -3.0])
    baselines = [np.array([1.5, -3.25]), np.array([1.625, -3.0])]
    assert testing.allow(exact, baselines, "float32", kind="gradient") == 3 * 0.25 + 2 * 2.0**-22
    assert testing.allow(exact, baselines, "float32", kind="output") == 2 * 0.25 + 2 * 2.0**-22


def test_overflowed_baseline_says_nothing() -> None:
    exact = np.array([1.0, 2.0])
    assert testing.allow(exact, [np.array([1.0, np.nan])], "float64") == 2 * 2.0**-51
    with pytest.raises(ValueError, match="says nothing"):
        testing.allow(exact, [np.array([np.inf, np.nan])], "float64")


@pytest.mark.parametrize("x", [1.0, 1.5, 2.0, 32768.0, 6.1e-5, 3e-7, -0.3])
def test_ulp_is_numpys_spacing(x: float) -> None:
    for name in ("float16", "float32", "float64"):
        assert testing.ulp(float(np.dtype(name).type(x)), name) == abs(float(np.spacing(np.dtype(name).type(x))))


def test_unknown_options_are_refused() -> None:
    q, k, v = uniform(SHAPE, "float32")
    with pytest.raises(flashtile.errors.KeywordError, match="softcaps: got a keyword .*, did you mean softcap="):
        testing.assert_accurate(q, q, k, v, softcaps=3.0)
    with pytest.raises(flashtile.errors.KeywordError, match="lse: got a keyword that expect_gradients does not have"):
        testing.assert_gradients_accurate(flashtile.Gradients(), q, q, k, v, lse=q)


def test_unknown_kind_is_refused() -> None:
    q, k, v = uniform(SHAPE, "float32")
    with pytest.raises(ValueError, match="kind: got 'sum', expected"):
        testing.assert_accurate(q, q, k, v, kind="sum")


DO = np.random.default_rng(1).uniform(-1, 1, (*SHAPE.q[:3], SHAPE.value_size))
TABLE = np.random.default_rng(2).uniform(-1, 1, SHAPE.kv_len)
DIFFERENTIATED: dict[str, Any] = {
    "wrt": ("q", "k", "v", "sinks", "captured"),
    "dlse": np.ones(SHAPE.q[:3], np.float32),
    "sinks": np.array([0.5, -0.5]),
    "score_mod": lambda s, b, h, i, j: s + TABLE[j],
}


def _right_gradients(dtype: str) -> tuple[dict[str, Any], tuple[np.ndarray, ...]]:
    """The reference's gradients rounded to their dtypes, and do, q, k, v."""
    inputs = DO.astype(numpy_dtype(dtype)), *uniform(SHAPE, dtype)
    found = vars(testing.expect_gradients(*inputs, **DIFFERENTIATED))
    right = {name: found[name].value.astype(numpy_dtype(dtype)) for name in "qkv"}
    captured = ByIdentity([(TABLE, found["captured"][TABLE].value.astype(TABLE.dtype))])
    return right | {"sinks": found["sinks"].value.astype(np.float64), "captured": captured}, inputs


def test_right_gradients_pass(dtype: str) -> None:
    right, inputs = _right_gradients(dtype)
    testing.assert_gradients_accurate(Gradients(**right), *inputs, **DIFFERENTIATED)


WRONG_GRADIENTS: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "NaN": (lambda x: np.where(np.arange(x.size).reshape(x.shape) == 1, np.nan, x).astype(x.dtype), "NaN in one"),
    "negated": (lambda x: -x, "error over"),
    "zero": (np.zeros_like, "error over"),
    "a row short": (lambda x: x[..., 1:], "got shape"),
    "another dtype": (lambda x: x.astype(np.float16 if x.dtype != np.float16 else np.float32), "got dtype"),
    "missing": (lambda x: None, "got none"),
}


@pytest.mark.parametrize("which", ["q", "k", "v", "sinks", "captured"])
@pytest.mark.parametrize("wrong", WRONG_GRADIENTS.values(), ids=WRONG_GRADIENTS.keys())
def test_wrong_gradients_fail(dtype: str, wrong: tuple[Callable[[np.ndarray], Any], str], which: str) -> None:
    spoil, message = wrong
    right, inputs = _right_gradients(dtype)
    if which == "captured":
        spoiled = spoil(right["captured"][TABLE])
        right["captured"] = ByIdentity([] if spoiled is None else [(TABLE, spoiled)])
    else:
        right[which] = spoil(right[which])
    with pytest.raises(AssertionError, match=f"^{which}: .*{message}"):
        testing.assert_gradients_accurate(Gradients(**right), *inputs, **DIFFERENTIATED)


def test_gradients_by_more_than_is_allowed_and_unasked_ones_fail(dtype: str) -> None:
    right, inputs = _right_gradients(dtype)
    expected = testing.expect_gradients(*inputs, **DIFFERENTIATED)
    right["k"] = right["k"].copy()
    right["k"][0, 0, 3] = (right["k"][0, 0, 3].astype(float) + 3 * expected.k.allowed).astype(right["k"].dtype)
    with pytest.raises(AssertionError, match="^k: error over"):
        testing.assert_gradients_accurate(Gradients(**right), *inputs, **DIFFERENTIATED)
    with pytest.raises(AssertionError, match="^q: got one, expected .*where wrt asks"):
        testing.assert_gradients_accurate(Gradients(**right), *inputs, **DIFFERENTIATED | {"wrt": ()})


def test_what_gradients_are_allowed_is_small(dtype: str) -> None:
    _, inputs = _right_gradients(dtype)
    for name, want in vars(testing.expect_gradients(*inputs, **DIFFERENTIATED)).items():
        if name in "qkv":
            assert 0 < want.allowed < 32 * testing.ulp(np.abs(want.value).max(), dtype)


@pytest.mark.parametrize("size", [1, 3e3])
def test_what_the_stored_output_and_lse_cost_is_allowed(dtype: str, size: float) -> None:
    """Exact arithmetic on them passes: of a gradient that has few elements the baseline may err little by chance, and
    where one key of each row counts, not at all in dV."""
    shape = Shape(1, 2, 1, 40, 40, 16, 16)
    options: dict[str, Any] = {"sinks": np.array([0.5, -0.5]), "alibi_slopes": np.array([0.1, 0.2]), "causal": True}
    options["wrt"] = "q", "k", "v", "sinks", "alibi_slopes"
    accumulator = np.float64 if dtype == "float64" else np.float32
    for seed in range(20):
        do, (q, k, v) = uniform(shape, dtype, seed=seed + 100)[0], uniform(shape, dtype, seed=seed)
        q = (q.astype(np.float64) * size).astype(q.dtype)
        wide = [np.asarray(x, np.float64) for x in (do, q, k, v)]
        given = {name: x for name, x in options.items() if name != "wrt"}
        o, lse = flashtile.attention(*wide[1:], return_lse=True, kernel="reference", **given)
        stored = o.astype(q.dtype).astype(np.float64), lse.astype(accumulator).astype(np.float64)
        found = flashtile.attention_backward(*wide, *stored, kernel="reference", **options)
        kept = {name: x.astype(q.dtype) if name in "qkv" else x for name, x in vars(found).items() if x is not None}
        testing.assert_gradients_accurate(Gradients(**kept), do, q, k, v, **options)
