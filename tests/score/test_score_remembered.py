"""Functions that were traced before: the program that tracing them again would give, whatever has changed since."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flashtile import score
from flashtile.errors import SpecError
from flashtile.score import padding, remembered
from flashtile.score.mask import Mask
from flashtile.score.program import Program

pytestmark = pytest.mark.core

SHAPE = (1, 2, 6, 8)
LIMIT = 3


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    monkeypatch.setattr(remembered, "_entries", {})
    yield remembered._entries


def values(program: Program) -> np.ndarray:
    b, h, i, j = np.ogrid[tuple(slice(n) for n in SHAPE)]
    return program.evaluate(0.5, b, h, i, j)


def check(entries: dict[Any, Any], kept: bool, **options: Any) -> Program:
    """Twice, and against what tracing gives; whether it was remembered."""
    programs = [Program.of(SHAPE, **options) for _ in range(2)]
    assert bool(entries) == kept
    entries.clear()
    fresh = Program.of(SHAPE, **options)
    for program in programs:
        assert program.code == fresh.code and program.slots == fresh.slots
        assert [x.name for x in program.captures] == [x.name for x in fresh.captures]
        np.testing.assert_array_equal(values(program), values(fresh))
    return programs[1]


def closing_over(value: Any) -> Callable[..., Any]:
    return lambda b, h, i, j: (value[i] == value[j]) & (j >= 0)


def less(x: Any, most: Any = 5) -> Any:
    return np.minimum(x, most)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": lambda b, h, i, j: (i >= j) & (j > LIMIT)},
        {"mask": closing_over(np.arange(8, dtype=np.int32) // 3)},
        {"mask": padding(np.array([5]))},
        {"mask": Mask(lambda offset: lambda b, h, i, j: j <= i + offset, positional=True), "offset": 2},
        {"score_mod": lambda s, b, h, i, j: np.tanh(s / 20.0) * less(j) + np.pi},
        {"score_mod": lambda s, b, h, i, j: np.where(j > i, -np.inf, -s), "softcap": 2.0, "causal": True, "offset": 2},
    ],
    ids=["a global number", "an array", "padding", "an offset", "a function of a function", "beside other options"],
)
def test_what_follows_from_code_and_closure_is_traced_once(entries: dict[Any, Any], options: dict[str, Any]) -> None:
    check(entries, True, **options)


def makes_another(array: np.ndarray) -> Callable[..., Any]:
    return lambda b, h, i, j: (array > 1)[j]


def has_memory(seen: list[int]) -> Callable[..., Any]:
    return lambda b, h, i, j: j > seen[0]


@pytest.mark.parametrize(
    "function",
    [
        makes_another(np.arange(8)),
        has_memory([2]),
        lambda b, h, i, j: j > random.randint(0, 3),
        lambda b, h, i, j: j > math.floor(2.5),
        lambda b, h, i, j: j > len(INDEXED),
        lambda b, h, i, j: INDEXED[INDEXED[j]] > 1,
        lambda b, h, i, j: j <= np.array([i + 1]).size + i,
    ],
    ids=["computes with an array", "a list", "chance", "another library", "asks an array", "by elements", "unknown"],
)
def test_what_may_see_more_is_traced_at_every_call(entries: dict[Any, Any], function: Any) -> None:
    with contextlib.suppress(SpecError):  # outside the language, or a position that an array does not have
        Program.of(SHAPE, mask=function)
    assert not entries


INDEXED = np.array([0, 1, 2, 3, 4, 5, 6, 7])


def test_a_function_without_a_module_is_traced(entries: dict[Any, Any]) -> None:
    """Such as exec makes where there is no __name__: notebooks' and doctests' helpers do."""
    scope: dict[str, Any] = {}
    exec("def mask(b, h, i, j): return j <= i", scope)
    scope["mask"].__module__ = None
    check(entries, kept=True, mask=scope["mask"])


def test_values_are_those_of_the_call(entries: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other elements, another array, another number, also where Python says that they are equal."""
    groups = np.zeros(8, np.int32)
    function = closing_over(groups)
    assert (values(Program.of(SHAPE, mask=function)) == 0.5).all()
    groups[4:] = 1
    assert np.isneginf(values(Program.of(SHAPE, mask=function))).any(), "elements are read anew"
    other = Program.of(SHAPE, mask=closing_over(np.arange(8, dtype=np.int32)))
    assert len(entries) == 1 and np.isneginf(values(other)).sum() == 2 * (48 - 6)
    Program.of(SHAPE, mask=closing_over(np.arange(8, dtype=np.int64)))
    assert len(entries) == 2, "another type is another program"
    with pytest.raises(SpecError, match="mask: value: got integers from 0 to 4294967296"):
        Program.of(SHAPE, mask=closing_over(np.array([0, 1 << 32] * 4)))
    function = lambda b, h, i, j: j > LIMIT  # noqa: E731
    for limit, shown in ((3, 4), (6, 1), (True, 6), (3.5, 4), (-0.0, 7), (0.0, 7)):
        monkeypatch.setitem(globals(), "LIMIT", limit)
        program = Program.of(SHAPE, mask=function)
        assert np.isfinite(values(program)).sum() == shown * 12
        assert [math.copysign(1, x.value) for x in program.captures] == (
            [] if limit is True else [math.copysign(1, limit)]
        )


