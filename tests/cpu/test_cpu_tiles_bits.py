"""Kernels for matrix registers on a machine that has them: bit for bit what the emulated ones give.

`.ci/amx` runs this where no such machine is: on a whole one that Bochs emulates, whose tiles are written from Intel's
manual, apart from `flashtile.llvm.machines.amx`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_cpu_tiles import KINDS

import flashtile
from flashtile.calls import clear_cache
from flashtile.llvm import machines as isas
from flashtile.score import document

pytestmark = pytest.mark.skipif("amx" not in isas.usable(), reason="this machine has no matrix registers of its own")
# (batch, heads, heads of keys, q_len, kv_len, D, D_v), options, where what is not a number or vanishes goes.
SHAPE = (1, 2, 1, 96, 160, 64, 64)
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any], str]] = {
    "dense": (SHAPE, {}, ""),
    "causal, D = 128": ((1, 2, 2, 200, 200, 128, 128), {"causal": True}, ""),
    "softcap, D = 128": ((1, 2, 2, 200, 200, 128, 128), {"softcap": 5.0}, ""),
    "causal, ragged": ((2, 4, 2, 50, 131, 40, 24), {"causal": True, "align": "bottom_right"}, ""),
    "window, dropout": (SHAPE, {"window": (40, 3), "align": 20, "dropout_p": 0.2, "seed": 7}, ""),
    "mask, softcap": (SHAPE, {"mask": document(np.arange(160) // 60), "softcap": 5.0}, ""),
    "bias, sinks": (SHAPE, {"bias": np.linspace(-2, 2, 2 * 160).reshape(2, 1, 160), "sinks": np.array([0.5, 3.0])}, ""),
    "ALiBi, D = 128": ((1, 1, 1, 80, 260, 128, 128), {"alibi_slopes": np.array([0.1]), "align": "bottom_right"}, ""),
    "NaN, infinity": (SHAPE, {"window": (20, 0), "align": 64}, "poison"),
    "values near 1e-33": (SHAPE, {}, "tiny"),
    "scores far apart": (SHAPE, {}, "sharp"),
}


def arrays(shape: tuple[int, ...], number: Any, what: str) -> list[np.ndarray]:
    batch, heads, kv_heads, q_len, kv_len, d, dv = shape
    of_queries, of_keys = (batch, heads, q_len), (batch, kv_heads, kv_len)
    shapes = (*of_queries, d), (*of_keys, d), (*of_keys, dv), (*of_queries, dv)
    r = np.random.default_rng(3)
    q, k, v, do = (r.standard_normal(s).astype(np.float32) for s in shapes)
    if what == "poison":
        k[0, 0, 150, 3], v[0, 0, 155, 2] = np.nan, np.inf  # seen by the last rows
    elif what == "tiny":
        v[..., ::3] *= np.float32(1e-33)
    elif what == "sharp":
        q *= np.float32(300 if number is np.float16 else 3e3)
    return [x.astype(number) for x in (q, k, v, do)]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, but for which NaN it is."""
    numbers = ~(np.isnan(a) & np.isnan(b))
    return bool(numbers.any()) and a[numbers].tobytes() == b[numbers].tobytes()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_instructions_give_the_bits_of_their_emulation(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number, precision = KINDS[kind]
    shape, given, what = CASES[name]
    q, k, v, do = arrays(shape, number, what)
    options: dict[str, Any] = {**given, "precision": precision, "kernel": "cpu"}
    results: dict[str, list[np.ndarray]] = {}
    for isa in ("amx_emulated", "amx"):
        monkeypatch.setenv("FLASHTILE_ISA", isa)
        clear_cache()
        o, lse = flashtile.attention(q, k, v, return_lse=True, **options)
        gradients = flashtile.attention_backward(do, q, k, v, o, lse, **options)
        results[isa] = [o, lse, gradients.q, gradients.k, gradients.v]
        said = flashtile.explain(q, k, v, **options)
        assert (said.isa, said.product[:5]) == (isa, "tiles")
    clear_cache()
    for part, want, got in zip(("o", "lse", "dq", "dk", "dv"), *results.values(), strict=True):
        assert same(want, got), part
