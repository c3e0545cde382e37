"""Few queries on long keys, keys in parts, and the kernel that merges them: on every instruction set."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from inputs import Shape, numpy_dtype, same_bits, uniform
from kernel_cases import own_decoding

import flashtile
from flashtile.arrays import address_of
from flashtile.calls import clear_cache
from flashtile.dtypes import DTYPES
from flashtile.kernels import cpu
from flashtile.kernels.cpu import parts
from flashtile.kernels.cpu.passes import merge
from flashtile.llvm import machines as isas
from flashtile.plan import make_plan
from flashtile.plan.tiling import ENOUGH_ITEMS, MOST_PARTS
from flashtile.spec import AttentionSpec
from flashtile.testing import assert_accurate, assert_gradients_accurate

pytestmark = pytest.mark.core

LONGEST_PART = 16384
BOTTOM_RIGHT: dict[str, Any] = {"causal": True, "align": "bottom_right"}
CASES = {
    "one row": (Shape(1, 2, 2, 1, 300, 64, 64), {}),
    "parts": (Shape(1, 1, 1, 1, 2100, 32, 16), {}),
    "group of 7 in parts": (Shape(2, 7, 1, 1, 1300, 40, 72), {}),
    "group and positions": (Shape(1, 6, 2, 3, 333, 33, 100), BOTTOM_RIGHT),
    "window in the middle": (Shape(1, 2, 1, 5, 700, 24, 8), {"window": (100, 3), "align": 250}),
    "parts that some rows do not see": (Shape(1, 2, 2, 3, 2000, 48, 31), {"causal": True, "align": 1022}),
    "rows without keys": (Shape(1, 1, 1, 4, 90, 16, 16), {"causal": True, "align": -2}),
    "one offset per batch": (Shape(3, 2, 1, 2, 400, 17, 19), {"window": (64, 0), "align": np.array([398, 100, -5])}),
    "smallest": (Shape(1, 1, 1, 1, 1, 1, 1), {}),
    "negative scale": (Shape(1, 1, 1, 2, 129, 5, 3), {"scale": -0.7}),
    "scale 0": (Shape(1, 2, 1, 2, 65, 20, 20), {"scale": 0.0}),
    "largest head": (Shape(1, 2, 1, 1, 70, 512, 511), {}),
    "every width of a tile of values": (Shape(1, 7, 1, 1, 70, 24, 511), {}),
}


EVERY = pytest.mark.parametrize(
    "isa", isas.usable(), indirect=True
)  # those whose kernels for few queries are another's


@EVERY
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp16"])
def test_gradients_of_few_queries_weigh_as_their_forward_does(isa: str, precision: str) -> None:
    """Large scores: where the backward had them in fewer bits than the lse that it is given, weights were off by a
    factor."""
    q, k, v = uniform(Shape(1, 4, 2, 3, 120, 64, 24), "float32", size=5.0)
    o, lse = flashtile.attention(q, k, v, precision=precision, return_lse=True)
    g = flashtile.attention_backward(o, q, k, v, o, lse, precision=precision)
    assert_gradients_accurate(g, o, q, k, v, precision=precision)


@EVERY
@pytest.mark.parametrize("storage", ["float32", "float64"])
@pytest.mark.parametrize("sizes", [(1, 128), (3, 128), (3, 512)], ids=str)
def test_gradients_of_few_queries_sum_scores_as_their_forward_does(
    isa: str, storage: str, sizes: tuple[int, int]
) -> None:
    """Large scores: where the backward summed q.k in another order, or in one long chain, weights were off by more than
    the rule allows."""
    rows, depth = sizes
    shape = Shape(1, 4, 2, rows, 200, depth, depth)
    q, k, v = uniform(shape, storage)
    q, do = (q * 10).astype(q.dtype), np.roll(uniform(shape, storage)[0], 1, -1)
    o, lse = flashtile.attention(q, k, v, kernel="cpu", return_lse=True)
    g = flashtile.attention_backward(do, q, k, v, o, lse, kernel="cpu")
    assert_gradients_accurate(g, do, q, k, v)


@EVERY
@pytest.mark.parametrize("rows", [1, 70])
def test_values_that_are_the_first_columns_of_keys(isa: str, rows: int, dtype: str) -> None:
    """Latent attention: every head on one key head of 576, of which the first 512 are the values."""
    options: dict[str, Any] = {"scale": 192**-0.5, "causal": True, "align": "bottom_right", "kernel": "cpu"}
    q, k, _ = uniform(Shape(1, 4, 1, rows, 90, 576, 1), dtype)
    v, do = k[..., :512], uniform(Shape(1, 4, 1, rows, 90, 512, 1), dtype, seed=1)[0]
    o, lse = flashtile.attention(q, k, v, return_lse=True, **options)
    g = flashtile.attention_backward(do, q, k, v, o, lse, **options)
    del options["kernel"]
    assert_accurate(o, q, k, v, **options)
    assert_accurate(lse, q, k, v, kind="lse", **options)
    assert_gradients_accurate(g, do, q, k, v, **options)


ALIKE: dict[str, Any] = {
    "plain": lambda n: {},
    "the last query of a causal call": lambda n: BOTTOM_RIGHT,
    "softcap": lambda n: {"softcap": 1.5},
    "bias of keys": lambda n: {"bias": np.linspace(-2, 2, n, dtype=np.float32)},
    "negative scale": lambda n: {"scale": -0.7},
}
APART: dict[str, Any] = {
    "mask": lambda n: {"mask": np.arange(n) % 3 > 0},
    "window": lambda n: {"window": (40, 0), "align": "bottom_right"},
    "position": lambda n: {"causal": True, "align": 20},
    "ALiBi": lambda n: {"alibi_slopes": np.linspace(0.1, 1, 64, dtype=np.float32), "align": "bottom_right"},
    "sinks": lambda n: {"sinks": np.linspace(-1, 1, 64, dtype=np.float32)},
    "dropout": lambda n: {"dropout_p": 0.5, "seed": 1},
}


def stacks(isa: str, storage: str) -> bool:
    """Whether 48 heads of one query are rows of the forward kernel on this instruction set."""
    told = flashtile.explain((1, 64, 48, 64), (1, 64, 3000, 64), dtype=numpy_dtype(storage), kernel="cpu")
    return told.product.startswith("tiles") or (told.product.startswith("pairs") and "avx512" in isa)


@EVERY
@pytest.mark.parametrize(
    ("storage", "name"),
    [*(("bfloat16", name) for name in ALIKE), *((name, "plain") for name in DTYPES if name[0] == "f")],
)
def test_heads_of_one_query_are_rows(isa: str, storage: str, name: str) -> None:
    """Where they are many, share keys, and nothing tells them apart: the bits of as many queries of one head, whatever
    the strides, at every next key as in a first call."""
    options = ALIKE[name]
    q, k, v = uniform(Shape(1, 96, 2, 1, 1100, 40, 24), storage)
    told = flashtile.explain(q, k, v, kernel="cpu", **options(1100))
    assert (told.variant == "forward") == stacks(isa, storage) == ("48 heads that share" in str(told))
    inside = np.ascontiguousarray(q.swapaxes(1, 2)).swapaxes(1, 2)
    for n in (89, 90, 1100):
        keys, values, some = k[:, :, :n], v[:, :, :n], options(n)
        found = attend(q, keys, values, **some)
        assert same(found, attend(inside, keys, values, **some))
        assert_accurate(found[0], q, keys, values, **some)
        assert_accurate(found[1], q, keys, values, kind="lse", **some)
        if stacks(isa, storage):
            one = {name: x for name, x in some.items() if name not in BOTTOM_RIGHT}
            o, lse = attend(q.reshape(1, 2, 48, 40), keys, values, **one)
            assert same(found, (o.reshape(1, 96, 1, 24), lse.reshape(1, 96, 1)))


@EVERY
@pytest.mark.parametrize("options", APART.values(), ids=APART)
def test_heads_of_one_query_that_are_told_apart(isa: str, options: Callable[[int], dict[str, Any]]) -> None:
    q, k, v = uniform(Shape(1, 64, 1, 1, 90, 24, 24), "bfloat16")
    told = flashtile.explain(q, k, v, kernel="cpu", **options(90))
    assert (told.variant == "decode") == (not told.spec.dropout) and told.plan.heads == 64
    o = flashtile.attention(q, k, v, kernel="cpu", **options(90))
    assert_accurate(o, q, k, v, **options(90))


@EVERY
def test_gradients_of_heads_that_were_rows(isa: str, dtype: str) -> None:
    """Large scores: their weights come from the products that lse came from."""
    q, k, v = uniform(Shape(1, 96, 2, 1, 300, 40, 24), dtype, size=5.0)
    do = np.ascontiguousarray(np.roll(q, 1, -1)[..., :24])
    o, lse = flashtile.attention(q, k, v, kernel="cpu", return_lse=True)
    g = flashtile.attention_backward(do, q, k, v, o, lse, kernel="cpu")
    assert_gradients_accurate(g, do, q, k, v)


@pytest.fixture(params=own_decoding())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set that this machine runs and that has kernels of its own for few queries, in turn."""
    monkeypatch.setenv("FLASHTILE_ISA", request.param)
    clear_cache()
    yield request.param
    clear_cache()


