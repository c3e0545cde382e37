"""Gradients through masks and score functions, and of the arrays that they read, by the CPU kernels."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from inputs import Shape, same_bits, uniform
from kernel_cases import Kernel, computes_apart
from option_cases import EACH, SHAPE, SINKS, SLOPES, TOGETHER, coins, numbers

import flashtile
from flashtile.calls import clear_cache
from flashtile.dtypes import DTYPES
from flashtile.llvm import machines
from flashtile.score import document, padding
from flashtile.testing import assert_gradients_accurate, expect_gradients

CASES = {**TOGETHER, **EACH}
ONE_DTYPE_EACH = [(name, list(DTYPES)[n % len(DTYPES)]) for n, name in enumerate(EACH)]
ARRAYS = ("bias", "sinks", "alibi_slopes")

Run = Callable[..., flashtile.Gradients]


def on_machines(element: str) -> list[str]:
    """The instruction sets whose kernels for a dtype are their own."""
    return [isa for isa in machines.usable() if computes_apart(Kernel("cpu", isa), element)]


def each(*cases: tuple[str, str]) -> Any:
    """A test for each (name, dtype) on every instruction set that computes the dtype apart."""
    found = [pytest.param(isa, *case, id="-".join((isa, *case))) for case in cases for isa in on_machines(case[1])]
    return pytest.mark.parametrize(("differentiate", "name", "element"), found, indirect=["differentiate"])


on_fp32 = pytest.mark.parametrize("differentiate", on_machines("float32"), indirect=True)


@pytest.fixture(params=list(machines.usable()))
def differentiate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Forward and backward by the CPU kernels on one instruction set."""
    monkeypatch.setenv("FLASHTILE_ISA", request.param)
    clear_cache()
    yield _differentiate
    clear_cache()


def _differentiate(
    do: Any, q: Any, k: Any, v: Any, *, wrt: Any, dlse: Any = None, kernel: str = "cpu", **options: Any
) -> flashtile.Gradients:
    o, lse = flashtile.attention(q, k, v, return_lse=True, kernel=kernel, **options)
    return flashtile.attention_backward(do, q, k, v, o, lse, dlse=dlse, wrt=wrt, kernel=kernel, **options)


def asked(options: dict[str, Any]) -> tuple[str, ...]:
    return ("q", "k", "v", *(n for n in ARRAYS if n in options), *(["captured"] if "score_mod" in options else []))


def values(g: flashtile.Gradients) -> list[np.ndarray]:
    return [x for x in (g.q, g.k, g.v, g.bias, g.sinks, g.alibi_slopes, *(g.captured or {}).values()) if x is not None]


