"""The built-in rules against their formulas, the order they apply in, derivatives at the edges, bounds of loads."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flashtile.errors import SpecError
from flashtile.score import Program, alibi, bias, causal, dense, document, padding, prefix, relative, softcap, window
from flashtile.score.expr import postorder
from flashtile.score.relative import distance_buckets

SHAPE = (2, 3, 10, 14)
b, h, i, j = np.ix_(*(np.arange(n) for n in SHAPE))
RNG = np.random.default_rng(0)
s = RNG.normal(size=SHAPE) * 3
IDS, KEY_IDS = RNG.integers(0, 3, (2, 10)), RNG.integers(0, 3, (2, 14))
LENGTHS, OFFSETS, SLOPES = np.array([5, 14]), np.array([4, -2]), np.array([0.5, 0.25, 0.125], np.float32)
BIAS = RNG.normal(size=(2, 1, 10, 14)).astype(np.float16)

MASKS = {
    "causal": (causal(), j <= i + 4),
    "window": (window(3, 1), (j >= i + 1) & (j <= i + 5)),
    "prefix": (prefix(6), j < 6),
    "left": (window(3, None), j >= i + 1),
    "right": (window(-1, 0), j <= i + 4),
    "open": (window(None, -1), np.True_),
    "prefixes": (prefix(LENGTHS), j < LENGTHS[b]),
    "padding": (padding(LENGTHS), j < LENGTHS[b]),
    "lists": (padding([5, 14]), j < LENGTHS[b]),
    "documents": (document(IDS, KEY_IDS), IDS[b, i] == KEY_IDS[b, j]),
    "one document list": (document(IDS[0], KEY_IDS[1]), IDS[0, i] == KEY_IDS[1, j]),
    "dense": (dense(BIAS > 0), BIAS[b, 0, i, j] > 0),
    "row": (dense(KEY_IDS[:, None, None] > 0), KEY_IDS[b, j] > 0),
    "and": (causal() & prefix(8), (j <= i + 4) & (j < 8)),
    "or": (causal() | prefix(8), (j <= i + 4) | (j < 8)),
    "not": (~causal() & ~padding(LENGTHS), (j > i + 4) & (j >= LENGTHS[b])),
    "with a function": (causal() & (lambda b, h, i, j: h != 1), (j <= i + 4) & (h != 1)),
    "with an array": (prefix(8) & (BIAS[0, 0] > 0), (j < 8) & (BIAS[0, 0, i, j] > 0)),
    "array first": ((BIAS[0, 0] > 0) & prefix(8), (j < 8) & (BIAS[0, 0, i, j] > 0)),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mask, want = MASKS[name]
    got = Program.of(SHAPE, mask=mask, offset=4).visible(b, h, i, j)
    np.testing.assert_array_equal(np.broadcast_to(got, SHAPE), np.broadcast_to(want, SHAPE))


def test_offsets_of_each_batch_anchor_every_positional_rule():
    program = Program.of(SHAPE, causal=True, window=(3, 1), alibi_slopes=SLOPES, offset=OFFSETS)
    ahead = j - (i + OFFSETS[b])
    want = np.where((ahead <= 0) & (ahead >= -3), s - SLOPES[h] * abs(ahead), -np.inf)
    np.testing.assert_allclose(program.evaluate(s, b, h, i, j), want)


def t5_bucket(distance: int, buckets: int, furthest: int) -> int:
    """mesh_tensorflow's formula for one direction, in Python numbers."""
    exact = buckets // 2
    if distance < exact:
        return distance
    far = exact + int(
        np.float32(math.log(distance / exact)) / np.float32(math.log(furthest / exact)) * (buckets - exact)
    )
    return min(far, buckets - 1)


def test_relative_position_buckets():
    assert distance_buckets(16, 128).tolist() == [t5_bucket(d, 16, 128) for d in range(129)]
    table = RNG.normal(size=(8, 3))
    ahead = np.broadcast_to(j - i - 4, SHAPE)
    bucket = np.vectorize(lambda d: t5_bucket(abs(d), 4, 20) + 4 * (d > 0))(ahead)
    got = Program.of(SHAPE, score_mod=relative(table, max_distance=20), offset=4).evaluate(s, b, h, i, j)
    np.testing.assert_allclose(got, s + table[bucket, np.broadcast_to(h, SHAPE)])
    bucket = np.vectorize(lambda d: t5_bucket(max(-d, 0), 8, 20))(ahead)
    got = Program.of(SHAPE, score_mod=relative(table, max_distance=20, bidirectional=False), offset=4)
    np.testing.assert_allclose(got.evaluate(s, b, h, i, j), s + table[bucket, np.broadcast_to(h, SHAPE)])


