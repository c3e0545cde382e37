"""Every wrong argument gets one error that names it, what came and what was expected; out is untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from inputs import read_from
from numpy.lib.stride_tricks import as_strided

import flashtile
from flashtile import score
from flashtile.errors import FlashtileError, KernelError, SpecError, UnavailableError
from flashtile.score import builtin
from flashtile.spec import LARGEST_POSITION

pytestmark = pytest.mark.core


def a(*shape: int, name: Any = "float32") -> np.ndarray:
    return np.ones(shape, name)


SHAPE = (2, 4, 5, 8)
NAN, INF = float("nan"), float("inf")
PAIR = r"expected a pair \(left, right\) of integers"
ALIGN = r'expected "top_left", "bottom_right", an integer, or an integer array \(B,\)'

# the arguments that differ from four arrays of SHAPE; the error's text from its start
WRONG: list[tuple[dict[str, Any], str]] = [
    # rank
    ({"q": a(8)}, r"q: got shape \(8,\), expected \(B, H, S_q, D\), \(H, S_q, D\) or \(S_q, D\)"),
    ({"q": a(1, 2, 4, 5, 8)}, r"q: got shape \(1, 2, 4, 5, 8\), expected \(B, H, S_q, D\)"),
    ({"k": a(4, 5, 8)}, r"k: got shape \(4, 5, 8\), expected rank 4 as in q"),
    ({"v": a(5, 8)}, r"v: got shape \(5, 8\), expected rank 4 as in q"),
    # shape
    ({"k": a(3, 4, 5, 8)}, "k: got batch 3, expected 2 as in q"),
    ({"v": a(1, 4, 5, 8)}, "v: got batch 1, expected 2 as in q"),
    ({"k": a(2, 4, 5, 9)}, "k: got head size 9, expected 8 as in q"),
    ({"v": a(2, 2, 5, 8)}, "v: got 2 heads, expected 4 as in k"),
    ({"v": a(2, 4, 6, 8)}, "v: got length 6, expected 5 as in k"),
    ({"k": a(2, 3, 5, 8), "v": a(2, 3, 5, 8)}, "k: got 3 heads, expected a divisor of q's 4 heads"),
    ({"k": a(2, 8, 5, 8), "v": a(2, 8, 5, 8)}, "k: got 8 heads, expected a divisor of q's 4 heads"),
    ({"k": a(2, 0, 5, 8), "v": a(2, 0, 5, 8)}, "k: got 0 heads, expected a divisor of q's 4 heads"),
    ({"q": a(2, 4, 5, 0)}, "k: got head size 8, expected 0 as in q"),
    # dtype
    ({"k": a(*SHAPE, name="float64")}, "k: got dtype float64, expected float32 as in q"),
    ({"v": a(*SHAPE, name="float16")}, "v: got dtype float16, expected float32 as in q"),
    ({"q": a(*SHAPE, name="int32")}, "q: got dtype int32, expected one of float64, float32, float16, bfloat16"),
    ({"q": a(*SHAPE, name="uint16")}, "q: got dtype uint16, expected one of"),
    ({"k": a(*SHAPE, name="complex64")}, "k: got dtype complex64, expected one of"),
    ({"v": a(*SHAPE, name="object")}, "v: got dtype object, expected one of"),
    ({"q": a(*SHAPE, name=">f4")}, r"q: got dtype float32 in foreign byte order \(>f4\), expected this machine's"),
    # kind of array
    ({"q": a(*SHAPE).tolist()}, "q: got a list, expected a NumPy array or a torch tensor"),
    ({"k": None}, "k: got None, expected a NumPy array or a torch tensor"),
    ({"v": 1.0}, "v: got 1.0, expected a NumPy array or a torch tensor"),
    ({"k": np.ma.masked_array(a(*SHAPE))}, "k: got a masked array, expected a plain array"),
    # options
    ({"return_lse": "no"}, "return_lse: got 'no', expected True or False"),
    ({"return_lse": 1}, "return_lse: got 1, expected True or False"),
    ({"causal": "yes"}, "causal: got 'yes', expected True or False"),
    ({"causal": None}, "causal: got None, expected True or False"),
    ({"window": (-2, 0)}, r"window: got \(-2, 0\), " + PAIR),
    ({"window": (0, -2)}, r"window: got \(0, -2\), " + PAIR),
    ({"window": (1.5, 0)}, r"window: got \(1.5, 0\), " + PAIR),
    ({"window": (0, LARGEST_POSITION + 1)}, r"window: got \(0, \d+\), " + PAIR),
    ({"window": 4}, "window: got 4, " + PAIR),
    ({"window": (1, 2, 3)}, r"window: got \(1, 2, 3\), " + PAIR),
    ({"window": [[1], 2]}, r"window: got \(\[1\], 2\), " + PAIR),
    ({"window": (True, 2)}, r"window: got \(True, 2\), " + PAIR),
    ({"align": "left"}, "align: got 'left', " + ALIGN),
    ({"align": True, "causal": True}, "align: got True, " + ALIGN),
    ({"align": LARGEST_POSITION + 1}, r"align: got \d+, " + ALIGN),
    ({"align": 1.5}, "align: got 1.5, " + ALIGN),
    ({"align": np.zeros(2)}, r"align: got dtype float64, expected an integer array of shape \(2,\)"),
    ({"align": np.zeros(3, int)}, r"align: got shape \(3,\), expected an integer array of shape \(2,\)"),
    ({"align": np.zeros((2, 1), int)}, r"align: got shape \(2, 1\), expected an integer array of shape \(2,\)"),
    ({"align": np.array([0, 2**62])}, r"align: got offsets from 0 to \d+, expected at most \d+"),
    ({"align": object()}, "align: got dtype object, expected an integer array"),
    ({"align": [[1], [2, 3]]}, "align: got a list, expected an integer array"),
    ({"scale": NAN}, "scale: got nan, expected a finite real number or None"),
    ({"scale": -INF}, "scale: got -inf, expected a finite real number or None"),
    ({"scale": "1"}, "scale: got '1', expected a finite real number or None"),
    ({"scale": 10**400}, r"scale: got 10+\.\.\., expected a finite real number or None"),
    ({"scale": -1e39}, r"scale: got -1e\+39, expected a number that float32 holds, in which scores are computed"),
    ({"softcap": 10**400}, r"softcap: got 10+\.\.\., expected a finite number > 0"),
    ({"dropout_p": 10**400}, r"dropout_p: got 10+\.\.\., expected a real number in"),
    ({"scale": 1j}, "scale: got 1j, expected a finite real number or None"),
    ({"scale": True}, "scale: got True, expected a finite real number or None"),
    ({"scale": a(1)}, r"scale: got array\(.*\), expected a finite real number or None"),
    ({"precision": "high"}, "precision: got 'high', expected one of 'ieee', 'tf32', 'bf16', 'fp16'"),
    ({"precision": ["ieee"]}, r"precision: got \['ieee'\], expected one of"),
    ({"kernel": "quick"}, "kernel: got 'quick', expected one of 'auto', .*'vanilla', 'reference'"),
    ({"kernel": "views"}, "kernel: got 'views', expected one of 'auto'"),
    ({"kernel": ["auto"]}, r"kernel: got \['auto'\], expected a name"),
    ({"engine": "steam"}, "engine: got 'steam', expected one of 'auto', 'direct'"),
    ({"engine": None}, "engine: got None, expected a name"),
    ({"progress": 7}, "progress: got 7, expected a function"),
    # what changes scores
    ({"mask": a(5, 5)}, r"mask: got float32, expected bool \(True: attend\); numbers .* are a bias"),
    ({"mask": 3}, "mask: got 3, expected a boolean array, a mask or a function of"),
    ({"score_mod": "relu"}, r"score_mod: got 'relu', expected a function of \(s, b, h, i, j\)"),
    ({"sinks": 0.5}, "sinks: got 0.5, expected floats"),
    ({"bias": -1.5}, "bias: got -1.5, expected a NumPy array or a torch tensor"),
    ({"mask": [[True]]}, "mask: got a list, expected a boolean array, a mask or a function of"),
    ({"mask": a(5, 4, name=bool)}, r"mask: got shape \(5, 4\), expected one that broadcasts to .* = \(2, 4, 5, 5\)"),
    ({"mask": score.padding([1, 2, 3])}, r"padding: got shape \(3,\), expected \(B,\) = \(2,\)"),
    ({"mask": score.softcap(3.0)}, "mask: got the score function softcap, expected a boolean array"),
    ({"bias": a(5, 5, name=bool)}, "bias: got bool, expected a float dtype; a boolean mask goes to mask="),
    ({"bias": [[0.0]]}, "bias: got a list, expected a NumPy array or a torch tensor"),
    ({"score_mod": score.causal()}, "score_mod: got the mask causal, expected a function of"),
    ({"softcap": INF}, r"softcap: got inf, expected a finite number > 0 \(None or 0: off\)"),
    ({"softcap": NAN}, "softcap: got nan, expected a finite number > 0"),
    ({"dropout_p": NAN, "seed": 1}, r"dropout_p: got nan, expected a real number in \[0, 1\)"),
    ({"softcap": -1}, r"softcap: got -1, expected a finite number > 0 \(None or 0: off\)"),
    ({"alibi_slopes": [0.5] * 4}, "alibi_slopes: got a list, expected a NumPy array or a torch tensor"),
    ({"alibi_slopes": a(3)}, r"alibi_slopes: got shape \(3,\), expected \(H,\) = \(4,\) or \(B, H\) = \(2, 4\)"),
    ({"alibi_slopes": a(4, name="int16")}, "alibi_slopes: got int16 of shape .*, expected floats"),
    ({"sinks": [0.0] * 4}, "sinks: got a list, expected floats"),
    ({"sinks": a(2, 3)}, r"sinks: got shape \(2, 3\), expected floats of shape \(H,\) = \(4,\)"),
    ({"sinks": a(4, name=int)}, "sinks: got dtype int64, expected floats"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    # Among calls that are right, so that nothing a cached call knows hides an error.
    flashtile.attention(a(*SHAPE), a(*SHAPE), a(*SHAPE), out=a(*SHAPE))
    out = np.full(SHAPE, 7, np.float32)
    for _ in range(2):
        with pytest.raises(SpecError, match="^" + message) as caught:
            flashtile.attention(**{"q": a(*SHAPE), "k": a(*SHAPE), "v": a(*SHAPE), "out": out, **arguments})
        assert isinstance(caught.value, ValueError) and isinstance(caught.value, FlashtileError)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("right", "equal"),
    [
        ({"causal": True}, {"causal": 1}),
        ({"causal": False}, {"causal": 0.0}),
        ({"window": (2, 1)}, {"window": (2.0, 1)}),
        ({"window": (2, 1)}, {"window": (2, True)}),
        ({"causal": True, "align": 1}, {"causal": True, "align": 1.0}),
        ({"causal": True, "align": 1}, {"causal": True, "align": True}),
        ({"scale": 1.0}, {"scale": True}),
    ],
)
def test_an_option_that_equals_a_right_one_is_no_right_one(right: dict[str, Any], equal: dict[str, Any]) -> None:
    """1 == True: the call that was prepared for one must not be found for the other."""
    flashtile.attention(a(*SHAPE), a(*SHAPE), a(*SHAPE), **right)
    with pytest.raises(SpecError, match=f"^{list(equal)[-1]}: got "):
        flashtile.attention(a(*SHAPE), a(*SHAPE), a(*SHAPE), **equal)


@pytest.mark.parametrize("name", ["causal", "window", "scale", "precision", "kernel", "softcap", "dropout_p"])
@pytest.mark.parametrize("value", [a(5, 8), np.zeros((2, 40, 60)), [a(4, 4)] * 9, "x" * 5000, "two\nlines"])
def test_a_message_is_a_line_that_ends_in_what_was_expected(name: str, value: Any) -> None:
    """An array in a number's place shows a few of its elements, not all of them line by line."""
    with pytest.raises(SpecError, match=rf"^{name}: got .{{1,210}}, expected [^\n]*$"):
        flashtile.attention(a(*SHAPE), a(*SHAPE), a(*SHAPE), **{name: value})


