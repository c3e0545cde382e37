"""Matrix registers beyond what the suites run over them: other storage, few queries, and what a row does not see.

On the emulated machine, and on a real one where it is; test_cpu_tiles_bits.py holds the two bit-equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from inputs import Shape, preset, uniform

import flashtile
from flashtile.calls import clear_cache
from flashtile.kernels import cpu
from flashtile.kernels.cpu.steps.softmax import Softmax
from flashtile.llvm import machines as isas
from flashtile.score import dropout_keep
from flashtile.testing import assert_accurate, expect

MACHINES = [name for name in isas.usable() if isas.known()[name].tiles]
BF16 = ml_dtypes.bfloat16
# What is computed on tiles: the dtype of arrays, and the precision of their products; in 1, 2, 3 bf16 parts.
KINDS: dict[str, tuple[Any, str]] = {
    "bf16": (BF16, "ieee"),
    "fp32 as bf16": (np.float32, "bf16"),
    "fp16": (np.float16, "ieee"),
    "fp32 as tf32": (np.float32, "tf32"),
    "fp32 as fp16": (np.float32, "fp16"),
    "fp32": (np.float32, "ieee"),
}


@pytest.fixture(params=MACHINES)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("FLASHTILE_ISA", request.param)
    clear_cache()
    yield request.param
    clear_cache()


def grouped(kind: str, q_len: int, kv_len: int, group: int) -> list[np.ndarray]:
    """Queries of twice as many heads, row after row in memory, and keys and values of two."""
    shapes = {"q": (1, q_len, 2 * group, 48), "k": (1, kv_len, 2, 48), "v": (1, kv_len, 2, 24)}
    rng = np.random.default_rng(group)
    return [rng.standard_normal(shape).astype(KINDS[kind][0]).swapaxes(1, 2) for shape in shapes.values()]


def arrays(q_len: int, kv_len: int, d: int, dv: int, dtype: Any = ml_dtypes.bfloat16) -> list[np.ndarray]:
    """q, k, v of two batches, four heads on two."""
    r = np.random.default_rng(q_len)
    shapes = (2, 4, q_len, d), (2, 2, kv_len, d), (2, 2, kv_len, dv)
    return [r.standard_normal(shape).astype(dtype) for shape in shapes]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> Any:
    return flashtile.attention(q, k, v, kernel="cpu", **options)


def test_explain_names_tiles_and_few_queries_do_without(isa: str) -> None:
    shape = (1, 2, 64, 64)
    said = [
        flashtile.explain(shape, dtype="bfloat16", kernel="cpu"),
        flashtile.explain(shape, dtype="bfloat16", kernel="cpu", backward=True),
        flashtile.explain((1, 2, 1, 64), shape, shape, dtype="bfloat16", kernel="cpu"),
        flashtile.explain(shape, dtype="float32", kernel="cpu"),
        flashtile.explain(shape, dtype="float32", precision="tf32", kernel="cpu"),
        flashtile.explain(shape, dtype="float16", kernel="cpu"),
        flashtile.explain(shape, dtype="float64", kernel="cpu"),
    ]
    names = ["tiles", "tiles", "pairs", "tiles3", "tiles2", "tiles2", "fma"]
    assert [x.product.partition(":")[0] for x in said] == names


SIZES = (64, 64), (17, 33), (96, 80), (1, 1)
# Another precision for the kernel of tf32: it is looked at in one size.
EVERY_KIND = [(kind, sizes) for kind in KINDS for sizes in SIZES if kind != "fp32 as fp16" or sizes == (64, 64)]


@pytest.mark.parametrize("options", [{}, {"causal": True, "align": 30}], ids=["dense", "causal"])
@pytest.mark.parametrize(("kind", "sizes"), EVERY_KIND, ids=str)
def test_every_kind_is_accurate(isa: str, kind: str, sizes: tuple[int, int], options: dict[str, Any]) -> None:
    dtype, precision = KINDS[kind]
    q, k, v = arrays(50, 131, *sizes, dtype=dtype)
    right = expect(q, k, v, precision=precision, **options)
    for got, want in zip(attend(q, k, v, precision=precision, return_lse=True, **options), right, strict=True):
        want.check(got)


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_keys_in_parts(isa: str, kind: str) -> None:
    q, k, v = (x[:1, :2] for x in arrays(21, 4500, 32, 40, dtype=KINDS[kind][0]))
    assert_accurate(attend(q, k, v), q, k, v)


@pytest.mark.parametrize("factor", [30.0, 3e3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp32 as fp16"])
def test_scores_that_lie_far_apart(isa: str, kind: str, factor: float) -> None:
    """Some 24,000 octaves apart by the larger factor."""
    dtype, precision = KINDS[kind]
    q, k, v = arrays(40, 200, 64, 64, dtype=dtype)
    q = (q.astype(np.float32) * np.float32(factor if dtype is not np.float16 else min(factor, 300))).astype(dtype)
    assert_accurate(attend(q, k, v, precision=precision), q, k, v, precision=precision)


POISON = [np.nan, np.inf, -np.inf, 3.399e38, 1e20, 1e-33, 1e-39]


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32 as tf32", "fp32"])
def test_what_a_row_does_not_see_changes_no_bit_of_it(isa: str, kind: str) -> None:
    """A key that causal hides, another query, another head's and another batch's; lengths that are no whole number of
    tiles."""
    dtype, precision = KINDS[kind]
    arrays_ = dict(zip("qkv", arrays(150, 150, 48, 24, dtype), strict=True))
    clean = attend(**arrays_, causal=True, precision=precision)
    for where, poison in itertools.product("qkv", POISON):
        if dtype is np.float16 and np.isfinite(poison):
            poison = 65504.0 if poison > 1 else 2.0**-24
        others = np.r_[:100, 101:150] if where == "q" else np.r_[:100]
        for batch, head, row, untouched in (
            (0, 0, 100, np.s_[:, :, others]),
            (0, 0, 3, np.s_[:, 1 if where == "q" else 2 :]),
            (1, 1, 3, np.s_[:1]),
        ):
            poisoned = {name: x.copy() for name, x in arrays_.items()}
            poisoned[where][batch, head, row, 5] = poison
            dirty = attend(**poisoned, causal=True, precision=precision)
            assert dirty[untouched].tobytes() == clean[untouched].tobytes(), (where, poison)


@pytest.mark.parametrize("number", [np.float16, np.float32], ids=["fp16", "fp32"])
def test_what_a_row_sees_is_computed_whatever_it_holds(isa: str, number: Any) -> None:
    options: dict[str, Any] = {"causal": True, "align": 40}
    for where, poison in itertools.product("qkv", POISON):
        if number is np.float16 and np.isfinite(poison):
            continue  # its parts hold every finite number
        if poison > 1e38 and np.isfinite(poison):
            poison = 1e38  # of which a product with K does not overflow
        arrays_ = dict(zip("qkv", arrays(70, 150, 48, 24, number), strict=True))
        arrays_[where][0, 1, 37, 5] = poison
        with np.errstate(all="ignore"):
            found = attend(**arrays_, return_lse=True, **options)
            for got, right in zip(found, expect(*arrays_.values(), **options), strict=True):
                right.check(got, f"{where} has {poison}")


TINY: dict[str, tuple[float, float, float, dict[str, Any]]] = {  # factors of q, k, v
    "values 1e-25": (1, 1, 1e-25, {}),
    "values 1e-33": (1, 1, 1e-33, {}),
    "values 1e-37": (1, 1, 1e-37, {"causal": True, "align": 80}),
    "values 1e-38": (1, 1, 1e-38, {}),
    "values 1e-37 in two parts": (1, 1, 1e-37, {"precision": "tf32"}),
    "values 1e33": (1, 1, 1e33, {}),
    "keys 1e20": (1e-20, 1e20, 1, {}),
    "queries 1e30": (1e30, 1e-30, 1, {}),
    "scores 1e-50": (1e-25, 1e-25, 1, {}),
    "a huge scale": (1e-15, 1e-15, 1, {"scale": 1e29}),
    "a huge scale of tiny numbers": (1e-18, 1e-18, 1, {"scale": 1e35}),
    "a program that enlarges": (1e-17, 1e-17, 1, {"score_mod": lambda s, b, h, i, j: s * 1e34}),
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("number", [BF16, np.float32], ids=["bf16", "fp32"])
def test_numbers_far_from_1(isa: str, number: Any, name: str) -> None:
    *factors, options = TINY[name]
    if number is BF16:
        options = {x: y for x, y in options.items() if x != "precision"}
    q, k, v = stored(
        (x * factor for x, factor in zip(arrays(50, 131, 48, 24, np.float64), factors, strict=True)), number
    )
    assert_accurate(attend(q, k, v, **options), q, k, v, **options)


def test_a_tiny_value_takes_no_bit_from_a_row_that_does_not_see_it(isa: str) -> None:
    """Sums of two blocks, the first of which has tiny values alone, all but one of them hidden from some rows."""
    q, k, v = arrays(70, 300, 32, 40)
    v = v * BF16(1e-33)
    options: dict[str, Any] = {"causal": True, "align": 100}
    clean = attend(q, k, v, **options)
    v[:, :, 120, ::3] = BF16(1e-38)
    dirty = attend(q, k, v, **options)
    assert dirty[:, :, :20].tobytes() == clean[:, :, :20].tobytes()
    assert_accurate(dirty, q, k, v, **options)


def test_dropped_values_that_parts_cannot_hold(isa: str) -> None:
    """Their share is added by the weights that are kept."""
    q, k, v = arrays(50, 75, 48, 24, np.float32)
    v[:, :, ::7, 3] *= np.float32(1e-30)
    options = {"dropout_p": 0.4, "seed": 3}
    assert_accurate(attend(q, k, v, **options), q, k, v, **options)
    v = (v * 1e-30).astype(np.float32)
    assert_accurate(attend(q, k, v, **options), q, k, v, **options)


def test_element_by_element_grid(isa: str) -> None:
    for data, batch, heads, length, size in itertools.product((preset, uniform), (1, 2), (1, 2), (4, 8), (4, 8)):
        q, k, v = data(Shape(batch, heads, heads, length, length, size, size), "bfloat16")
        expect(q, k, v)[0].check(flashtile.attention(q, k, v, kernel="cpu"))


def case(q_len: int, kv_len: int, size: int = 64, value_size: int = 64, heads: int = 2, kv_heads: int = 1) -> Any:
    rng = np.random.default_rng(1)
    shapes = (2, heads, q_len, size), (2, kv_heads, kv_len, size), (2, kv_heads, kv_len, value_size)
    return tuple(rng.standard_normal(shape) for shape in shapes)


def stored(values: Any, dtype: Any) -> Any:
    return tuple(x.astype(dtype) for x in values)


RNG = np.random.default_rng(2)
TABLE = RNG.standard_normal(800).astype(np.float32)
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (case(100, 200), {}),
    "head sizes 15 and 9": (case(33, 50, 15, 9), {}),
    "head sizes 128 and 72": (case(70, 150, 128, 72), {}),
    "causal": (case(150, 150), {"causal": True}),
    "bottom right": (case(40, 333), {"causal": True, "align": "bottom_right"}),
    "an offset a batch": (case(100, 200), {"causal": True, "align": np.array([3, 120])}),
    "rows without keys": (case(100, 60), {"causal": True, "align": -50}),
    "window": (case(200, 300), {"window": (37, 5), "align": "bottom_right"}),
    "negative scale": (case(60, 90), {"scale": -0.7}),
    "padding": (case(90, 300), {"mask": flashtile.score.padding(np.array([300, 77]))}),
    "documents": (case(300, 300), {"mask": flashtile.score.document(np.arange(300) // 37), "causal": True}),
    "stored mask": (case(70, 140), {"mask": RNG.random((2, 1, 70, 140)) < 0.6}),
    "bias": (case(70, 140), {"bias": RNG.standard_normal((1, 2, 70, 140)).astype(np.float32)}),
    "softcap and sinks": (case(90, 200), {"softcap": 7.0, "sinks": np.array([0.5, 40.0])}),
    "ALiBi": (case(90, 90), {"alibi_slopes": np.array([0.3, 0.05])}),
    "own": (case(90, 300), {"score_mod": lambda s, b, h, i, j: s + TABLE[j - i + 200]}),
    "sharp": (tuple(x * 20 for x in case(60, 120)[:2]) + case(60, 120)[2:], {}),
}
IN_TWO_PARTS = ("causal", "bias", "head sizes 15 and 9")
# A program's pass comes after the products and knows nothing of their parts: a mask and a score stand for all of them.
IN_THREE_PARTS = OPTIONS.keys() - {"padding", "documents", "softcap and sinks", "ALiBi", "own"}


def options() -> list[Any]:
    """Every pair, of which a run of every change leaves some to the nightly one."""
    every = {"bf16": (BF16, OPTIONS), "fp16": (np.float16, IN_TWO_PARTS), "fp32": (np.float32, IN_THREE_PARTS)}
    return [
        pytest.param(name, number, id=f"{name}-{said}", marks=[] if name in often else [pytest.mark.slow])
        for said, (number, often) in every.items()
        for name in OPTIONS
    ]


@pytest.mark.parametrize(("name", "number"), options())
def test_every_option_is_accurate(name: str, number: Any, isa: str) -> None:
    values, options = OPTIONS[name]
    arrays = stored(values, number)
    assert flashtile.explain(*arrays, **options).product.startswith("tiles")
    o, lse = flashtile.attention(*arrays, return_lse=True, **options)
    right = expect(*arrays, **options)
    right[0].check(o, "output")
    right[1].check(lse, "lse")


@pytest.mark.parametrize("number", [BF16, np.float32], ids=["bf16", "fp32"])
def test_strides_of_every_kind(isa: str, number: Any) -> None:
    q, k, v = stored(case(50, 130), number)
    plain = flashtile.attention(q, k, v)
    turned = [np.swapaxes(np.ascontiguousarray(np.swapaxes(x, 2, 3)), 2, 3) for x in (q, k, v)]
    assert flashtile.attention(*turned).tobytes() == plain.tobytes()
    k_back, v_back = (np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1] for x in (k, v))
    assert flashtile.attention(q, k_back, v_back).tobytes() == plain.tobytes()


@pytest.mark.parametrize("number", [BF16, np.float32], ids=["bf16", "fp32"])
def test_bits_do_not_depend_on_threads(isa: str, number: Any, threads: Any) -> None:
    q, k, v = stored(case(500, 700), number)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(flashtile.attention(q, k, v, causal=True, align=200).tobytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("number", [BF16, np.float32], ids=["bf16", "fp32"])
def test_dropout_keeps_what_it_says(isa: str, number: Any) -> None:
    rows, keys = 50, 75
    q, k = np.zeros((1, 2, rows, 8), number), np.zeros((1, 2, keys, 8), number)
    v = np.broadcast_to(np.eye(keys).astype(number), (1, 2, keys, keys))
    o = flashtile.attention(q, k, v, dropout_p=0.4, seed=9)
    assert ((o != 0) == dropout_keep((1, 2, rows, keys), 0.4, seed=9)).all()


@pytest.mark.parametrize(
    ("kind", "rise"), [("bf16", 1.0), ("bf16", 15.0), ("fp16", 5.0), ("fp16", 17.0), ("bf16", 40.0)]
)
def test_a_maximum_that_rises_a_little_from_block_to_block(isa: str, kind: str, rise: float) -> None:
    """Below RISE octaves a row keeps its maximum, and weighs more than 1; the next step is beyond. Half of the rows see
    scores fall."""
    dtype, precision = KINDS[kind]
    q, k, v = (x[:1, :1] for x in arrays(40, 450, 32, 32, dtype))
    q[..., 0], k[..., 0] = np.where(np.arange(40) % 2, 1, -1), np.arange(450) // 64 * rise * np.log(2)
    o, lse = attend(q, k, v, scale=1.0, precision=precision, return_lse=True)
    expected_o, expected_lse = expect(q, k, v, scale=1.0, precision=precision)
    expected_o.check(o)
    expected_lse.check(lse)


SHARED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "align": "bottom_right"},
    "window and sinks": {"window": (90, 30), "align": 300, "sinks": np.linspace(-2, 3, 6).astype(np.float32)},
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(25, 700), (70, 2200)])
def test_heads_that_share_keys_share_a_work_item(isa: str, kind: str, name: str, q_len: int, kv_len: int) -> None:
    """With the bits of heads that have keys of their own, which are the same: in one span of keys and in several."""
    q, k, v = grouped(kind, q_len, kv_len, group=3)
    options = {**SHARED[name], "precision": KINDS[kind][1], "return_lse": True}
    with np.errstate(all="ignore"):
        assert flashtile.explain(q, k, v, kernel="cpu", **options).plan.head_block == 3
    o, lse = attend(q, k, v, **options)
    options.pop("return_lse")
    assert_accurate(o, q, k, v, **options)
    assert_accurate(lse, q, k, v, kind="lse", **options)
    alone = attend(q, *(np.repeat(x, 3, axis=1) for x in (k, v)), return_lse=True, **options)
    assert [x.tobytes() for x in alone] == [o.tobytes(), lse.tobytes()]


def test_heads_that_are_told_apart_are_work_items_of_their_own(isa: str) -> None:
    """So are those that would leave too few of them for threads."""
    q, k, v = grouped("bf16", 64, 600, group=3)
    slopes = np.full(6, 0.1, np.float32)
    for told in ({"alibi_slopes": slopes, "align": 0}, {"dropout_p": 0.1, "seed": 1}, {"mask": np.ones(600, bool)}):
        assert flashtile.explain(q, k, v, kernel="cpu", **told).plan.head_block == 1
    assert flashtile.explain(q, k, v, kernel="cpu").plan.head_block == 3
    assert flashtile.explain(q, k[:, :, :300], v[:, :, :300], kernel="cpu").plan.head_block == 1


@pytest.mark.parametrize("key", [20, 140, 200, 290])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_rises_takes_no_bit_from_the_others(isa: str, kind: str, key: int) -> None:
    """Of 32 queries that share registers one has a score far above those before, in the first block or in either half
    of another: its weights are made again, with a new maximum, and the others' with them."""
    dtype, precision = KINDS[kind]
    q, k, v = arrays(32, 300, 48, 40, dtype)
    q[..., 0], k[..., 0] = 0, 0
    k[..., key, 0] = 30
    options: dict[str, Any] = {"scale": 1.0, "precision": precision}
    level = attend(q, k, v, return_lse=True, **options)
    q[..., 7, 0] = 4
    found = attend(q, k, v, return_lse=True, **options)
    for got, before, right in zip(found, level, expect(q, k, v, **options), strict=True):
        right.check(got)
        others = np.arange(32) != 7
        assert got[:, :, others].tobytes() == before[:, :, others].tobytes()


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_blocks_after_the_first_are_weighed_without_maxima(
    isa: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A kernel that never does a strip again is right where scores rise in the first block, and wrong where they rise
    in another: so no maximum was looked for there, and it is the sum of weights that tells."""
    dtype, precision = KINDS[kind]
    q, k, v = arrays(32, 300, 48, 40, dtype)
    q[..., 0], k[..., 0] = 4, 0
    k[..., 20, 0] = 30
    options: dict[str, Any] = {"scale": 1.0, "precision": precision}
    right = attend(q, k, v, **options)
    monkeypatch.setenv("FLASHTILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(Softmax, "exceeded", lambda softmax, at: softmax.tops.load(0, at=at) < -1.0)
    made = cpu.library_of, cpu._entry
    for kept in made:
        kept.cache_clear()
    clear_cache()
    try:
        assert attend(q, k, v, **options).tobytes() == right.tobytes()
        k[..., [20, 200], 0] = 0, 30
        with pytest.raises(AssertionError):
            assert_accurate(attend(q, k, v, **options), q, k, v, **options)
    finally:
        for kept in made:
            kept.cache_clear()


@pytest.mark.parametrize("options", [{}, {"precision": "tf32"}], ids=str)
def test_values_near_the_largest(isa: str, options: dict[str, Any]) -> None:
    """A weight may be more than 1 while a maximum stays; a value of 3e38 may not be multiplied by that. Rows that do
    not see it keep their bits, and the others' next keys count as before."""
    number = np.float32 if options else BF16
    q, k, v = np.zeros((1, 1, 40, 32), number), np.full((1, 1, 450, 32), 0, number), np.ones((1, 1, 450, 24), number)
    q[..., 0], k[..., 0] = 1, -90
    k[..., [3, 300, 400], 0] = [0, 4, 3]
    v[..., :200, :] = np.linspace(-2, 2, 24)
    seen = np.arange(450) != np.where(np.arange(40) % 3, 300, 301)[:, None]
    options = {**options, "scale": 1.0, "mask": seen}
    level = attend(q, k, v, **options)
    v[..., 300, 5:9] = 3e38
    o = attend(q, k, v, **options)
    assert_accurate(o, q, k, v, **options)
    hidden = np.arange(40) % 3 != 0
    assert o[:, :, hidden].tobytes() == level[:, :, hidden].tobytes()
    assert (o[:, :, ~hidden, 5:9].astype(np.float32) > 2e38).all()


@pytest.mark.parametrize("options", [{}, {"causal": True, "align": 260}, {"dropout_p": 0.3, "seed": 1}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_beside_weights_give_the_bits_of_one_after_the_other(isa: str, kind: str, options: Any) -> None:
    """A value that is not finite makes a block's weights and products follow each other; where it is hidden, nothing
    else is new. Three blocks; the last has a strip and a part of one."""
    dtype, precision = KINDS[kind]
    q, k, v = arrays(40, 300, 48, 40, dtype)
    hidden = np.isin(np.arange(300), (7, 200, 270))
    options = {**options, "precision": precision, "mask": ~hidden, "return_lse": True}
    clean = attend(q, k, v, **options)
    v[..., hidden, 7] = np.nan
    assert [x.tobytes() for x in attend(q, k, v, **options)] == [x.tobytes() for x in clean]
