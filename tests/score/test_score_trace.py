"""Functions as people write them: captured in every way that Python has, for torch's flex_attention and for NumPy."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from flashtile.errors import SpecError
from flashtile.score import Program, causal, softcap, varlen, window

SHAPE = (2, 3, 12, 12)
b, h, i, j = np.ix_(*(np.arange(n) for n in SHAPE))
s = np.random.default_rng(0).normal(size=SHAPE)

GLOBAL_TABLE = np.arange(12) // 5
GLOBAL_WIDTH = 4
PAIRS, WORD, LAST = np.ones((3, 12)), "causal", -1


def mask_of(function) -> np.ndarray:
    return np.broadcast_to(Program.of(SHAPE, mask=function).visible(b, h, i, j), SHAPE)


def score_of(function) -> np.ndarray:
    return Program.of(SHAPE, score_mod=function).evaluate(s, b, h, i, j)


def same(got, want) -> None:
    np.testing.assert_allclose(got, np.broadcast_to(want, SHAPE), rtol=1e-12)


# -- where captured values may stand -----------------------------------------------------------------


def uses_globals(b, h, q, kv):
    return (GLOBAL_TABLE[q] == GLOBAL_TABLE[kv]) & (q - kv < GLOBAL_WIDTH)


def calls_a_helper(b, h, q, kv):
    return uses_globals(b, h, q, kv) | (kv == 0)


def has_default(b, h, q, kv, table=GLOBAL_TABLE, *, width=GLOBAL_WIDTH):
    return (table[q] == table[kv]) & (q - kv < width)


class Rule:
    def __init__(self):
        self.table, self.width = GLOBAL_TABLE, 4

    def same(self, q, kv):
        return self.table[q] == self.table[kv]

    def mask(self, b, h, q, kv):
        return self.same(q, kv) & (q - kv < self.width)

    __call__ = mask


@dataclasses.dataclass
class Settings:
    width: int = 4


def in_a_closure():
    table, settings, other = np.array(GLOBAL_TABLE), Settings(), {"width": (4,)}

    def mask(b, h, q, kv):
        width = settings.width if other["width"][0] == settings.width else 0
        return (table[q] == table[kv]) & (q - kv < width)

    return mask


def in_nested_functions():
    inner = in_a_closure()
    return lambda *args: (lambda: inner(*args))()


WANT = (GLOBAL_TABLE[i] == GLOBAL_TABLE[j]) & (i - j < 4)


@pytest.mark.parametrize(
    "function",
    [
        uses_globals,
        has_default,
        Rule().mask,
        Rule(),
        in_a_closure(),
        in_nested_functions(),
        functools.partial(
            lambda table, b, h, q, kv, width: (table[q] == table[kv]) & (q - kv < width), GLOBAL_TABLE, width=4
        ),
        functools.partial(Rule().mask),
        SimpleNamespace(rule=Rule()).rule.mask,
    ],
)
def test_captured_everywhere(function):
    same(mask_of(function), WANT)


def test_helpers_are_traced_too():
    same(mask_of(calls_a_helper), WANT | (j == 0))


def test_the_callers_objects_are_untouched():
    rule = Rule()
    before = rule.table.copy()
    mask_of(rule.mask)
    assert type(rule.table) is np.ndarray and (rule.table == before).all() and type(GLOBAL_WIDTH) is int
    assert (rule.mask(0, 0, np.arange(3), 0) == [True, True, True]).all()


def test_a_recursive_function():
    def powers(x, n):
        return x if n == 0 else powers(x, n - 1) * 2.0

    same(score_of(lambda s, b, h, q, kv: powers(s, 3)), s * 8)


def test_indexing_styles():
    table = np.arange(2 * 3 * 12 * 12).reshape(SHAPE) * 1.0
    want = table + s
    same(score_of(lambda s, b, h, q, kv: s + table[b, h, q, kv]), want)
    same(score_of(lambda s, b, h, q, kv: s + table[b][h][q][kv]), want)
    same(score_of(lambda s, b, h, q, kv: s + table[b, :, q][h, kv]), want)
    same(score_of(lambda s, b, h, q, kv: s + table[..., kv][b, h][q]), want)
    same(score_of(lambda s, b, h, q, kv: s + table[1, -1, q, kv]), s + table[1, -1, i[0, 0], j[0, 0]])
    same(score_of(lambda s, b, h, q, kv: s + table[0, 1, 2, 3] + GLOBAL_TABLE[-1]), s + table[0, 1, 2, 3] + 2)
    for at in (np.int64(-1), np.int8(-1), LAST):
        same(score_of(lambda s, b, h, q, kv, at=at: s + table[b, at, q, kv]), s + table[b, -1, i, j])
    same(score_of(lambda s, b, h, q, kv: s + table[b, np.int64(-1), q, kv]), s + table[b, -1, i, j])
    same(score_of(lambda s, b, h, q, kv: s + table[1][2][q, kv]), s + table[1, 2, i[0, 0], j[0, 0]])
    same(score_of(lambda s, b, h, q, kv: s + (table * 2).max(0)[h, q, kv]), s + (table * 2).max(0)[h, i, j])
    same(score_of(lambda s, b, h, q, kv: s + table.shape[1] * len(table)), s + 6)


def test_numbers_stay_numbers():
    """Loops, math and comparisons of captured numbers run while tracing."""
    steps, size = 3, 2.0

    def score(s, b, h, q, kv):
        for n in range(steps):
            s = s + n / math.sqrt(size) if n < steps - 1 else s * max(size, 1)
        return s + [1, 2, 3, 4][steps] + isinstance(steps, int)

    same(score_of(score), (s + 1 / math.sqrt(2)) * 2 + 5)


@pytest.mark.parametrize(
    "function, want",
    [
        (lambda s, b, h, q, kv: s + (kv - q) * np.exp2(-((h + 1) * 8.0 / 3)), s + (j - i) * 2.0 ** -((h + 1) * 8 / 3)),
        (lambda s, b, h, q, kv: 30 * np.tanh(s / 30), 30 * np.tanh(s / 30)),
        (lambda s, b, h, q, kv: np.where(q >= kv, s, -np.inf), np.where(i >= j, s, -np.inf)),
        (lambda s, b, h, q, kv: np.where(q < kv, -float("inf"), s), np.where(i >= j, s, -np.inf)),
        (lambda s, b, h, q, kv: s**2 + 2**s + abs(s) ** 0.5 + s**-1, s**2 + 2**s + abs(s) ** 0.5 + 1 / s),
        (lambda s, b, h, q, kv: s + np.clip(kv - q, -3, 2) // 2 + (q % 5) * -1, s + np.clip(j - i, -3, 2) // 2 - i % 5),
        (
            lambda s, b, h, q, kv: np.float32(2) * s - np.int64(1) + np.maximum(q, 3) / 2,
            2 * s - 1 + np.maximum(i, 3) / 2,
        ),
        (lambda s, b, h, q, kv: s + np.log(np.abs(q - kv) + 1.0) * np.sign(s), s + np.log(abs(i - j) + 1) * np.sign(s)),
        (lambda s, b, h, q, kv: s + np.ceil(s) + np.trunc(s) + np.square(s), s + np.ceil(s) + np.trunc(s) + s * s),
        (
            lambda s, b, h, q, kv: s + ((q ^ kv) & 3 | 8) + (q << 1) + (kv >> 1) + ~q,
            s + ((i ^ j) & 3 | 8) + (i << 1) + (j >> 1) + ~i,
        ),
        (lambda s, b, h, q, kv: s + (q > kv), s + (i > j)),
        (lambda s, b, h, q, kv: s + 1 if GLOBAL_WIDTH == 4 else s, s + 1),
        (lambda s, b, h, q, kv: q - kv, (i - j) * 1.0),
        (lambda s, b, h, q, kv: 3, 3.0),
        (lambda s, b, h, q, kv: np.full_like(s, 2.0) * s, 2 * s),
        (lambda s, b, h, q, kv: s.astype(np.int32), np.trunc(s)),
    ],
)
def test_numpy_score_functions(function, want):
    same(score_of(function), want)


@pytest.mark.parametrize(
    "function, want",
    [
        (lambda b, h, q, kv: q >= kv, i >= j),
        (lambda b, h, q, kv: (q >= kv) & (q - kv <= 3), (i >= j) & (i - j <= 3)),
        (lambda b, h, q, kv: ~(q == kv), i != j),
        (lambda b, h, q, kv: True, True),
        (lambda b, h, q, kv: np.logical_or(q == kv, np.logical_not(h == 1)), (i == j) | (h != 1)),
        (lambda b, h, q, kv: np.where(h == 0, q >= kv, kv < 5), np.where(h == 0, i >= j, j < 5)),
        (lambda b, h, q, kv: (q // 4 == kv // 4) ^ (kv % 2 == 0), (i // 4 == j // 4) ^ (j % 2 == 0)),
        (lambda b, h, q, kv: (q <= 3) | (kv > 5), (i <= 3) | (j > 5)),
        (lambda b, h, q, kv: divmod(q - kv, 3)[0] == divmod(kv, -5)[1], (i - j) // 3 == j % -5),
        (lambda b, h, q, kv: GLOBAL_TABLE.astype(bool)[kv], j >= 5),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Python's True")
def test_numpy_mask_functions(function, want):
    same(mask_of(function), want)


# -- one structure, many values ----------------------------------------------------------------------


def windowed(width, table, slope):
    return Program.of(
        SHAPE,
        mask=lambda b, h, q, kv: (q - kv < width) & (table[q] == table[kv]),
        score_mod=lambda s, b, h, q, kv: s + slope * (q - kv) + width // 2,
    )


def test_other_values_have_the_same_structure():
    one = windowed(4, np.zeros(12, np.int64), 0.5)
    for other in (windowed(7, np.ones(12, np.int64), 0.25), windowed(8, np.ones(13, np.int64), 8.0)):
        assert other.structure == one.structure and other.score is one.score and other.mask is one.mask
    assert windowed(4, np.zeros(12, np.int32), 0.5).structure != one.structure
    assert windowed(4, np.zeros((12, 1), np.int64)[:, 0], 0.5).structure == one.structure
    assert windowed(4, np.zeros(12, np.int64), 1).structure != one.structure  # an int slope is another type


def test_structure_is_the_same_in_every_process():
    import subprocess
    import sys

    code = (
        "from flashtile.score import *; import numpy as np; "
        "print(Program.of((1, 2, 9, 9), causal=True, softcap=5.0, alibi_slopes=np.ones(2)).structure)"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab"
    }
    want = Program.of((1, 2, 9, 9), causal=True, softcap=7.0, alibi_slopes=np.zeros(2)).structure
    assert found == {want + "\n"}


def test_values_that_decide_are_part_of_the_program():
    def program(width):
        return Program.of(SHAPE, mask=lambda b, h, q, kv: q - kv < width if width > 0 else q >= kv)

    assert program(3).structure == program(4).structure != program(-1).structure


# -- what is refused ---------------------------------------------------------------------------------


def test_composing_with_a_rule_that_is_not_called():
    with pytest.raises(SpecError, match=r"^mask: got score.window itself, .*score.window\(left, right\)"):
        causal() & window


class Whole:
    table = np.arange(12) > 3

    def rule(self, b, h, i, j):
        return self.table

    __call__ = rule


@pytest.mark.parametrize("constant", [True, False])
def test_a_constant_of_python_from_a_mask_warns_and_names_the_line(constant):
    masks = {True: lambda b, h, i, j: i is not j, False: lambda b, h, i, j: i is j}
    with pytest.warns(UserWarning, match=f"mask: the function returned Python's {constant}") as found:
        same(mask_of(masks[constant]), constant)
    assert found[0].filename == __file__ and found[0].lineno == masks[constant].__code__.co_firstlineno


def test_constants_that_were_chosen_do_not_warn(recwarn):
    same(mask_of(lambda b, h, q, kv: np.full_like(q, True, dtype=bool)), True)
    same(np.broadcast_to(Program.of(SHAPE, mask=window(None, None)).visible(b, h, i, j), SHAPE), True)
    same(score_of(lambda s, b, h, q, kv: 3), 3.0)
    assert not recwarn.list


def test_rows_of_an_array_are_not_computed_with():
    """NumPy would compute with what the index leaves; the stand-in holds the whole array."""
    table = np.arange(3 * 12.0).reshape(3, 12)
    same(score_of(lambda s, b, h, q, kv: s + (table + 1).sum(0)[q]), s + (table + 1).sum(0)[i])
    same(score_of(lambda s, b, h, q, kv: s + sum(row for row in table[:, q])), s + table.sum(0)[i])
    assert score_of(lambda s, b, h, q, kv: s + table[h].ndim + (table[h].dtype == np.float64)).shape == SHAPE


def branch(s, b, h, q, kv):
    if q > kv:
        return s
    return -s


@pytest.mark.parametrize(
    "function, words",
    [
        (branch, ["bool()", "if", "where", "if q > kv:"]),
        (lambda s, b, h, q, kv: s * math.exp(s), ["float()", "math", "numpy"]),
        (lambda s, b, h, q, kv: s if q > kv and h == 0 else 0.0, ["bool()", "&"]),
        (lambda s, b, h, q, kv: s + min(q, kv), ["min", "minimum"]),
        (lambda s, b, h, q, kv: s + [1, 2, 3][h], ["index", "NumPy array"]),
        (lambda s, b, h, q, kv: s + sum(range(q)), ["range"]),
        (lambda s, b, h, q, kv: s + {q: 1}[q], ["hash"]),
        (lambda s, b, h, q, kv: np.sin(s), ["numpy.sin"]),
        (lambda s, b, h, q, kv: s.cumsum(), [".cumsum"]),
        (lambda s, b, h, q, kv: np.add.reduce(s), ["reduce"]),
        (lambda s, b, h, q, kv: s + GLOBAL_TABLE, ["whole array of shape (12,)", "index it"]),
        (lambda s, b, h, q, kv: s + GLOBAL_TABLE[s], ["indexing with a float"]),
        (lambda s, b, h, q, kv: s & 1, ["float"]),
        (lambda s, b, h, q, kv: np.where(q, s, 0), ["where", "int"]),
        (lambda s, b, h, q, kv: s[0], ["indexing"]),
        (lambda s, b, h, q, kv: int(s), ["int()"]),
        (lambda s, b, h, q, kv: round(s), ["round()", "floor"]),
        (lambda s, b, h, q, kv: s**q, ["**"]),
        (lambda s, b, h, q, kv: s.astype(np.int8), ["int8"]),
        (lambda s, b, h, q, kv: np.zeros(3) + s, ["combination"]),
        (lambda s, b, h, q, kv: s + PAIRS[h].sum(0)[q], [".sum", "indexed in part", "index all axes"]),
        (lambda s, b, h, q, kv: s + (PAIRS[h] + 1).sum(0)[q], ["add", "indexed in part"]),
        (lambda s, b, h, q, kv: s + np.sum(PAIRS[:, q], axis=0), ["sum", "indexed in part"]),
        (lambda s, b, h, q, kv: s + np.asarray(PAIRS[h])[q], ["conversion", "indexed in part"]),
        (lambda s, b, h, q, kv: s + PAIRS[True, q], ["[bool]", "an index is an integer"]),
        (lambda s, b, h, q, kv: s + PAIRS.__setitem__((0, 0), 1.0), ["assignment", "where"]),
        (lambda s, b, h, q, kv: s + WORD, ["combination with str", "operands are numbers"]),
        (lambda s, b, h, q, kv: np.where(q == WORD, s, 0), ["combination with str"]),
        (lambda s, b, h, q, kv: s * None, ["combination with NoneType"]),
        (lambda s, b, h, q, kv: s + [1, 2], ["combination with list"]),
        (lambda s, b, h, q, kv: np.where(q < kv), ["numpy.where", "missing 2 required"]),
    ],
)
def test_operations_outside_the_language_say_where_and_what_instead(function, words):
    with pytest.raises(SpecError) as raised:
        score_of(function)
    message = str(raised.value)
    assert f"{__file__}:" in message and all(w in message for w in words), message
    line = int(message.split(f"{__file__}:")[1].split(":")[0])
    assert abs(line - function.__code__.co_firstlineno) <= 1


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(mask=lambda b, h, i: True), ["mask", "4 arguments"]),
        (dict(score_mod=lambda s, i, j: s), ["score_mod", "5 arguments"]),
        (dict(mask=lambda b, h, i, j: i * 1.0), ["mask", "float", "score_mod"]),
        (dict(mask=lambda b, h, i, j: i & 1), ["integer"]),
        (dict(score_mod=lambda s, b, h, i, j: i > j), ["score_mod", "bool"]),
        (dict(mask=lambda b, h, i, j: None), ["NoneType", f"{__file__}:"]),
        (
            dict(mask=lambda b, h, i, j: GLOBAL_TABLE),
            ["whole captured array", "GLOBAL_TABLE", f"{__file__}:", "index it"],
        ),
        (dict(mask=functools.partial(lambda t, *a: t[a[2] :], GLOBAL_TABLE)), ["index", f"{__file__}:"]),
        (dict(mask=lambda b, h, i, j: np.ones(12) > 0), ["an array of shape (12,)", f"{__file__}:", "index it"]),
        (dict(mask=lambda b, h, i, j: causal()), ["<mask causal>", f"{__file__}:", "composed outside"]),
        (dict(mask=lambda b, h, i, j: (i, j)), ["a tuple", f"{__file__}:"]),
        (dict(score_mod=lambda s, b, h, i, j: "s"), ["a str", f"{__file__}:"]),
        (dict(mask=Whole().rule), ["a whole captured array", f"{__file__}:"]),
        (dict(mask=Whole()), ["a whole captured array", f"{__file__}:"]),
        (dict(mask=causal), ["mask: got score.causal itself, expected what it returns: score.causal()"]),
        (dict(mask=window), ["mask: got score.window itself, expected what it returns: score.window(left, right)"]),
        (dict(mask=varlen), ["score.varlen itself", "score.varlen(cu_seqlens_q, cu_seqlens_k)"]),
        (dict(score_mod=softcap), ["score_mod: got score.softcap itself, expected", "score.softcap(cap)"]),
        (dict(mask=lambda b, h, i, j: GLOBAL_TABLE[20] < j), ["GLOBAL_TABLE: got index 20 in `", f"{__file__}:"]),
        (dict(mask=3), ["mask: got 3,"]),
        (dict(score_mod="x"), ["score_mod: got 'x',"]),
        (dict(score_mod=causal()), ["score_mod", "the mask causal"]),
        (dict(mask=softcap(3.0)), ["mask", "the score function softcap"]),
        (dict(alibi_slopes=[1.0] * 3), ["alibi_slopes", "list"]),
        (dict(bias=[[0.0]]), ["bias", "list"]),
        (dict(mask=lambda *a: GLOBAL_TABLE), ["array"]),
        (dict(mask=np.zeros((12, 12))), ["mask", "float64", "bias"]),
        (dict(mask=np.ones((5, 12), bool)), ["mask", "(5, 12)"]),
        (dict(bias=np.zeros((3, 12, 11))), ["bias", "(3, 12, 11)"]),
        (dict(bias=np.zeros((12, 12), bool)), ["bias", "bool"]),
        (dict(bias=np.zeros((1, 1, 1, 12, 12))), ["bias"]),
        (dict(alibi_slopes=np.ones(4)), ["alibi_slopes", "(4,)", "(3,)"]),
        (dict(alibi_slopes=np.ones(3, int)), ["alibi_slopes", "int64"]),
        (dict(softcap=-1.0), ["softcap", "-1.0"]),
        (dict(softcap=math.nan), ["softcap"]),
        (dict(window=(-2, 0)), ["window", "-2"]),
        (dict(window=(1.5, 0)), ["window", "1.5"]),
        (dict(causal=True, offset=np.zeros(3, int)), ["align", "(3,)"]),
        (dict(causal=True, offset=np.zeros(2)), ["align"]),
    ],
)
def test_wrong_arguments_have_one_clear_error(options, words):
    with pytest.raises(SpecError) as raised:
        Program.of(SHAPE, **options)
    assert all(w in str(raised.value) for w in words), raised.value


@pytest.mark.parametrize(
    "table, words",
    [
        (np.zeros(12, complex), ["complex128"]),
        (np.array(["a"] * 12), ["<U1"]),
        (np.zeros(12, object), ["object"]),
        (np.zeros(12, ">f4"), [">f4"]),
        (np.full(12, 2**40), ["int32", str(2**40)]),
    ],
)
def test_unusable_arrays_are_named(table, words):
    with pytest.raises(SpecError) as raised:
        mask_of(lambda b, h, q, kv: table[q] == table[kv])
    assert all(w in str(raised.value) for w in ["mask: table", *words]), raised.value


def test_numbers_beyond_int32():
    far = 2**31
    with pytest.raises(SpecError, match="int32"):
        mask_of(lambda b, h, q, kv: q < far)
    with pytest.raises(SpecError, match="int32"):
        mask_of(lambda b, h, q, kv: q < 2147483648)
    same(mask_of(lambda b, h, q, kv: q < far - 1), True)
