"""The exchanged accumulation: sums[row][column] += sum over lanes of lines[row][lane] * rows[lane][column].

What stood in lanes is summed over: lanes run over columns of the rows that the panel's lanes stand for, and a word of a
line is broadcast. So weights and rows of dO become dV, dS and rows of Q become dK, without a transposition. Tiles take
both operands whole, of many panels at once (held.py).
"""

from __future__ import annotations

from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.band import Seen
from flashtile.kernels.cpu.steps.differentiate import TILE_ROWS, weight_at
from flashtile.kernels.cpu.steps.held import ENTRY, OUTPUT_ROWS, WEIGHTS, Held
from flashtile.kernels.cpu.steps.pack import read
from flashtile.kernels.cpu.steps.product import outer
from flashtile.kernels.cpu.steps.range import Range
from flashtile.llvm.blocks import WORD
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.lines import Lines, Rows, Words
from flashtile.llvm.products.tiles import Tiles
from flashtile.llvm.routines import Routine


def tile_rows(c: Config, width: int) -> int:
    """Rows of a tile of so many registers of columns: as many sums as the other products keep."""
    return min(TILE_ROWS, c.isa.rows * c.isa.vectors // width)


def widest(c: Config) -> int:
    """The most registers of columns: those of a head size of 64 at once where 32 registers hold the sums."""
    return c.isa.vectors + (c.isa.rows * c.isa.vectors > 16)


def emit_exchange(module: Module, c: Config) -> Routine:
    """``count`` lines against the rows of ``lanes`` lanes, for ``columns`` registers of columns. Which lanes of a line
    are 0 its band says; a program's mask may show any."""
    tiles = [_emit_tile(module, c, n + 1) for n in range(widest(c))]
    kinds: dict[str, Any] = {"sums": Words.kind(), "lines": Lines.of(c.line), "rows": Words.kind()}
    f = Routine(module, "exchange", **kinds, columns="i64", lanes="i64", seen=Seen.kind())
    sums, lines, rows, columns, lanes, seen = f.parameters
    above, below = (f.cast("sext", x, "i64") - seen.some_from for x in (seen.above, seen.below))

    def stretch(width: int, column: Value) -> None:
        """One register of columns, or a few."""
        n = tile_rows(c, width)
        with f.range(0, seen.count, n) as row:
            first, stop = f.const("i64", 0), lanes
            if not c.masked:
                first = f.maximum(row - above, 0) // c.per_word
                stop = f.minimum(row + n - below, lanes)
            tiles[width - 1](
                f,
                sums=Words(sums.row(row).at + column * c.register, sums.stride),
                lines=lines.line(row),
                rows=Words(rows.at + column * c.register, rows.stride),
                first=first,
                stop=(stop + (c.per_word - 1)) // c.per_word,
            )

    def dispatch(width: Value, column: Value, n: int) -> None:
        if n == 1:
            stretch(1, column)
        else:
            f.either(width.eq(n), lambda: stretch(n, column), lambda: dispatch(width, column, n - 1))

    def next_columns(at: list[Value]) -> list[Value]:
        left = columns - at[0]
        pieces = (left + (widest(c) - 1)) // widest(c)
        width = (left + pieces - 1) // pieces  # 5 registers are 3 and 2, not 4 and 1
        dispatch(width, at[0], widest(c))
        return [at[0] + width]

    f.repeat([f.const("i64", 0)], lambda at: at[0] < columns, next_columns)
    f.ret()
    return f


def _emit_tile(module: Module, c: Config, width: int) -> Routine:
    """One tile, over the words [first, stop) of each line. Its sums are accumulated separately, as in accumulate.py."""
    kinds: dict[str, Any] = {"sums": Words.kind(), "lines": Lines.of(c.line), "rows": Words.kind()}
    f = Routine(module, f"exchange_{width}", **kinds, first="i64", stop="i64")
    sums, lines, rows, first, stop = f.parameters
    live, count = range(width), tile_rows(c, width)

    def left(word: Value, row: int) -> Value:
        return f.load(c.word, lines.at + word * c.size + row * c.line.bytes, align=c.size)

    def right(word: Value, register: int) -> Value:
        return f.load(c.words, rows.row(word).at + register * c.register, align=1)

    def step(word: Value, totals: list[Value]) -> list[Value]:
        return outer(f, c, word, left, right, totals, live)

    def steps(word: Value, totals: list[Value]) -> list[Value]:
        for u in range(c.unroll):
            totals = step(word + u, totals)
        return totals

    whole = stop - f.maximum(stop - first, 0) % c.unroll
    totals = f.fold(first, whole, c.unroll, [f.const(c.vector, 0.0)] * (count * width), steps)
    totals = f.fold(whole, stop, 1, totals, step)
    for row in range(count):
        target = sums.row(row).at
        for register in live:
            at = target + register * c.register
            f.store(f.load(c.vector, at, align=c.register) + totals[row * width + register], at, align=c.register)
    f.ret()
    return f


def emit_exchange_held(module: Module, c: Config) -> Routine:
    """The same where sums land in memory: what the panels of a span hold, by each strip's list, against their rows, in
    words along columns, so many bytes apart. ``which``: WEIGHTS against rows of dO, or SLOPES against rows of Q."""
    tiles = [_emit_held_tile(module, c, n + 1) for n in range(c.registers)]
    f = Routine(module, "exchange", held=Held.of(c), which="i64", sums=Words.kind(), stride="i64", columns="i64")
    held, which, sums, stride, columns = f.parameters
    with f.range(0, Held.strips(c)) as strip:
        count, entries = held.count(strip), held.list_of(strip) + which * WORD

        def tile(width: int, column: Value, strip: Value = strip, **of_strip: Value) -> None:
            at = column * c.register
            target = Words(sums.row(strip * c.rows).at + at, sums.stride)
            tiles[width - 1](f, **of_strip, sums=target, stride=stride, column=at)

        of_strip = {"entries": entries, "count": count}
        if c.product.parts > 1:
            of_strip["part"] = columns * c.register
        with f.when(count > 0):
            whole = columns // c.registers * c.registers
            with f.range(0, whole, c.registers) as column:
                tile(c.registers, column, **of_strip)
            with f.range(whole, columns) as column:
                tile(1, column, **of_strip)
    f.ret()
    return f


def _emit_held_tile(module: Module, c: Config, width: int) -> Routine:
    """A strip's tile of so many registers of columns, from ``column`` bytes on: each panel is one step of its depth.
    ``part``: bytes between the parts of its rows, where they have several."""
    assert isinstance(c.product, Tiles)
    kinds: dict[str, Any] = {"sums": Words.kind(), "entries": "ptr"}
    kinds |= dict.fromkeys(("count", "stride", "column", *(["part"] if c.product.parts > 1 else [])), "i64")
    f = Routine(module, f"exchange_{width}", **kinds)
    sums, entries, count, stride, column, *part = f.parameters
    words = c.product.words
    lines = f.const("i64", c.weight_line.bytes)

    def step(word: Value) -> tuple[Words, Words]:
        entry = entries + word * (ENTRY // words)
        left, right = (f.load("ptr", entry + n * WORD) for n in (0, OUTPUT_ROWS - WEIGHTS))
        return Words(left, lines), Words(right + column, stride)

    bytes_ = (f.const("i64", c.held_part), part[0]) if part else None
    c.product.multiply(f, c.isa, step, sums, count * words, width, apart=bytes_, onto=True, streamed="right")
    f.ret()
    return f


def emit_put_back(module: Module, c: Config) -> Routine:
    """What ``rows`` hold that is not finite, where a line's weight is not 0, or -0, which was dropped: the exchange met
    0 in its place. Of the ``count`` lines the first register of lanes may see ``reach``; further ones are not there."""
    kinds: dict[str, Any] = {"sums": Words.kind(), "lines": Lines.of(c.weight_line), "rows": Rows.kind()}
    f = Routine(module, "put_back", **kinds, count="i64", reach="i64")
    sums, lines, rows, count, reach = f.parameters
    with f.range(0, rows.count) as lane, f.range(0, rows.size) as column:
        value = read(f, c, rows.at + (lane * rows.stride + column * rows.step))
        there = f.minimum(reach + lane // c.lanes * c.lanes, count)
        unheld = (value * 0.0).isnan()
        if c.lands_in_memory:
            unheld = f.select(Range.finite(f).holds(value), f.const("i1", 0), f.const("i1", 1))
        with f.when(unheld), f.range(0, there) as row:
            weight = weight_at(f, c, lines, row, lane)
            with f.when(f.bitcast(weight, f"i{8 * c.size}").ne(0)):
                at = sums.row(row).at + column * c.size
                f.store(f.load(c.acc, at) + weight * value, at)
    f.ret()
    return f
