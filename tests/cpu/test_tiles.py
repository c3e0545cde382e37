"""Kernels on matrix registers, every option; emulated where this machine has none. Instructions: llvm/test_amx.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from inputs import Shape, preset, uniform

import flashtile
from flashtile.calls import clear_cache
from flashtile.llvm import machines
from flashtile.llvm.products import TILES
from flashtile.score import dropout_keep
from flashtile.testing import assert_accurate, expect

MACHINES = [isa for isa in machines.known().values() if not TILES.unavailable(isa) and not machines.unavailable(isa)]
bf16 = ml_dtypes.bfloat16


@pytest.fixture(params=MACHINES, ids=lambda isa: isa.name)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A machine with matrix registers, in force."""
    monkeypatch.setenv("FLASHTILE_ISA", request.param.name)
    clear_cache()
    yield request.param
    clear_cache()


def test_the_mode_of_products_does_not_leak_into_what_follows(tiles: Any) -> None:
    """Denormal sums of vector code survive beside products, which flush theirs."""
    q = np.zeros((1, 1, 40, 32), bf16)
    v = np.full((1, 1, 8, 32), 1.0, bf16)
    tiny = np.full((1, 1, 40, 8), 1e-40, np.float32)
    _, lse = flashtile.attention(q, q[:, :, :8], v, bias=tiny, return_lse=True)
    assert np.allclose(lse, np.log(8))
    a = np.array([1e-40], np.float32)
    assert (a * np.float32(0.5) > 0).all()


# -- kernels --------------------------------------------------------------------------------------------------------


def test_element_by_element_grid(tiles: Any) -> None:
    for data, batch, heads, length, size in itertools.product((preset, uniform), (1, 2), (1, 2), (4, 8), (4, 8)):
        q, k, v = data(Shape(batch, heads, heads, length, length, size, size), "bfloat16")
        expect(q, k, v)[0].check(flashtile.attention(q, k, v, kernel="cpu"))


def case(q_len: int, kv_len: int, size: int = 64, value_size: int = 64, heads: int = 2, kv_heads: int = 1) -> Any:
    rng = np.random.default_rng(1)
    shapes = (2, heads, q_len, size), (2, kv_heads, kv_len, size), (2, kv_heads, kv_len, value_size)
    return tuple(rng.standard_normal(shape).astype(bf16) for shape in shapes)


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
    "sharp": (tuple(x * bf16(20) for x in case(60, 120)[:2]) + case(60, 120)[2:], {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_accurate(name: str, tiles: Any) -> None:
    arrays, options = OPTIONS[name]
    assert flashtile.explain(*arrays, **options).product.startswith("tiles")
    o, lse = flashtile.attention(*arrays, return_lse=True, **options)
    right = expect(*arrays, **options)
    right[0].check(o, "output")
    right[1].check(lse, "lse")


def test_bf16_products_of_fp32_inputs(tiles: Any) -> None:
    q, k, v = (x.astype(np.float32) + 1e-3 for x in case(70, 150))
    assert flashtile.explain(q, k, v, precision="bf16").product.startswith("tiles")
    assert flashtile.explain(q, k, v).product.startswith("fma")
    assert_accurate(
        flashtile.attention(q, k, v, precision="bf16", causal=True, align=80),
        q,
        k,
        v,
        precision="bf16",
        causal=True,
        align=80,
    )


def test_strides_of_every_kind(tiles: Any) -> None:
    q, k, v = case(50, 130)
    plain = flashtile.attention(q, k, v)
    turned = [np.swapaxes(np.ascontiguousarray(np.swapaxes(x, 2, 3)), 2, 3) for x in (q, k, v)]
    assert flashtile.attention(*turned).tobytes() == plain.tobytes()
    k_back, v_back = (np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1] for x in (k, v))
    assert flashtile.attention(q, k_back, v_back).tobytes() == plain.tobytes()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("rule", ["causal", "mask"])
def test_what_a_mask_hides_changes_no_bit(rule: str, where: str, poison: float, tiles: Any) -> None:
    q, k, v = case(64, 200)
    options: dict[str, Any] = {"causal": True, "align": 40}
    if rule == "mask":
        options = {"mask": lambda b, h, i, j: (j < 60) | (j > 140) & (i < 0)}
    clean = flashtile.attention(q, k, v, **options)
    {"k": k, "v": v}[where][:, :, 130] = poison
    assert flashtile.attention(q, k, v, **options).tobytes() == clean.tobytes()


def test_a_visible_nan_stays_in_its_row_and_column(tiles: Any) -> None:
    q, k, v = case(70, 90)
    q[0, 0, 5, 3] = np.nan
    v[0, 0, 80, 7] = np.nan
    o = flashtile.attention(q, k, v, causal=True, align=0).astype(np.float32)
    assert_accurate(o.astype(bf16), q, k, v, causal=True, align=0)
    assert np.isnan(o[0, 0, 5]).all() and not np.isnan(o[0, 1, 5]).any()


def test_bits_do_not_depend_on_threads(tiles: Any, threads: Any) -> None:
    q, k, v = case(500, 700)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(flashtile.attention(q, k, v, causal=True, align=200).tobytes())
    assert found[0] == found[1] == found[2]


def test_many_keys_and_keys_in_parts(tiles: Any) -> None:
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((1, 1, n, 32)).astype(bf16) for n in (40, 20_000, 20_000))
    assert flashtile.explain(q, k, v).plan.splits > 1
    assert_accurate(flashtile.attention(q, k, v), q, k, v)


def test_dropout_keeps_what_it_says(tiles: Any) -> None:
    rows, keys = 50, 75
    q, k = np.zeros((1, 2, rows, 8), bf16), np.zeros((1, 2, keys, 8), bf16)
    v = np.broadcast_to(np.eye(keys).astype(bf16), (1, 2, keys, keys))
    o = flashtile.attention(q, k, v, dropout_p=0.4, seed=9)
    assert ((o != 0) == dropout_keep((1, 2, rows, keys), 0.4, seed=9)).all()