def arriving(shape: Shape, dtype: str, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """do and dlse."""
    r = np.random.default_rng(seed)
    do, dlse = r.standard_normal((*shape.q[:3], shape.value_size)), r.standard_normal(shape.q[:3])
    return do.astype(uniform(Shape(), dtype)[0].dtype), dlse.astype(DTYPES[DTYPES[dtype].accumulator].numpy)


@cache
def _case(name: str, dtype: str, shape: Shape) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Inputs, options and the gradients to expect; shared by all instruction sets."""
    options = CASES[name](shape)
    do, dlse = arriving(shape, dtype)
    inputs = (do, *uniform(shape, dtype, size=2.0))
    options = {**options, "wrt": asked(options), "dlse": dlse}
    return inputs, options, expect_gradients(*inputs, **options)


def _check(run: Run, name: str, dtype: str, shape: Shape = SHAPE) -> None:
    inputs, options, want = _case(name, dtype, shape)
    got = run(*inputs, **options)
    for which in asked(options):
        if which != "captured":
            getattr(want, which).check(getattr(got, which), which)
    for array, right in (want.captured or {}).items():
        right.check(got.captured[array], "captured")


@each(*itertools.product(TOGETHER, DTYPES))
def test_options_together(differentiate: Run, name: str, element: str) -> None:
    _check(differentiate, name, element)


@each(*ONE_DTYPE_EACH)
def test_each_option(differentiate: Run, name: str, element: str) -> None:
    _check(differentiate, name, element)


@on_fp32
@pytest.mark.parametrize("lengths", [(1, 1), (1, 150), (16, 16), (48, 128), (49, 129), (150, 60)])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2)])
def test_ragged_sizes(differentiate: Run, lengths: tuple[int, int], heads: tuple[int, int]) -> None:
    shape = Shape(2, *heads, *lengths, 17, 9)
    mask, bias = padding([shape.kv_len, shape.kv_len // 2]), numbers(shape.heads, *lengths)
    do, dlse = arriving(shape, "float32")
    options: dict[str, Any] = {"softcap": 3.0, "mask": mask, "bias": bias, "dlse": dlse, "wrt": ("q", "k", "v", "bias")}
    inputs = (do, *uniform(shape, "float32"))
    assert_gradients_accurate(differentiate(*inputs, **options), *inputs, **options)


B, H, S, T = SHAPE.batch, SHAPE.heads, SHAPE.q_len, SHAPE.kv_len
TABLE, BACK = numbers(H, S + T), numbers(S + T, H, seed=3)
ROWS, KEYS, FEW, SQUARE = numbers(S), numbers(H, T), numbers(7), numbers(T, T)
INDICES: dict[str, Callable[..., Any]] = {
    "row and key": lambda s, b, h, i, j: s + SQUARE[i, j],
    "key and row": lambda s, b, h, i, j: s + SQUARE[j, i] + s * SQUARE[i, j],
    "row": lambda s, b, h, i, j: s * ROWS[i],
    "key": lambda s, b, h, i, j: s * KEYS[h, j],
    "distance": lambda s, b, h, i, j: s + TABLE[h, i - j + T - 1],
    "distance backwards": lambda s, b, h, i, j: s * BACK[j - i + S - 1, h],
    "distance, guarded": lambda s, b, h, i, j: s + np.where(abs(i - j) < 4, FEW[i - j + 3], 0),
    "head": lambda s, b, h, i, j: s - TABLE[h, 0] * abs(i - j),
    "one": lambda s, b, h, i, j: s * (1 + FEW[0] + FEW[b]),
    "anywhere": lambda s, b, h, i, j: s + FEW[(i * i + j) % 7],
    "of a load": lambda s, b, h, i, j: s + TABLE[h, np.where(KEYS[0, j] > 0, 3, i)],
}


@pytest.mark.parametrize("element", ["float32", "float64"])
@pytest.mark.parametrize("name", INDICES)
def test_every_kind_of_index(name: str, element: str) -> None:
    """On one instruction set: tests/cpu/test_derivative.py has them all."""
    options = {"score_mod": INDICES[name], "mask": document(np.arange(S) // 40, np.arange(T) // 70)}
    inputs = (arriving(SHAPE, element)[0], *uniform(SHAPE, element))
    wrt = ("q", "captured")
    assert_gradients_accurate(_differentiate(*inputs, wrt=wrt, **options), *inputs, wrt=wrt, **options)


@pytest.mark.parametrize("axes", [(1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 1, 0), (0, 0, 1, 1), (0, 0, 0, 0), (1, 1, 0, 0)])
def test_a_bias_is_summed_over_the_axes_that_it_broadcasts_along(axes: tuple[int, ...]) -> None:
    shape = Shape(2, 6, 2, 49, 60, 8, 8)
    full = (2, 6, 49, 60)
    dense = numbers(*full, dtype="float64")
    do, dlse = arriving(shape, "float64")  # without dlse a row's dS would sum to 0
    inputs = (do, *uniform(shape, "float64"))
    bias = dense[tuple(slice(None) if axis else slice(0, 1) for axis in axes)]
    wide = _differentiate(*inputs, dlse=dlse, wrt="bias", bias=np.broadcast_to(bias, full)).bias
    narrow = _differentiate(*inputs, dlse=dlse, wrt="bias", bias=bias).bias
    want = wide.sum(axis=tuple(n for n in range(4) if not axes[n]), keepdims=True)
    np.testing.assert_allclose(narrow, want, rtol=0, atol=np.sqrt(np.finfo(float).eps) * np.abs(want).max())
    swapped = np.ascontiguousarray(bias.swapaxes(2, 3)).swapaxes(2, 3)
    assert same_bits(_differentiate(*inputs, dlse=dlse, wrt="bias", bias=swapped).bias, narrow)


@pytest.mark.parametrize("element", ["float32", "float64"])
@pytest.mark.parametrize(("rows", "keys"), [(6, 100_000), (100_000, 6)])
def test_long_sums_keep_to_the_rule(element: str, rows: int, keys: int) -> None:
    """Of one sign, so that errors of one direction grow. A sink's sum goes over rows: of six, the rounding of lse says
    more than the sum."""
    shape = Shape(1, 4, 2, rows, keys, 8, 4)
    inputs = tuple(np.abs(x) for x in (arriving(shape, element)[0], *uniform(shape, element)))
    slopes, ends, few = np.abs(numbers(4)) * 1e-5, numbers(4, min(rows, keys)), np.abs(numbers(3, 4))
    short = "i" if rows < keys else "j"

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s * (1 + few[0, h]) + ends[h, i if short == "i" else j] + few[(i + j) % 3, h]

    options: dict[str, Any] = {"score_mod": score, "alibi_slopes": slopes, "sinks": SINKS, "align": 0}
    options["dlse"] = np.abs(arriving(shape, element)[1])
    options["wrt"] = ("captured", "alibi_slopes", *(("sinks",) if rows > keys else ()))
    assert_gradients_accurate(_differentiate(*inputs, **options), *inputs, **options)


LARGE = Shape(2, 8, 2, 200, 310, 48, 40)
FAR, NEAR = numbers(600), numbers(8, 310)
MANY = {
    "own": lambda: {"bias": numbers(2, 8, 200, 310)},
    "copies": lambda: {"alibi_slopes": numbers(8), "bias": numbers(200, 1), "align": "bottom_right", "softcap": 3.0},
    "one after another": lambda: {"bias": numbers(200, 310), "sinks": numbers(8), "mask": coins(200, 310)},
    "captured": lambda: {"score_mod": lambda s, b, h, i, j: s * FAR[i - j + 310] + NEAR[h, j]},
}


@pytest.mark.parametrize("name", MANY)
def test_number_of_threads_changes_no_bit(
    name: str, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "one after another":  # at a size at which a test is quick
        monkeypatch.setattr("flashtile.kernels.cpu.array_sums.COPIES_BYTES", 1000)
    options = MANY[name]()
    inputs = (arriving(LARGE, "float32")[0], *uniform(LARGE, "float32"))
    threads(1)
    alone = values(_differentiate(*inputs, wrt=asked(options), **options))
    for count in (2, 3, 8):
        threads(count)
        for a, b in zip(alone, values(_differentiate(*inputs, wrt=asked(options), **options)), strict=True):
            assert same_bits(a, b), f"{count} threads"


def test_an_array_has_one_accumulator_whatever_the_heads() -> None:
    shape = Shape(1, 16, 16, 1100, 1100, 8, 8)
    bias, inputs = np.zeros((1100, 1100), np.float32), uniform(shape, "float32")
    do, _ = arriving(shape, "float32")
    o, lse = flashtile.attention(*inputs, bias=bias, return_lse=True)
    tracemalloc.start()
    try:
        flashtile.attention_backward(do, *inputs, o, lse, wrt="bias", bias=bias, kernel="cpu")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * bias.nbytes + (16 << 20)  # its accumulator, the gradient, and what every backward takes


@each(*itertools.product(("nan", "inf", "-inf"), ("float32", "bfloat16")))
def test_what_is_hidden_reaches_no_gradient(differentiate: Run, name: str, element: str) -> None:
    poison = float(name)
    shape = Shape(2, 4, 2, 55, 140, 16, 12)
    r = np.random.default_rng(0)
    mask = r.random((2, 1, 55, 140)) > 0.3
    mask[:, :, :, 130] = mask[:, :, 50] = False
    q, k, v = uniform(shape, element)
    do, _ = arriving(shape, element)
    bias, table, rows = numbers(2, 4, 55, 140), numbers(4, 140), numbers(55)

    def gradients(do: Any, q: Any, k: Any, v: Any, bias: Any, table: Any, rows: Any) -> list[np.ndarray]:
        score = lambda s, b, h, i, j: s * table[h, j] + rows[i]  # noqa: E731
        options = {"score_mod": score, "mask": mask, "bias": bias, "sinks": SINKS}
        wrt = ("q", "k", "v", "bias", "sinks", "captured")
        return values(differentiate(do, q, k, v, wrt=wrt, **options))

    clean = gradients(do, q, k, v, bias, table, rows)
    do, q, k, v, bias, table, rows = (x.copy() for x in (do, q, k, v, bias, table, rows))
    for x in (k, v):
        x[:, :, 130] = poison
    for x in (do, q):
        x[:, :, 50] = poison
    table[:, 130] = rows[50] = poison
    bias[~np.broadcast_to(mask, bias.shape)] = poison
    for a, b in zip(clean, gradients(do, q, k, v, bias, table, rows), strict=True):
        assert np.isfinite(a.astype(np.float32)).all() and same_bits(a, b)


@on_fp32
def test_a_selection_or_a_saturated_cap_gives_zero_and_not_nan(differentiate: Run) -> None:
    """Where the slope is 0 nothing arrives, however large the rest."""
    shape = Shape(1, 2, 1, 20, 40, 8, 8)
    q, k, v = uniform(shape, "float32")
    # Scores overflow, to +inf: of both signs their sum would be NaN where multiply and add round apart.
    q[0, 0] = np.abs(q[0, 0]) * np.float32(1e30)
    k[0, 0] = np.abs(k[0, 0]) * np.float32(1e10)
    do, _ = arriving(shape, "float32")
    got = differentiate(do, q, k, v, wrt=("q", "k", "v"), softcap=2.0)
    assert np.isfinite(got.q).all() and not got.q[0, 0].any()
    score = lambda s, b, h, i, j: np.where(i > 9, 0.5 * j, np.where(s > 0, np.sqrt(s), 0.0))  # noqa: E731
    q, k, v = uniform(shape, "float32")
    got = differentiate(do, q, k, v, wrt=("q", "k"), score_mod=score)
    assert np.isfinite(got.q).all() and np.isfinite(got.k).all() and not got.q[:, :, 10:].any()
    assert_gradients_accurate(got, do, q, k, v, wrt=("q", "k"), score_mod=score)


def test_an_array_captured_twice_is_one_sum_and_a_view_its_own() -> None:
    inputs = (arriving(SHAPE, "float64")[0], *uniform(SHAPE, "float64"))
    x = numbers(T, dtype="float64")
    view = x[::2]

    def captured(score: Any) -> Any:
        return _differentiate(*inputs, wrt="captured", score_mod=score).captured

    twice = captured(lambda s, b, h, i, j: s + x[j] * j + x[j])
    once = captured(lambda s, b, h, i, j: s + x[j] * (j + 1))
    near = {"rtol": 0, "atol": np.sqrt(np.finfo(float).eps) * np.abs(once[x]).max()}
    assert len(twice) == 1
    np.testing.assert_allclose(twice[x], once[x], **near)
    both = captured(lambda s, b, h, i, j: s + x[j] + np.where(j < 70, view[j % 75], 0) * (j + 1))
    assert len(both) == 2 and both[view].shape == view.shape
    alone = captured(lambda s, b, h, i, j: s + x[j] + np.where(j < 70, x[::2].copy()[j % 75], 0) * (j + 1))
    np.testing.assert_allclose(both[x], alone[x], **near)


def test_sinks_of_rows_that_see_nothing_have_a_gradient(differentiate: Run) -> None:
    shape = Shape(2, 4, 2, 20, 30, 8, 8)
    mask = np.ones((20, 30), bool)
    mask[3:9] = False
    do, dlse = arriving(shape, "float64")
    inputs = (do, *uniform(shape, "float64"))
    for sinks in (SINKS, np.stack([SINKS, SINKS - 9])):
        options: dict[str, Any] = {"mask": mask, "sinks": sinks, "dlse": dlse, "wrt": ("q", "sinks")}
        assert_gradients_accurate(differentiate(*inputs, **options), *inputs, **options)
    only = differentiate(*inputs, mask=np.zeros((20, 30), bool), sinks=SINKS, dlse=dlse, wrt=("q", "sinks"))
    np.testing.assert_allclose(only.sinks, dlse.sum(axis=(0, 2)))
    assert not only.q.any()


def test_torch_agrees() -> None:
    torch = pytest.importorskip("torch")
    shape = Shape(2, 4, 4, 50, 70, 16, 8)
    inputs = uniform(shape, "float64")
    do, dlse = arriving(shape, "float64")
    bias, slopes = numbers(1, 4, 50, 70, dtype="float64"), SLOPES.astype(float)
    options: dict[str, Any] = {"softcap": 2.0, "alibi_slopes": slopes, "bias": bias, "align": 3}
    got = _differentiate(do, *inputs, dlse=dlse, wrt=("q", "k", "v", "bias", "alibi_slopes"), **options)
    q, k, v, x, y = (torch.from_numpy(a).clone().requires_grad_() for a in (*inputs, bias, slopes))
    s = 2 * torch.tanh(q @ k.transpose(2, 3) / 4 / 2)
    far = (torch.arange(50)[:, None] + 3 - torch.arange(70)).abs()
    s = s - y[:, None, None] * far + x
    loss = (torch.softmax(s, -1) @ v * torch.from_numpy(do)).sum() + (
        torch.logsumexp(s, -1) * torch.from_numpy(dlse)
    ).sum()
    loss.backward()
    for a, b in zip((got.q, got.k, got.v, got.bias, got.alibi_slopes), (q, k, v, x, y), strict=True):
        want = b.grad.numpy()
        np.testing.assert_allclose(a, want, rtol=0, atol=np.sqrt(np.finfo(float).eps) * np.abs(want).max())


def test_auto_takes_the_fused_kernel_with_every_option() -> None:
    inputs = (arriving(SHAPE, "float32")[0], *uniform(SHAPE, "float32"))
    for name in TOGETHER:
        options = CASES[name](SHAPE)
        chosen, named = (_differentiate(*inputs, wrt=asked(options), kernel=x, **options) for x in ("auto", "cpu"))
        assert all(same_bits(a, b) for a, b in zip(values(chosen), values(named), strict=True))


@pytest.mark.parametrize("family", ["auto", "cpu"])
def test_bits_of_floats_have_no_derivative(family: str) -> None:
    inputs = (arriving(SHAPE, "float32")[0], *uniform(SHAPE, "float32"))
    o, lse = flashtile.attention(*inputs[1:], return_lse=True)
    here = __file__.rpartition("/")[2]
    with pytest.raises(flashtile.SpecError, match=rf"{here}:\d+: and of a float"):
        flashtile.attention_backward(*inputs, o, lse, score_mod=lambda s, b, h, i, j: s & 1, kernel=family)
