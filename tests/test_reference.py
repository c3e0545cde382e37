"""The oracle against the definitions written out key by key, and against a few values worked out by hand."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import pytest
from inputs import Shape, uniform

from flashtile.arrays import view
from flashtile.dtypes import round_to_bf16, widen_bits
from flashtile.kernels import reference, vanilla, views
from flashtile.spec import Band

pytestmark = pytest.mark.core

BANDS = {
    "dense": (None, 0),
    "causal": (Band(None, 0), 0),
    "causal, bottom right": (Band(None, 0), 4),
    "rows without keys": (Band(None, 0), -3),
    "window": (Band(2, 1), 0),
    "window, far away": (Band(1, 1), 40),
    "open to the right": (Band(0, None), 2),
    "offset per batch": (Band(3, 0), np.array([5, -2])),
}


def _by_definition(q: Any, k: Any, v: Any, scale: float, band: Band | None, offset: Any) -> reference.Attended:
    """Attention one score at a time, in Python floats."""
    (batch, heads, q_len, _), group = q.shape, q.shape[1] // k.shape[1]
    o, lse = np.zeros(q.shape[:3] + v.shape[3:]), np.full(q.shape[:3], -np.inf)
    for b, h, i in np.ndindex(batch, heads, q_len):
        at = i + int(np.broadcast_to(offset, batch)[b])
        keys = [
            j
            for j in range(k.shape[2])
            if band is None
            or ((band.left is None or j >= at - band.left) and (band.right is None or j <= at + band.right))
        ]
        s = [scale * math.fsum(x * y for x, y in zip(q[b, h, i], k[b, h // group, j], strict=True)) for j in keys]
        if keys:
            p, values = [math.exp(x) for x in s], v[b, h // group, keys]
            lse[b, h, i] = math.log(math.fsum(p))
            for c in range(v.shape[3]):
                o[b, h, i, c] = math.fsum(map(operator.mul, p, values[:, c])) / math.fsum(p)
    return reference.Attended(o, lse)


@pytest.mark.parametrize(("band", "offset"), BANDS.values(), ids=BANDS.keys())
@pytest.mark.parametrize("attend", ["reference", "longdouble", "vanilla"])
def test_attend_is_the_definition(band: Band | None, offset: Any, attend: str) -> None:
    q, k, v = uniform(Shape(2, 4, 2, 7, 11, 5, 3), "float64", size=2)
    options: dict[str, Any] = {"scale": 0.7, "band": band, "offset": offset}
    if attend == "vanilla":
        got = vanilla.attend(q, k, v, dtype="float64", **options)
    else:
        got = reference.attend(q, k, v, dtype=np.longdouble if attend == "longdouble" else np.float64, **options)
    o, lse = _by_definition(q, k, v, 0.7, band, offset)
    np.testing.assert_allclose(got.o.astype(float), o, rtol=0, atol=5e-15)
    np.testing.assert_allclose(got.lse.astype(float), lse, rtol=0, atol=5e-15)


def test_two_keys_by_hand() -> None:
    """Scores 0 and log 3 weigh the values 1 : 3."""
    q, k, v = np.array([[[[1.0]]]]), np.array([[[[0.0], [math.log(3)]]]]), np.array([[[[0.0, 8.0], [4.0, 0.0]]]])
    o, lse = reference.attend(q, k, v, scale=1.0)
    np.testing.assert_allclose(o, [[[[3.0, 2.0]]]], rtol=1e-15)
    np.testing.assert_allclose(lse, [[[math.log(4)]]], rtol=1e-15)


def test_blocks_of_rows_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = uniform(Shape(1, 1, 1, 40, 24, 8, 8), "float64")
    whole = reference.attend(q, k, v, scale=1.0, band=Band(9, 0), offset=3, dtype=np.longdouble)
    monkeypatch.setattr(reference, "_BLOCK_SCORES", 7 * 24)
    parts = reference.attend(q, k, v, scale=1.0, band=Band(9, 0), offset=3, dtype=np.longdouble)
    assert (whole.o == parts.o).all() and (whole.lse == parts.lse).all()


def test_longdouble_is_the_finer_oracle() -> None:
    if np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("longdouble is double on this machine")
    q, k, v = uniform(Shape(1, 1, 1, 8, 64, 8, 8), "float64")
    fine = reference.attend(q, k, v, scale=1.0, dtype=np.longdouble)
    coarse = reference.attend(q, k, v, scale=1.0)
    assert 0 < np.abs(fine.o - coarse.o).max() < 1e-14


@pytest.mark.parametrize("store", ["tf32", "bfloat16", "float16"])
def test_rounding_keeps_the_types_bits(store: str) -> None:
    """Values that the type holds stay, halfway ones go to even, and inf and NaN are kept."""
    bits = {"tf32": 10, "bfloat16": 7, "float16": 10}[store]
    step = 2.0**-bits
    near = [1, 1 + step, 1 + step / 2, 1 + 3 * step / 2, -1 - 0.51 * step]
    x = np.array([*near, np.inf, -np.inf, np.nan], np.float32)
    want = np.array([1, 1 + step, 1, 1 + 2 * step, -1 - step, np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(vanilla.rounded(x, store), want)


def test_vanilla_rounds_what_it_stores() -> None:
    q, k = (np.random.default_rng(n).uniform(-1, 1, (6, 8)).astype(np.float32) for n in (0, 1))
    for store, bits in (("float16", 10), ("bfloat16", 7)):
        s = vanilla.scores(q, k, scale=0.3, store=store)
        p, _ = vanilla.softmax(s, store=store)
        for x in (s, p):
            mantissa = np.frexp(x)[0] * 2.0 ** (bits + 1)
            assert (mantissa == np.round(mantissa)).all()


def test_views_share_memory_at_any_stride() -> None:
    a = np.arange(24.0).reshape(2, 3, 4)
    for x in (a, a[:, ::-1], a.transpose(2, 0, 1), a[..., ::2], np.broadcast_to(a[0], (5, 3, 4)), a[:, :0]):
        seen = view(x.ctypes.data, x.shape, x.strides, x.dtype)
        np.testing.assert_array_equal(seen, x)
        assert not x.size or np.shares_memory(seen, a)
        assert not seen.flags.writeable or not x.size
    misaligned = np.zeros(33, np.uint8)
    view(misaligned.ctypes.data + 1, (4,), (8,), a.dtype, writable=True)[:] = 1.5
    np.testing.assert_array_equal(np.frombuffer(misaligned[1:].tobytes()), [1.5] * 4)


def test_bfloat16_bits_widen_exactly() -> None:
    x = np.array([1.5, -2.0, 3e38, np.inf, -0.0], np.float32)
    np.testing.assert_array_equal(widen_bits(round_to_bf16(x[[0, 1, 3, 4]])), x[[0, 1, 3, 4]])
    np.testing.assert_array_equal(views.widen(round_to_bf16(x[:2])), x[:2])
