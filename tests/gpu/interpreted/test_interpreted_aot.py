"""Kernels as `flashtile aot` chooses them, launched by what the manifest says of them, under Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import launching  # noqa: F401  # skips this file unless Triton interprets
import numpy as np
import pytest
from inputs import Shape, uniform

import flashtile
from flashtile.kernels.triton import aot
from flashtile.kernels.triton.device import Pointer
from flashtile.kernels.triton.host import OPEN, bits
from flashtile.kernels.triton.interpreter import Interpreter
from flashtile.testing import assert_gradients_accurate

SHAPE = Shape(1, 4, 2, 70, 101, 16, 16)
CUT = {"splits": 4, "split_keys": 32, "row_parts": 2, "split_rows": 64, "split_heads": 1}


def strides(name: str, x: np.ndarray) -> dict[str, int]:
    return {f"{name}_{axis}": n // x.itemsize for axis, n in zip("bhsd", x.strides, strict=True)}


def launch(one: aot.Chosen, values: dict[str, Any]) -> None:
    """With as many programs as the manifest says. Of the second launches of a call any number does."""
    shape, what = SHAPE, one.specialisation
    tiles = {"query_tiles": math.ceil(shape.q_len / one.tile.tile_q)}
    tiles["tiles"] = math.ceil(values.get("length", 0) / one.tile.tile_q)
    tiles["key_tiles"] = math.ceil(shape.kv_len / one.tile.tile_k)
    words = {"B": shape.batch, "H": shape.heads, "H_kv": shape.kv_heads, **tiles, **values}
    grid = eval(aot.GRIDS[what.kernel].partition(";")[0], {}, words)
    given = {**values, **tiles, "items": grid, "first": 0}
    if dict(what.constants).get("CONTAIN"):
        grid = 2
    types = dict(what.signature)
    for name, x in given.items():
        if isinstance(x, np.ndarray):
            given[name] = Pointer(x.ctypes.data, str(types.get(name, "*i32"))[1:], x)
    Interpreter().bind(what, {})(grid, given)


@pytest.mark.parametrize("state", ["finished", "partial"])
def test_gradients_by_the_manifest(state: str) -> None:
    """One launch after the other, in their order there; a key that few rows see holds NaN, so that second launches
    have something to do."""
    do = uniform(SHAPE, "float32", seed=5)[0]
    q, k, v = uniform(SHAPE, "float32")
    k[:, :, 85] = v[:, :, 85] = np.nan
    options: dict[str, Any] = {"causal": True, "align": 20}
    o, lse = flashtile.attention(q, k, v, return_lse=True, kernel="reference", **options)
    chosen = list(
        aot.choose("sm_80", ["float32"], [16], kernels=["backward"], states=[state], bands=["causal", "band"])
    )
    chosen = [one for one in chosen if one.name != "row_deltas-float32-d16-dlse"]
    assert [one.specialisation.kernel for one in chosen] == [
        "row_deltas", *("backward_q", "backward_kv") * 2, *["add_parts"] * (state == "partial")
    ]  # fmt: skip
    found = {"dq": np.zeros_like(q), "dk": np.zeros_like(k), "dv": np.zeros_like(v)}
    cut = CUT if state == "partial" else {"splits": 1}
    parts = {name: np.full((cut["splits"], *x.shape), 7, x.dtype) for name, x in found.items()}
    written = parts if state == "partial" else found
    values: dict[str, Any] = {"q": q, "k": k, "v": v, "o": o, "do": do, "lse": lse, **written, **cut}
    values |= {
        "delta": np.empty_like(lse),
        "left": OPEN,
        "right": 0,
        "offset": 20,
        "scale": bits(0.25),
        "odd": np.zeros(99, np.int32),
    }
    values |= {"heads": 4, "group": 2, "q_len": 70, "kv_len": 101, "head_size": 16, "value_size": 16, "size": 16}
    for name, x in (("q", q), ("k", k), ("v", v), ("o", o), ("do", do), *found.items()):
        values |= strides(name, x)
    values |= {f"{name}_split": x.size for name, x in found.items()}
    marks = {"backward_q": np.full(99, 9, np.int32), "backward_kv": np.full(99, 9, np.int32)}
    for one in chosen:
        kernel = one.specialisation.kernel
        for name in found if kernel == "add_parts" else ("",):
            more: dict[str, Any] = {"odd": marks[kernel]} if kernel in marks else {}
            if name:
                x = found[name]
                more = {"parts": parts[name], "out": x, "split": x.size, "heads": x.shape[1], "length": x.shape[2]}
                more |= strides("out", x)
            launch(one, {**values, **more})
    gradients = flashtile.Gradients(*found.values())
    with np.errstate(all="ignore"):
        assert_gradients_accurate(gradients, do, q, k, v, wrt=["q", "k", "v"], **options)