def test_the_order_is_softcap_score_mod_alibi_bias_mask():
    program = Program.of(
        SHAPE,
        softcap=2.0,
        score_mod=lambda s, b, h, i, j: s * s,
        alibi_slopes=SLOPES,
        bias=BIAS,
        mask=prefix(6),
        causal=True,
        window=(5, 0),
    )
    want = (2 * np.tanh(s / 2)) ** 2 - SLOPES[h].astype(float) * abs(i - j) + BIAS[b, 0, i, j]
    want = np.where((j < 6) & (j <= i) & (j >= i - 5), want, -np.inf)
    np.testing.assert_allclose(program.evaluate(s, b, h, i, j), want, rtol=1e-12)


@pytest.mark.parametrize(
    "shape", [(), (14,), (10, 1), (1, 1, 1), (3, 1, 14), (2, 1, 1, 14), (1, 3, 10, 14), (2, 3, 10, 14)]
)
@pytest.mark.parametrize("layout", ["contiguous", "reversed", "stride 0"])
def test_bias_broadcasting(shape, layout):
    array = RNG.normal(size=shape).astype(np.float32)
    array = array[..., ::-1] if layout == "reversed" and shape else array
    array = np.broadcast_to(array.ravel()[0], shape) if layout == "stride 0" else array
    for program, base in ((Program.of(SHAPE, bias=array), s), (Program.of(SHAPE, score_mod=bias(array)), s)):
        np.testing.assert_array_equal(program.evaluate(base, b, h, i, j), base + array.astype(float))
        assert program.captures[0].array.ctypes.data == array.ctypes.data


@pytest.mark.filterwarnings("ignore:.*Python's True")
def test_nothing_to_do_is_no_program():
    for options in (
        {},
        {"softcap": None},
        {"softcap": 0},
        {"softcap": 0.0},
        {"mask": lambda *a: True},
        {"score_mod": lambda s, *a: s},
    ):
        assert Program.of(SHAPE, **options).is_identity
    assert Program.of(SHAPE).structure == ""
    assert np.array_equal(Program.of(SHAPE).evaluate(s, b, h, i, j), s)


def test_variables_and_dense_loads():
    program = Program.of(SHAPE, bias=BIAS, alibi_slopes=SLOPES, mask=padding(LENGTHS))
    assert program.variables == {"s", "b", "h", "i", "j"}
    (load,) = program.dense_loads
    assert program.capture(load.data.source).array is BIAS


# -- derivatives -------------------------------------------------------------------------------------


def slope(score_mod, at) -> np.ndarray:
    program = Program.of((1, 1, 1, 1), score_mod=score_mod)
    return program.run([program.score_derivative], np.asarray(at, float), 0, 0, 0, 0)[0]


