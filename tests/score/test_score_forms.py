"""Each node kind's forms against each other, over random expressions: NumPy value, interval, LLVM code."""

from __future__ import annotations

import functools

import jitted
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from trees import Tree, as_mask, as_score, trees

from flashtile.llvm import machines as isa
from flashtile.score import Program
from flashtile.score.bounds import Bounds
from flashtile.score.interval import Interval

SHAPE = (2, 3, 40, 40)
ISAS = [name for name in isa.usable() if not name.endswith("emulated")]


def program_of(tree: Tree, result: str) -> Program:
    """A program whose expression is the tree: as its mask, or as its score."""
    if result == "b":
        return Program.of(SHAPE, mask=as_mask(tree))
    return Program.of(SHAPE, score_mod=as_score(tree))


def root_of(program: Program):
    return program.mask if program.score is None else program.score


def points(dtype, seed: int = 0, n: int = 64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = dict(zip("bhij", SHAPE, strict=True))
    s = np.concatenate([rng.normal(size=n - 4) * 4, [0.0, -0.0, np.inf, np.nan]]).astype(dtype)
    return {"s": s, **{v: rng.integers(0, m, n).astype(np.int32) for v, m in sizes.items()}}


@given(st.sampled_from("bif").flatmap(lambda t: st.tuples(st.just(t), trees(t, scores=t != "b"))))
@example(("i", Tree("floordiv_i", (Tree("i"), Tree("sub_i", (Tree("j"), Tree("j")))))))
@example(("i", Tree("mod_i", (Tree("neg_i", (Tree("i"),)), Tree(7)))))
@example(("i", Tree("mul_i", (Tree("mul_i", (Tree("i"), Tree(100_000_000))), Tree("j")))))
def test_value_is_numpys(case):
    result, tree = case
    program, at = program_of(tree, result), points(np.float64)
    with np.errstate(all="ignore"):
        want = np.asarray(tree.run(at)).astype(bool if result == "b" else np.float64)
    place = {v: at[v] for v in "bhij"}
    got = program.visible(**place) if result == "b" else program.evaluate(**at)
    np.testing.assert_array_equal(got, np.broadcast_to(want, 64))


@given(
    st.sampled_from("bif").flatmap(lambda t: st.tuples(st.just(t), trees(t, scores=t != "b", approximate=True))),
    st.sampled_from([np.float32, np.float64]),
    st.integers(0, 100),
)
def test_interval_holds_every_value(case, dtype, seed):
    result, tree = case
    root = root_of(program_of(tree, result))
    if root is None:
        return
    rng = np.random.default_rng(seed)
    ends = {v: np.sort(rng.integers(0, n, (5, 2)), 1) for v, n in zip("bhij", SHAPE, strict=True)}
    boxes = {v: Interval(e[:, 0], e[:, 1]) for v, e in ends.items()}
    program = program_of(tree, result)
    lo, hi, nan = Bounds(boxes, program.capture, dtype).run([root])[0]
    at = {v: rng.integers(e[:, 0], e[:, 1] + 1, (200, 5)) for v, e in ends.items()}
    values = program.run([root], points(dtype, seed, 200)["s"][:, None], **at, dtype=dtype)[0]
    inside = (values >= lo) & (values <= hi) | np.isnan(np.where(nan, np.asarray(values, float), 0.0))
    assert inside.all()


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("real", [np.float32, np.float64])
@given(case=st.sampled_from("bif").flatmap(lambda t: st.tuples(st.just(t), trees(t, scores=t != "b"))))
@example(case=("i", Tree("floordiv_i", (Tree("i"), Tree("sub_i", (Tree("j"), Tree(3)))))))
@example(case=("i", Tree("mod_i", (Tree("sub_i", (Tree(5), Tree("i"))), Tree("sub_i", (Tree("i"), Tree(20)))))))
@example(case=("i", Tree("floordiv_i", (Tree("sub_i", (Tree(5), Tree("i"))), Tree(-7)))))
@example(case=("i", Tree("mod_i", (Tree("sub_i", (Tree(5), Tree("i"))), Tree(8)))))
@example(case=("f", Tree("maximum_f", (Tree(0.5), Tree("s")))))
@example(case=("f", Tree("floordiv_f", (Tree("s"), Tree(0.5)))))
def test_machine_code_gives_the_numpy_value(name, real, case):
    """Bit for bit: these kinds are exactly rounded."""
    result, tree = case
    program, s = program_of(tree, result), points(real)["s"]
    root = root_of(program)
    if root is None:
        return
    got = jitted.compiled(program, root, isa.known()[name], real)(s, 0, 1, 2, 3)
    want = program.run([root], s, 1, 2, np.arange(64, dtype=np.int32), 3, real)[0]
    np.testing.assert_array_equal(got, np.broadcast_to(want, 64).astype(got.dtype))


FUNCTIONS = {
    "exp": (np.exp, np.linspace(-86, 88, 4000)),
    "exp2": (np.exp2, np.linspace(-125, 127, 4000)),
    "log": (np.log, np.geomspace(1e-37, 1e38, 4000)),
    "log near 1": (np.log, 1 + np.geomspace(-1e-2, -1e-6, 500)),
    "log2": (np.log2, np.geomspace(1e-37, 1e38, 4000)),
    "tanh": (np.tanh, np.linspace(-25, 25, 4000)),
    "tanh near 0": (np.tanh, np.geomspace(1e-30, 0.5, 500)),
    "sqrt": (np.sqrt, np.geomspace(1e-37, 1e38, 4000)),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), np.linspace(-80, 80, 4000)),
}
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, -1.0, 1.0, 1e-42]


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_functions_in_machine_code(name, real, function):
    """Within 8 ulp of NumPy in longdouble, and the same at 0, inf, NaN and below the domain."""
    numpy_form, s = FUNCTIONS[function][0], FUNCTIONS[function][1].astype(real)
    kind = function.split()[0]
    program = Program.of(SHAPE, score_mod=lambda s, b, h, i, j: getattr(s, kind)())

    run = jitted.compiled(program, program.score, isa.known()[name], real)

    def machine(x):
        return run(np.resize(x, -(-len(x) // 16) * 16), 0, 0, 0, 0)[: len(x)]

    with np.errstate(all="ignore"):
        want = numpy_form(s.astype(np.longdouble))
        error = np.abs(machine(s) - want) / np.spacing(np.abs(want).astype(real))
        assert error.max() <= 8
        special = np.array(SPECIAL, real)
        exact = numpy_form(special.astype(np.longdouble)).astype(real)
    np.testing.assert_allclose(machine(special), exact, rtol=1e-6, atol=float(np.finfo(real).tiny))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_float_to_int_saturates(name, real):
    program = Program.of(SHAPE, score_mod=lambda s, b, h, i, j: s.astype(np.int32))
    s = np.array([0.9, -0.9, 1.5, -1.5, 2.0**31, -(2.0**31), 3e9, -3e9, np.inf, -np.inf, np.nan, 0, 7, 8, 9, 10], real)
    want = [0, 0, 1, -1, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 0, 0, 7, 8, 9, 10]
    (integer,) = program.score.args
    assert jitted.compiled(program, integer, isa.known()[name], real)(s, 0, 0, 0, 0).tolist() == want
    assert program.run([integer], s, 0, 0, 0, 0)[0].tolist() == want


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("divisor", [-1, 0, 1, 3, -3, 8])
@pytest.mark.parametrize("scalar", [False, True])
def test_division_of_extremes_never_traps(name, divisor, scalar):
    """INT_MIN // -1 and division by 0: vectors and scalars, by a literal and by a number known at run time."""
    low = np.full(64, -(2**31), np.int32)

    def quotients(s, b, h, i, j):
        dividend = low[j if scalar else i]
        return (dividend // (j * 0 + divisor)) * 0.5 + dividend % (j * 0 + divisor) + (dividend // divisor) * 0.25

    program = Program.of(SHAPE, score_mod=quotients)
    s = np.zeros(16, np.float32)
    got = jitted.compiled(program, program.score, isa.known()[name], np.float32)(s, 0, 1, 2, 5)
    quotient = {0: 0, -1: -(2**31)}.get(divisor, -(2**31) // (divisor or 1))  # by 0: 0; by -1: wraps
    rest = 0 if divisor == 0 else -(2**31) % divisor
    assert (
        got.tolist() == [np.float32(np.float32(quotient * 0.5) + np.float32(rest)) + np.float32(quotient * 0.25)] * 16
    )


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("element", ["bool", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "f2", "f4", "f8", "bfloat16"])
@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_loads_of_every_element_type(name, element, real):
    """With scalar and vector indices, strided, reversed and clamped."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    stored = ml_dtypes.bfloat16 if element == "bfloat16" else np.dtype(element)
    rng = np.random.default_rng(1)
    table = (rng.integers(0, 100, (40, 9)) - (0 if element in ("bool", "u1", "u2", "u4") else 50)).astype(stored)
    reachable = lambda b, h, i, j: (j >= 2) & (j < 7)  # noqa: E731  # elsewhere the first index is out of bounds
    for array in (table, table[::-1, ::2], np.broadcast_to(table[:1], table.shape)):
        program = Program.of(SHAPE, score_mod=functools.partial(_two_loads, array), mask=reachable)
        run = jitted.compiled(program, program.score, isa.known()[name], real)
        for j in (0, 3, 20):
            got = run(np.zeros(32, real), 4, 1, 2, j)
            column = min(max(j - 2, 0), array.shape[1] - 1)
            want = array[4:36, column].astype(real) + array[j, 1].astype(real)
            np.testing.assert_array_equal(got, want)


def _two_loads(array, s, b, h, i, j):
    return array[i, j - 2] * 1.0 + array[j, 1]


def test_what_does_not_depend_on_the_rows_is_emitted_outside_their_loop():
    slopes, ids = np.ones(3), np.zeros(40, np.int64)
    program = Program.of(SHAPE, alibi_slopes=slopes, mask=lambda b, h, i, j: ids[i] == ids[j])
    text = jitted.module_text(program, program.score, isa.known()["generic"], "float")
    before, body = text.split("body", 1)[0], text.rsplit("body", 1)[1]
    assert before.count("load double") == 1  # the slope, f64
    assert "load double" not in body
