"""flashtile.jax: jax.nn's dot_product_attention by its own signature, under JAX's transformations, on a CPU."""

from __future__ import annotations

import ctypes
import inspect
import pathlib
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from processes import run

import flashtile
from flashtile.errors import SpecError, UnavailableError

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402  (after JAX is known to be there)

import flashtile.jax  # noqa: E402
from flashtile import xla  # noqa: E402
from flashtile.score.mask import as_mask  # noqa: E402
from flashtile.testing import assert_accurate, assert_gradients_accurate  # noqa: E402

ours, theirs = flashtile.jax.dot_product_attention, jax.nn.dot_product_attention
BATCH, ROWS, KEYS, HEADS, SHARED = 2, 9, 13, 4, 2


def draw(*shape: int, dtype: str = "float32", seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), dtype)


def inputs(dtype: str = "float32") -> tuple[Any, ...]:
    shapes = (BATCH, ROWS, HEADS, 8), (BATCH, KEYS, SHARED, 8), (BATCH, KEYS, SHARED, 8)
    return tuple(draw(*shape, dtype=dtype, seed=n) for n, shape in enumerate(shapes))


TABLE = np.linspace(-1, 1, ROWS + KEYS).astype(np.float32)
MASK = np.arange(ROWS * KEYS).reshape(1, 1, ROWS, KEYS) % 3 > 0
# As JAX calls it, and as flashtile.attention does.
CASES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], dict[str, Any]]]] = {
    "plain": (lambda: {}, lambda: {}),
    "causal": (lambda: {"is_causal": True}, lambda: {"causal": True}),
    "scale": (lambda: {"scale": 0.7}, lambda: {"scale": 0.7}),
    "window": (lambda: {"local_window_size": (5, 2)}, lambda: {"window": (5, 2)}),
    "one window": (lambda: {"local_window_size": 3}, lambda: {"window": (3, 3)}),
    "mask": (lambda: {"mask": MASK}, lambda: {"mask": MASK}),
    "bias": (lambda: {"bias": draw(1, 4, 9, 13)}, lambda: {"bias": np.asarray(draw(1, 4, 9, 13))}),
    "lengths": (
        lambda: {
            "query_seq_lengths": jnp.array([9, 4], jnp.int32),
            "key_value_seq_lengths": jnp.array([6, 13], jnp.int32),
            "mask": MASK,
        },
        lambda: {
            "mask": MASK
            & (np.arange(9) < np.array([9, 4])[:, None])[:, None, :, None]
            # the keys' lengths
            & (np.arange(13) < np.array([6, 13])[:, None])[:, None, None]
        },
    ),
    "softcap": (lambda: {"softcap": 0.8}, lambda: {"softcap": 0.8}),
    "sinks": (lambda: {"sinks": draw(4)}, lambda: {"sinks": np.asarray(draw(4))}),
    "score_mod": (
        lambda: {"score_mod": lambda s, b, h, i, j: s + TABLE[i - j + 12]},
        lambda: {"score_mod": lambda s, b, h, i, j: s + TABLE[i - j + 12]},
    ),
}
OWN = ("softcap", "sinks", "score_mod")


def swapped(x: Any) -> np.ndarray:
    return np.asarray(x).swapaxes(1, 2)


def test_signature() -> None:
    """Every parameter of JAX's, with its default, in its place; then flashtile's own, by keyword alone."""
    found, wanted = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
    assert [(p.name, p.default, p.kind) for p in found[: len(wanted)]] == [(p.name, p.default, p.kind) for p in wanted]
    assert {p.kind for p in found[len(wanted) : -1]} == {inspect.Parameter.KEYWORD_ONLY}
    assert tuple(p.name for p in found[len(wanted) : -1]) == OWN


@pytest.mark.parametrize(
    ("case", "storage"),
    [(case, x) for n, case in enumerate(CASES) for x in ("float32", ("float64", "bfloat16", "float16")[n % 3])],
)
def test_every_option(case: str, storage: str) -> None:
    """Forward and backward, compiled, of grouped heads: by the accuracy rule. Each in float32 and one dtype more, of
    which each has several."""
    with jax.enable_x64(storage == "float64"):
        given, options = CASES[case][0](), {**CASES[case][1](), "align": "top_left"}
        arrays, do = inputs(storage), draw(BATCH, ROWS, HEADS, 8, dtype=storage, seed=5)
        (o, lse), back = jax.vjp(jax.jit(lambda q, k, v: ours(q, k, v, **given, return_residual=True)), *arrays)
        found = flashtile.Gradients(*map(swapped, back((do, jnp.zeros_like(lse)))))
    q, k, v = map(swapped, arrays)
    assert_accurate(swapped(o), q, k, v, **options)
    assert_accurate(swapped(lse), q, k, v, kind="lse", **options)
    assert_gradients_accurate(found, swapped(do), q, k, v, **options)


