"""The score language's Triton form against its NumPy value, kind by kind."""

from __future__ import annotations

import launching  # noqa: F401  # skips this file unless Triton interprets
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trees import Tree, as_mask, as_score, trees

from flashtile.kernels.triton.host import captured
from flashtile.kernels.triton.interpreter import Interpreter, _argument
from flashtile.kernels.triton.language import spread
from flashtile.kernels.triton.program import function_of
from flashtile.kernels.triton.specialisation import capture_types
from flashtile.score import Program
from flashtile.score.expr import postorder
from flashtile.score.operations import OPERATIONS, inside

SHAPE = (2, 3, 40, 40)
REALS = {"float32": tl.float32, "float64": tl.float64}


@triton.jit
def evaluate(out, s, i, j, b, h, captures, F: tl.constexpr, N: tl.constexpr):
    """out[n] = F(s[n], b, h, i[n], j[n])"""
    n = tl.arange(0, N)
    ACC: tl.constexpr = s.dtype.element_ty
    value = F(tl.load(s + n), spread(b), spread(h), tl.load(i + n), tl.load(j + n), captures, ACC)
    tl.store(out + n, tl.broadcast_to(value.to(out.dtype.element_ty), [N]))


def run(program: Program, root, s: np.ndarray, b: int, h: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """An expression of a program in Triton, at points."""
    dtype = s.dtype if root.type == "float" else np.int32
    out = torch.empty(len(s), dtype=getattr(torch, np.dtype(dtype).name))
    s_, i_, j_ = (torch.from_numpy(np.ascontiguousarray(x)) for x in (s, i.astype(np.int32), j.astype(np.int32)))
    values = captured(program.captures, Interpreter())
    captures = None if values is None else tuple(map(_argument, values, capture_types(program.code.slots)))
    with np.errstate(all="ignore"):
        evaluate[(1,)](out, s_, i_, j_, b, h, captures, function_of("f", root, program.code.slots), len(s))
    return out.numpy()


def points(real: type, seed: int = 0, n: int = 64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    s = np.concatenate([rng.normal(size=n - 4) * 4, [0.0, -0.0, np.inf, np.nan]]).astype(real)
    return {"s": s, "i": rng.integers(0, SHAPE[2], n), "j": rng.integers(0, SHAPE[3], n)}


def agrees(program: Program, real: type, at: dict[str, np.ndarray], b: int = 1, h: int = 2) -> None:
    """Bit for bit: these kinds are exactly rounded, or integers."""
    root = program.mask if program.score is None else program.score
    if root is None:
        return
    want = program.run([root], at["s"], b, h, at["i"].astype(np.int32), at["j"].astype(np.int32), real)[0]
    got = run(program, root, at["s"], b, h, at["i"], at["j"])
    np.testing.assert_array_equal(got, np.broadcast_to(want, len(got)).astype(got.dtype))


def program_of(tree: Tree, result: str) -> Program:
    if result == "b":
        return Program.of(SHAPE, mask=as_mask(tree))
    return Program.of(SHAPE, score_mod=as_score(tree))


HALF_OF_BATCH = Tree("float", (Tree("b"),))
CASES = st.sampled_from("bif").flatmap(lambda t: st.tuples(st.just(t), trees(t, scores=t != "b")))


@pytest.mark.parametrize("real", [np.float32, np.float64])
@settings(max_examples=60)
@given(case=CASES)
@example(case=("i", Tree("floordiv_i", (Tree("i"), Tree("sub_i", (Tree("j"), Tree(3)))))))
@example(case=("i", Tree("mod_i", (Tree("sub_i", (Tree(5), Tree("i"))), Tree("sub_i", (Tree("i"), Tree(20)))))))
@example(case=("i", Tree("floordiv_i", (Tree("sub_i", (Tree(5), Tree("i"))), Tree(-7)))))
@example(case=("i", Tree("mod_i", (Tree("sub_i", (Tree(5), Tree("i"))), Tree(8)))))
@example(case=("i", Tree("mul_i", (Tree("mul_i", (Tree("i"), Tree(100_000_000))), Tree("j")))))
@example(case=("b", Tree("and_b", (Tree("lti", (Tree("i"), Tree(4))), Tree("eqf", (Tree(0.5), HALF_OF_BATCH))))))
@example(case=("f", Tree("maximum_f", (Tree(0.5), Tree("s")))))
@example(case=("f", Tree("minimum_f", (Tree("s"), Tree(0.5)))))
@example(case=("f", Tree("floordiv_f", (Tree("s"), Tree(0.5)))))
@example(case=("f", Tree("truediv_f", (Tree(0.5), Tree("neg_f", (Tree("s"),))))))
def test_triton_gives_the_numpy_value(real, case):
    result, tree = case
    agrees(program_of(tree, result), real, points(real))


@pytest.mark.slow
@pytest.mark.parametrize("real", [np.float32, np.float64])
@settings(max_examples=400)
@given(case=CASES, seed=st.integers(0, 100))
def test_triton_gives_the_numpy_value_of_many_programs(real, case, seed):
    result, tree = case
    agrees(program_of(tree, result), real, points(real, seed))


BIG = np.array([2**31 - 1, -(2**31), 2**30, -5, -1, 0, 1, 7], np.int32)
EDGES = {
    "divide the least integer": lambda s, b, h, i, j: BIG[i] // BIG[j],
    "remainder of the least integer": lambda s, b, h, i, j: BIG[i] % BIG[j],
    "wrapping sums": lambda s, b, h, i, j: BIG[i] + BIG[j] - 3 * BIG[i],
    "negated least integer": lambda s, b, h, i, j: -BIG[i] + abs(BIG[j]),
    "shift left": lambda s, b, h, i, j: BIG[i] << (BIG[j] % 64 - 16),
    "shift right": lambda s, b, h, i, j: BIG[i] >> (BIG[j] % 64 - 16),
    "bits": lambda s, b, h, i, j: (BIG[i] & BIG[j]) ^ (~BIG[i] | 12),
    "saturating cast": lambda s, b, h, i, j: (s * 1e9).astype(np.int32),
    "cast to bool": lambda s, b, h, i, j: np.where(BIG[i].astype(bool), s, -s),
    "bool to float": lambda s, b, h, i, j: (i > j) * 1.5 + (h == 2),
    "float remainder": lambda s, b, h, i, j: s % 0.75,
    "division by zero": lambda s, b, h, i, j: 1.0 / (s * 0.0),
    "signed zero": lambda s, b, h, i, j: 1.0 / -(i * 0.0),
    "square root": lambda s, b, h, i, j: np.sqrt(s),
    "floor": lambda s, b, h, i, j: np.floor(s * 1.25),
    "comparisons with NaN": lambda s, b, h, i, j: (s < 1) + 2.0 * (s != s) + 4.0 * (s >= 1) + 8.0 * (s == s),
}


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("name", EDGES)
def test_edges_of_the_kinds(name, real):
    at = points(real)
    n = np.arange(64)
    at["i"], at["j"] = n // 8, n % 8  # every pair of BIG
    program = Program.of((2, 3, 8, 8), score_mod=EDGES[name])
    agrees(program, real, at)
    if name == "signed zero":  # the sign, which assert_array_equal does not see, decides
        assert np.isneginf(run(program, program.score, at["s"], 0, 0, at["i"], at["j"])).all()


ARRAYS = {
    "bool": np.arange(12).reshape(3, 4) % 3 == 0,
    **{name: np.arange(-6, 6).reshape(3, 4).astype(name) for name in ("int8", "int16", "int32", "int64")},
    **{name: np.arange(12).reshape(3, 4).astype(name) for name in ("uint8", "uint16", "uint32", "uint64")},
    **{name: np.linspace(-3, 3, 12).reshape(3, 4).astype(name) for name in ("float16", "float32", "float64")},
    "reversed": np.linspace(-3, 3, 12).reshape(3, 4)[::-1, ::-1],
    "transposed": np.linspace(-3, 3, 12).reshape(4, 3).T,
    "stride 0": np.broadcast_to(np.float32(0.3), (3, 4)),
}


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("name", ARRAYS)
def test_loads(name, real):
    """Elements of every type and layout; outside the array, which the corners of the problem never are, the nearest."""
    array = ARRAYS[name]
    agrees(Program.of(SHAPE, score_mod=lambda s, b, h, i, j: s + array[h, j % 4]), real, points(real))

    def far(s, b, h, i, j):
        return s + array[h, j % 4 + np.where(i % 20 == 3, 7, 0) - np.where(i % 20 == 5, 7, 0)]

    at = points(real)
    at["i"] = at["i"] // 2 * 2 + 1
    assert {3, 5} <= set(at["i"] % 20)
    agrees(Program.of(SHAPE, score_mod=far), real, at)


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_bfloat16_loads_and_numbers(real):
    array = torch.linspace(-3, 3, 12, dtype=torch.bfloat16).reshape(3, 4)
    factor, shift, one = 0.1, 7, torch.tensor(1.5)
    agrees(Program.of(SHAPE, score_mod=lambda s, b, h, i, j: s + array[h, j % 4]), real, points(real))
    numbers = Program.of(SHAPE, score_mod=lambda s, b, h, i, j: s * factor + (i + shift) * one[()])
    agrees(numbers, real, points(real))


def test_whether_a_load_is_inside() -> None:
    """What a gradient asks of a load, at every combination of indices in and out of bounds."""
    array = np.zeros((3, 4), np.float32)
    program = Program.of(SHAPE, score_mod=lambda s, b, h, i, j: s + array[h, j % 4 + np.where(i % 20 == 3, 7, 0)])
    (found,) = (x for x in postorder(program.roots) if x.operation.name == "load")
    at = {**points(np.float32), "i": np.arange(64) % 8}
    for h in (2, 3):
        want = program.run([inside(found)], at["s"], 0, h, at["i"].astype(np.int32), at["j"].astype(np.int32))[0]
        assert want.any() == (h == 2) and not want.all()
        np.testing.assert_array_equal(run(program, inside(found), at["s"], 0, h, at["i"], at["j"]), want)


def test_an_empty_array_reads_as_zero():
    empty = np.zeros((0,), np.float32)
    program = Program.of((1, 1, 40, 0), score_mod=lambda s, b, h, i, j: s + empty[j])
    agrees(program, np.float32, points(np.float32), 0, 0)


FUNCTIONS = {
    "exp": (np.exp, np.linspace(-86, 88, 1024)),
    "exp2": (np.exp2, np.linspace(-125, 127, 1024)),
    "log": (np.log, np.geomspace(1e-37, 1e38, 1024)),
    "log near 1": (np.log, 1 + np.geomspace(-1e-2, -1e-6, 512)),
    "log2": (np.log2, np.geomspace(1e-37, 1e38, 1024)),
    "tanh": (np.tanh, np.linspace(-25, 25, 1024)),
    "tanh near 0": (np.tanh, np.geomspace(1e-30, 0.5, 512)),
    "sqrt": (np.sqrt, np.geomspace(1e-37, 1e38, 1024)),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), np.linspace(-80, 80, 1024)),
}
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -1.0, 1.0, 1e-42])


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(real, function):
    """Within 8 ulp of NumPy in longdouble, and the same at 0, inf, NaN and below the domain.

    The interpreter computes exp2 and log2 by NumPy; what is seen here is everything around them. On float64 all but
    tanh and sigmoid are NumPy's own here, and the vendor's on a GPU.
    """
    numpy_form, s = FUNCTIONS[function][0], FUNCTIONS[function][1].astype(real)
    kind = function.split()[0]
    program = Program.of(SHAPE, score_mod=lambda s, b, h, i, j: getattr(s, kind)())
    zeros = np.zeros(len(s), np.int32)

    def machine(x: np.ndarray) -> np.ndarray:
        return run(program, program.score, x, 0, 0, zeros[: len(x)], zeros[: len(x)])

    with np.errstate(all="ignore"):
        want = numpy_form(s.astype(np.longdouble))
        error = np.abs(machine(s) - want) / np.spacing(np.abs(want).astype(real))
        assert error.max() <= 8
        special = SPECIAL.astype(real)
        exact = numpy_form(special.astype(np.longdouble)).astype(real)
    np.testing.assert_allclose(machine(special), exact, rtol=1e-6, atol=float(np.finfo(real).tiny))