def test_a_mask_object_is_read_and_checked_at_every_call(entries: dict[Any, Any]) -> None:
    """Its arrays as they are now, the call's offset, what was computed when its rule was made, and whether it fits."""
    lengths = np.array([5])
    shown = []
    for lengths[0] in (5, 2):
        shown.append(np.isfinite(values(Program.of(SHAPE, mask=padding(lengths)))).sum() / 12)
    assert shown == [5, 2] and len(entries) == 1
    first = Mask(lambda offset: (lambda n: lambda b, h, i, j: j < n + offset)(int(lengths[0])), positional=True)
    for lengths[0], offset in ((3, 0), (4, 0), (4, 1)):
        program = Program.of(SHAPE, mask=first, offset=offset)
        assert np.isfinite(values(program)).sum() == (lengths[0] + offset) * 12

    def fits(shape: Any) -> None:
        raise SpecError("too long")

    with pytest.raises(SpecError, match="too long"):
        Program.of(SHAPE, mask=replace(padding(lengths), fits=fits))


def test_a_longer_call_is_checked_again(entries: dict[Any, Any]) -> None:
    function = closing_over(np.zeros(8, np.int32))
    Program.of(SHAPE, mask=function)
    with pytest.raises(SpecError, match="got index"):
        Program.of((1, 2, 6, 9), mask=function)


def test_no_more_programs_are_kept_than_some(entries: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_ENTRIES", 3)
    for n in range(9):
        Program.of((1, 1, 4, n + 1), mask=lambda b, h, i, j: j <= i)
    assert 0 < len(entries) <= 3


def rules(random: random.Random, lengths: tuple[int, int]) -> Any:
    """Masks of the package, of a function and frozen ones, put together by chance; arrays come from a few."""
    rows, keys = lengths
    longer = max(lengths)
    ids = [np.arange(longer, dtype=np.int32) // n for n in (2, 3)]
    dense = [np.arange(n * m).reshape(n, m) % 3 > 0 for n, m in ((rows, keys), (1, keys), (rows, 1))]

    def one() -> Any:
        cut = ((x if len(x) == n else x[:n]) for x, n in zip(random.choices(ids, k=2), lengths, strict=True))
        document = score.document(*cut)
        few = random.randint(0, keys)
        choices = [
            *(score.causal(), score.window(random.choice([None, 2, 3]), random.choice([None, 1])), document),
            *(score.padding(np.array([few])), score.prefix(few), score.prefix(np.array([few]))),
            *(score.dense(x) for x in dense),
        ]
        if random.random() < 0.2:
            choices = [Mask(lambda offset: lambda b, h, i, j: j - i < few + offset, positional=True)]
        if random.random() < 0.2:
            choices = [score.freeze(document)]
        return random.choice(choices)

    rule = one()
    for _ in range(random.randint(0, 2)):
        rule = random.choice([rule & one(), rule | ~one()])
    return rule, ids, dense


def test_a_remembered_program_is_never_another_ones(entries: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Chance rules, lengths, offsets and arrays, shared or not, and changed in place: always what tracing gives."""
    monkeypatch.setattr(remembered, "_ENTRIES", 1 << 20)
    chance = random.Random(0)
    for _ in range(300):
        lengths = chance.choice([(5, 7), (1, 6), (4, 4), (1, 1), (0, 3)])
        rule, ids, dense = rules(chance, lengths)
        causal, offset = chance.random() < 0.3, chance.randint(-2, 3)
        window = chance.choice([None, None, (1, None), (2, 0)])
        given = {"mask": rule, "causal": causal, "window": window, "offset": offset}
        for _ in range(2):
            ids[0] += np.arange(len(ids[0]), dtype=np.int32) % 2
            np.logical_not(dense[0], out=dense[0])
            shape = (1, 2, *lengths)
            program = Program.of(shape, **given)
            fresh = Program.traced(shape, softcap=None, alibi_slopes=None, bias=None, **given)
            assert program.structure == fresh.structure and program.slots == fresh.slots
            places = np.ogrid[tuple(slice(n) for n in shape)]
            np.testing.assert_array_equal(program.visible(*places), fresh.visible(*places))
    assert 100 < len(entries) < 400, "most of 600 are found"


def test_rules_of_the_package_serve_every_length_and_offset(entries: dict[Any, Any]) -> None:
    for keys in range(2, 12):
        ids = np.arange(keys) // 3
        rule = score.causal() & score.document(ids) & score.padding(np.array([keys - 1])) | score.window(keys, None)
        Program.of((1, 2, 1, keys), mask=rule & score.dense(np.ones((1, keys), bool)), offset=keys - 1)
    assert len(entries) == 1


def test_which_arrays_are_the_same_is_remembered(entries: dict[Any, Any]) -> None:
    first, second = np.arange(8) // 2, np.arange(8) // 3
    shown = []
    for other in (first, second, first):
        rule = score.document(first) & ~score.document(other)
        shown.append(int(Program.of(SHAPE, mask=rule).visible(*np.ogrid[:1, :2, :6, :8]).sum()))
    assert shown[0] == shown[2] == 0 < shown[1]
    low = [score.window(a, None) & ~score.window(b, None) for a, b in ((3, 1), (4, 1), (2, 2))]
    counts = [int(Program.of(SHAPE, mask=x).visible(*np.ogrid[:1, :2, :6, :8]).sum()) for x in low]
    assert len(set(counts)) == 3, "two numbers of one name"