@pytest.mark.parametrize("case", [case for case in CASES if case not in OWN])
def test_the_same_as_jax(case: str) -> None:
    given, arrays = CASES[case][0](), inputs()
    seen = slice(None, 4) if case == "lengths" else slice(None)  # of rows that see nothing JAX has the mean
    if case == "mask":
        given["mask"] = given["mask"] | (np.arange(KEYS) == 0)
    (got, lse), (want, residual) = (f(*arrays, **given, return_residual=True) for f in (ours, theirs))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse[:, seen], residual[:, seen], rtol=1e-5, atol=1e-5)
    single = {n: x[0] if hasattr(x, "ndim") and x.shape[0] == BATCH else x for n, x in given.items()}
    if case != "lengths":
        np.testing.assert_allclose(ours(*(x[0] for x in arrays), **single), want[0], rtol=1e-5, atol=1e-5)


def test_gradients_of_bias_and_sinks() -> None:
    q, k, v = inputs()
    bias, sinks = draw(1, HEADS, 1, KEYS, seed=3), draw(HEADS, seed=4)
    got = jax.grad(lambda bias, sinks: ours(q, k, v, bias, sinks=sinks).sum(), (0, 1))(bias, sinks)

    def exact(bias: Any, sinks: Any) -> Any:
        scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, 2)) / 8**0.5 + bias
        top = jnp.broadcast_to(sinks[:, None, None], (BATCH, HEADS, ROWS, 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, top], -1), -1)[..., :-1]
        return jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, 2, 2)).sum()

    for one, other in zip(got, jax.jit(jax.grad(exact, (0, 1)))(bias, sinks), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


AXES: dict[str, tuple[Any, ...]] = {"all": (0, 0, 0, 0), "of q": (0, None, None, None), "odd": (1, None, 0, None)}


@pytest.mark.parametrize("axes", AXES)
def test_vmap(axes: str) -> None:
    """Of a batch, with a bias, forward and backward."""
    shapes = (BATCH, ROWS, HEADS, 8), (BATCH, KEYS, SHARED, 8), (BATCH, KEYS, SHARED, 8), (1, HEADS, ROWS, KEYS)
    given = []
    for n, (shape, axis) in enumerate(zip(shapes, AXES[axes], strict=True)):
        more = list(shape)
        if axis is not None:
            more.insert(axis, 3)
        given.append(draw(*more, seed=n))

    def loss(f: Any) -> Any:
        return jax.value_and_grad(lambda q, k, v, b: (f(q, k, v, b) ** 2).sum(), (0, 1, 2, 3))

    results = [jax.jit(jax.vmap(loss(f), in_axes=AXES[axes]))(*given) for f in (ours, theirs)]
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_vmap_in_vmap() -> None:
    nested = [
        jax.jit(jax.vmap(lambda q, f=f: jax.vmap(lambda k, f=f: f(q, k, k))(draw(2, BATCH, KEYS, SHARED, 8))))(
            draw(3, BATCH, ROWS, HEADS, 8)
        )
        for f in (ours, theirs)
    ]
    np.testing.assert_allclose(*nested, rtol=1e-4, atol=1e-4)


def test_a_function_is_compiled_once() -> None:
    """Of other captured values it is the same program: they are operands."""
    q, k, v = inputs()
    table = draw(ROWS + KEYS)
    call = jax.jit(lambda q, table: ours(q, k, v, score_mod=lambda s, b, h, i, j: s + table[i - j + 12]))
    first, second = call(q, table), call(q, 2 * table)
    assert call._cache_size() == 1 and not np.array_equal(first, second)
    np.testing.assert_array_equal(second, ours(q, k, v, score_mod=lambda s, b, h, i, j: s + (2 * table)[i - j + 12]))


SLOPES, NUMBERS = draw(4, seed=7), np.arange(ROWS + KEYS) % 3


def learned(q: Any, table: Any, factor: Any, k: Any, v: Any) -> Any:
    """By a score function of one array twice, one of no axes, and numbers that have no gradient."""

    def score_mod(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s * factor + table[h, i - j + KEYS] * NUMBERS[i] + table[h, j]

    return ours(q, k, v, score_mod=score_mod)


def written_out(q: Any, table: Any, factor: Any, k: Any, v: Any) -> Any:
    s = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, q.shape[2] // k.shape[2], 2)) / q.shape[-1] ** 0.5
    i, j = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None, :]
    s = s * factor + table[:, i - j + KEYS] * jnp.asarray(NUMBERS)[i] + table[:, j]
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s), jnp.repeat(v, q.shape[2] // v.shape[2], 2))


@pytest.mark.parametrize("way", ["eager", "jit", "vmap"])
def test_gradients_of_what_a_function_captured(way: str) -> None:
    q, k, v = inputs()
    table, factor = draw(q.shape[2], ROWS + KEYS + 1, seed=3), jnp.asarray(0.7)

    def gradients(call: Any) -> Any:
        if way == "vmap":
            loss = lambda q, t, f: jax.vmap(lambda t: call(q, t, f, k, v))(jnp.stack((t, 2 * t)))  # noqa: E731
        else:
            loss = lambda q, t, f: call(q, t, f, k, v)  # noqa: E731
        found = jax.grad(lambda *x: (loss(*x) ** 2).sum(), (0, 1, 2))
        return (found if way == "eager" and call is learned else jax.jit(found))(q, table, factor)

    for got, want in zip(gradients(learned), gradients(written_out), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def test_a_traced_array_goes_to_no_other_door() -> None:
    x = np.ones((1, 1, 3, 4), np.float32)
    with pytest.raises(SpecError, match="^bias: got an array on a trace of JAX, expected one in CPU memory"):
        jax.jit(lambda t: flashtile.attention(x, x, x, bias=t))(jnp.ones((3, 3)))


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever XLA enters Python, as it does once to ask a new function for its version."""
    frames: list[int] = []
    read = xla._frame

    def noting(address: int) -> Any:
        frames.append(address)
        return read(address)

    monkeypatch.setattr(xla, "_frame", noting)
    return frames


def both_ways(options: dict[str, Any], *arrays: Any) -> Any:
    """A compiled function: o and lse, and the gradients of all arrays by a cotangent that comes last."""

    def run(*arrays: Any) -> Any:
        (o, lse), back = jax.vjp(lambda *x: ours(*x, **options, return_residual=True), *arrays[:-1])
        return o, lse, *back((arrays[-1], jnp.zeros_like(lse)))

    return jax.jit(run)


@pytest.mark.parametrize(
    ("case", "storage"), [*((case, "float32") for case in CASES), ("lengths", "bfloat16"), ("score_mod", "float16")]
)
def test_small_calls_need_no_python(case: str, storage: str, entered: list[int]) -> None:
    """Forward and backward, with every option: the same bits as the front door's."""
    arrays = (*inputs(storage), draw(BATCH, ROWS, HEADS, 8, dtype=storage, seed=5))
    options, same = (make() for make in CASES[case])
    call = both_ways(options, *arrays)
    jax.block_until_ready(call(*arrays))
    entered.clear()
    o, lse, *gradients = call(*arrays)
    jax.block_until_ready(gradients)
    assert not entered
    q, k, v, do = map(swapped, arrays)
    want = flashtile.attention(q, k, v, **same, align="top_left", return_lse=True)
    np.testing.assert_array_equal(swapped(o), want[0])
    np.testing.assert_array_equal(lse.swapaxes(1, 2), want[1])
    wanted = flashtile.attention_backward(do, q, k, v, *want, **same, align="top_left")
    for name, got in zip("qkv", gradients, strict=True):
        np.testing.assert_array_equal(swapped(got), getattr(wanted, name))


@pytest.mark.parametrize("rows", [1, 20])
def test_machine_code_of_another_number_of_keys(rows: int) -> None:
    """A call that was prepared for some keys serves others, machine code with lengths of its own."""
    q = draw(1, rows, 2, 8)
    for keys in (5, 6, 40, 7):
        k = draw(1, keys, 2, 8, seed=keys)
        got = jax.jit(lambda q, k: ours(q, k, k))(q, k)
        assert_accurate(swapped(got), *map(swapped, (q, k, k)))


def test_a_small_backward_in_parts_needs_no_python(entered: list[int]) -> None:
    """Two heads are cut by their keys, and the parts of dQ added up; sinks have their gradient."""
    q, k, do = draw(1, 40, 2, 16), draw(1, 150, 2, 16, seed=1), draw(1, 40, 2, 16, seed=2)
    sinks = draw(2, seed=3)

    def run(q: Any, k: Any, sinks: Any) -> Any:
        return jax.vjp(lambda q, k, sinks: ours(q, k, k, sinks=sinks), q, k, sinks)[1](do)

    call = jax.jit(run)
    jax.block_until_ready(call(q, k, sinks))
    entered.clear()
    dq, dk, dsinks = jax.block_until_ready(call(q, k, sinks))
    assert not entered
    rows, keys, by = map(swapped, (q, k, do))
    o, lse = flashtile.attention(rows, keys, keys, sinks=np.asarray(sinks), return_lse=True)
    given: dict[str, Any] = {"sinks": np.asarray(sinks), "wrt": ("q", "k", "v", "sinks")}
    want = flashtile.attention_backward(by, rows, keys, keys, o, lse, **given)
    np.testing.assert_array_equal(swapped(dq), want.q)
    np.testing.assert_array_equal(swapped(dk), want.k + want.v)
    np.testing.assert_array_equal(dsinks, want.sinks)


def within_documents(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return flashtile.score.functions.where(DOCUMENTS[i] == DOCUMENTS[j], s, -float("inf"))


DOCUMENTS = np.arange(256) // 100


@pytest.mark.parametrize(
    ("options", "storage", "python"),
    [
        ({"is_causal": True}, "bfloat16", 0),
        ({"mask": np.arange(256 * 256).reshape(1, 1, 256, 256) % 7 > 0, "sinks": np.linspace(-1, 1, 8)}, "float32", 0),
        (
            {"key_value_seq_lengths": np.array([200], np.int32), "bias": np.ones((1, 8, 1, 256), np.float32)},
            *("float32", 0),
        ),
        ({"score_mod": within_documents}, "float32", 2),  # where whole tiles may be of others
    ],
)
def test_calls_of_several_threads_are_prepared_once(
    options: dict[str, Any], storage: str, python: int, entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take XLA's threads without Python, or enter it once each way and find there what they need: the bits of the
    front door."""
    arrays = [draw(1, 256, 8, 32, dtype=storage, seed=n) for n in range(4)]
    call = both_ways(options, *arrays)
    for name in ("attention", "attention_backward"):
        monkeypatch.setattr(flashtile.jax.run, name, None)
    jax.block_until_ready(call(*arrays))
    entered.clear()
    o, lse, *gradients = jax.block_until_ready(call(*arrays))
    assert len(entered) == python
    q, k, v, do = map(swapped, arrays)
    lengths = options.get("key_value_seq_lengths")
    same = {"mask": options.get("mask") if lengths is None else flashtile.score.padding(lengths)}
    same |= {"causal": "is_causal" in options, **{x: options.get(x) for x in ("bias", "sinks", "score_mod")}}
    want = flashtile.attention(q, k, v, **same, return_lse=True)
    np.testing.assert_array_equal(swapped(o), want[0])
    wanted = flashtile.attention_backward(do, q, k, v, *want, **same)
    for name, got in zip("qkv", gradients, strict=True):
        np.testing.assert_array_equal(swapped(got), getattr(wanted, name))


def test_places_that_elements_decide_are_looked_at() -> None:
    """An index out of an array that a call reads is an error, wherever the call runs."""
    q, k, v = inputs()
    table, places = draw(4), np.array([4, 1, 2, 3] + [0] * 9, np.int32)
    call = jax.jit(lambda places: ours(q, k, v, score_mod=lambda s, b, h, i, j: s + table[places[j]]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: score_mod: captured array .: got index"):
        jax.block_until_ready(call(places))


def read_twice(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """Its index may leave the table, as far as one can tell without the elements."""
    return s + TABLE[OF_TABLE[j]]


OF_TABLE = np.arange(KEYS)


def test_what_machine_code_was_not_made_for_goes_to_python(entered: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of a bias, wide integers, which are prepared there once, and an index that may leave an array."""
    q, k, v = inputs()
    bias = draw(1, 4, 9, 13)
    _, back = jax.vjp(lambda bias: ours(q, k, v, bias=bias), bias)
    lengths = np.array([6, 13], np.uint32)
    prepared = (lambda: back(q), lambda: ours(q, k, v, key_value_seq_lengths=lengths))
    for call in (*prepared, lambda: ours(q, k, v, score_mod=read_twice)):
        with monkeypatch.context() as patch:
            for name in ("attention", "attention_backward") if call in prepared else ():
                patch.setattr(flashtile.jax.run, name, None)
            call()
            entered.clear()
            call()
        assert len(entered) == 1


def test_a_mask_and_a_bias_of_one_element() -> None:
    """They are read at a fixed place while JAX traces."""
    q, k, v = (x[:, :1] for x in inputs())
    k, v = (jnp.repeat(x, HEADS // SHARED, 2) for x in (k, v))
    for options in ({"bias": jnp.full((1, 1, 1, 1), 2.0)}, {"mask": jnp.ones((1, 1, 1, 1), bool)}):
        flashtile.calls.clear_cache()
        o, lse = jax.jit(lambda o=options: ours(q, k, v, **o, return_residual=True))()
        np.testing.assert_allclose(o, v, rtol=1e-6)
        scores = (q * k).sum(-1) / np.sqrt(8) + (2.0 if "bias" in options else 0.0)
        np.testing.assert_allclose(lse, scores, rtol=1e-5, atol=1e-6)


def test_wide_integers_are_looked_at_in_every_call() -> None:
    q, k, v = inputs()
    with jax.enable_x64(True):
        call = jax.jit(lambda n: ours(q, k, v, key_value_seq_lengths=n))
        for lengths in ([6, 13], [13, 2], [6, 13]):
            want = ours(q, k, v, key_value_seq_lengths=jnp.array(lengths, jnp.int32))
            np.testing.assert_array_equal(call(jnp.array(lengths)), want)
        text = (
            "INVALID_ARGUMENT: padding: lengths: got integers from 3 to 4294967299, expected values that fit in int32"
        )
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=text):
            jax.block_until_ready(call(jnp.array([3, 2**32 + 3])))


@pytest.mark.parametrize("rows", [9, 200])
def test_axes_of_vmap_need_no_python(rows: int, entered: list[int]) -> None:
    """In front of all arrays or of some, one in the other, forward and backward: the bits of calls one by one."""
    q, k, v, do = (draw(2, 3, n, 4, 32, seed=m) for m, n in enumerate((rows, 150, 150, rows)))
    mask = np.arange(rows * 150).reshape(1, 1, rows, 150) % 7 > 0

    def both(q: Any, k: Any, v: Any, do: Any) -> Any:
        o, back = jax.vjp(lambda *x: ours(*x, mask=mask, softcap=5.0), q[None], k[None], v[None])
        return o, *(x[0] for x in back(do[None]))

    one = jax.jit(both)
    inner = jax.vmap(both, (0, None, 0, 0))  # over B, with the keys of its first
    mapped = jax.jit(jax.vmap(lambda q, k, v, do: inner(q, k[0], v, do), (0, None, 0, 0)))
    arrays = q, k[0], v, do
    jax.block_until_ready(mapped(*arrays))
    entered.clear()
    got = jax.block_until_ready(mapped(*arrays))
    assert not entered
    for a in range(2):
        for b in range(3):
            for x, y in zip(got, one(q[a, b], k[0, 0], v[a, b], do[a, b]), strict=True):
                np.testing.assert_array_equal(x[a, b], y)
    assert jax.vmap(ours)(*(x[:0] for x in (q, k, v))).shape == (0, *q.shape[1:])


@pytest.mark.parametrize("number", [2, 5])
def test_threads_of_xla_share_a_call(number: int, threads: Callable[[int], None], entered: list[int]) -> None:
    """Of many shapes, from several threads at once, forward and backward, keys in parts or not: the bits of one thread.
    Those of XLA's that come late find nothing to do."""
    shapes = [(1, 200, 300, 4, 2), (1, 1, 900, 4, 4), (2, 64, 1100, 2, 1), (1, 3, 2000, 6, 6)]
    threads(1)
    calls = []
    for n, (batch, rows, keys, heads, kv_heads) in enumerate(shapes):
        of_q, of_k = (batch, rows, heads, 64), (batch, keys, kv_heads, 64)
        arrays = [draw(*x, seed=4 * n + m) for m, x in enumerate((of_q, of_k, of_k, of_q))]
        call = both_ways({"sinks": draw(heads), "is_causal": n == 0}, *arrays)
        calls.append((call, arrays, [np.asarray(x) for x in call(*arrays)]))
    entered.clear()
    threads(number)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: jax.block_until_ready(x[0](*x[1])), calls * 12))
    for (_, _, want), got in zip(calls * 12, found, strict=True):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(x, y)
    assert not entered


@pytest.mark.parametrize(
    ("storage", "options"), [("float32", {"is_causal": True}), ("bfloat16", {"local_window_size": (40, 30)})]
)
def test_lengths_that_differ_at_every_call_need_no_python(
    storage: str, options: dict[str, Any], threads: Callable[[int], None], entered: list[int]
) -> None:
    """Of none, of all, beyond either end and ragged, from several threads at once, forward and backward, under vmap:
    the front door's bits, and the reference's results."""
    batch, rows, keys = 3, 210, 300
    shapes = [(batch, n, heads, 32) for n, heads in ((rows, 4), (keys, 2), (keys, 2), (rows, 4))]
    q, k, v, do = (draw(*shape, dtype=storage, seed=n) for n, shape in enumerate(shapes))

    def both(of_rows: Any, of_keys: Any) -> Any:
        given = {"query_seq_lengths": of_rows, "key_value_seq_lengths": of_keys, **options}
        (o, lse), back = jax.vjp(lambda *x: ours(*x, **given, return_residual=True), q, k, v)
        return o, lse, *back((do, jnp.zeros_like(lse)))

    rng = np.random.default_rng(7)
    cases: list[Any] = [([0, rows, 1], [keys, 0, keys]), ([rows] * 3, [keys] * 3), ([-3, 900, 129], [-1, 10**6, 129])]
    cases += [[rng.integers(0, n + 1, batch) for n in (rows, keys)] for _ in range(3)]
    lengths = [[np.array(x, np.int32) for x in case] for case in cases]
    wanted = []
    for m, n in lengths:
        mask = as_mask(lambda b, h, i, j, m=m: i < m[b]) & flashtile.score.padding(n)
        seen: dict[str, Any] = {"mask": mask, "align": "top_left", "causal": "is_causal" in options}
        seen["window"] = options.get("local_window_size")
        inputs = [swapped(x) for x in (q, k, v)]
        o, lse = flashtile.attention(*inputs, **seen, return_lse=True)
        assert_accurate(o, *inputs, **seen)
        found = flashtile.attention_backward(swapped(do), *inputs, o, lse, **seen)
        wanted.append([x.swapaxes(1, 2) for x in (o, lse, found.q, found.k, found.v)])
    call, mapped = jax.jit(both), jax.jit(jax.vmap(both))
    every = [np.stack(x) for x in zip(*lengths, strict=True)]
    jax.block_until_ready((call(*lengths[0]), mapped(*every)))
    entered.clear()
    for number in (1, 3):
        threads(number)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda x: jax.block_until_ready(call(*x)), lengths * 4))
        answers += zip(*jax.block_until_ready(mapped(*every)), strict=True)
        for got, want in zip(answers, wanted * 5, strict=True):
            for x, y in zip(got, want, strict=True):
                np.testing.assert_array_equal(x, y)
    assert not entered


def test_a_failure_of_machine_code_is_told_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashtile import xla_native

    q, k, v = (x[:, :5] for x in inputs())
    make, told = xla_native.handler, []
    failing = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 4)(lambda *call: told.append(call) or 7)

    def broken(alone: Any, template: Any, *rest: Any) -> Any:
        return make(alone, template._replace(steps=(template.steps[0]._replace(function=failing),)), *rest)

    monkeypatch.setattr(xla_native, "handler", broken)
    got = ours(q, k, v)
    assert told
    np.testing.assert_array_equal(swapped(got), flashtile.attention(*map(swapped, (q, k, v))))


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_attend(batch: int, rows: int, keys: int) -> None:
    q, k = draw(batch, rows, 2, 8), draw(batch, keys, 2, 8)
    o, lse = jax.jit(lambda q, k: ours(q, k, k, return_residual=True))(q, k)
    assert o.shape == q.shape and not o.any() and (lse == -jnp.inf).all() and lse.shape == (batch, rows, 2)
    assert jax.grad(lambda q: ours(q, k, k, softcap=1.0).sum())(q).shape == q.shape