@pytest.mark.parametrize("name", ["kernel", "engine"])
@pytest.mark.parametrize("beside", [{"mask": a(5, 5, name=bool)}, {"softcap": 2.0}, {"sinks": a(4)}])
def test_a_name_that_cannot_be_a_key_is_no_name(name: str, beside: dict[str, Any]) -> None:
    """Options that change scores are remembered apart from the rest, and before a kernel is picked."""
    for value in (["auto"], a(3), bytearray(4), None):
        with pytest.raises(SpecError, match=f"^{name}: got .* expected a name"):
            flashtile.attention(a(*SHAPE), a(*SHAPE), a(*SHAPE), **beside, **{name: value})


@pytest.mark.parametrize("rule", [{"causal": True}, {"window": (1, 1)}])
@pytest.mark.parametrize("kv_len", [4, 6, 0])
def test_ambiguous_alignment(rule: dict[str, Any], kv_len: int) -> None:
    k = a(2, 4, kv_len, 8)
    choices = '"top_left".*"bottom_right".*an integer offset, or an integer array'
    with pytest.raises(SpecError, match=f"^align: got None with 5 queries and {kv_len} keys, expected .*{choices}"):
        flashtile.attention(a(*SHAPE), k, k, **rule)


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["float64", "float16"])
def test_precision_is_for_float32(name: str, precision: str) -> None:
    q = a(*SHAPE, name=name)
    with pytest.raises(SpecError, match=f"^precision: got '{precision}' with {name} inputs, expected 'ieee'"):
        flashtile.attention(q, q, q, precision=precision)


