"""flashtile.nntile on arrays: Fortran-ordered tiles, one key tile a call. (tests/starpu has its tasks.)"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from inputs import numpy_dtype
from nntile_problem import LSE, MASK, TILES, VALID, BackwardProblem, K, Problem, Q

from flashtile import nntile
from flashtile.errors import SpecError
from flashtile.testing import ulp


@pytest.mark.parametrize("mask", [None, "own", "float32", "bool"])
def test_every_dtype_and_mask_on_arrays(dtype: str, mask: str | None) -> None:
    problem = Problem(dtype, mask, value_size=17)
    problem.run()
    problem.check()


@pytest.mark.parametrize("name", list(nntile.DTYPE_NAMES))
def test_nntile_s_names_of_dtypes(name: str) -> None:
    stored, precision = nntile.DTYPE_NAMES[name]
    problem = Problem(stored, precision=precision)
    problem.run(dtype=name)
    problem.check()


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window": (40, 10)}, {"causal": True, "window": (30, -1)}], ids=str
)
@pytest.mark.parametrize("first", [0, 90, 1000])
def test_computed_masks_know_where_tiles_stand(options: dict[str, Any], first: int) -> None:
    """Queries that begin at `first`; key tiles that they do not see change nothing."""
    problem = Problem("float32", align=first, **options)
    problem.run(first_query=first, **options)
    problem.check()


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_16_bit_rounding_is_bounded_by_half_an_ulp_a_tile(narrow: str) -> None:
    """The same inputs with A in float32 instead, which differs by nothing but that rounding; many small tiles.

    bfloat16 products may go through a unit that rounds weights, so it is compared on float32 inputs with the same
    request."""
    tiles, keys, size = 64, 8, 16
    rng = np.random.default_rng(1)
    q, k, v = (rng.uniform(-1, 1, (size, n, 1, 1, 2)).astype(numpy_dtype(narrow)) for n in (40, *[tiles * keys] * 2))
    precision = "fp32_fast_bf16" if narrow == "bfloat16" else "fp32"
    found = []
    for kind, name in ((numpy_dtype(narrow), None), (np.dtype("float32"), precision)):
        a, lse = np.zeros((size, 40, 1, 1, 2), kind, order="F"), np.full((40, 1, 1, 2), -np.inf, "float32", order="F")
        arrays = [np.asfortranarray(x.astype(kind)) for x in (q, k, v)]
        for first in range(0, tiles * keys, keys):
            part = [np.asfortranarray(x[:, first : first + keys]) for x in arrays[1:]]
            nntile.flash_sdpa_fwd(part[0], arrays[0], None, lse, part[1], a, dtype=name)
        found.append(a.astype("float64"))
    largest = float(np.abs(v.astype("float64")).max())
    error = np.abs(found[0] - found[1]).max()
    assert 0 < error <= tiles * 0.5 * ulp(largest, narrow)
    assert error > 2 * ulp(np.abs(found[1]).max(), narrow), "the bound says nothing if one rounding explains the error"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"K": K[:7].copy("F")}, "K: got shape (7, 6, 1, 2, 3), expected (8, 6, 1, 2, 3)"),
        ({"V": K[:, :5].copy("F")}, "V: got shape (8, 5, 1, 2, 3), expected (8, 6, 1, 2, 3)"),
        ({"K": K[..., :2].copy("F")}, "K: got shape (8, 6, 1, 2, 2)"),
        ({"A": K.copy("F")}, "A: got shape"),
        ({"logsumexp": LSE[..., 0]}, "logsumexp: got shape (4, 1, 2), expected [n_queries"),
        ({"logsumexp": LSE.astype("float64")}, "logsumexp: got dtype float64, expected float32"),
        ({"mask": MASK.T.copy("F")}, "mask: got shape (4, 6), expected (6, 4)"),
        ({"mask": MASK.astype("float64", order="F")}, "mask: got dtype float64, expected float32"),
        ({"mask": MASK.copy("C")}, "mask: got strides"),
        ({"Q": Q.copy("C")}, "Q: got strides"),
        ({"Q": [1]}, "Q: got a list"),
        ({"A": K[:, :4]}, "A: got strides"),
        ({"A": Q}, "A: got an array within the memory that Q spans"),
        ({"dtype": "fp32_fast"}, "dtype: got 'fp32_fast', expected one of fp32, fp32_fast_tf32"),
        ({"dtype": "fp16"}, "dtype: got 'fp16', expected one of fp32"),
        ({"first_key": -1}, "first_key: got -1"),
        ({"first_query": 1.5}, "first_query: got 1.5"),
        ({"causal": 1}, "causal: got 1"),
        ({"scale": np.nan}, "scale: got nan"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments(change: dict[str, Any], expected: str) -> None:
    given = {**VALID, **change}
    arrays = [given.pop(name) for name in VALID]
    with pytest.raises(SpecError) as raised:
        nntile.flash_sdpa_fwd(*arrays, **given)
    assert str(raised.value).startswith(expected), raised.value


# Gradients


@pytest.mark.parametrize(
    ("name", "mask", "options"),
    [
        ("fp64", "own", {}),
        ("fp32", None, {"causal": True}),
        ("fp32_fast_tf32", "bool", {}),
        ("fp32_fast_fp16", None, {}),
        ("fp32_fast_bf16", None, {"window": (40, 10)}),
        ("fp16", "float32", {}),
        ("bf16", "bool", {"causal": True, "window": (60, -1)}),
    ],
    ids=str,
)
def test_gradients_of_every_dtype_and_mask(name: str, mask: str | None, options: dict[str, Any]) -> None:
    """Key tile by key tile, summed in float32 where that is wider."""
    stored, precision = nntile.DTYPE_NAMES[name]
    problem = BackwardProblem(stored, mask, wide=True, precision=precision, align=90, **options)
    problem.run(dtype=name, first_query=90, **options)
    problem.check()


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_gradients_in_16_bits_round_once_a_call(narrow: str) -> None:
    wide, own = BackwardProblem(narrow, wide=True), BackwardProblem(narrow)
    wide.run()
    own.run()
    for name in ("dq", "dk", "dv"):
        exact, rounded = getattr(wide, name), getattr(own, name).astype("float32")
        calls = TILES if name == "dq" else 1
        assert np.abs(rounded - exact).max() <= calls * 0.5 * ulp(np.abs(exact).max(), narrow) * 1.01


GRADIENTS = np.zeros((8, 6, 2, 1, 3), "float16", order="F")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dK": np.zeros((8, 5, 2, 1, 3), "float16", order="F")}, r"dK: got shape \(8, 5, 2, 1, 3\)"),
        ({"dQ": np.zeros((8, 6, 2, 1, 3), "float64", order="F")}, "dQ: got dtype float64, expected float16 or float32"),
        ({"dA": np.zeros((8, 6, 2, 1, 3), "float32", order="F")}, "dA: got dtype float32, expected float16"),
        ({"dV": np.zeros((8, 6, 2, 1, 3), "float16")}, "dV: got strides .*, expected a Fortran-ordered array"),
        ({"dV": GRADIENTS}, "dK: got an array within the memory that dV spans, expected memory of its own"),
    ],
)
def test_gradients_refuse_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    given = {name: GRADIENTS.copy("F") for name in ("K", "Q", "V", "A", "dA", "dK", "dQ")}
    given |= {"dV": GRADIENTS.copy("F"), "mask": None, "logsumexp": np.zeros((6, 2, 1, 3), "float32", order="F")}
    given |= changed
    if given["dV"] is GRADIENTS:
        given["dK"] = GRADIENTS
    with pytest.raises(SpecError, match=message):
        nntile.flash_sdpa_bwd(**given)
