"""The unfused baseline in Triton, under its interpreter, by the accuracy rule."""

from __future__ import annotations

import launching
import numpy as np
import pytest
from inputs import Shape, uniform
from launching import attend_unfused, check, problem
from test_interpreted_forward import OPTIONS, SHAPE

from flashtile.errors import SpecError
from flashtile.kernels.triton.interpreter import Interpreter
from flashtile.kernels.triton.vanilla_host import Vanilla
from flashtile.plan import Plan


@pytest.mark.parametrize(
    "name", ["dense", "window, an offset a batch", "scale zero", "sinks", "bias that hides", "all together"]
)
def test_options(dtype: str, name: str) -> None:
    inputs = uniform(SHAPE, dtype)
    check(attend_unfused(*inputs, **OPTIONS[name]), *inputs, **OPTIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(dtype: str, name: str) -> None:
    inputs = uniform(SHAPE, dtype)
    check(attend_unfused(*inputs, **OPTIONS[name]), *inputs, **OPTIONS[name])


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("poison", [np.nan, -np.inf])
def test_poisoned_elements(where: str, poison: float) -> None:
    inputs = uniform(SHAPE, "float32")
    inputs["qkv".index(where)][0, 0, 14, 3] = poison
    check(attend_unfused(*inputs, **OPTIONS["causal"]), *inputs, **OPTIONS["causal"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions(precision: str) -> None:
    inputs = uniform(SHAPE, "float32")
    check(attend_unfused(*inputs, precision=precision), *inputs, precision=precision)


@pytest.mark.parametrize("shape", [Shape(1, 1, 1, 3, 0), Shape(batch=0), Shape(q_len=0)], ids=str)
def test_empty_axes(shape: Shape) -> None:
    inputs = uniform(shape, "float32")
    check(attend_unfused(*inputs), *inputs)


def test_only_whole_heads() -> None:
    p = problem(*uniform(SHAPE, "float32"))
    plan = Plan(p.spec.batch, p.spec.heads, 2, 1, 16, 40, 0)
    with pytest.raises(SpecError, match="^plan: got 2 tiles of queries in 1 parts, expected one: a whole head"):
        Vanilla(p.spec, plan, p.layout, launching.SMALL, Interpreter())
