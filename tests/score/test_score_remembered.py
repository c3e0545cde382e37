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