on_every_isa = pytest.mark.usefixtures("isa")


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return flashtile.attention(q, k, v, kernel="cpu", return_lse=True, **options)


def same(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@EVERY
@on_every_isa
@pytest.mark.parametrize("name", CASES)
def test_decode_is_accurate(name: str, dtype: str) -> None:
    shape, options = CASES[name]
    inputs = uniform(shape, dtype)
    told = flashtile.explain(*inputs, kernel="cpu", **options)
    assert told.variant == "decode" and (told.plan.splits > 1) == ("parts" in name)
    o, lse = attend(*inputs, **options)
    assert_accurate(o, *inputs, **options)
    assert_accurate(lse, *inputs, kind="lse", **options)


@on_every_isa
@pytest.mark.parametrize("heads", [1, ENOUGH_ITEMS])
@pytest.mark.parametrize("light", [1e-5, 1e-7, 1e-9])
def test_light_keys_count_beside_a_heavy_one(light: float, heads: int, dtype: str) -> None:
    """One key of weight 1 and 100,000 of weight 1e-5 or less, in one part and in many."""
    q, k, v = uniform(Shape(1, 1, 1, 1, 100_000, 4, 16), dtype)
    q[...], k[...], v[...] = 1, -0.25, np.abs(v) + 0.5
    k[..., 33_333, :] = 0
    scale = float(-np.log(light))
    everywhere = (np.broadcast_to(x, (1, heads, *x.shape[2:])) for x in (q, k, v))  # heads that share their memory
    o, lse = attend(*everywhere, scale=scale)
    assert same_bits(o[:, :1], o[:, -1:]) and same_bits(lse[:, :1], lse[:, -1:])
    assert_accurate(o[:, :1], q, k, v, scale=scale)
    assert_accurate(lse[:, :1], q, k, v, scale=scale, kind="lse")


@on_every_isa
@pytest.mark.parametrize("heads", [1, ENOUGH_ITEMS])
def test_scores_that_rise_with_every_key(heads: int, dtype: str) -> None:
    """100,000 keys, so that every key block brings a new maximum and rescales the sums."""
    q, k, v = uniform(Shape(1, 1, 1, 1, 100_000, 4, 16), dtype)
    q[...], v[...] = 1, np.abs(v) + 0.5
    k[...] = np.linspace(-0.25, 0.25, 100_000)[:, None]
    everywhere = (np.broadcast_to(x, (1, heads, *x.shape[2:])) for x in (q, k, v))
    o, lse = attend(*everywhere, scale=8.0)
    assert_accurate(o[:, :1], q, k, v, scale=8.0)
    assert_accurate(lse[:, :1], q, k, v, scale=8.0, kind="lse")


@on_every_isa
def test_no_keys(dtype: str) -> None:
    o, lse = attend(*uniform(Shape(1, 2, 1, 2, 0, 8, 8), dtype))
    assert not o.astype(np.float32).any() and np.isneginf(lse).all()


@on_every_isa
@pytest.mark.parametrize("options", [{}, BOTTOM_RIGHT], ids=["dense", "causal"])
def test_threads_change_no_bit(options: dict[str, Any], dtype: str, threads: Callable[[int], None]) -> None:
    inputs = uniform(Shape(1, 8, 2, 2, 3000, 64, 64), dtype)
    plan = flashtile.explain(*inputs, kernel="cpu", **options).plan
    assert plan.splits > 1
    threads(1)
    alone = attend(*inputs, **options)
    for n in (2, 3, 8):
        threads(n)
        assert flashtile.explain(*inputs, kernel="cpu", **options).plan == plan
        assert same(attend(*inputs, **options), alone), f"{n} threads"


@EVERY
@on_every_isa
def test_rows_together_have_the_bits_of_rows_alone(dtype: str) -> None:
    """Tiles of one, two and four rows do the same arithmetic."""
    q, k, v = uniform(Shape(1, 7, 1, 1, 301, 40, 72), dtype)
    together = attend(q, k, v)
    for h in range(7):
        assert same(attend(q[:, h : h + 1], k, v), tuple(x[:, h : h + 1] for x in together)), f"head {h}"


@on_every_isa
@pytest.mark.parametrize("sizes", [(40, 40), (15, 9), (64, 33)])
def test_any_strides_have_the_same_bits(sizes: tuple[int, int], dtype: str) -> None:
    """In place with rows far apart, copied where the innermost axis is not adjacent, outputs placed likewise."""
    q, k, v = uniform(Shape(1, 4, 2, 2, 203, *sizes), dtype)
    want = attend(q, k, v, **BOTTOM_RIGHT)

    def by_rows(x: np.ndarray) -> np.ndarray:  # stored (B, S, H, D)
        return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)

    def by_columns(x: np.ndarray) -> np.ndarray:  # stored (B, H, D, S)
        return np.ascontiguousarray(x.swapaxes(2, 3)).swapaxes(2, 3)

    def reversed_(x: np.ndarray) -> np.ndarray:
        return x[..., ::-1].copy()[..., ::-1]

    def backwards(x: np.ndarray) -> np.ndarray:
        return x[:, :, ::-1].copy()[:, :, ::-1]

    def in_wider_rows(x: np.ndarray) -> np.ndarray:
        wider = np.full((*x.shape[:-1], x.shape[-1] + 9), np.nan, x.dtype)
        wider[..., : x.shape[-1]] = x
        return wider[..., : x.shape[-1]]

    for place in (by_rows, by_columns, reversed_, backwards, in_wider_rows):
        out = place(np.zeros_like(want[0]))
        got = flashtile.attention(*map(place, (q, k, v)), kernel="cpu", return_lse=True, out=out, **BOTTOM_RIGHT)
        assert same(got, want), place.__name__


