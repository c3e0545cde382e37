"""The merge of partial results in Triton, under its interpreter, against `flashtile.merge`."""

from __future__ import annotations

import launching  # noqa: F401  # skips this file unless Triton interprets
import numpy as np
import pytest
from inputs import Shape, uniform
from launching import SMALL, problem

import flashtile
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.interpreter import Interpreter
from flashtile.testing import ulp

SHAPE = Shape(2, 3, 1, 21, 10, 8, 20)


def partials(real: type, parts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """o (parts, B, H, S_q, D_v), lse (parts, B, H, S_q); some parts, and some rows in all parts, saw no key."""
    rng = np.random.default_rng(seed)
    o = rng.normal(size=(parts, 2, 3, 21, 20)).astype(real)
    lse = (rng.normal(size=o.shape[:-1]) * 6).astype(real)
    lse[rng.random(lse.shape) < 0.2] = -np.inf
    lse[:, 0, 0, :3] = -np.inf
    o[np.isneginf(lse)] = 0
    return o, lse


def merged(
    o: np.ndarray, lse: np.ndarray, *, finished: bool, sinks: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """The kernel on some partial results, written in the partials' own dtype."""
    dtype = str(o.dtype)
    p = problem(*uniform(SHAPE, dtype), **({} if sinks is None else {"sinks": sinks}))
    device, element = Interpreter(), special.ELEMENTS[dtype]
    out, out_lse = p.arrays[3:]
    steps = [stride // o.itemsize for stride in out.strides]
    values = {
        "parts_o": device.place(o, element).pointer,
        "parts_lse": device.place(lse, element).pointer,
        "o": device.place(out, element).pointer,
        "lse": device.place(out_lse, element).pointer,
        **dict(zip(("o_b", "o_h", "o_s", "o_d"), steps, strict=True)),
        "o_split": o[0].size,
        "lse_split": lse[0].size,
        "first": 0,
        "heads": 3,
        "q_len": 21,
        "value_size": 20,
        "query_tiles": 2,
        "splits": len(o),
        "sinks": None if p.scoring.sinks is None else device.place(p.scoring.sinks, element).pointer,
    }
    kernel = special.merge(p.spec, SMALL, finished=finished, memory=special.Memory(aligned=False))
    device.launch(kernel, 2 * 3 * 2, values)
    return out, out_lse


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("finished", [True, False])
def test_merge_is_the_formula(real: type, parts: int, finished: bool) -> None:
    o, lse = partials(real, parts)
    got_o, got_lse = merged(o, lse, finished=finished)
    want_o, want_lse = flashtile.merge(list(zip(o.astype(np.float64), lse.astype(np.float64), strict=True)))
    dtype = np.dtype(real).name
    assert np.abs(got_o - want_o).max() <= 4 * ulp(np.abs(want_o).max(), dtype)
    np.testing.assert_array_equal(np.isneginf(got_lse), np.isneginf(want_lse))
    seen = np.isfinite(want_lse)
    assert (~seen).any()
    assert np.abs(got_lse[seen] - want_lse[seen]).max() <= 4 * ulp(np.abs(want_lse[seen]).max(), dtype)
    assert (got_o[~seen] == 0).all()


def test_a_sink_is_one_more_part_of_zero() -> None:
    o, lse = partials(np.float64, 3)
    sinks = np.array([0.5, -np.inf, 500.0])
    got_o, got_lse = merged(o, lse, finished=True, sinks=sinks)
    part = np.broadcast_to(sinks[:, None], lse.shape[1:])
    want_o, want_lse = flashtile.merge([*zip(o, lse, strict=True), (np.zeros_like(o[0]), part)])
    want_o[:, 2] = (o * np.exp(lse.astype(np.longdouble) - 500)[..., None]).sum(0)[:, 2]
    assert (want_o[:, 2] != 0).any()
    np.testing.assert_allclose(got_o, want_o, rtol=1e-13, atol=0)
    np.testing.assert_allclose(got_lse, want_lse, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_nan_and_inf_make_their_row_nan(odd: float) -> None:
    o, lse = partials(np.float32, 3)
    clean = merged(o, lse, finished=True)
    lse[1, 1, 2, 5] = odd
    got_o, got_lse = merged(o, lse, finished=True)
    assert np.isnan(got_o[1, 2, 5]).all() and np.isnan(got_lse[1, 2, 5])
    got_o[1, 2, 5], got_lse[1, 2, 5] = clean[0][1, 2, 5], clean[1][1, 2, 5]
    np.testing.assert_array_equal(got_o, clean[0])
    np.testing.assert_array_equal(got_lse, clean[1])


def test_the_output_of_a_part_without_keys_is_not_read() -> None:
    o, lse = partials(np.float32, 3)
    clean = merged(o, lse, finished=False)
    o[np.isneginf(lse)] = np.nan
    np.testing.assert_array_equal(merged(o, lse, finished=False)[0], clean[0])