def test_checkpoint_and_scan() -> None:
    q, k, v = inputs()

    def layers(f: Any, q: Any) -> Any:
        return jax.lax.scan(lambda x, _: (jax.checkpoint(lambda x: f(x, k, v))(x), None), q, None, length=3)[0].sum()

    got, want = (jax.grad(lambda q, f=f: layers(f, q))(q) for f in (ours, theirs))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_what_is_not_there_raises() -> None:
    q, k, v = inputs()
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: ours(q, k, v), (q,), (q,))
    with pytest.raises(ValueError, match=r"flashtile_attention_backward\w*. cannot be differentiated"):
        jax.grad(lambda q: jax.grad(lambda q: ours(q, k, v).sum())(q).sum())(q)
    for implementation in ("xla", "cudnn"):
        with pytest.raises(UnavailableError, match=f"implementation: got '{implementation}', expected None"):
            ours(q, k, v, implementation=implementation)


WRONG: dict[str, dict[str, Any]] = {
    r"mask: got dtype float32, expected bool": {"mask": jnp.ones((1, 1, 9, 13))},
    r"bias: got dtype bool, expected a float": {"bias": MASK},
    r"mask: got shape \(1, 1, 9, 12\), expected one that broadcasts to \(B, N, T, S\) = \(2, 4, 9, 13\)": {
        "mask": MASK[..., 1:]
    },
    r"key_value_seq_lengths: got int32 of shape \(3,\), expected integers \(B,\) = \(2,\)": {
        "key_value_seq_lengths": jnp.ones(3, jnp.int32)
    },
    r"query_seq_lengths: got float32 of shape \(2,\)": {"query_seq_lengths": jnp.ones(2)},
    r"local_window_size: got -1, expected a distance, or \(left, right\)": {"local_window_size": -1},
    r"sinks: got float32 of shape \(3,\), expected floats \(N,\) = \(4,\)": {"sinks": jnp.ones(3)},
    r"softcap: got -1.0": {"softcap": -1.0},
    r"scale: got 'x', expected a number, known while tracing": {"scale": "x"},
    r"is_causal: got 1, expected True or False": {"is_causal": 1},
    "mask: got dtype int32, expected bool": {"mask": jnp.ones((ROWS, KEYS), jnp.int32)},
    "bias: got dtype int32, expected a float dtype": {"bias": jnp.ones((ROWS, KEYS), jnp.int32)},
    "bias: got dtype bool, expected a float dtype": {"bias": jnp.ones((ROWS, KEYS), bool)},
    r"bias: got 9223372036854775808, expected an array": {"bias": 2**63},
    r"is_causal: got array.*, expected True or False": {"is_causal": np.ones(2)},
    r"return_residual: got 1, expected True or False": {"return_residual": 1},
    r"causal: got a keyword that .* does not have, did you mean is_causal=\?": {"causal": True},
    r"score_mod: got a function that returns a bool": {"score_mod": lambda s, b, h, i, j: i > j},
}


