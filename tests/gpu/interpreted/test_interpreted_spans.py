"""Sums over many keys, in spans of key tiles: by the accuracy rule, which one chain of roundings would not keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from inputs import Shape, same_bits, uniform
from launching import attend, check

from flashtile.kernels.triton import forward as forward_module
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.specialisation import Tile
from flashtile.score import document

KEYS = 100_000
MANY: dict[str, tuple[str, int, dict[str, Any]]] = {
    "fp32": ("float32", 64, {}),
    "fp64": ("float64", 128, {}),
    "fp32, causal": ("float32", 64, {"causal": True, "align": "bottom_right"}),
    "fp64, sinks": ("float64", 128, {"sinks": np.full(1, 3.0)}),
    "fp32, a mask of many runs": ("float32", 64, {"mask": np.arange(KEYS) % 500 < 450}),
}


@pytest.mark.parametrize("name", MANY)
def test_a_hundred_thousand_keys(name: str) -> None:
    """Values above 0 and weights alike, so that sums grow and errors of one direction with them."""
    dtype, keys, options = MANY[name]
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 1, n, 8)).astype(dtype) for n in (16, KEYS))
    v = np.abs(rng.standard_normal((1, 1, KEYS, 4))).astype(dtype)
    options = {"scale": 1e-3, **options}
    check(attend(q, k, v, tile=Tile(16, keys), **options), q, k, v, **options)


# -- spans of two key tiles, so that a small problem has many ----------------------------------------------------------

SHAPE = Shape(2, 2, 1, 21, 200, 20, 24)
RNG = np.random.default_rng(0)
SINKS = np.array([0.5, -np.inf])
OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "rising": {"score_mod": lambda s, b, h, i, j: s + 0.5 * j},  # earlier spans count for nothing
    "falling": {"score_mod": lambda s, b, h, i, j: s - 0.5 * j},
    "causal, rows without a key": {"causal": True, "align": np.array([-10, 150])},
    "window, sinks": {"window": (90, 4), "align": 120, "sinks": SINKS},
    "first keys hidden by a score": {"score_mod": lambda s, b, h, i, j: np.where(j < 70, -np.inf, s)},
    "documents": {"mask": document(RNG.integers(0, 3, (2, 21)), np.sort(RNG.integers(0, 4, (2, 200))))},
    "every other tile": {"mask": (np.arange(200) // 16 % 2 == 0)},
    "elements": {"mask": RNG.random((21, 200)) < 0.3, "sinks": SINKS},
    "nothing seen": {"mask": np.zeros(200, bool)},
}
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "in parts": {"parts": 2},
    "packed": {"packed": True, "tile": Tile(64, 16)},
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(special, "SPAN", 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(short: None, name: str, way: str) -> None:
    inputs = uniform(SHAPE, "float32")
    check(attend(*inputs, **WAYS[way], **OPTIONS[name]), *inputs, **OPTIONS[name])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_with_the_rows_that_see_it(short: None, poison: float) -> None:
    """In an early span, a late one, and one that some rows do not see; these keep their bits."""
    q, k, v = inputs = uniform(SHAPE, "float32")
    options = {"causal": True, "align": 170}
    clean = attend(*inputs, **options)
    v[0, :, 20, 3] = v[0, :, 130, 5] = v[:, :, 180] = poison
    o, lse = attend(*inputs, **options)
    check((o, lse), *inputs, **options)
    assert same_bits(lse, clean[1]) and same_bits(o[1, :, :10], clean[0][1, :, :10])


@pytest.mark.parametrize("poison", [np.inf, -np.inf])
def test_an_infinity_outlives_its_weight(short: None, poison: float) -> None:
    """Scores rise by more from span to span than fp32 has powers of two."""
    q, k, v = inputs = uniform(SHAPE, "float32")
    options = {"score_mod": lambda s, b, h, i, j: s + 3.5 * j}
    v[0, :, 20, 3] = poison
    got = attend(*inputs, **options)
    check(got, *inputs, **options)
    assert (got[0][0, ..., 3] == poison).all()


@pytest.mark.parametrize(("name", "joins"), [("dense", 6), ("every other tile", 3), ("nothing seen", 0)])
def test_spans_end_after_so_many_tiles(short: None, monkeypatch: pytest.MonkeyPatch, name: str, joins: int) -> None:
    """Twelve whole tiles side by side are six spans; six apart, and one that is cut, are three and a rest."""
    count = 0
    join = forward_module._joined

    def counting(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return join(*arguments)

    monkeypatch.setattr(forward_module, "_joined", counting)
    attend(*uniform(Shape(1, 1, 1, 16, 200, 16, 16), "float32"), **OPTIONS[name])
    assert count == joins + 1, "what is left over joins at the end"
