"""Matrix registers beyond what the suites run over them: other storage, few queries, and what a row does not see.

On the emulated machine, and on a real one where it is; the two are held bit-equal there.
"""

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
from flashtile.llvm import machines as isas
from flashtile.score import dropout_keep
from flashtile.testing import assert_accurate, expect

MACHINES = [name for name in isas.usable() if isas.known()[name].tiles]


@pytest.fixture(params=MACHINES)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("FLASHTILE_ISA", request.param)
    clear_cache()
    yield request.param
    clear_cache()


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
    ]
    assert [x.product.partition(":")[0] for x in said] == ["tiles", "tiles", "pairs", "fma"]


@pytest.mark.parametrize("options", [{}, {"causal": True, "align": 30}], ids=["dense", "causal"])
@pytest.mark.parametrize("sizes", [(64, 64), (17, 33), (96, 80), (1, 1)], ids=str)
def test_fp32_multiplied_as_bf16(isa: str, sizes: tuple[int, int], options: dict[str, Any]) -> None:
    q, k, v = arrays(50, 131, *sizes, dtype=np.float32)
    assert_accurate(attend(q, k, v, precision="bf16", **options), q, k, v, precision="bf16", **options)


def test_keys_in_parts(isa: str) -> None:
    q, k, v = (x[:1, :2] for x in arrays(21, 4500, 32, 40))
    assert_accurate(attend(q, k, v), q, k, v)


@pytest.mark.parametrize("factor", [30.0, 3e3])
def test_scores_that_lie_far_apart(isa: str, factor: float) -> None:
    q, k, v = arrays(40, 200, 64, 64)
    q = (q.astype(np.float32) * factor).astype(ml_dtypes.bfloat16)
    assert_accurate(attend(q, k, v), q, k, v)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3.39e38, 1e-39])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_a_row_does_not_see_changes_no_bit_of_it(isa: str, where: str, poison: float) -> None:
    """A key that causal hides, another head's and another batch's; lengths that are no whole number of tiles."""
    q, k, v = arrays(150, 150, 48, 24)
    clean = attend(q, k, v, causal=True)
    for batch, head, key, untouched in (
        (0, 0, 100, np.s_[:, :, :100]),
        (0, 0, 3, np.s_[:, 2:]),
        (1, 1, 3, np.s_[:1]),
    ):
        k2, v2 = k.copy(), v.copy()
        {"k": k2, "v": v2}[where][batch, head, key, 5] = poison
        dirty = attend(q, k2, v2, causal=True)
        assert dirty[untouched].tobytes() == clean[untouched].tobytes()


@pytest.mark.skipif(len(MACHINES) < 2, reason="this machine has no matrix registers of its own")
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 5.0}], ids=["dense", "causal", "softcap"])
def test_a_real_machine_and_the_emulated_one_give_the_same_bits(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in MACHINES:
        monkeypatch.setenv("FLASHTILE_ISA", name)
        clear_cache()
        found.append(b"".join(attend(*arrays(200, 200, d, d), **options).tobytes() for d in (64, 128)))
    clear_cache()
    assert found[0] == found[1]


def test_element_by_element_grid(isa: str) -> None:
    for data, batch, heads, length, size in itertools.product((preset, uniform), (1, 2), (1, 2), (4, 8), (4, 8)):
        q, k, v = data(Shape(batch, heads, heads, length, length, size, size), "bfloat16")
        expect(q, k, v)[0].check(flashtile.attention(q, k, v, kernel="cpu"))


def case(q_len: int, kv_len: int, size: int = 64, value_size: int = 64, heads: int = 2, kv_heads: int = 1) -> Any:
    rng = np.random.default_rng(1)
    shapes = (2, heads, q_len, size), (2, kv_heads, kv_len, size), (2, kv_heads, kv_len, value_size)
    return tuple(rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in shapes)


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
    "sharp": (tuple(x * ml_dtypes.bfloat16(20) for x in case(60, 120)[:2]) + case(60, 120)[2:], {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_accurate(name: str, isa: str) -> None:
    arrays, options = OPTIONS[name]
    assert flashtile.explain(*arrays, **options).product.startswith("tiles")
    o, lse = flashtile.attention(*arrays, return_lse=True, **options)
    right = expect(*arrays, **options)
    right[0].check(o, "output")
    right[1].check(lse, "lse")


def test_strides_of_every_kind(isa: str) -> None:
    q, k, v = case(50, 130)
    plain = flashtile.attention(q, k, v)
    turned = [np.swapaxes(np.ascontiguousarray(np.swapaxes(x, 2, 3)), 2, 3) for x in (q, k, v)]
    assert flashtile.attention(*turned).tobytes() == plain.tobytes()
    k_back, v_back = (np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1] for x in (k, v))
    assert flashtile.attention(q, k_back, v_back).tobytes() == plain.tobytes()


def test_bits_do_not_depend_on_threads(isa: str, threads: Any) -> None:
    q, k, v = case(500, 700)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(flashtile.attention(q, k, v, causal=True, align=200).tobytes())
    assert found[0] == found[1] == found[2]


def test_dropout_keeps_what_it_says(isa: str) -> None:
    rows, keys = 50, 75
    q, k = np.zeros((1, 2, rows, 8), ml_dtypes.bfloat16), np.zeros((1, 2, keys, 8), ml_dtypes.bfloat16)
    v = np.broadcast_to(np.eye(keys).astype(ml_dtypes.bfloat16), (1, 2, keys, keys))
    o = flashtile.attention(q, k, v, dropout_p=0.4, seed=9)
    assert ((o != 0) == dropout_keep((1, 2, rows, keys), 0.4, seed=9)).all()
