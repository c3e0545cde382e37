"""NEON kernels, executed: shapes and options that reach every path of the generator, by the accuracy rule."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from inputs import Shape, uniform

import flashtile
from flashtile.dtypes import DTYPES
from flashtile.llvm import jit
from flashtile.llvm import machines as isas
from flashtile.testing import expect

if (emulated := sys.modules.get("emulated")) is None:
    pytest.skip("run by .ci/neon: needs an aarch64 emulator and cross compiler", allow_module_level=True)

SHAPES = {
    "head-64": Shape(q_len=100, kv_len=200, head_size=64, value_size=64),
    "head-80": Shape(q_len=61, kv_len=300, head_size=80, value_size=80),
    "head-33": Shape(q_len=50, kv_len=131, head_size=33, value_size=33),
    "differing": Shape(q_len=37, kv_len=53, head_size=7, value_size=20),
    "grouped": Shape(batch=2, heads=4, kv_heads=2, q_len=29, kv_len=150, head_size=16, value_size=24),
    "one-query": Shape(heads=4, kv_heads=2, q_len=1, kv_len=700, head_size=64, value_size=64),
}
OPTIONS = {
    "dense": {},
    "causal": {"causal": True, "align": "bottom_right"},
    "window": {"window": (40, 9), "align": "top_left"},
    "scale": {"scale": -0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("storage", DTYPES)
def test_accuracy(storage: str, shape: Shape, options: dict) -> None:
    before = next(emulated.programs_run)
    q, k, v = uniform(shape, storage, seed=sum(shape), size=2.0)
    o, lse = flashtile.attention(q, k, v, kernel="cpu", return_lse=True, **options)
    expected_o, expected_lse = expect(q, k, v, **options)
    expected_o.check(o, "output")
    expected_lse.check(lse, "lse")
    assert next(emulated.programs_run) > before + 1, "no NEON code ran"


def test_the_instruction_set_is_neon() -> None:
    assert isas.usable() == ["neon"]
    assert isas.current().name == "neon"


PEEK = """
define i32 @peek(ptr %p) {
  %x = load i32, ptr %p
  store i32 7, ptr %p
  ret i32 %x
}
"""


def test_the_emulator_reads_and_writes_this_memory() -> None:
    """And a kernel that touches memory that is not there fails the call: nothing passes by not running."""
    peek = emulated.Library(jit.object_code(PEEK, isas.current())).function("peek", None)
    number = np.array([1, 42, 3], np.int32)
    assert peek(number.ctypes.data + 4) == 42
    assert number.tolist() == [1, 7, 3]
    with pytest.raises(RuntimeError, match="status 121"):
        peek(4096)
