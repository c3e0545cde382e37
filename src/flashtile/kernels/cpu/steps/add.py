"""Gradients on their way out: sums times a factor, added to rows in memory that hold what there was before."""

from __future__ import annotations

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.pack import read, write
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.lines import Rows, Sums, Words
from flashtile.llvm.routines import Routine


def emit_add_rows(module: Module, c: Config) -> Routine:
    """Rows of sums to rows in memory."""
    f = Routine(module, "add_rows", sums=Words.kind(), rows=Rows.kind(), factor=c.acc)
    sums, rows, factor = f.parameters
    chunks = f.select(rows.adjacent(c.element), rows.size // c.lanes * c.lanes, f.const("i64", 0))

    def add(row: Value, column: Value, count: int) -> None:
        kind, times = (c.vector, f.splat(factor, c.lanes)) if count > 1 else (c.acc, factor)
        target = rows.at + (row * rows.stride + column * rows.step)
        value = f.load(kind, sums.row(row).at + column * c.size)
        write(f, c, c.isa.multiply_add(f, value, times, read(f, c, target, count)), target)

    with f.range(0, rows.count) as row:
        with f.range(0, chunks, c.lanes) as column:
            add(row, column, c.lanes)
        with f.range(chunks, rows.size) as column:
            add(row, column, 1)
    f.ret()
    return f


def emit_add_lanes(module: Module, c: Config, *, apart: bool = False) -> Routine:
    """Sums of a panel, a line for each column, to rows in memory, one for each lane. ``apart``: even lanes stand in the
    first register and odd ones in the second, as the words of differentiate.py's `store_pair` have them."""
    f = Routine(module, "add_lanes", sums=Sums.of(c.line), rows=Rows.kind(), factor=c.acc)
    sums, rows, factor = f.parameters
    n = c.lanes
    # Squares of lanes x lanes go through registers; the columns that are left over go one by one.
    whole_columns = f.select(rows.adjacent(c.element), rows.size // n * n, f.const("i64", 0))
    every = 2 if apart else 1
    with f.range(0, c.panel if apart else rows.count, n) as lane, f.range(0, whole_columns, n) as column:
        first = lane // n if apart else lane
        corner = sums.moved(column * c.line.bytes + lane * c.size)
        target = rows.at + (first * rows.stride + column * c.element)
        for r, values in enumerate(f.transpose([corner.load(t) for t in range(n)])):
            with f.when(first + r * every < rows.count):
                at = target + rows.stride * (r * every)
                write(f, c, c.isa.multiply_add(f, values, f.splat(factor, n), read(f, c, at, n)), at)
    with f.range(0, rows.count) as row, f.range(whole_columns, rows.size) as column:
        lane = row % 2 * n + row // 2 if apart else row
        value = f.load(c.acc, sums.at + (column * c.line.bytes + lane * c.size))
        at = rows.at + (row * rows.stride + column * rows.step)
        write(f, c, c.isa.multiply_add(f, value, factor, read(f, c, at)), at)
    f.ret()
    return f


def emit_join_rows(module: Module, c: Config) -> Routine:
    """Sums at hand into totals, row by row; they begin anew at 0. Whole registers."""
    f = Routine(module, "join_rows", sums=Words.kind(), totals=Words.kind(), count="i64")
    sums, totals, count = f.parameters
    with f.range(0, count * sums.stride, c.register) as at:
        there, here = totals.at + at, sums.at + at
        total = f.load(c.vector, there, align=c.register) + f.load(c.vector, here, align=c.register)
        f.store(total, there, align=c.register)
        f.store(f.const(c.vector, 0.0), here, align=c.register)
    f.ret()
    return f
