"""Sums that are not normal numbers, kept where matrix registers add to them and would take them for 0.

Only where values themselves are that small are such sums more than a rounding, and those values are added by
multiply-adds (unheld.py), which note the lanes that saw one. Of these lanes sums below 2^-126 are set aside while tiles
add, and are added after: no other lane is touched, so a row's bits depend on what it sees. On other data this costs a
look at one line for each panel and block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.range import any_lane
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.lines import Lines, Sums
from flashtile.llvm.routines import Operand, Routine
from flashtile.llvm.types import like


@dataclass(frozen=True)
class Tiny(Operand):
    """``lanes``: an i32 for each lane of a panel, not 0 where it saw a tiny value; ``sums``: room for what is set
    aside, a line for each column."""

    WORDS: ClassVar = {"lanes": "ptr", "sums": "ptr"}

    lanes: Value
    sums: Value

    def lines(self, c: Config) -> Lines:
        return Lines(self.lanes, c.word_line)

    def note(self, c: Config, register: int, saw: Value) -> None:
        """These lanes of a register saw one."""
        lines, f = self.lines(c), self.function
        old = lines.load(0, register)
        lines.store(f.select(saw, f.const(old.type, 1), old), 0, register)

    def some(self, c: Config) -> Value:
        """Whether any lane did."""
        lines = self.lines(c)
        found = lines.load(0, 0)
        for j in range(1, c.registers):
            found = found | lines.load(0, j)
        return any_lane(self.function, found.ne(0))


def emit_set_aside(module: Module, c: Config) -> Routine:
    """Of the lanes that saw a tiny value, sums that are not normal go to ``tiny``; for all others there is 0."""
    f = Routine(module, "set_aside", sums=Sums.of(c.line), tiny=Tiny.kind(), columns="i64")
    sums, tiny, columns = f.parameters
    aside, zero = Sums(tiny.sums, c.line), f.const(c.vector, 0.0)
    for j in range(c.registers):
        saw = tiny.lines(c).load(0, j).ne(0)
        with f.range(0, columns) as column:
            old = sums.load(column, j)
            normal = (f.bitcast(old, "i32") & 0x7F800000).ne(0)
            small = f.select(normal, f.const(like(saw.type, "i1"), 0), saw)
            aside.store(f.select(small, old, zero), column, j)
    f.ret()
    return f


def emit_add_aside(module: Module, c: Config) -> Routine:
    """What was set aside joins the sums again."""
    f = Routine(module, "add_aside", sums=Sums.of(c.line), tiny=Tiny.kind(), columns="i64")
    sums, tiny, columns = f.parameters
    aside = Sums(tiny.sums, c.line)
    with f.range(0, columns) as column:
        for j in range(c.registers):
            added, old = aside.load(column, j), sums.load(column, j)
            sums.store(f.select(f.bitcast(added, "i32").ne(0), old + added, old), column, j)
    f.ret()
    return f
