"""The vocabulary of the generators: each word does what it says when it runs, and nonsense is refused."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
from lanes import every_isa, run

from flashtile.errors import KernelError
from flashtile.llvm import jit
from flashtile.llvm import machines as isas
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.machines import ISA
from flashtile.llvm.types import element, lanes, like, literal, mangle, sizeof, vector

INTEGERS = np.array([-7, -1, 0, 1, 2, 3, 8, 1 << 40, -(1 << 62), (1 << 63) - 1, 12, 5], np.int64)
FLOATS = np.array([-2.5, -0.0, 0.0, 1.0, 3.25, np.inf, -np.inf, np.nan, 1e-40, 7.0, -1.0, 2.0], np.float32)


def compiled(body, *types: str, returns: str = "i64", result=ctypes.c_int64):  # type: ignore[no-untyped-def]
    """A callable of one emitted function; body(f, *arguments) gives the value to return."""
    f = Function(Module(), "made", returns, types)
    f.ret(body(f, *f.args))
    library = jit.Library(jit.object_code(f.module.text(), isas.current()), ("made",))
    kinds = {"i64": ctypes.c_int64, "ptr": ctypes.c_void_p, "double": ctypes.c_double, "float": ctypes.c_float}
    function = library.function("made", result, *(kinds[t] for t in types))
    function.library = library  # type: ignore[attr-defined]  # the code lives as long as the callable
    return function


def test_types() -> None:
    assert vector(16, "float") == "<16 x float>"
    assert (element("<4 x i32>"), element("double")) == ("i32", "double")
    assert (lanes("<4 x i32>"), lanes("ptr")) == (4, 1)
    assert (sizeof("<8 x double>"), sizeof("i16"), sizeof("ptr")) == (64, 2, 8)
    assert (like("<4 x i32>", "float"), like("i32", "float")) == ("<4 x float>", "float")
    mangled = {"<16 x float>": "v16f32", "double": "f64", "<8 x bfloat>": "v8bf16", "i64": "i64", "ptr": "p0"}
    assert {t: mangle(t) for t in mangled} == mangled


def test_literals_lose_no_digit() -> None:
    assert literal("i32", 7) == "7"
    assert literal("<4 x i64>", -1) == "splat (i64 -1)"
    assert literal("double", 1 / 3) == "0x3FD5555555555555"
    assert literal("float", 1 / 3) == "0x3FD5555560000000"  # the image of a float is that of the double of equal value
    assert literal("float", float("-inf")) == "0xFFF0000000000000"
    with pytest.raises(ValueError, match="half"):
        literal("half", 1.0)


BINARY = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "reflected": lambda a, b: 3 + 2 * a - (5 - b),
}
COMPARISONS = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a.eq(b) if isinstance(a, Value) else a == b,
    "ne": lambda a, b: a.ne(b) if isinstance(a, Value) else a != b,
}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("expression", BINARY.values(), ids=BINARY)
def test_integer_arithmetic_wraps(expression, count: int) -> None:  # type: ignore[no-untyped-def]
    a, b = INTEGERS, INTEGERS[::-1].copy()
    with np.errstate(over="ignore"):
        expected = expression(a, b)
    assert (run(isas.current(), lambda f, x, y: expression(x, y), a, b, count=count) == expected).all()


def test_division_and_shifts() -> None:
    def check(emitted, expected: np.ndarray, *arrays: np.ndarray) -> None:  # type: ignore[no-untyped-def]
        assert run(isas.current(), emitted, *arrays).tolist() == expected.tolist()

    a, b = np.arange(12), np.array([1, 2, 3, 4, 5, 6] * 2)
    check(lambda f, x, y: x // y, a // b, a, b)
    check(lambda f, x, y: x % y, a % b, a, b)
    check(lambda f, x: x << 3, INTEGERS << 3, INTEGERS)
    check(lambda f, x: x.ashr(2), INTEGERS >> 2, INTEGERS)
    check(lambda f, x: x >> 2, (INTEGERS.view(np.uint64) >> np.uint64(2)).view(np.int64), INTEGERS)
    check(lambda f, x: f.select(x.ult(5), f.const(x.type, 1), 0), ((INTEGERS >= 0) & (INTEGERS < 5)) * 1, INTEGERS)


@pytest.mark.parametrize("how", COMPARISONS)
@pytest.mark.parametrize("numbers", [INTEGERS, FLOATS], ids=["integers", "floats"])
def test_comparisons(how: str, numbers: np.ndarray) -> None:
    """Signed; false of NaN, but for ne."""
    compare = COMPARISONS[how]
    a, b = (np.resize(x, 144) for x in (np.repeat(numbers, 12), numbers))
    expected = compare(a, b)
    one = np.ones(144, numbers.dtype)
    got = run(isas.current(), lambda f, x, y, z: f.select(compare(x, y), z, 0), a, b, one)
    assert (got == expected).all()


def test_float_arithmetic() -> None:
    a, b = FLOATS, FLOATS[::-1].copy()
    with np.errstate(all="ignore"):
        expected = (a + b) * a / b - 1 / a
    got = run(isas.current(), lambda f, x, y: (x + y) * x / y - 1.0 / x, a, b)
    np.testing.assert_array_equal(got, expected)


def test_extremes_give_the_second_operand_for_nan() -> None:
    a, b = (np.resize(x, 144) for x in (np.repeat(FLOATS, 12), FLOATS))
    unordered = np.isnan(a) | np.isnan(b)
    largest = run(isas.current(), lambda f, x, y: f.maximum(x, y), a, b)
    smallest = run(isas.current(), lambda f, x, y: f.minimum(x, y), a, b)
    np.testing.assert_array_equal(largest, np.where(unordered, b, np.where(a > b, a, b)))
    np.testing.assert_array_equal(smallest, np.where(unordered, b, np.where(a < b, a, b)))
    clamped = run(isas.current(), lambda f, x: f.clamp(x, -3, 8), INTEGERS)
    assert clamped.tolist() == np.clip(INTEGERS, -3, 8).tolist()


def test_fma_rounds_once() -> None:
    if not isas.current().fused:
        pytest.skip(f"{isas.current().name} has no fused multiply-add")
    x = np.array([1 + 2.0**-12], np.float32)
    got = run(isas.current(), lambda f, a: f.fma(a, a, f.const(a.type, -1.0)), x)
    assert got[0] == np.float32((1 + 2.0**-12) ** 2 - 1) != x[0] * x[0] - 1


def test_constants_fold_and_identities_cost_nothing() -> None:
    f = Function(Module(), "f", "void", ["i64", "ptr"])
    n, p = f.args
    three = f.const("i64", 3)
    assert ((three + 4) * 2 - 1).number == 13
    assert f.text().count("\n") == 2, "arithmetic on constants was emitted"
    assert (n + 0) is n and (0 + n) is n and (n * 1) is n and (1 * n) is n and (p + 0) is p
    assert f.text().count("\n") == 2, "an identity was emitted"
    assert (n + 1).number is None
    assert f.text().count("\n") == 3
    assert f.cast("bitcast", n, "i64") is n


def test_floats_never_fold() -> None:
    """x + 0.0 is not x where x is -0.0."""
    got = run(isas.current(), lambda f, x: x + 0.0, np.array([-0.0, 1.0], np.float32))
    assert not np.signbit(got[0])


def test_casts() -> None:
    x = np.array([-3, -1, 0, 7], np.int32)
    assert run(isas.current(), lambda f, v: f.cast("sext", v, like(v.type, "i64")), x).tolist() == x.tolist()
    zext = run(isas.current(), lambda f, v: f.cast("zext", v, like(v.type, "i64")), x)
    assert zext.tolist() == x.view(np.uint32).tolist()
    assert run(isas.current(), lambda f, v: f.cast("sitofp", v, like(v.type, "float")), x).tolist() == x.tolist()
    assert (run(isas.current(), lambda f, v: f.bitcast(v, "float"), x).view(np.int32) == x).all()


# -- lanes ---------------------------------------------------------------------------------------------


def test_splat_insert_extract_iota() -> None:
    def body(f: Function, out: Value) -> Value:
        number = f.load("i32", out)
        line = f.splat(number, 4) * f.iota("<4 x i32>", 1)  # 1 2 3 4 times what stands there
        line = f.insert(line, f.extract(line, 0) + 100, 2)
        f.store(line, out, align=4)
        f.store(f.splat(f.const("i32", 9), 4), out + 16, align=4)
        return f.const("i64", 0)

    out = np.array([10, 0, 0, 0, 0, 0, 0, 0], np.int32)
    compiled(body, "ptr")(out.ctypes.data)
    assert out.tolist() == [10, 20, 110, 40, 9, 9, 9, 9]


def test_shuffle_and_interleave() -> None:
    def body(f: Function, a: Value, b: Value, out: Value) -> Value:
        x, y = f.load("<4 x i32>", a), f.load("<4 x i32>", b)
        low, high = f.interleave(x, y)
        for n, value in enumerate((low, high, f.shuffle(x, y, [3, 4, 0, 7]))):
            f.store(value, out + 16 * n, align=4)
        f.store(f.shuffle(x, y, [6, 1]), out + 48, align=4)
        return f.const("i64", 0)

    a, b, out = np.arange(4, dtype=np.int32), np.arange(10, 14, dtype=np.int32), np.zeros(14, np.int32)
    compiled(body, "ptr", "ptr", "ptr")(a.ctypes.data, b.ctypes.data, out.ctypes.data)
    assert out.tolist() == [0, 10, 1, 11, 2, 12, 3, 13, 3, 10, 0, 13, 12, 1]


@pytest.mark.parametrize("isa", every_isa())
@pytest.mark.parametrize("kind", ["float", "double"])
def test_transpose(isa: ISA, kind: str) -> None:
    n = isa.lanes(kind)
    f = Function(Module(), "made", "void", ["ptr", "ptr"])
    step = isa.vector_bytes
    rows = [f.load(isa.vector_of(kind), f.args[0] + r * step) for r in range(n)]
    for r, row in enumerate(f.transpose(rows)):
        f.store(row, f.args[1] + r * step)
    f.ret()
    square = np.arange(n * n, dtype="f4" if kind == "float" else "f8").reshape(n, n)
    out = np.zeros_like(square)
    library = jit.Library(jit.object_code(f.module.text(), isa), ("made",))
    library.function("made", None, ctypes.c_void_p, ctypes.c_void_p)(square.ctypes.data, out.ctypes.data)
    assert (out == square.T).all()


# -- control flow --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(0, 0), (0, 1), (2, 11), (5, 5), (7, 3), (-4, 3)])
@pytest.mark.parametrize("step", [1, 3])
def test_fold(bounds: tuple[int, int], step: int) -> None:
    """for i in range(start, stop, step), two values carried; nested, with run-time bounds."""

    def body(f: Function, start: Value, stop: Value) -> Value:
        def outer(i: Value, carry: list[Value]) -> list[Value]:
            inner = f.fold(0, i, 1, [carry[0]], lambda j, c: [c[0] + j * i])
            return [inner[0] + 1, carry[1] + i]

        total, indices = f.fold(start, stop, step, [f.const("i64", 0), f.const("i64", 100)], outer)
        return total * 1000 + indices

    total, indices = 0, 100
    for i in range(*bounds, step):
        total, indices = total + sum(j * i for j in range(i)) + 1, indices + i
    assert compiled(body, "i64", "i64")(*bounds) == total * 1000 + indices


def test_range_and_when_and_either() -> None:
    """Blocks inside blocks; a loop inside a condition inside a loop."""

    def body(f: Function, n: Value, out: Value) -> Value:
        with f.range(0, n) as i:
            here = out + i * 8
            with f.when((i % 2).eq(1)):
                f.store(i, here)
                with f.range(0, i) as j, f.when(j.eq(2)):
                    f.store(f.load("i64", here) + 100, here)
            f.either(
                i < 3,
                lambda: f.store(f.load("i64", here) + 1000, here),
                lambda: f.store(f.load("i64", here) + 2000, here),
            )
        return f.const("i64", 0)

    out = np.zeros(6, np.int64)
    compiled(body, "i64", "ptr")(6, out.ctypes.data)
    assert out.tolist() == [1000, 1001, 1000, 2103, 2000, 2105]


def test_value_when_computes_only_if_wanted() -> None:
    def body(f: Function, pointer: Value, otherwise: Value) -> Value:
        def sum_of_four() -> Value:  # ends in another block than it begins in
            return f.fold(0, 4, 1, [f.const("i64", 0)], lambda i, c: [c[0] + f.load("i64", pointer + i * 8)])[0]

        return f.value_when(f.is_null(pointer).eq(0), sum_of_four, otherwise)

    function = compiled(body, "ptr", "i64")
    numbers = np.array([1, 2, 3, 4], np.int64)
    assert function(numbers.ctypes.data, -5) == 10
    assert function(None, -5) == -5


def test_calls_between_functions() -> None:
    module = Module()
    inner = Function(module, "twice", "i64", ["i64"], internal=True)
    inner.ret(inner.args[0] * 2)
    outer = Function(module, "made", "i64", ["i64"], names=["n"])
    outer.ret(outer.call("twice", "i64", [outer.args[0]]) + 1)
    assert "%n" in module.text()
    library = jit.Library(jit.object_code(module.text(), isas.current()), ("made",))
    assert library.function("made", ctypes.c_int64, ctypes.c_int64)(20) == 41


def test_chains_abreast_are_the_same_chains() -> None:
    """Instructions of one chain after the other, or in turns: the same values; and the turns are there."""

    def emit(f: Function, n: int) -> Value:
        x = f.args[0] + n
        return x * x * (2 + n) - 1 if n else x + 5

    module = Module()
    f = Function(module, "made", "i64", ["i64"])
    first, second, third = f.abreast(3, lambda n: emit(f, n))
    f.ret(first + second * 10 + third * 100)
    x = 7
    library = jit.Library(jit.object_code(module.text(), isas.current()), ("made",))
    want = x + 5 + ((x + 1) ** 2 * 3 - 1) * 10 + ((x + 2) ** 2 * 4 - 1) * 100
    assert library.function("made", ctypes.c_int64, ctypes.c_int64)(x) == want
    operations = re.findall(r"= (add|sub|mul) ", module.text())
    assert operations[:9] == ["add"] * 3 + ["mul"] * 4 + ["sub"] * 2  # the first chain is at its end after one


INVALID = {
    "types that do not match": lambda f: f.emit("i64", f"add i64 {f.args[0].ref}, {f.args[1].ref}"),
    "a value of another function": lambda f: Value(f, "i64", "%elsewhere") + 1,
    "no return": lambda f: f.put("unreachable_"),
    "a cast that is none": lambda f: f.cast("trunc", f.args[0], "double"),
}


@pytest.mark.parametrize("emit", INVALID.values(), ids=INVALID)
def test_invalid_code_is_a_kernel_error(emit) -> None:  # type: ignore[no-untyped-def]
    f = Function(Module(), "wrong", "void", ["i64", "float"])
    emit(f)
    f.ret()
    with pytest.raises(KernelError, match="invalid LLVM IR"):
        jit.parse(f.module.text())


def test_vectors_of_different_length_do_not_mix() -> None:
    f = Function(Module(), "wrong", "void", ["<4 x float>", "<8 x float>"])
    _ = f.args[0] + f.args[1]
    f.ret()
    with pytest.raises(KernelError):
        jit.object_code(f.module.text(), isas.current())


def test_names_of_arguments_are_as_many_as_arguments() -> None:
    with pytest.raises(ValueError):
        Function(Module(), "f", "void", ["i64", "i64"], names=["only"])


@pytest.mark.parametrize("isa", every_isa())
@pytest.mark.parametrize("kind", ["i16", "float", "double"])
def test_some_lanes_are_loaded_and_stored(isa: ISA, kind: str) -> None:
    """The first so many; memory behind them is neither read into a lane nor written."""
    numbers = np.arange(1, 9).astype({"i16": np.int16, "float": np.float32, "double": np.float64}[kind])
    f = Function(Module(), "made", "void", ["ptr", "ptr", "i64", "i64"])
    source, target, loaded, stored = f.args
    f.store_some(f.load_some(vector(8, kind), source, loaded), target, stored)
    f.ret()
    library = jit.Library(jit.object_code(f.module.text(), isa), ("made",))
    move = library.function("made", None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2)
    for loaded_, stored_ in ((0, 8), (-3, 2), (3, 8), (8, 5), (20, 20), (7, 0)):
        out = np.full(8, 77, numbers.dtype)
        move(numbers.ctypes.data, out.ctypes.data, loaded_, stored_)
        lane = np.arange(8)
        want = np.where(lane < stored_, np.where(lane < loaded_, numbers, 0), 77)
        assert (out == want).all()
