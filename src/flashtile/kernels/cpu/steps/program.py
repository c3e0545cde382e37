"""The score program: one pass over the scores of a block, after the products and before the softmax.

A pass of its own, not the end of each score tile: there the sums fill the register file and the program would be
emitted for every element of the tile; here it is emitted once for each register of lanes, its constants and whatever
depends on the lane stay in registers, and the scores it reads are in the first-level cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.scratch import Work, dense_bytes
from flashtile.kernels.cpu.steps.band import Band
from flashtile.kernels.cpu.steps.frame import Frame
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Lines
from flashtile.llvm.routines import Routine
from flashtile.llvm.types import vector
from flashtile.score.emit import Emission
from flashtile.score.expr import Expr


def emit_program(module: Module, c: Config, width: int, *, edge: bool, top: bool = True) -> Routine:
    """The rows [first, last) go through the program, counted from the block; row ``origin`` stands on the first line of
    the scores. An ``edge`` pass hides what the mask, or where the program has none, the band hides. ``top``: it also
    keeps the running maximum."""
    kinds: dict[str, Any] = {"work": Work.of(c), "first": "i64", "last": "i64", "origin": "i64", "band": Band.kind()}
    f = Routine(module, f"program_{width}_{'edge' if edge else 'full'}{'' if top else '_no_top'}", **kinds)
    work, first, last, origin, band = f.parameters
    program: Any = Elements(f, c, Frame(work.frame), width, masked=edge and c.masked) if c.code else Identity(c)
    hidden = f.const(c.vector, -math.inf)
    tops = [work.tops.load(0, j) for j in range(width)] if top else []

    def one_row(row: Value, tops: list[Value]) -> list[Value]:
        line = (row - origin) * c.line.bytes
        place = program.row(row)

        def one_register(j: int) -> Value:
            here = work.scores.place(0, j, at=line)
            element = program.element(place, j, f.load(c.vector, here, align=c.register), line)
            value = program.score_of(element)
            if edge:
                value = f.select(program.sees(element, band, j, row), value, hidden)
            if edge or c.scored:
                f.store(value, here, align=c.register)
            return f.maximum(value, tops[j]) if tops else value

        found = f.abreast(width, one_register)
        return found if tops else []

    # Where there is nothing but the maximum, it is one chain of rows, each 4 cycles after the one before: so several.
    chains = 1 if edge or c.scored else max(1, 8 // width)

    def some_rows(row: Value, tops: list[Value]) -> list[Value]:
        return [top for n in range(chains) for top in one_row(row + n, tops[n * width : (n + 1) * width])]

    tops = f.fold(first, last, chains, tops * chains, some_rows)
    for j in range(width if top else 0):
        work.tops.store(functools.reduce(f.maximum, tops[j::width]), 0, j)
    f.ret()
    return f


class Identity:
    """No program: scores that landed in memory are banded, no more."""

    def __init__(self, c: Config) -> None:
        self.c = c

    def row(self, row: Value) -> None:
        """Nothing depends on it."""

    def element(self, row: None, j: int, raw: Value, line: Value) -> Value:
        return raw

    def score_of(self, element: Value) -> Value:
        return element

    def sees(self, element: Value, band: Band, j: int, row: Value) -> Value:
        return band.sees(self.c, j, row)


class Elements:
    """Emits the program's parts where they belong: what depends on the lane before the loop over rows, what depends
    on the row once in it, the rest for every register of scores.

    Lanes past the end repeat the last: what is loaded for them exists, and they are not stored.
    """

    def __init__(
        self, f: Function, c: Config, frame: Frame, width: int, *, masked: bool, also: Iterable[Expr] = ()
    ) -> None:
        """``also``: other expressions of the program that will be asked for."""
        assert c.code is not None
        self.f, self.c, self.code = f, c, c.code
        self.score, self.mask = c.code.score, c.code.mask if masked else None
        self.roots = [root for root in (self.score, self.mask, *also) if root is not None]
        self.outer = frame.program(f, c)
        self.outer.prepare(*self.roots)
        self.block, self.dense = frame.read("block"), frame.read("dense")
        self.scale = f.splat(f.cast("fptrunc", frame.read("scale"), c.acc), c.lanes)
        lane, last_lane = (f.splat(frame.integer(name), c.lanes) for name in ("row", "last_row"))
        self.lanes = []
        for j in range(width):
            i = f.minimum(lane + f.iota(vector(c.lanes, "i32"), j * c.lanes), last_lane)
            self.lanes.append(self.outer.inner({"i": i}))
            self.lanes[j].prepare(*self.roots)

    def row(self, row: Value) -> Emission:
        """The place where a row, counted from the block, is known."""
        place = self.outer.inner({"j": self.f.cast("trunc", self.block + row, "i32")})
        place.prepare(*self.roots)
        return place

    def element(self, row: Emission, j: int, raw: Value, line: Value) -> Emission:
        """The place where a row's raw products with the lanes of register j are known; ``line``: how many bytes into
        the scores."""
        lanes = self.lanes[j]
        variables = {"i": lanes.variable("i"), "s": raw * self.scale if self.score else raw}
        return row.inner(variables, given={**lanes.known, **self._dense(j, line)})

    def score_of(self, element: Emission) -> Value:
        """The scores of an element's lanes."""
        return element.vector(self.score) if self.score else element.variable("s")

    def sees(self, element: Emission, band: Band, j: int, row: Value) -> Value:
        """Which of the lanes see the row: by the program's mask, or where it has none by the band."""
        return element.vector(self.mask) if self.mask else band.sees(self.c, j, row)

    def _dense(self, j: int, line: Value) -> dict[Expr, Value]:
        """Loads that dense.py has laid out like the scores."""
        f, c, found = self.f, self.c, {}
        for n, load in enumerate(self.code.dense_loads):
            stored = Lines(self.dense + n * dense_bytes(c), c.line).load(0, j, at=line)
            if load.type != "float":  # integers and bools were widened to the accumulator's size
                stored = f.bitcast(stored, f"i{8 * c.size}")
                stored = stored.ne(0) if load.type == "bool" else f.cast("trunc", stored, vector(c.lanes, "i32"))
            found[load] = stored
        return found
