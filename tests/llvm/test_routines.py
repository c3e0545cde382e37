"""Emitted functions are called by name and kind: what LLVM's verifier cannot see raises while the text is generated."""

from __future__ import annotations

from typing import Any

import pytest

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.accumulate import emit_accumulate
from flashtile.llvm import machines
from flashtile.llvm.ir import Module
from flashtile.llvm.lines import Line, Lines, Rows, Scores, Sums, Weights, Words
from flashtile.llvm.routines import Routine, entry

pytestmark = pytest.mark.core

LINE = Line("<4 x float>", 2)


def calling(**arguments: Any) -> str:
    """The text of a module in which `main` calls a function of every sort of parameter with these arguments."""
    module = Module()
    kinds: dict[str, Any] = {"sums": Sums.of(LINE), "scores": Scores.of(LINE), "rows": Rows.kind(), "n": "i64"}
    add = Routine(module, "add", **kinds)
    add.ret()
    main = Routine(module, "main", exported=True, x="ptr", y="ptr", m="i64", k="i32")
    x, y, m, k = main.parameters
    named = {"x": x, "y": y, "m": m, "k": k}
    given: dict[str, Any] = {
        "sums": Sums(x, LINE),
        "scores": Scores(y, LINE),
        "rows": Rows(x, m, m, m, m),
        "n": m,
    }
    given |= {name: how(named) if callable(how) else how for name, how in arguments.items()}
    add(main, **{name: value for name, value in given.items() if value is not None})
    main.ret()
    return module.text()


def test_operands_travel_as_their_values() -> None:
    text = calling()
    assert (
        "define internal void @add(ptr %sums.at, ptr %scores.at, ptr %rows.at, i64 %rows.stride, i64 %rows.step" in text
    )
    assert "call void @add(ptr %x, ptr %y, ptr %x, i64 %m, i64 %m, i64 %m, i64 %m, i64 %m)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "swapped pointers": (
            {"sums": lambda v: Scores(v["y"], LINE), "scores": lambda v: Sums(v["x"], LINE)},
            r"add: sums: got Scores .*, expected Sums",
        ),
        "a bare pointer": ({"sums": lambda v: v["x"]}, "add: sums: got ptr, expected Sums"),
        "another geometry": (
            {"sums": lambda v: Sums(v["x"], Line("<4 x float>", 3))},
            "got Sums shape=3 x .*, expected",
        ),
        "a parent's kind": ({"sums": lambda v: Lines(v["x"], LINE)}, "got Lines .*, expected Sums"),
        "rows for words": ({"rows": lambda v: Words(v["x"], v["m"])}, "add: rows: got Words, expected Rows"),
        "a width": ({"n": lambda v: v["k"]}, "add: n: got i32, expected i64"),
        "a Python number": ({"n": 3}, "add: n: got int, expected i64"),
        "missing": ({"n": None}, "add: got sums, scores, rows, expected sums, scores, rows, n"),
        "unknown": ({"count": lambda v: v["m"]}, "add: got .*count, expected"),
    }.values(),
    ids=lambda x: None,
)
def test_a_wrong_call_raises(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        calling(**arguments)


def test_two_swapped_pointers_of_a_step_are_seen() -> None:
    """The accumulation's sums and weights are two pointers to LLVM."""
    module, c = Module(), Config(machines.known()["avx512"], "float")
    step = emit_accumulate(module, c, 3)
    f = entry(module, "main")
    at, n = f.parameters[0], f.parameters[1]
    right = {"alpha": Lines(at, c.line), "rows": Words(at, n), "count": n, "reach": n}
    step(f, sums=Sums(at, c.line), weights=Weights(at, c.word_line), **right)
    with pytest.raises(TypeError, match=r"accumulate_3: sums: got Weights .*, expected Sums"):
        step(f, sums=Weights(at, c.word_line), weights=Sums(at, c.line), **right)