def bad_outs() -> list[tuple[Any, str]]:
    """out, and the error's text from its start."""
    return [
        (a(2, 4, 5, 9), r"out: got shape \(2, 4, 5, 9\), expected \(2, 4, 5, 8\)"),
        (a(4, 5, 8), r"out: got shape \(4, 5, 8\), expected \(2, 4, 5, 8\)"),
        (a(*SHAPE, name="float64"), "out: got dtype float64, expected float32 as in q"),
        (a(*SHAPE, name=">f4"), "out: got dtype float32 in foreign byte order"),
        (as_strided(a(1), SHAPE, (0,) * 4), "out: got strides of .* for shape .*, expected elements that do not share"),
        (as_strided(a(999), SHAPE, (640, 160, 16, 4)), "out: got strides of .*, expected elements that do not share"),
        (a(*SHAPE).tolist(), "out: got a list, expected a NumPy array"),
        (np.ma.masked_array(a(*SHAPE)), "out: got a masked array"),
    ]


@pytest.mark.parametrize("n", range(len(bad_outs())))
def test_bad_out(n: int) -> None:
    out, message = bad_outs()[n]
    before = np.array(out)
    with pytest.raises(SpecError, match="^" + message):
        flashtile.attention(a(*SHAPE), a(*SHAPE), a(*SHAPE), out=out)
    assert np.array_equal(np.array(out), before)


