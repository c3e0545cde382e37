"""Options with few queries: on every instruction set, in one part and in several, with many heads on one key head."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from inputs import Shape, same_bits, uniform
from kernel_cases import own_decoding
from option_cases import EACH, SINKS, TOGETHER, Options, coins, ids, numbers

import flashtile
from flashtile.calls import clear_cache
from flashtile.dtypes import DTYPES
from flashtile.llvm import machines as isas
from flashtile.score import document, padding
from flashtile.testing import Expected, assert_accurate, expect

CASES = {**TOGETHER, **EACH}
WHOLE = Shape(2, 4, 2, 3, 333, 33, 40)
PARTS = Shape(2, 4, 2, 2, 1300, 20, 24)
# Packed sequences are of a length of their own. The shapes in turn, so that neighbours have either.
NAMES = [name for name in EACH if name != "packed"]
ONE_DTYPE_EACH = [(name, list(DTYPES)[n % 4], (WHOLE, PARTS)[n // 4 % 2]) for n, name in enumerate(NAMES)]


# Those whose kernels for few queries are another's, too.
EVERY = pytest.mark.parametrize("isa", isas.usable(), indirect=True)


@pytest.fixture(autouse=True, params=own_decoding())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set that this machine runs and that has kernels of its own for few queries, in turn."""
    monkeypatch.setenv("FLASHTILE_ISA", request.param)
    clear_cache()
    yield request.param
    clear_cache()


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return flashtile.attention(q, k, v, kernel="cpu", return_lse=True, **options)


@cache
def _case(name: str, dtype: str, shape: Shape) -> tuple[tuple[np.ndarray, ...], Options, tuple[Expected, ...]]:
    """Inputs, options and what to expect of them; shared by all instruction sets."""
    inputs, options = uniform(shape, dtype, size=2.0), CASES[name](shape)
    return inputs, options, expect(*inputs, **options)


def _check(name: str, dtype: str, shape: Shape) -> None:
    inputs, options, (want_o, want_lse) = _case(name, dtype, shape)
    told = flashtile.explain(*inputs, kernel="cpu", **options)
    band = told.spec.band
    narrow = band is not None and band.left is not None  # a window sees too few keys for parts
    assert (told.variant, told.plan.splits) == ("decode", 1 if shape is WHOLE or narrow else 2)
    o, lse = attend(*inputs, **options)
    want_o.check(o, "output")
    want_lse.check(lse, "lse")


@EVERY
@pytest.mark.parametrize("shape", [WHOLE, PARTS], ids=["whole", "parts"])
@pytest.mark.parametrize("name", TOGETHER)
def test_options_together(name: str, shape: Shape, dtype: str) -> None:
    _check(name, dtype, shape)


@pytest.mark.parametrize(("name", "element", "shape"), ONE_DTYPE_EACH)
def test_each_option(name: str, element: str, shape: Shape) -> None:
    _check(name, element, shape)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 17), (2, 128), (1, 129), (5, 250), (3, 2)])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (5, 1)])
