"""Gradients by matrix registers, beyond the suites that run on every machine: many panels, options in pairs, in one
bf16 part and in several; that what a row does not see, or has dropped, changes no bit; what parts cannot hold.

On the emulated machine, and on a real one where it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import flashtile
from flashtile.calls import clear_cache
from flashtile.kernels import cpu
from flashtile.kernels.cpu import backward
from flashtile.llvm import machines as isas
from flashtile.testing import assert_gradients_accurate, expect_gradients

MACHINES = [name for name in isas.usable() if isas.known()[name].tiles]
BF16 = ml_dtypes.bfloat16
RNG = np.random.default_rng(8)
TABLE = RNG.standard_normal(2000).astype(np.float32)


@pytest.fixture(params=MACHINES)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("FLASHTILE_ISA", request.param)
    clear_cache()
    yield request.param
    clear_cache()


def arrays(
    q_len: int, kv_len: int, d: int, dv: int, *, batch: int = 1, heads: int = 2, kv_heads: int = 1, dtype: Any = BF16
) -> list[np.ndarray]:
    """do, q, k, v."""
    r = np.random.default_rng(q_len)
    shapes = (heads, q_len, dv), (heads, q_len, d), (kv_heads, kv_len, d), (kv_heads, kv_len, dv)
    return [r.standard_normal((batch, *shape)).astype(dtype) for shape in shapes]


def gradients(do: Any, q: Any, k: Any, v: Any, *, more: Any = None, wrt: Any = "qkv", **options: Any) -> Any:
    dlse = options.pop("dlse", None)
    o, lse = flashtile.attention(q, k, v, return_lse=True, kernel="cpu", **options)
    options |= {"kernel": "cpu", "dlse": dlse, "wrt": tuple(wrt), **(more or {})}
    return flashtile.attention_backward(do, q, k, v, o, lse, **options)


def bits(found: Any) -> list[bytes | None]:
    return [None if x is None else x.tobytes() for x in (found.q, found.k, found.v)]


# More panels than a span has (512 rows), more blocks than one; panels, strips and whole spans that see nothing.
CASES: dict[str, tuple[list[np.ndarray], dict[str, Any]]] = {
    "dense, two spans": (arrays(600, 300, 72, 40), {}),
    "causal, two spans": (arrays(580, 580, 40, 64), {"causal": True}),
    "a window, heads that share": (arrays(540, 300, 16, 24, heads=4, kv_heads=2), {"window": (20, 3), "align": 40}),
    "an offset per batch, softcap": (
        arrays(90, 200, 64, 64, batch=2),
        {"causal": True, "align": np.array([3, 150]), "softcap": 4.0},
    ),
    "a mask of documents, causal": (
        arrays(320, 320, 32, 32),
        {"mask": flashtile.score.document(np.arange(320) // 90), "causal": True},
    ),
    "padding and sinks": (
        arrays(70, 300, 48, 16, batch=2),
        {"mask": flashtile.score.padding(np.array([300, 77])), "sinks": np.array([0.5, 9.0])},
    ),
    "a stored mask and dropout": (
        arrays(75, 140, 33, 17),
        {"mask": RNG.random((1, 1, 75, 140)) < 0.5, "dropout_p": 0.3, "seed": 2},
    ),
    "a bias, its gradient and lse's": (
        arrays(100, 170, 32, 32),
        {"bias": RNG.standard_normal((1, 2, 100, 170)).astype(np.float32), "dlse": RNG.standard_normal((1, 2, 100))},
    ),
    "slopes and causal with dropout": (
        arrays(130, 130, 24, 80),
        {"alibi_slopes": np.array([0.3, 0.05]), "causal": True, "dropout_p": 0.2, "seed": 7},
    ),
    "a captured table": (
        arrays(60, 200, 64, 32),
        {"score_mod": lambda s, b, h, i, j: s + TABLE[j - i + 200], "window": (90, None), "align": 30},
    ),
    "scores that lie far apart": ([x * BF16(12) for x in arrays(60, 120, 64, 64)], {}),
}


# Of products in several parts every run sees what parts make different: dropout in each of them, strips and spans,
# passes of their own; all else goes through a nightly run.
EVERY_RUN = {
    np.float32: {"a window, heads that share", "a stored mask and dropout", "a bias, its gradient and lse's"},
    np.float16: {"dense, two spans"},
}


def cases() -> Iterator[Any]:
    for name in CASES:
        for number in (BF16, np.float16, np.float32):
            marks = [] if name in EVERY_RUN.get(number, CASES) else [pytest.mark.slow]
            yield pytest.param(name, number, id=f"{name}-{np.dtype(number).name}", marks=marks)


@pytest.mark.parametrize(("name", "number"), list(cases()))
def test_options_in_pairs(name: str, number: Any, isa: str) -> None:
    inputs, options = CASES[name]
    inputs = [x.astype(np.float32).astype(number) for x in inputs]
    if (dlse := options.get("dlse")) is not None:
        options = {**options, "dlse": dlse.astype(np.float32)}
    also = [x for x in ("bias", "sinks", "alibi_slopes") if x in options]
    wrt = ("q", "k", "v", *also, *(["captured"] if "score_mod" in options else []))
    got, want = gradients(*inputs, wrt=wrt, **options), expect_gradients(*inputs, wrt=wrt, **options)
    for which in ("q", "k", "v", *also):
        getattr(want, which).check(getattr(got, which), which)
    for array, right in (want.captured or {}).items():
        right.check(got.captured[array], "captured")


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp16"])
def test_fp32_multiplied_in_fewer_parts(isa: str, precision: str) -> None:
    for sizes in ((64, 64), (17, 33)):
        do, q, k, v = arrays(70, 150, *sizes, dtype=np.float32)
        options: dict[str, Any] = {"causal": True, "align": 60, "precision": precision}
        assert_gradients_accurate(gradients(do, q, k, v, **options), do, q, k, v, **options)


def test_explain_and_doctor_name_the_product(isa: str) -> None:
    shape = (1, 2, 64, 64)
    dtypes = ("bfloat16", "float32", "float16", "float64")
    said = [flashtile.explain(shape, dtype=x, kernel="cpu", backward=True).product for x in dtypes]
    assert [x.partition(":")[0] for x in said] == ["tiles", "tiles3", "tiles2", "fma"]
    for precision, name in (("bf16", "tiles:"), ("tf32", "tiles2:"), ("fp16", "tiles2:")):
        assert flashtile.explain(shape, kernel="cpu", precision=precision, backward=True).product.startswith(name)


POISON = {
    BF16: [np.nan, np.inf],
    np.float16: [np.nan, np.inf],
    np.float32: [np.nan, -np.inf, 3.4e38, 1e20, 1e-33, 1e-39],
}
NUMBERS = pytest.mark.parametrize("number", POISON, ids=lambda x: np.dtype(x).name)


@NUMBERS
def test_what_is_hidden_changes_no_bit(isa: str, number: Any) -> None:
    """Rows without a key and keys without a row; a last panel of a few lanes, which has no row for the others."""
    inputs = dict(zip(("do", "q", "k", "v"), arrays(101, 150, 40, 24, batch=2, dtype=number), strict=True))
    options = {"causal": True, "align": -20}  # row i sees keys up to i - 20: rows 0 ... 19 none, keys from 81 on nobody
    clean = bits(gradients(**inputs, **options))
    for which, poison in itertools.product(inputs, POISON[number]):
        dirty = {**inputs, which: inputs[which].copy()}
        dirty[which][:, :, slice(0, 20) if which in ("q", "do") else slice(81, None)] = poison
        assert bits(gradients(**dirty, **options)) == clean, (which, poison)


@pytest.mark.parametrize("number", [np.float16, np.float32], ids=["fp16", "fp32"])
def test_what_parts_cannot_hold_concerns_those_that_see_it(isa: str, number: Any) -> None:
    """One element of a row or a key: rows that do not see it, and keys that only those see, keep every bit; what it
    reaches is computed as ever."""
    inputs = dict(zip(("do", "q", "k", "v"), arrays(150, 150, 40, 24, dtype=number), strict=True))
    options = {"causal": True, "align": -20}
    clean = gradients(**inputs, **options)
    for which, poison in itertools.product(inputs, POISON[number]):
        if poison == 3.4e38 or (poison == 1e20 and which in ("q", "k")):
            continue  # what they make overflows in fp32, or all of it is the rounding of an lse of 1e20
        dirty = {**inputs, which: inputs[which].copy()}
        dirty[which][0, 0, 100, 5] = poison
        with np.errstate(all="ignore"):
            got, want = gradients(**dirty, **options), expect_gradients(**dirty, **options)
        for n in "qkv":
            getattr(want, n).check(getattr(got, n), f"{n}, {which} has {poison}")
        rows = np.delete(np.arange(150), 100) if which in ("q", "do") else np.arange(120)
        assert got.q[:, :, rows].tobytes() == clean.q[:, :, rows].tobytes()
        if which in ("q", "do"):
            assert got.q[:, 1].tobytes() == clean.q[:, 1].tobytes()
            for n in "kv":
                assert getattr(got, n)[:, :, 81:].tobytes() == getattr(clean, n)[:, :, 81:].tobytes()


FAR: dict[str, tuple[tuple[float, float, float, float], dict[str, Any]]] = {  # factors of do, q, k, v
    "dO 1e-30": ((1e-30, 1, 1, 1), {}),
    "dO 1e-18": ((1e-18, 1, 1, 1), {}),
    "dO 1e30": ((1e30, 1, 1, 1), {}),
    "values 1e-25": ((1, 1, 1, 1e-25), {}),
    "values 3e-9 and dO 1e-18": ((1e-18, 1, 1, 3e-9), {}),
    "values 1e30": ((1, 1, 1, 1e30), {}),
    "keys 1e20": ((1, 1e-20, 1e20, 1), {}),
    "queries 1e30": ((1, 1e30, 1e-30, 1), {"causal": True, "align": 81}),
    "a huge scale": ((1, 1e-15, 1e-15, 1), {"scale": 1e29}),
    "sharp": ((1, 30, 1, 1), {}),
    "dropout and dO 1e-22": ((1e-22, 1, 1, 1), {"dropout_p": 0.3, "seed": 3}),
    "a program that enlarges": ((1, 1e-17, 1e-17, 1), {"score_mod": lambda s, b, h, i, j: s * 1e34}),
}


@pytest.mark.parametrize("name", FAR)
def test_numbers_far_from_1(isa: str, name: str) -> None:
    factors, options = FAR[name]
    inputs = arrays(50, 131, 48, 24, dtype=np.float64)
    inputs = [(x * factor).astype(np.float32) for x, factor in zip(inputs, factors, strict=True)]
    assert_gradients_accurate(gradients(*inputs, **options), *inputs, **options)


def test_a_number_that_bf16_rounds_to_infinity_reaches_no_row_that_does_not_see_it(isa: str) -> None:
    """fp32 at precision="bf16": 3.4e38 is finite and its part is not, which times a weight of 0 would be NaN."""
    inputs = dict(zip(("do", "q", "k", "v"), arrays(70, 80, 32, 32, dtype=np.float32), strict=True))
    options = {"causal": True, "align": -20, "precision": "bf16"}
    clean = bits(gradients(**inputs, **options))
    for which, rows in (("q", slice(0, 20)), ("do", slice(0, 20)), ("k", slice(60, None)), ("v", slice(60, None))):
        dirty = {**inputs, which: inputs[which].copy()}
        dirty[which][:, :, rows] = 3.4e38
        assert bits(gradients(**dirty, **options)) == clean, which
    inputs["do"][0, 0, 69, 3] = 3.4e38
    dv = gradients(**inputs, **options).v
    assert np.isfinite(dv).all() and (np.abs(dv[0, 0, :50, 3]) > 1e30).any()


@NUMBERS
@pytest.mark.parametrize("which", ["q", "k", "v", "do"])
def test_a_visible_nan_stays_where_the_reference_has_it(isa: str, number: Any, which: str) -> None:
    inputs = dict(zip(("do", "q", "k", "v"), arrays(99, 140, 24, 40, dtype=number), strict=True))
    inputs[which][0, 0, 57, 3] = np.nan
    options = {"window": (9, 4), "align": 0}
    o, lse = flashtile.attention(*(inputs[n] for n in "qkv"), return_lse=True, kernel="reference", **options)
    got, want = (
        flashtile.attention_backward(**inputs, o=o, lse=lse, kernel=x, **options) for x in ("cpu", "reference")
    )
    for n in "qkv":
        a, b = (np.isnan(getattr(x, n).astype(np.float64)) for x in (got, want))
        assert b.any() or n == "v"
        np.testing.assert_array_equal(a, b, err_msg=n)


@NUMBERS
def test_lanes_without_a_row_add_nothing_where_dropout_hides_what_a_row_holds(isa: str, number: Any) -> None:
    """The last row's dO is infinite at one column; keys that it has dropped get NaN there and nowhere else."""
    do, q, k, v = arrays(37, 75, 32, 32, heads=1, dtype=number)
    options: dict[str, Any] = {"dropout_p": 0.5, "seed": 4}
    do[0, 0, 36, 3] = np.inf
    dv = gradients(do, q, k, v, **options).v
    kept = flashtile.score.dropout_keep((1, 1, 37, 75), 0.5, 4)[0, 0, 36]
    np.testing.assert_array_equal(np.isposinf(dv[0, 0, :, 3].astype(np.float32)), kept)
    np.testing.assert_array_equal(np.isnan(dv[0, 0, :, 3].astype(np.float32)), ~kept)
    assert np.isfinite(np.delete(dv, 3, -1).astype(np.float32)).all()


