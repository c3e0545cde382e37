"""The backward kernels under Triton's interpreter, by the accuracy rule: every option, dtype and array of gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import launching  # noqa: F401  # skips this file unless Triton interprets
import numpy as np
import pytest
import torch
from inputs import Shape, placed, same_bits, uniform
from test_interpreted_forward import OPTIONS, SHAPE

import flashtile.torch
from flashtile.calls import clear_cache
from flashtile.dtypes import DTYPES
from flashtile.kernels import triton
from flashtile.kernels.triton import backward_parts
from flashtile.kernels.triton.interpreter import Interpreter
from flashtile.kernels.triton.specialisation import Tile
from flashtile.score import dropout_keep
from flashtile.testing import assert_gradients_accurate

DROPOUT: dict[str, Any] = {"dropout_p": 0.25, "seed": 0xF23456789ABCDEF1}
OF_OPTIONS = ("bias", "sinks", "alibi_slopes")
Arrays = tuple[np.ndarray, ...]


def problem(shape: Shape, dtype: str) -> Arrays:
    """do, q, k, v."""
    do = uniform(shape._replace(head_size=shape.value_size), dtype, seed=5)[0]
    return do, *uniform(shape, dtype)


def gradients(inputs: Arrays, *, wrt: Any = None, dlse: bool = True, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The gradients as users reach them, of what the same kernels' forward has left; and the call's options."""
    do, q, k, v = inputs
    wrt = wrt or ["q", "k", "v", *(n for n in OF_OPTIONS if n in options and np.asarray(options[n]).dtype.kind == "f")]
    o, lse = flashtile.attention(q, k, v, kernel="triton", return_lse=True, **options)
    given: dict[str, Any] = {"wrt": wrt, **options}
    if dlse:
        given["dlse"] = np.random.default_rng(3).uniform(-1, 1, lse.shape).astype(lse.dtype)
    return flashtile.attention_backward(do, q, k, v, o, lse, kernel="triton", **given), given


def check(inputs: Arrays, **options: Any) -> Any:
    found, given = gradients(inputs, **options)
    assert_gradients_accurate(found, *inputs, **given)
    return found


DTYPE_OF = dict(zip(OPTIONS, itertools.cycle(DTYPES), strict=False))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    """Each in one dtype, all of them in turn."""
    check(problem(SHAPE, DTYPE_OF[name]), **OPTIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_in_every_dtype(dtype: str, name: str, dropped: bool) -> None:
    check(problem(SHAPE, dtype), **OPTIONS[name], **(DROPOUT if dropped else {}))


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("dense", "float32"),
        ("window, an offset a batch", "bfloat16"),
        ("all together", "float64"),
        ("documents", "float16"),
    ],
)
def test_dropout(name: str, storage: str) -> None:
    check(problem(SHAPE, storage), **OPTIONS[name], **DROPOUT)


def test_the_mask_of_dropout_read_out_of_dv() -> None:
    """The forward's, bit for bit: q = 0 makes all weights alike, and dO is an identity in the rows."""
    _, q, k, v = problem(Shape(2, 2, 2, 21, 40, 16, 21), "float32")
    do = np.broadcast_to(np.eye(21, dtype=np.float32), (2, 2, 21, 21))
    found, _ = gradients((do, q * 0, k, v), wrt=["v"], dlse=False, **DROPOUT)
    mask = dropout_keep((2, 2, 21, 40), *DROPOUT.values())
    np.testing.assert_array_equal(found.v.swapaxes(2, 3) != 0, mask)


@pytest.fixture
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other tiles than the interpreter's own."""
    monkeypatch.setattr(triton, "backward_tiles", lambda *_: request.param)
    clear_cache()
    yield
    clear_cache()


SIZES = [(Tile(16, 64), Tile(64, 16)), (Tile(64, 16), Tile(16, 64))]


@pytest.mark.parametrize("tiled", SIZES, indirect=True, ids=str)
@pytest.mark.parametrize("name", ["window, an offset a batch", "mask of a head", "all together"])
@pytest.mark.usefixtures("tiled")
def test_other_tiles(name: str) -> None:
    check(problem(SHAPE, "float32"), **OPTIONS[name], **DROPOUT)


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, int]]]:
    """A device with many processors, for which short calls are cut into parts; what was launched, and in how many."""
    monkeypatch.setattr(Interpreter, "processors", lambda self: 64)
    monkeypatch.setattr(backward_parts, "PART_LENGTH", 8)
    launched: set[tuple[str, int]] = set()
    launch = Interpreter.launch

    def spy(device: Interpreter, what: Any, grid: int, values: Any) -> None:
        launched.add((what.kernel, values.get("splits", 1)))
        launch(device, what, grid, values)

    monkeypatch.setattr(Interpreter, "launch", spy)
    clear_cache()
    yield launched
    clear_cache()