@pytest.mark.parametrize("message", WRONG)
def test_one_clear_error_while_tracing(message: str) -> None:
    with pytest.raises(SpecError, match="^" + message):
        jax.jit(lambda *x: ours(*x, **WRONG[message]))(*inputs())


def test_a_flag_may_be_numpys() -> None:
    assert (ours(*inputs(), is_causal=np.True_) == ours(*inputs(), is_causal=True)).all()


def test_wrong_shapes() -> None:
    q, k, v = inputs()
    with pytest.raises(SpecError, match=r"^query, key, value: got shape \(9, 4, 8\), .* expected as many axes"):
        ours(q[0], k, v)
    with pytest.raises(SpecError, match=r"^key: got 3 heads, expected a divisor of query's 4 heads"):
        ours(q, draw(BATCH, KEYS, 3, 8), draw(BATCH, KEYS, 3, 8))
    with pytest.raises(SpecError, match=r"^value: got length 12, expected 13 as in key"):
        ours(q, k, v[:, 1:])
    with pytest.raises(SpecError, match=r"^query: got shape \(2, 9\), expected 3 or 4 axes"):
        ours(q[..., 0, 0], k, v)
    with pytest.raises(SpecError, match="dtype"):
        ours(q.astype(jnp.bfloat16), k, v)
    with pytest.raises(SpecError, match="^scale: got a .*Tracer, expected a number, known while tracing"):
        jax.jit(lambda t: ours(q, k, v, scale=t))(0.5)