@pytest.mark.parametrize("number", [BF16, np.float32], ids=["bf16", "fp32"])
def test_only_what_is_asked_for_and_operands_made_ready_at_every_visit(
    isa: str, number: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, options = arrays(600, 300, 24, 40, dtype=number), {"causal": True, "align": -200}
    inputs[0][:, :, 300, 7] = 1e-30 if number is np.float32 else 1
    whole = bits(gradients(*inputs, **options))
    for n, name in enumerate("qkv"):
        part = bits(gradients(*inputs, wrt=name, **options))
        assert part[n] == whole[n] and part.count(None) == 2
    clear_cache()
    monkeypatch.setattr(backward, "_KEPT_BYTES", 0)
    assert bits(gradients(*inputs, **options)) == whole
    clear_cache()


@pytest.mark.parametrize("number", [BF16, np.float32], ids=["bf16", "fp32"])
def test_bits_do_not_depend_on_threads(isa: str, number: Any, threads: Callable[[int], None]) -> None:
    """One head of keys and values: parts of the keys, whose dQ are added in order."""
    found = []
    options = {"dropout_p": 0.1, "seed": 3} if number is BF16 else {}
    for count in (1, 2, 3, 8):
        threads(count)
        inputs = arrays(300, 700, 32, 32, dtype=number)
        found.append(bits(gradients(*inputs, causal=True, align=250, **options)))
    assert all(x == found[0] for x in found)


@pytest.mark.parametrize("number", [BF16, np.float16, np.float32], ids=["bf16", "fp16", "fp32"])
def test_scratch_grows_by_the_panels_that_there_are(isa: str, number: Any) -> None:
    """Up to a span by what they hold for the exchange, too: an engine's tiles are a few panels."""
    told = [flashtile.explain((1, 4, n, 64), dtype=number, backward=True, kernel="cpu") for n in (32, 512, 1024)]
    one, sixteen, more = (x.scratch_bytes for x in told)
    c = cpu.backward_config(told[0].spec)
    held = 2 * c.held_part * c.product.parts
    assert (sixteen - one) / 15 - (more - sixteen) / 16 == pytest.approx(held, rel=0.01)


def test_gradients_add_to_what_is_there_at_any_strides(isa: str) -> None:
    do, q, k, v = arrays(60, 200, 24, 40)
    do[:] = do[:, :, :1, :1]
    whole = gradients(do, q, k, v)
    turned = [np.swapaxes(np.ascontiguousarray(np.swapaxes(x, 2, 3)), 2, 3) for x in (q, k, v)]
    still = np.broadcast_to(do[:, :, :1, :1], do.shape)
    out = flashtile.Gradients(*(np.ones(x.shape, BF16)[:, :, ::-1] for x in (q, k, v)))
    gradients(still, *turned, more={"out": out, "accumulate": True})
    for n in "qkv":
        added, wide = (np.asarray(x, np.float64) for x in (getattr(out, n), getattr(whole, n)))
        np.testing.assert_allclose(added, wide + 1, rtol=2.0**-6, atol=2.0**-6)


@pytest.mark.slow
@NUMBERS
@pytest.mark.parametrize(("rows", "keys"), [(8, 100_000), (100_000, 8)])
def test_long_sums_keep_to_the_rule(
    isa: str, number: Any, rows: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear_cache()
    monkeypatch.setattr(backward, "_MOST_PARTS", 1)
    do, q, k, v = (np.abs(x) for x in arrays(rows, keys, 8, 4, heads=1, dtype=number))
    assert_gradients_accurate(gradients(do, q, k, v, scale=0.25), do, q, k, v, scale=0.25)
    clear_cache()
