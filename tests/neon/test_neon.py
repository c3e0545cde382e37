"""NEON kernels, executed: shapes and options that reach every path of the generator, by the accuracy rule."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from inputs import Shape, preset, uniform

import flashtile
from flashtile.calls import clear_cache
from flashtile.dtypes import DTYPES
from flashtile.llvm import jit
from flashtile.llvm import machines as isas
from flashtile.llvm.ir import Function, Module, Value
from flashtile.testing import expect, expect_gradients

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


# Of the machine with bf16's instructions all else is the other one's.
KERNELS = [("neon", storage) for storage in DTYPES] + [("neon_bf16", "bfloat16")]


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("FLASHTILE_ISA", request.param)
    clear_cache()
    yield request.param
    clear_cache()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("isa", "storage"), KERNELS, indirect=["isa"])
def test_accuracy(isa: str, storage: str, shape: Shape, options: dict) -> None:
    before = next(emulated.programs_run)
    q, k, v = uniform(shape, storage, seed=sum(shape), size=2.0)
    o, lse = flashtile.attention(q, k, v, kernel="cpu", return_lse=True, **options)
    expected_o, expected_lse = expect(q, k, v, **options)
    expected_o.check(o, "output")
    expected_lse.check(lse, "lse")
    assert next(emulated.programs_run) > before + 1, "no NEON code ran"


@pytest.mark.parametrize("options", [{}, OPTIONS["causal"], OPTIONS["window"]], ids=["dense", "causal", "window"])
@pytest.mark.parametrize("shape", ["head-80", "differing", "grouped"])
@pytest.mark.parametrize(("isa", "storage"), [("neon", "float32"), ("neon_bf16", "bfloat16")], indirect=["isa"])
def test_gradients(isa: str, storage: str, shape: str, options: dict) -> None:
    q, k, v = uniform(SHAPES[shape], storage, seed=1, size=2.0)
    do, _, _ = uniform(SHAPES[shape]._replace(head_size=v.shape[-1]), storage, seed=2)
    o, lse = flashtile.attention(q, k, v, kernel="cpu", return_lse=True, **options)
    got = flashtile.attention_backward(do, q, k, v, o, lse, kernel="cpu", **options)
    expected = expect_gradients(do, q, k, v, **options)
    for name in "qkv":
        getattr(expected, name).check(getattr(got, name), f"d{name}")


@pytest.mark.parametrize("isa", ["neon_bf16"], indirect=True)
def test_the_grid_of_bf16(isa: str) -> None:
    """tests/test_grid.py, in the one dtype that this machine computes by itself; its few queries take the dot, so it
    is there once more with as many as take squares."""
    for data, more, *sizes in itertools.product((preset, uniform), (0, 16), (1, 2), (1, 2), (4, 8), (4, 8)):
        batch, heads, length, size = sizes
        q, k, v = data(Shape(batch, heads, heads, length + more, length, size, size), "bfloat16")
        expect(q, k, v)[0].check(flashtile.attention(q, k, v, kernel="cpu"))


def test_the_instruction_sets_are_neons() -> None:
    assert isas.usable() == ["neon_bf16", "neon"]
    assert isas.current().name == "neon_bf16"


@pytest.mark.parametrize(("isa", "product"), [("neon", "fma"), ("neon_bf16", "squares")], indirect=["isa"])
def test_explain_names_the_product(isa: str, product: str) -> None:
    told = flashtile.explain((1, 1, 100, 64), dtype="bfloat16", kernel="cpu")
    assert told.isa == isa and told.product.startswith(f"{product}: ") and told.variant == "forward"
    few = flashtile.explain((1, 1, 1, 64), (1, 1, 500, 64), dtype="bfloat16", kernel="cpu")
    assert few.variant == "decode" and few.product.startswith("pairs: " if product == "squares" else "fma: ")


def _to_odd(x: np.ndarray) -> np.ndarray:
    """To fp32: of the two neighbours of what it does not hold, the one whose last bit is set."""
    near = x.astype(np.float32)
    below = np.where(np.abs(near) > np.abs(x), np.nextafter(near, np.float32(0)), near)
    return (below.view(np.uint32) | (below != x)).view(np.float32)


def _pair(total: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """total + a.low b.low + a.high b.high, as Arm has it: products are exact, either sum is rounded to odd."""
    wide = (a.astype(np.float64) * b.astype(np.float64)).sum(-1)
    return _to_odd(total.astype(np.longdouble) + _to_odd(wide))


@pytest.mark.parametrize("name", ["dot_pairs", "multiply_squares"])
def test_the_instructions_of_bf16_are_bit_equal_to_their_rule(name: str) -> None:
    """And a square is two dots, so both products of the kernels have the same bits of the same sums."""
    isa = isas.known()["neon_bf16"]
    module = Module()
    f = Function(module, "run", "i32", ["ptr", "ptr", "ptr", "i64"])
    with f.range(0, f.args[3], 16) as at:
        operands: list[Value] = [f.load("<4 x i32>", pointer + at, align=4) for pointer in f.args[1:3]]
        total = f.load("<4 x float>", f.args[0] + at, align=4)
        f.store(getattr(isa, name)(f, total, *operands), f.args[0] + at, align=4)
    f.ret(f.const("i32", 0))
    run = emulated.Library(jit.object_code(module.text(), isa)).function("run", None)
    rng, n = np.random.default_rng(0), 500
    total = rng.standard_normal((n, 4)).astype(np.float32)
    a, b = ((rng.standard_normal((n, 4, 2)) * 2.0 ** rng.integers(-6, 6, (n, 4, 2))) for _ in range(2))
    a, b = (x.astype(np.float32).astype(ml_dtypes.bfloat16) for x in (a, b))
    got = total.copy()
    run(got.ctypes.data, a.ctypes.data, b.ctypes.data, got.nbytes)
    if name == "dot_pairs":
        want = _pair(total, a, b)
    else:
        rows, lanes = (x.reshape(n, 2, 2, 2) for x in (a, b))  # (row or lane, word, element)
        want = total.reshape(n, 2, 2)
        for word in range(2):
            want = _pair(want, rows[:, :, None, word], lanes[:, None, :, word])
        want = want.reshape(n, 4)
    assert (got.view(np.uint32) == want.view(np.uint32)).all()


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