def test_ragged_sizes(heads: tuple[int, int], lengths: tuple[int, int]) -> None:
    """One program, whatever the sizes: nothing is compiled anew. The bias is read along rows, along columns, backwards
    and with one element for all keys."""
    shape = Shape(2, *heads, *lengths, 17, 9)
    inputs = uniform(shape, "float32")
    whole = numbers(shape.heads, *lengths)
    biases = whole, np.ascontiguousarray(whole.swapaxes(1, 2)).swapaxes(1, 2), whole[..., ::-1], whole[..., :1]
    for bias in biases:
        options: Options = {"softcap": 3.0, "mask": padding([shape.kv_len, shape.kv_len // 2]), "bias": bias}
        o, lse = attend(*inputs, **options)
        assert_accurate(o, *inputs, **options)
        assert_accurate(lse, *inputs, kind="lse", **options)


def _rules(s: Shape) -> dict[str, tuple[Options, np.ndarray]]:
    """Rules that hide keys, and what they show, (B, H, S_q, S_kv)."""
    b, h, i, j = np.ogrid[: s.batch, : s.heads, : s.q_len, : s.kv_len]
    shown, doc = coins(s.batch, s.heads, s.q_len, s.kv_len, heads=0.2), ids(s.kv_len)[0]
    lengths = np.array([s.kv_len - 9, 33])
    by_columns = np.ascontiguousarray(shown.swapaxes(2, 3)).swapaxes(2, 3)
    rules: dict[str, tuple[Options, np.ndarray]] = {
        "padding": ({"mask": padding(lengths)}, j < lengths[b]),
        "for all rows": ({"mask": shown[:, :1, :1]}, shown[:, :1, :1]),
        "dense": ({"mask": shown}, shown),
        "by columns": ({"mask": by_columns, "softcap": 5.0}, shown),
        "documents": ({"mask": document(doc[: s.q_len], doc)}, doc[i] == doc[j]),
        "by head": ({"mask": lambda b, h, i, j: j % 128 >= 30 * h + i}, j % 128 >= 30 * h + i),
        "bias": ({"bias": np.where(shown, 0.5, -np.inf)}, shown),
        "causal and padding": (
            {"mask": padding(lengths), "causal": True, "align": 700},
            (j < lengths[b]) & (j <= i + 700),
        ),
    }
    return {name: (given, np.broadcast_to(rule, shown.shape)) for name, (given, rule) in rules.items()}


@pytest.mark.parametrize("name", _rules(PARTS))
def test_hidden_keys_change_no_bit(name: str) -> None:
    """Rows that do not see the poisoned keys keep their bits; rows that see NaN are NaN."""
    rules = _rules(PARTS)
    options, visible = rules[name]
    inputs = uniform(PARTS, ("float32", "bfloat16", "float64", "float16")[list(rules).index(name) % 4])
    clean_o, clean_lse = attend(*inputs, **options)
    met = spared = 0
    for where, poison, keys in (
        ("k", np.nan, [0]),
        ("v", np.nan, [33, 34, 1299]),
        ("k", np.inf, [700, 702]),
        ("v", -np.inf, [5, 1100]),
    ):
        if name == "bias" and where == "k":
            continue  # a bias is no mask: -inf added to NaN is NaN; but a score of -inf hides what V holds
        q, k, v = (x.copy() for x in inputs)
        (k if where == "k" else v)[:, :, keys] = poison
        o, lse = attend(q, k, v, **options)
        meets = visible[..., keys].any(-1)
        met, spared = met + meets.sum(), spared + (~meets).sum()
        assert same_bits(o[~meets], clean_o[~meets]) and same_bits(lse[~meets], clean_lse[~meets])
        if np.isnan(poison):
            assert np.isnan(o[meets]).all() and (np.isnan(lse[meets]) == (where == "k")).all()
    assert met and spared


def test_what_no_row_sees_is_not_read(isa: str) -> None:
    """Keys that padding hides stand in memory that nobody may read."""
    subprocess.run([sys.executable, "-c", _ON_FORBIDDEN_PAGES], check=True, timeout=300)


_ON_FORBIDDEN_PAGES = """
import ctypes, mmap
import numpy as np
import flashtile
from flashtile.score import padding

keys, seen, size = 4096, 2048 + 48, 64
rng = np.random.default_rng(0)
memory = [mmap.mmap(-1, keys * size * 4) for _ in "kv"]
k, v = (np.frombuffer(m, np.float32).reshape(1, 1, keys, size) for m in memory)
k[...], v[...] = rng.standard_normal((2, 1, 1, keys, size))
q = rng.standard_normal((1, 4, 2, size), np.float32)
want = flashtile.attention(q, k[:, :, :seen], v[:, :, :seen], kernel="reference")
before = seen * size * 4 // mmap.PAGESIZE * mmap.PAGESIZE
protect = ctypes.CDLL(None).mprotect
for x in (k, v):
    assert protect(ctypes.c_void_p(x.ctypes.data + before), ctypes.c_size_t(x.nbytes - before), 0) == 0
mask = padding([seen])
assert flashtile.explain(q, k, v, mask=mask, kernel="cpu").variant == "decode"
np.testing.assert_allclose(flashtile.attention(q, k, v, mask=mask, kernel="cpu"), want, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.parametrize("name", [*TOGETHER, "sinks", "padding"])
def test_threads_change_no_bit(name: str, threads: Callable[[int], None]) -> None:
    inputs, options, _ = _case(name, "float32", PARTS)
    threads(1)
    alone = attend(*inputs, **options)
    for n in (2, 5):
        threads(n)
        assert all(map(same_bits, attend(*inputs, **options), alone)), f"{n} threads"


@EVERY
@pytest.mark.parametrize("element", ["float32", "float64"])
@pytest.mark.parametrize("q_len", [1, 60])
@pytest.mark.parametrize("sink", [-200.0, 20.0, 60.0, 86.0, 120.0, 700.0])
def test_a_sink_joins_where_parts_are_merged(element: str, q_len: int, sink: float) -> None:
    """In the decode and in the forward kernel, however far it is."""
    q, k, v = uniform(Shape(1, 2, 2, q_len, 2100, 16, 8), element)
    options = {"sinks": np.array([sink, sink + 0.37])}
    told = flashtile.explain(q, k, v, kernel="cpu", **options)
    assert told.variant == ("decode" if q_len == 1 else "forward") and told.plan.splits > 1
    for values in (v, v * v.dtype.type(1e20)):
        o, lse = attend(q, k, values, **options)
        assert_accurate(o, q, k, values, **options)
        assert_accurate(lse, q, k, values, kind="lse", **options)


@EVERY
@pytest.mark.parametrize("q_len", [1, 60])
@pytest.mark.parametrize("kv_len", [70, 2100])
def test_a_row_that_sees_nothing_has_its_sink(q_len: int, kv_len: int, dtype: str) -> None:
    inputs = uniform(Shape(1, 4, 4, q_len, kv_len, 8, 8), dtype)
    o, lse = attend(*inputs, sinks=SINKS, mask=np.zeros((1, kv_len), bool))
    assert not o.astype(np.float32).any()
    np.testing.assert_array_equal(lse, np.broadcast_to(SINKS.astype(lse.dtype)[None, :, None], lse.shape))


@pytest.mark.parametrize(("heads", "q_len"), [(129, 1), (43, 3), (71, 2), (100, 3), (300, 1)])
def test_many_rows_on_one_key_head(heads: int, q_len: int, dtype: str) -> None:
    """Rows go in groups, and have the bits that they have alone. A sink each tells heads of one query apart, which may
    be computed as rows otherwise."""
    q, k, v = uniform(Shape(1, heads, 1, q_len, 301, 40, 24), dtype)
    sinks = numbers(heads)
    assert flashtile.explain(q, k, v, kernel="cpu", sinks=sinks).variant == "decode"
    together = attend(q, k, v, sinks=sinks)
    for h in (0, heads // 2 - 1, heads // 2, heads - 1):
        alone = attend(q[:, h : h + 1], k, v, sinks=sinks[h : h + 1])
        assert all(map(same_bits, alone, (x[:, h : h + 1] for x in together))), f"head {h}"


@pytest.mark.parametrize("name", ["together", "by head"])
def test_many_rows_with_options(name: str) -> None:
    shape = Shape(1, 75, 1, 3, 700, 16, 24)
    inputs = uniform(shape, "float32")
    options: Options = {"softcap": 3.0, "sinks": numbers(75), "bias": numbers(75, 3, 700), "mask": coins(3, 700)}
    if name == "by head":
        options = {"mask": lambda b, h, i, j: j >= h * 5 + i, "alibi_slopes": numbers(75), "align": 650}
    assert flashtile.explain(*inputs, kernel="cpu", **options).variant == "decode"
    o, lse = attend(*inputs, **options)
    assert_accurate(o, *inputs, **options)
    assert_accurate(lse, *inputs, kind="lse", **options)