@pytest.mark.parametrize(
    "score_mod, at, want",
    [
        (lambda s, b, h, i, j: np.where(s > 0, np.log(s), 0.0), [0.0, -1.0, 2.0], [0.0, 0.0, 0.5]),
        (lambda s, b, h, i, j: np.where(s > 0, np.sqrt(s), s), [0.0, -4.0, 4.0], [1.0, 1.0, 0.25]),
        (lambda s, b, h, i, j: np.sqrt(np.where(s > 0, s, 0.0)), [-1.0, 0.0, 4.0], [0.0, 0.0, 0.25]),
        (lambda s, b, h, i, j: np.where(s > 0, 1 / s, 5.0) * np.where(s > 0, s, 0.0) * 3, [0.0, 2.0], [0.0, 0.0]),
        (lambda s, b, h, i, j: np.abs(s), [-2.0, 0.0, 3.0], [-1.0, 0.0, 1.0]),
        (
            lambda s, b, h, i, j: np.minimum(s, 1.0) + np.maximum(s, -1.0),
            [-2.0, 0.0, 1.0, 2.0],
            [1.0, 2.0, 2.0, 1.0],
        ),  # a tie is the first operand's
        (lambda s, b, h, i, j: np.floor(s) + s // 2 + s % 2 + s.astype(np.int32), [0.3, -2.6], [1.0, 1.0]),
        (lambda s, b, h, i, j: np.where(i > 100, np.exp(1e6 * s), 2 * s), [5.0], [2.0]),
    ],
)
def test_a_derivative_selects(score_mod, at, want):
    np.testing.assert_allclose(np.broadcast_to(slope(score_mod, at), len(at)), want)


SMOOTH = {
    "tanh": lambda s: 3 * np.tanh(s / 3),
    "exp": lambda s: np.exp(s) * s,
    "exp2": lambda s: np.exp2(-s) + 1 / (s * s + 2),
    "log": lambda s: np.log(s * s + 1) / np.sqrt(s * s + 0.5),
    "log2": lambda s: np.log2(s * s + 1) - s / 3,
    "power": lambda s: s**3 - 2.0**s,
    "mod": lambda s: (s + 100) % 7 - (-s),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_are_the_limit_of_differences(name):
    at, step = np.array([-1.7, -0.4, 0.3, 2.9]), 1e-5
    f = SMOOTH[name]
    differences = (f(at + step) - f(at - step)) / (2 * step)
    np.testing.assert_allclose(slope(lambda s, b, h, i, j: f(s), at), differences, rtol=1e-6)


def test_gradients_of_arrays_stop_at_their_bounds():
    table = np.ones(4)
    program = Program.of(
        (1, 1, 6, 6),
        score_mod=lambda s, b, h, i, j: s * np.where(j < 4, table[j], table[i - j]),
        mask=lambda b, h, i, j: i >= j,
    )
    at = np.ix_(*(np.arange(n) for n in (1, 1, 6, 6)))
    one, other = program.array_gradients
    (inner,) = program.run([other.value], 2.0, *at)
    index = at[2] - at[3]
    np.testing.assert_array_equal(
        np.broadcast_to(inner, (1, 1, 6, 6)), np.where((at[3] >= 4) & (index >= 0) & (index < 4), 2.0, 0)
    )
    (first,) = program.run([one.value], 2.0, *at)
    np.testing.assert_array_equal(np.broadcast_to(first, (1, 1, 6, 6)), np.where(at[3] < 4, 2.0, 0.0) + 0 * at[2])


# -- bounds of loads ---------------------------------------------------------------------------------

SHORT = np.arange(9)


@pytest.mark.parametrize(
    "mask",
    [
        lambda b, h, i, j: SHORT[i] == SHORT[j],
        lambda b, h, i, j: (i >= j) & (SHORT[i] == 3),
        lambda b, h, i, j: SHORT[i - j] == 0,
        lambda b, h, i, j: (j < 20) & (SHORT[j] > 2),
    ],
)
def test_arrays_that_are_certain_to_be_left_are_an_error(mask):
    with pytest.raises(
        SpecError, match=r"got index \(-?\d+,\) at b=\d+, h=\d+, i=\d+, j=\d+, expected one within its shape \(9,\)"
    ):
        Program.of(SHAPE, mask=mask)


@pytest.mark.parametrize(
    "options, clamps",
    [
        ({"mask": lambda b, h, i, j: (j < 9) & (SHORT[j] > 2)}, [True]),
        ({"mask": lambda b, h, i, j: SHORT[j % 9] > 2}, [False]),
        ({"mask": lambda b, h, i, j: np.where(j < 9, SHORT[j] > 2, True)}, [True]),
        ({"mask": prefix(LENGTHS)}, [False]),
        ({"score_mod": lambda s, b, h, i, j: s + SHORT[j], "mask": prefix(9)}, [True]),
        ({"bias": BIAS}, [False] * 4),
        ({"mask": lambda b, h, i, j: SHORT[np.minimum(j, 8)] > SHORT[SHORT[i // 2]]}, [False, False, False]),
    ],
)
def test_loads_that_are_guarded_are_clamped_and_proven_ones_are_not(options, clamps):
    program = Program.of(SHAPE, **options)
    roots = [x for x in (program.score, program.mask) if x is not None]
    loads = [x for x in postorder(roots) if x.operation.name == "load"]
    assert [c for x in loads for c in x.data.clamp] == clamps
    program.evaluate(s, b, h, i, j)


def test_a_guarded_load_reads_the_nearest_element():
    program = Program.of(SHAPE, score_mod=lambda s, b, h, i, j: np.where(j < 9, SHORT[j] * 1.0, SHORT[j - 9] * -1.0))
    want = np.where(j < 9, j, -(j - 9.0))
    np.testing.assert_array_equal(program.evaluate(s, b, h, i, j), np.broadcast_to(want, SHAPE))


def test_empty_arrays_for_empty_sequences():
    program = Program.of((2, 3, 10, 0), mask=document(np.zeros((2, 10), int), np.zeros((2, 0), int)))
    assert program.visible(b, h, i, np.zeros((1, 1, 1, 0), int)).shape == (2, 3, 10, 0)


def test_masks_are_not_truth_values():
    with pytest.raises(SpecError, match="&"):
        causal() and prefix(3)


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: document(np.zeros(3)), "float64"),
        (lambda: document(np.zeros((1, 2, 3), int)), "(1, 2, 3)"),
        (lambda: padding(5), "int"),
        (lambda: padding(np.zeros(2)), "float64"),
        (lambda: prefix(1.5), "got 1.5,"),
        (lambda: prefix(True), "got True,"),
        (lambda: alibi(np.ones((1, 1, 3))), "(1, 1, 3)"),
        (lambda: softcap(0.0), "0.0"),
        (lambda: softcap(math.inf), "inf"),
        (lambda: relative(np.zeros(8)), "(8,)"),
        (lambda: relative(np.zeros((8, 3)), max_distance=2), "max_distance"),
        (lambda: relative(np.zeros((8, 3)), max_distance=2**24 + 1), "got 16777217, expected an integer, at most"),
        (lambda: relative(np.zeros((8, 3)), max_distance=np.ones(2)), "got a ndarray, expected an integer"),
        (lambda: relative(np.zeros((8, 3)), max_distance=20.5), "got 20.5, expected an integer"),
        (lambda: relative(np.zeros((8, 3)), bidirectional=np.ones(2)), "bidirectional"),
        (lambda: dense(np.ones((1, 1, 1, 1, 1), bool)), "(1, 1, 1, 1, 1)"),
        (lambda: window(-2, 0), "left -2"),
        (lambda: window(0, True), "right True"),
        (lambda: alibi([0.5, 0.25]), "a list"),
        (lambda: bias([[0.5]]), "a list"),
    ],
)
def test_rules_check_what_they_are_made_of(make, word):
    with pytest.raises(SpecError) as raised:
        make()
    assert word in str(raised.value)


@pytest.mark.parametrize(
    "option",
    [
        {"mask": document(SHORT)},
        {"mask": document(np.zeros(11, int))},
        {"mask": document(np.zeros((1, 10), int))},
        {"mask": document(np.zeros(10, int), np.zeros(8, int))},
        {"mask": causal() | ~padding(np.ones(3, int))},
        {"mask": prefix(np.ones(1, int)) & causal()},
        {"mask": dense(np.ones((2, 9), bool)) & causal()},
        {"score_mod": alibi(np.ones(4))},
        {"score_mod": bias(np.ones((10, 9)))},
        {"score_mod": relative(np.ones((8, 4)))},
    ],
)
def test_rules_check_that_their_arrays_are_of_the_calls_size(option):
    """Also where a longer array would only be read in part."""
    with pytest.raises(SpecError, match=r"^[a-z_ ]+: got shape \([\d, ]+\), expected .*\("):
        Program.of(SHAPE, **option)


def test_lists_and_integers_of_numpy_are_as_good():
    ids = [0] * 6 + [1] * 8
    same = Program.of(SHAPE, mask=document(ids)).visible(b, h, i, j)
    np.testing.assert_array_equal(same, np.broadcast_to(np.equal.outer(ids[:10], ids), SHAPE))
    assert Program.of(SHAPE, mask=window(np.int64(3), np.int8(-1))).structure


def test_rules_are_shown_by_name():
    assert repr(causal() | ~prefix(3)) == "<mask (causal | ~prefix)>"
    assert repr(softcap(30.0)) == "<score function softcap>"
