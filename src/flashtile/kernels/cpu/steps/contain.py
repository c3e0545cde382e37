"""NaN containment: a row that is hidden from a lane never changes it, whatever its values hold.

A hidden row's weight is 0, but 0 * NaN is NaN. So each block of values is scanned while it is first read; if all is
finite, as always but for broken data, nothing more happens. Otherwise the block is copied with zeros in place of what
is not finite (pack.py), the fast steps run on the copy, giving lanes that do not see those rows the bits they would
have had, and what is not finite is added to just the lanes that see it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.keep import Draw
from flashtile.kernels.cpu.steps.pack import any_nan, read
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.lines import Rows, Scores, Sums, Words
from flashtile.llvm.routines import Operand, Routine


@dataclass(frozen=True)
class NonFinite(Operand):
    """What a block of values holds that is not finite: whether anything, and the values as they lie."""

    WORDS: ClassVar = {"found": "i64", "at": "ptr", "stride": "i64", "step": "i64", "size": "i64", "sums": "ptr"}
    found: Value
    at: Value
    stride: Value
    step: Value
    size: Value
    sums: Value  # scratch memory for what is added at the end; where nothing is found, it is free (strips.py)

    def rows(self, first: Value, count: Value) -> Rows:
        return Rows(self.at + first * self.stride, self.stride, self.step, count, self.size)


def emit_scan(module: Module, c: Config) -> Routine:
    """Whether so many contiguous rows hold anything non-finite, at the speed of the cache: a product with 0 is NaN just
    for inf and NaN."""
    f = Routine(module, "scan", "i64", values=Words.kind(), count="i64", size="i64")
    values, count, size = f.parameters
    chunks = size // c.lanes * c.lanes

    def one_row(n: Value, poison: list[Value]) -> list[Value]:
        row = values.row(n).at

        def add(column: Value, poison: list[Value], lanes: int) -> list[Value]:
            return [poison[0] + read(f, c, row + column * c.element, lanes) * 0.0]

        registers = f.fold(0, chunks, c.lanes, poison[:1], lambda column, p: add(column, p, c.lanes))
        scalars = f.fold(chunks, size, 1, poison[1:], lambda column, p: add(column, p, 1))
        return [*registers, *scalars]

    clean = [f.const(c.vector, 0.0), f.const(c.acc, 0.0)]
    f.ret(any_nan(f, c, *f.fold(0, count, 1, clean, one_row)))
    return f


def emit_collect(module: Module, c: Config) -> Routine:
    """For each lane, the sums of the non-finite values of the rows that it sees, by scores before the softmax. A weight
    is positive wherever the score is not -inf, so inf and NaN enter unweighted; 0 times them, which is NaN, where
    dropout drops it."""
    kinds: dict[str, Any] = {"draw": Draw.kind()} if c.dropout else {}
    f = Routine(
        module, "collect", scores=Scores.of(c.line), values=Rows.kind(), columns="i64", sums=Sums.of(c.line), **kinds
    )
    scores, values, columns, sums, *draw = f.parameters
    sums.fill(0.0, columns)
    with f.range(0, values.count) as row, f.range(0, values.size) as column:
        value = read(f, c, values.at + (row * values.stride + column * values.step))
        with f.when((value * 0.0).isnan()), f.range(0, c.line.bytes, c.register) as at:
            score, found = scores.load(row, at=at), f.splat(value, c.lanes)
            for drawn in draw:
                found = f.select(drawn.keeps(c, row, at), found, f.const(c.vector, math.nan))
            seen = f.select(score.eq(-math.inf), f.const(c.vector, 0.0), found)
            sums.store(sums.load(column, at=at) + seen, column, at=at)
    f.ret()
    return f


def emit_add(module: Module, c: Config) -> Routine:
    """What ``collect`` summed joins a panel's sums."""
    f = Routine(module, "add", sums=Sums.of(c.line), collected=Sums.of(c.line), columns="i64")
    sums, collected, columns = f.parameters
    with f.range(0, columns * c.line.bytes, c.register) as at:
        sums.store(sums.load(0, at=at) + collected.load(0, at=at), 0, at=at)
    f.ret()
    return f