@pytest.mark.parametrize("error", [SpecError("q: got this, expected that"), RuntimeError("boom"), KeyError("bug")])
def test_an_error_of_a_run_is_xlas_with_our_text(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    def call(q: Any, k: Any, v: Any) -> Any:  # not by machine code alone
        return ours(q, k, v, score_mod=read_twice)

    monkeypatch.setattr(flashtile.jax.run, "attention", fail)
    text = "INVALID_ARGUMENT: q: got this, expected that" if isinstance(error, SpecError) else type(error).__name__
    with pytest.raises(jax.errors.JaxRuntimeError, match=text):
        jax.block_until_ready(jax.jit(call)(*inputs()))
    monkeypatch.undo()
    assert jax.block_until_ready(jax.jit(call)(*inputs())).shape == (BATCH, ROWS, HEADS, 8)


def test_many_threads() -> None:
    arrays = [[draw(1, 40, 4, 16, seed=3 * n + m) for m in range(3)] for n in range(16)]
    compiled = jax.jit(lambda q, k, v: ours(q, k, v, is_causal=True))
    want = [np.asarray(compiled(*x)) for x in arrays]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda x: np.asarray(compiled(*x)), arrays * 4))
    assert all(np.array_equal(x, y) for x, y in zip(got, want * 4, strict=True))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import flashtile.jax