@pytest.mark.parametrize("name", ["window, an offset a batch", "documents", "all together"])
def test_few_heads_are_computed_in_parts(name: str, busy: set[tuple[str, int]]) -> None:
    """Of the keys, the rows and the heads that share keys, whatever changes scores; a key holds NaN."""
    inputs = problem(SHAPE, "float32")
    inputs[3][1, :, 30, 0] = np.nan
    with np.errstate(all="ignore"):
        check(inputs, wrt=["q", "k", "v", *(["bias"] if "bias" in OPTIONS[name] else [])], **OPTIONS[name], **DROPOUT)
    assert {("backward_q", 2), ("backward_kv", 2 * SHAPE.heads // SHAPE.kv_heads)} < busy
    assert {("add_parts", parts) for _, parts in busy if parts > 1} < busy
    assert ("array_sums", 2) in busy or "bias" not in OPTIONS[name]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions_of_the_products(precision: str) -> None:
    check(problem(SHAPE, "float32"), **OPTIONS["all together"], precision=precision)


@pytest.mark.parametrize(
    ("shape", "storage"),
    [
        (Shape(1, 6, 2, 33, 64, 3, 40), "float32"),
        (Shape(1, 2, 1, 17, 37, 65, 17), "bfloat16"),
        (Shape(1, 1, 1, 32, 32, 128, 64), "float16"),
        (Shape(2, 1, 1, 1, 1, 1, 1), "float64"),
        pytest.param(Shape(1, 2, 1, 9, 37, 256, 256), "float32", marks=pytest.mark.slow),
        pytest.param(Shape(1, 1, 1, 300, 500, 16, 16), "float32", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sizes(shape: Shape, storage: str) -> None:
    check(problem(shape, storage), causal=True, align="bottom_right")


@pytest.mark.parametrize("shape", [Shape(2, 2, 1, 5, 0, 4, 6), Shape(batch=0), Shape(q_len=0)], ids=str)
def test_empty_axes(shape: Shape) -> None:
    bias = np.zeros((shape.q_len, shape.kv_len), np.float32)
    check(problem(shape, "float32"), sinks=np.zeros(shape.heads, np.float32), bias=bias)


@pytest.mark.parametrize("wrt", [["q"], ["k"], ["v"], ["sinks"], ["bias", "v"]], ids=str)
def test_only_what_is_wanted(wrt: list[str]) -> None:
    inputs, options = problem(SHAPE, "float32"), OPTIONS["all together"]
    some = check(inputs, wrt=wrt, **options)
    every, _ = gradients(inputs, **options)
    for name in wrt:
        assert same_bits(getattr(some, name), getattr(every, name))


def test_gradients_are_added_to_what_arrays_hold() -> None:
    do, q, k, v = problem(SHAPE, "float32")
    o, lse = flashtile.attention(q, k, v, kernel="triton", return_lse=True)
    fresh = flashtile.attention_backward(do, q, k, v, o, lse, kernel="triton")
    out = flashtile.Gradients(*(np.ones_like(x) for x in (q, k, v)))
    flashtile.attention_backward(do, q, k, v, o, lse, kernel="triton", out=out, accumulate=True)
    for got, want in zip((out.q, out.k, out.v), (fresh.q, fresh.k, fresh.v), strict=True):
        np.testing.assert_allclose(got, want + 1, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "place",
    [
        {"order": (3, 2, 1, 0), "steps": (1, -2, 1, -1), "shift": 0},
        {"order": (0, 2, 1, 3), "steps": (1, 1, 1, 1), "shift": 1},
        {"order": (0, 1, 2, 3), "steps": (1, 1, 1, 1), "shift": 0, "constant": (2,)},
    ],
    ids=str,
)
def test_any_layout(place: dict[str, Any]) -> None:
    check(tuple(placed(x, **place) for x in problem(SHAPE, "float16")), causal=True, align=3)


# -- gradients of arrays ------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
TABLE, BY_KEY, ONE = RNG.normal(size=(2, 7)), RNG.normal(size=40).astype(np.float32), np.array(0.25)
BUCKETS = RNG.integers(0, 7, (21, 40))  # row 3 reads beyond TABLE
FUNCTIONS: dict[str, Any] = {
    "a table by buckets": (lambda s, b, h, i, j: s + TABLE[h, BUCKETS[i, j] + np.where(i % 20 == 3, 7, 0)], [TABLE]),
    "by key, twice": (lambda s, b, h, i, j: s * BY_KEY[j] + BY_KEY[39 - j] * 0.5, [BY_KEY]),
    "one number": (lambda s, b, h, i, j: np.tanh(s * ONE[()]), [ONE]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_captured_arrays(name: str) -> None:
    function, arrays = FUNCTIONS[name]
    for storage in ("float32", "float64"):
        found = check(problem(SHAPE, storage), wrt=["q", "captured"], score_mod=function, **DROPOUT)
        assert set(map(id, found.captured)) == set(map(id, arrays))


@pytest.mark.parametrize("shape", [(2, 2, 21, 40), (2, 1, 1, 40), (1, 2, 21, 1), (1, 1, 1, 1)], ids=str)
def test_a_bias_is_summed_over_its_broadcast_axes(shape: tuple[int, ...]) -> None:
    check(problem(SHAPE, "bfloat16"), wrt=["bias"], bias=RNG.normal(size=shape).astype(np.float32), **OPTIONS["causal"])


def test_sums_of_arrays_have_one_order() -> None:
    """Terms that cancel: by any order of programs the bits are the same, and so they are with terms 2^40 times as
    large in other elements."""
    inputs, bias = problem(SHAPE, "float64"), np.zeros((1, 1, 21, 40))
    first, _ = gradients(inputs, wrt=["bias"], bias=bias)
    flipped, _ = gradients(tuple(x[::-1] for x in inputs), wrt=["bias"], bias=bias, dlse=False)
    again, _ = gradients(inputs, wrt=["bias"], bias=bias, dlse=False)
    assert same_bits(again.bias, flipped.bias) and not same_bits(first.bias, again.bias)


# -- what is not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["k", "v", "q", "do"])
@pytest.mark.parametrize("name", ["causal", "documents"])
def test_what_is_hidden_reaches_no_gradient(name: str, where: str, poison: float) -> None:
    """Gradients of whatever does not see the poisoned row or key keep their bits; the others are the reference's."""
    inputs, options = problem(SHAPE, "float32"), {**OPTIONS[name], **DROPOUT}
    clean, _ = gradients(inputs, **options)
    do, q, k, v = inputs
    at = 20 if where in "kv" else 3
    {"k": k, "v": v, "q": q, "do": do}[where][:, :, at] = poison
    with np.errstate(all="ignore"):
        found = check(inputs, **options)
    kept = [np.isfinite(got).all(axis=-1) for got in (found.q, found.k, found.v)]
    assert any(x.any() for x in kept) and not all(x.all() for x in kept)
    for rows, got, was in zip(kept, (found.q, found.k, found.v), (clean.q, clean.k, clean.v), strict=True):
        assert same_bits(got[rows], was[rows])


def test_an_array_whose_gradient_is_not_finite() -> None:
    do, q, k, v = inputs = problem(SHAPE, "float32")
    do[0, 0, 3], do[1, 1, 4, 2] = np.nan, np.inf
    with np.errstate(all="ignore"):
        found = check(inputs, wrt=["bias"], **OPTIONS["bias"])
    assert np.isnan(found.bias).any() and np.isfinite(found.bias).any()


def test_torch_autograd() -> None:
    """By the operator, as on a GPU."""
    given = [torch.from_numpy(x.astype(np.float32)) for x in problem(SHAPE, "float32")]
    do, q, k, v = given
    slopes = torch.tensor([0.5, 0.125])
    for x in (q, k, v, slopes):
        x.requires_grad_()
    o = flashtile.torch.attention(q, k, v, alibi_slopes=slopes, causal=True, align=19, kernel="triton", **DROPOUT)
    o.backward(do)
    found = flashtile.Gradients(*(x.grad.numpy() for x in (q, k, v)), alibi_slopes=slopes.grad.numpy())
    options = {"alibi_slopes": slopes.detach().numpy(), "causal": True, "align": 19, **DROPOUT}
    arrays = (x.detach().numpy() for x in given)
    assert_gradients_accurate(found, *arrays, wrt=["q", "k", "v", "alibi_slopes"], **options)