def test_every_kind_has_a_triton_form():
    base = type(OPERATIONS["add"]).__mro__[1]
    for name, operation in OPERATIONS.items():
        assert operation.triton is not None or type(operation).write is not base.write, name


def test_random_programs_use_every_exact_kind():
    """So that the tests above cannot miss one: what they draw from, and the edges, name every kind."""
    used: set[str] = set()

    def look(root) -> None:
        stack = [root]
        while stack:
            x = stack.pop()
            used.add(x.operation.name)
            stack += x.args

    for score_mod in (*EDGES.values(), lambda s, b, h, i, j: BIG[i] * np.minimum(s, np.maximum(s, 1)) - s // 2):
        look(Program.of((2, 3, 8, 8), score_mod=score_mod).score)
    for mask in (lambda b, h, i, j: (i < j) ^ (i <= j) | ~(b != h) & (i == j),):
        look(Program.of((2, 3, 8, 8), mask=mask).mask)
    for kind in {name.split()[0] for name in FUNCTIONS}:
        look(Program.of(SHAPE, score_mod=lambda s, b, h, i, j, kind=kind: getattr(s, kind)()).score)
    number = 0.1
    look(Program.of(SHAPE, score_mod=lambda s, b, h, i, j: s * number).score)
    assert set(OPERATIONS) - used == {"inside"}  # of gradients alone