attend = flashtile.jax.dot_product_attention
mesh = Mesh(jax.devices("cpu"), ("x",))
assert mesh.size == 2
rng = np.random.default_rng(0)
q, k, v = (rng.uniform(-1, 1, (4, 16, 2, 8)).astype(np.float32) for _ in range(3))
want = attend(q, k, v, is_causal=True)
for spec in (PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec(None, None, "x")):
    parts = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)]
    got = jax.jit(lambda *x: attend(*x, is_causal=True))(*parts)
    np.testing.assert_array_equal(got, want)
    loss = lambda *x: (attend(*x, is_causal=True) ** 2).sum()
    for one, other in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(*parts), jax.grad(loss, (0, 1, 2))(q, k, v)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
by_part = jax.shard_map(attend, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"), check_vma=False)
np.testing.assert_array_equal(jax.jit(by_part)(q, k, v), attend(q, k, v))
print("same")
"""


def test_sharded_arrays_are_replicated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Along whatever axis they are sharded, the result is that of the whole."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    done = run([sys.executable, "-c", SHARDED])
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr


def test_arrays_of_jax_at_the_front_door(dtype: str) -> None:
    """flashtile.attention itself, outside of JAX's transformations."""
    with jax.enable_x64(dtype == "float64"):
        q, k, v = (draw(2, 3, 9, 8, dtype=dtype, seed=n) for n in range(3))
        o, lse = flashtile.attention(q, k, v, causal=True, return_lse=True)
        assert isinstance(o, jax.Array) and isinstance(lse, jax.Array) and o.dtype == q.dtype
    want = flashtile.attention(*map(np.asarray, (q, k, v)), causal=True, return_lse=True)
    assert np.array_equal(np.asarray(o), want[0]) and np.array_equal(np.asarray(lse), want[1])
    if dtype == "float32":
        with pytest.raises(SpecError, match="^q: got a .*Tracer, expected one with values; inside of jit"):
            jax.jit(flashtile.attention)(q, k, v)
        with pytest.raises(SpecError, match="^out: got an array of jax, whose arrays are not written to"):
            flashtile.attention(q, k, v, out=o)
        with pytest.raises(SpecError, match="^k: got a numpy.ndarray"):
            flashtile.attention(q, np.asarray(k), v)


# Of a struct of the header: its name here. Fields of C types that are as large as these of ctypes.
STRUCTS = {
    name: getattr(xla, name)
    for name in (
        *("Extension_Base", "Api_Version", "Metadata", "Metadata_Extension", "Error_Create_Args", "Api", "Buffer"),
        *("ByteSpan", "Args", "Rets", "Attrs", "CallFrame", "TypeId", "Error_Destroy_Args", "ThreadPool_Schedule_Args"),
    )
}
SIZES = {"size_t": 8, "int64_t": 8, "int": 4, "uint32_t": 4}


def header() -> str:
    return (pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()


def fields_of(name: str) -> list[tuple[str, int]]:
    """The fields of a struct in the header, and their sizes."""
    text = re.sub(r"//.*", "", header())
    body = re.search(rf"struct XLA_FFI_{name} {{(.*?)}}", text, re.DOTALL)
    assert body is not None, name
    found = []
    for line in filter(None, map(str.strip, body[1].split(";"))):
        if macro := re.fullmatch(r"_XLA_FFI_API_STRUCT_FIELD\((\w+)\)", line):
            found.append((macro[1], 8))
            continue
        kind, field = re.fullmatch(r"(.*?)\s*(\w+)", line, re.DOTALL).groups()  # type: ignore[union-attr]
        kind = kind.removeprefix("const ").removeprefix("struct ").strip()
        short = kind.removeprefix("XLA_FFI_")
        if kind.endswith("*"):
            size = 8
        elif short in STRUCTS:
            size = ctypes.sizeof(STRUCTS[short])
        elif kind in SIZES:
            size = SIZES[kind]
        else:  # an enum, or another name of a number
            other = re.search(rf"typedef (\w+) {kind};", text)
            size = SIZES[other[1]] if other else 4
        found.append((field, size))
    return found


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_are_those_of_the_header(name: str) -> None:
    """Every field of ours stands in the header, in its order and of its size: so the offsets agree."""
    own = [(field, getattr(STRUCTS[name], field).size) for field, _ in STRUCTS[name]._fields_]
    assert own == fields_of(name)[: len(own)]
    if name != "Api":
        assert len(own) == len(fields_of(name))


def test_numbers_are_those_of_the_header() -> None:
    text = header()
    found = {name: int(value) for name, value in re.findall(r"XLA_FFI_(\w+) = (\d+)", text)}
    assert found["Extension_Metadata"] == xla.EXTENSION_METADATA
    assert found["ExecutionStage_EXECUTE"] == xla.STAGE_EXECUTE
    assert found["AttrType_STRING"] == xla.ATTRIBUTE_STRING
    assert found["Error_Code_INVALID_ARGUMENT"] == xla.INVALID_ARGUMENT
    assert found["Error_Code_UNIMPLEMENTED"] == xla.UNIMPLEMENTED and found["Error_Code_INTERNAL"] == xla.INTERNAL
    assert found["DataType_BF16"] == xla.BF16
    kinds = {"PRED": "bool", **{f"{s}{8 * n}": f"{t}{n}" for s, t in (("S", "i"), ("U", "u")) for n in (1, 2, 4, 8)}}
    kinds |= {f"F{8 * n}": f"f{n}" for n in (2, 4, 8)}
    assert {found[f"DataType_{name}"]: np.dtype(kind) for name, kind in kinds.items()} == {
        number: dtype for number, dtype in xla.ELEMENTS.items() if number != xla.BF16
    }
    major, minor = (int(re.search(rf"define XLA_FFI_API_{x} (\d+)", text)[1]) for x in ("MAJOR", "MINOR"))  # type: ignore[index]
    assert (major, minor) >= xla.API_VERSION and major == xla.API_VERSION[0]