def test_nothing_beyond_an_array_is_read() -> None:
    """Rows that end in the middle of a register, at the end of readable memory and before its beginning."""
    done = subprocess.run([sys.executable, "-c", FENCED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FENCED = """
import ctypes, itertools, mmap
import numpy as np
import flashtile

protect = ctypes.CDLL(None).mprotect
protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
held = []

def fenced(x, at_end):
    room = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    held.append(mmap.mmap(-1, room + 2 * mmap.PAGESIZE))
    memory = np.frombuffer(held[-1], np.uint8)
    for page in (0, room + mmap.PAGESIZE):
        assert protect(memory.ctypes.data + page, mmap.PAGESIZE, 0) == 0
    first = mmap.PAGESIZE + (room - x.nbytes if at_end else 0)
    placed = memory[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    placed[...] = x
    return placed

places = {
    "rows": lambda x, at_end: fenced(x, at_end),
    "transposed": lambda x, at_end: fenced(x.swapaxes(2, 3), at_end).swapaxes(2, 3),
    "backwards": lambda x, at_end: fenced(x[:, :, ::-1], at_end)[:, :, ::-1],
    "broadcast": lambda x, at_end: np.broadcast_to(fenced(x[:, :, :1], at_end), x.shape),
}
rng = np.random.default_rng(0)
for q_len, size, dtype in itertools.product((1, 40), (15, 33), (np.float32, np.float16)):
    q, k, v = (rng.standard_normal((1, 2, n, size)).astype(dtype) for n in (q_len, 143, 143))
    for (name, place), at_end in itertools.product(places.items(), (True, False)):
        inputs = [place(x, at_end) for x in (q, k, v)]
        o, want = flashtile.attention(*inputs, kernel="cpu"), flashtile.attention(*inputs, kernel="reference")
        np.testing.assert_allclose(o, want, rtol=1e-2, atol=1e-2, err_msg=f"{name} {q_len} {size}")
"""


@on_every_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kv_len", [200, 1500])
def test_a_hidden_key_changes_no_bit(bad: float, kv_len: int, dtype: str) -> None:
    """Rows at positions kv_len - 40 + i: what lies beyond must not matter to a row, whatever it is."""
    q, k, v = uniform(Shape(1, 3, 1, 3, kv_len, 40, 24), dtype)
    options = {"window": (kv_len // 2, 0), "align": kv_len - 40}
    clean = attend(q, k, v, **options)
    k[..., kv_len - 39 :, ::3] = bad  # row 0 sees none of these, row 1 the first
    v[..., kv_len - 39 :, 1::2] = bad
    k[..., 3, :] = v[..., 5, :] = bad  # behind every row's window
    o, lse = attend(q, k, v, **options)
    assert same_bits(o[:, :, 0], clean[0][:, :, 0]) and same_bits(lse[:, :, 0], clean[1][:, :, 0])
    assert_accurate(o, q, k, v, **options)
    assert_accurate(lse, q, k, v, kind="lse", **options)


@on_every_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_visible_value_counts_in_its_columns_only(bad: float, dtype: str) -> None:
    q, k, v = uniform(Shape(1, 2, 1, 2, 150, 16, 40), dtype)
    v[..., 70, 3] = bad
    o, lse = attend(q, k, v)
    assert_accurate(o, q, k, v)
    assert np.isfinite(np.delete(o.astype(np.float32), 3, -1)).all() and np.isfinite(lse).all()


@on_every_isa
def test_a_score_of_minus_infinity_hides_its_value(dtype: str) -> None:
    q, k, v = uniform(Shape(1, 2, 1, 1, 150, 16, 16), dtype)
    q[..., 0] = 1
    k[..., 70, 0] = -np.inf
    v[..., 70, :] = np.nan
    o, _ = attend(q, k, v)
    keep = np.delete(np.arange(150), 70)
    assert_accurate(o, q, k[..., keep, :], v[..., keep, :])


@EVERY
@on_every_isa
@pytest.mark.parametrize("options", [{}, BOTTOM_RIGHT], ids=["dense", "causal"])
def test_many_queries_in_parts(options: dict[str, Any], threads: Callable[[int], None]) -> None:
    """The forward kernel's keys are split, too, where its work items are few."""
    inputs = uniform(Shape(1, 1, 1, 60, 5000, 16, 24), "float32")
    told = flashtile.explain(*inputs, kernel="cpu", **options)
    assert told.variant == "forward" and told.plan.splits > 1 and told.workspace_bytes
    threads(1)
    o, lse = attend(*inputs, **options)
    assert_accurate(o, *inputs, **options)
    assert_accurate(lse, *inputs, kind="lse", **options)
    threads(3)
    assert same(attend(*inputs, **options), (o, lse))


@on_every_isa
@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("sunk", [True, False])
def test_merge_kernel(adjacent: bool, sunk: bool, dtype: str) -> None:
    """Against flashtile.merge, with parts and whole rows that saw nothing, and with sinks, which join last."""
    shape = Shape(2, 3, 3, 2, 4, 8, 37)
    spec = AttentionSpec.of(*uniform(shape, dtype))
    c = cpu.config_of(spec)
    accumulator = np.float64 if dtype == "float64" else np.float32
    rng = np.random.default_rng(0)
    rows, splits = (2, 3, 2), 5
    parts_o = rng.uniform(-1, 1, (splits, *rows, 37)).astype(accumulator)
    parts_lse = rng.uniform(-9, 9, (splits, *rows)).astype(accumulator)
    parts_lse[2], parts_o[2] = -np.inf, 0
    parts_lse[:, 1, 2, 0], parts_o[:, 1, 2, 0] = -np.inf, 0
    parts_o[3, 0, 0, 0, 5] = np.nan
    o = np.full((*rows, 37 * (1 if adjacent else 2)), 7).astype(numpy_dtype(dtype))[..., :: 1 if adjacent else 2]
    lse = np.empty(rows, accumulator)
    tail = {
        "heads": 3,
        "q_len": 2,
        "value_size": 37,
        "splits": splits,
        "o_split": parts_o.strides[0],
        "lse_split": parts_lse.strides[0],
        "sink_b": 3 * parts_lse.itemsize,
        "sink_h": parts_lse.itemsize,
    }
    sinks = rng.uniform(-9, 9, (2, 3)).astype(accumulator)
    tail.update(zip(("o_b", "o_h", "o_s", "o_d"), o.strides, strict=True))
    arrays = map(address_of, (parts_o, parts_lse, o, lse))
    block = merge.CALL.head(*arrays, address_of(sinks) if sunk else 0) + merge.CALL.tail(tail)
    scratch = np.empty(merge.scratch_bytes(c, splits), np.uint8)
    assert parts.entry("merge", c)(block, 0, lse.size, address_of(scratch)) == 0
    want_o, want_lse = flashtile.merge(list(zip(parts_o, parts_lse, strict=True)))
    if sunk:
        without, want_lse = want_lse, np.logaddexp(want_lse, sinks[..., None])
        want_o = want_o * np.exp(without - want_lse)[..., None]
        assert (lse[1, 2, 0] == sinks[1, 2]).all()
    eps = float(np.finfo(accumulator).eps)
    np.testing.assert_allclose(lse, want_lse, rtol=4 * eps, atol=4 * eps)
    coarse = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype, 0.0)
    np.testing.assert_allclose(o.astype(accumulator), want_o, rtol=coarse, atol=16 * eps)
    assert np.isnan(want_o[0, 0, 0, 5]) and not o[1, 2, 0].astype(accumulator).any()


@EVERY
def test_explain_tells_the_kernel_and_the_parts(isa: str) -> None:
    told = flashtile.explain((1, 32, 1, 128), (1, 8, 8192, 128), kernel="cpu")
    assert (told.variant, told.isa, told.plan.head_block) == ("decode", isa, 4)
    assert f"cpu, decode, {isa}" in str(told) and "keys in 4 parts of 2048, merged in order" in str(told)
    assert told.workspace_bytes == 4 * 32 * (128 + 1) * 4
    assert flashtile.explain((1, 32, 24, 128), (1, 8, 8192, 128), kernel="cpu").variant == "forward"


@pytest.mark.parametrize("keys", [9, 20])
def test_a_row_does_not_depend_on_how_keys_and_rows_are_cut_into_tiles(keys: int, dtype: str, isa: str) -> None:
    """Keys in whole tiles or one by one, the last hidden or not there, rows together or alone: the same bits."""
    rows = 5
    q, k, v = uniform(Shape(1, 2, 1, rows, keys, 24, 24), dtype)
    assert flashtile.explain(q, k, v, kernel="cpu").variant == "decode"
    together = flashtile.attention(q, k, v, causal=True, align="bottom_right", kernel="cpu")
    for row in range(rows):
        n = keys - rows + 1 + row
        alone = flashtile.attention(q[:, :, row : row + 1], k[:, :, :n], v[:, :, :n], kernel="cpu")
        assert alone.tobytes() == together[:, :, row : row + 1].tobytes(), row


@EVERY
@pytest.mark.parametrize("sizes", [(17, 17), (5, 5), (8, 3), (3, 8), (9, 9)], ids=str)
def test_short_calls_take_the_kernel_for_few_queries(sizes: tuple[int, int], isa: str) -> None:
    """Where padding to whole tiles and registers would cost more than the products."""
    q_len, kv_len = sizes
    on = isas.known()[isa]
    told = flashtile.explain((1, 8, q_len, 128), (1, 8, kv_len, 128), kernel="cpu")
    wide = on.vector_bytes == 64 and not told.product.startswith("tiles")
    assert not wide or told.variant == "decode"


@pytest.mark.parametrize("kv_len", [1, 1023, 1024, 2048, 100_000, 10_000_000])
@pytest.mark.parametrize("heads", [1, 5, ENOUGH_ITEMS])
@pytest.mark.parametrize("options", [{}, {"window": (4096, 0), "align": 0}], ids=["dense", "window"])
def test_parts_cover_the_keys(kv_len: int, heads: int, options: dict[str, Any]) -> None:
    plan = flashtile.explain((1, heads, 1, 8), (1, heads, kv_len, 8), kernel="cpu", **options).plan
    assert 1 <= plan.splits <= MOST_PARTS and plan.items == heads * plan.splits
    if kv_len < 2048:
        assert plan.splits == 1
    if heads == ENOUGH_ITEMS:  # threads have enough to do: split for the sake of accuracy only
        assert plan.splits == (1 if options else min(MOST_PARTS, -(-kv_len // LONGEST_PART)))
    if plan.splits > 1:
        assert plan.split_keys % plan.tile_k == 0 and plan.split_keys >= 1024
        assert (plan.splits - 1) * plan.split_keys < kv_len <= plan.splits * plan.split_keys
    assert [plan.locate(n)[3] for n in range(plan.splits)] == list(range(plan.splits))


def test_many_keys_are_read_for_many_queries_at_once() -> None:
    """Parts of the keys make work items enough, so tiles of queries are as large as there are queries; not where keys
    are about as many as queries, and parts would be hidden by causal."""

    def cut(heads: int, q_len: int, kv_len: int) -> tuple[int, int, int]:
        plan = flashtile.explain((1, heads, q_len, 64), (1, heads, kv_len, 64), kernel="cpu").plan
        return plan.tile_q >= q_len, plan.query_tiles, plan.items

    assert cut(8, 128, 16384) == (True, 1, ENOUGH_ITEMS)
    whole, tiles, items = cut(8, 128, 900)
    assert not whole and tiles > 1 and items == 8 * tiles
    assert cut(ENOUGH_ITEMS, 128, 16384)[0]
    assert cut(1, 300, 2000)[1] > 1


@pytest.mark.parametrize("rows", [30, 130])
def test_a_length_has_the_bits_of_a_first_call(rows: int) -> None:
    """Whatever lengths came before it, with other tiles and parts."""
    q, k, v = uniform(Shape(1, 2, 1, rows, 20_000, 16, 16), "float32")
    lengths = [200, 900, 1100, 4200, 8300, 20_000]
    options = {**BOTTOM_RIGHT, "kernel": "cpu"}

    def at(n: int) -> bytes:
        return flashtile.attention(q, k[:, :, :n], v[:, :, :n], **options).tobytes()

    alone = []
    for n in lengths:
        clear_cache()
        alone.append(at(n))
    for order in (lengths, lengths[::-1]):
        clear_cache()
        assert {n: at(n) for n in order} == dict(zip(lengths, alone, strict=True))


@EVERY
def test_queries_that_are_few_beside_their_keys_decode(isa: str, dtype: str) -> None:
    """From some number of keys on, or never; the more queries there are, the later."""
    lengths = [1, 8, 40, 120, 1000, 100_000]
    one = AttentionSpec.of(*uniform(Shape(1, 8, 8, 1, 1, 128, 128), dtype))
    begins = []
    for q_len in range(1, 24):
        specs = [replace(one, q_len=q_len, kv_len=n) for n in lengths]
        chosen = [cpu.capabilities(spec).variant == "decode" for spec in specs]
        assert chosen == sorted(chosen)
        begins.append(len(chosen) - sum(chosen))
    assert begins[0] == 0 and begins[-1] == len(lengths)
    lanes = isas.known()[isa].lanes("double" if dtype == "float64" else "float")
    alike = [begins[n : n + lanes] for n in range(0, len(begins), lanes)]  # as many registers
    assert all(some == sorted(some) for some in alike)


def test_a_group_is_one_work_item() -> None:
    spec = AttentionSpec.of(*uniform(Shape(2, 6, 2, 1, 10), "float32"))
    plan = make_plan(spec, cpu.capabilities(spec))
    assert [plan.locate(n)[:2] for n in range(plan.items)] == [(0, 0), (0, 3), (1, 0), (1, 3)]
