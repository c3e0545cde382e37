"""Matrix registers beyond what the suites run over them: other storage, few queries, and what a row does not see.

On the emulated machine, and on a real one where it is; the two are held bit-equal there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import flashtile
from flashtile.calls import clear_cache
from flashtile.llvm import machines as isas
from flashtile.testing import assert_accurate

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


def test_explain_names_tiles_and_the_backward_and_few_queries_do_without(isa: str) -> None:
    shape = (1, 2, 64, 64)
    said = [
        flashtile.explain(shape, dtype="bfloat16", kernel="cpu"),
        flashtile.explain(shape, dtype="bfloat16", kernel="cpu", backward=True),
        flashtile.explain((1, 2, 1, 64), shape, shape, dtype="bfloat16", kernel="cpu"),
        flashtile.explain(shape, dtype="float32", kernel="cpu"),
    ]
    assert [x.product.partition(":")[0] for x in said] == ["tiles", "pairs", "pairs", "fma"]


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