def test_read_only_out_is_refused_at_every_call() -> None:
    q, out = a(*SHAPE), np.full(SHAPE, 7, np.float32)
    flashtile.attention(q, q, q, out=out.copy())
    out.flags.writeable = False
    with pytest.raises(SpecError, match="^out: got a read-only array, expected a writable one"):
        flashtile.attention(q, q, q, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("shift", [0, 1, -1, 319, -319])
def test_out_that_overlaps_an_input(which: str, shift: int) -> None:
    """From one element in common to all: SHAPE is 320 elements."""
    room = np.full(3 * 320, 7, np.float32)
    shared = room[320:640].reshape(SHAPE)
    out = room[320 + shift : 640 + shift].reshape(SHAPE)
    arrays = {name: shared if name == which else a(*SHAPE) for name in "qkv"}
    flashtile.attention(**arrays, out=a(*SHAPE))  # the same strides, prepared and cached
    with pytest.raises(SpecError, match=f"^out: got an array within the memory that {which} spans"):
        flashtile.attention(**arrays, out=out)
    with pytest.raises(SpecError, match=f"^out: got an array within the memory that {which} spans"):
        flashtile.attention(**arrays, out=out[::-1, ::-1, ::-1, ::-1])
    assert (room == 7).all()


@pytest.mark.parametrize("met", [True, False])
@pytest.mark.parametrize("name", read_from(a(*SHAPE), 5))
def test_out_that_overlaps_what_changes_scores(name: str, met: bool) -> None:
    """A tile that is written would change what the next one reads."""
    out = np.zeros(SHAPE, np.float32)
    q = a(*SHAPE)
    if met:
        flashtile.attention(q, q, q, **read_from(out.copy(), 5)[name], out=out)  # the same strides, prepared and cached
    else:
        builtin._templates.clear()  # it is traced anew, in which arrays have other names
        flashtile.api.clear_cache()
    out[...] = 0
    with pytest.raises(SpecError, match=f"^out: got an array within the memory that {name} spans"):
        flashtile.attention(q, q, q, **read_from(out, 5)[name], out=out)
    assert not out.any()


@pytest.mark.parametrize("shift", [320, -320])
def test_out_beside_an_input_is_right(shift: int) -> None:
    room = np.full(3 * 320, 7, np.float32)
    q, out = room[320:640].reshape(SHAPE), room[320 + shift : 640 + shift].reshape(SHAPE)
    assert flashtile.attention(q, q[::-1], q, out=out) is out


@pytest.mark.parametrize("n", [0, -1, 10**6, 1.5, "2", None, True])
def test_bad_numbers_of_threads(n: Any) -> None:
    before = flashtile.get_num_threads()
    with pytest.raises(SpecError, match="^n: got .*, expected an integer from 1 to 4096"):
        flashtile.set_num_threads(n)
    assert flashtile.get_num_threads() == before


def test_the_family_of_errors() -> None:
    assert issubclass(SpecError, (FlashtileError, ValueError)) and issubclass(SpecError, ValueError)
    assert issubclass(UnavailableError, FlashtileError) and issubclass(UnavailableError, NotImplementedError)
    assert issubclass(KernelError, FlashtileError) and issubclass(KernelError, RuntimeError)
