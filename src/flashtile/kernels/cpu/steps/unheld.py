"""What the parts of a product cannot hold: not finite, larger than its largest part, or so small that parts vanish.

Tiles compute with 0 in the place of such an element, and what it would have done is done by multiply-adds: scores of
its key, or of its query, are computed again, and its share of an output is added. So a row's arithmetic depends on what
the row sees, and on nothing else: a row that does not see the element keeps every bit. On data that hold none of them
all this costs is a look at each element, while it is packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.scratch import Work
from flashtile.kernels.cpu.steps.pack import read
from flashtile.kernels.cpu.steps.range import Range, any_lane
from flashtile.kernels.cpu.steps.softmax import RISE, Factors
from flashtile.kernels.cpu.steps.tiny import Tiny
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Lines, Rows, State, Sums, Weights
from flashtile.llvm.routines import Operand, Routine
from flashtile.llvm.types import vector


@dataclass(frozen=True)
class Unheld(Operand):
    """Whether a block's keys or a panel's queries hold what parts cannot, and which; the keys as they lie, and room for
    the panel in accumulators."""

    WORDS: ClassVar = {
        "found": "i64",
        "at": "ptr",
        "stride": "i64",
        "step": "i64",
        "size": "i64",
        "keys": "ptr",
        "lanes": "ptr",
        "wide": "ptr",
    }
    found: Value
    at: Value
    stride: Value
    step: Value
    size: Value
    keys: Value  # an i32 for each key of the block, not 0 where it is one
    lanes: Value  # the same for each query of the panel
    wide: Value


def emit_find(module: Module, c: Config, *, more: bool = False) -> Routine:
    """Which of ``rows``, times a factor, hold what is not in a range: an i32 each. Returns whether any does. ``more``:
    beside those that are flagged already."""
    name = "find_more_unheld" if more else "find_unheld"
    f = Routine(module, name, "i64", rows=Rows.kind(), factor=c.acc, range=Range.kind(), flags="ptr")
    rows, factor, held, flags = f.parameters
    chunks = f.select(rows.adjacent(c.element), rows.size // c.lanes * c.lanes, f.const("i64", 0))
    one, none = f.const("i32", 1), f.const("i32", 0)

    def of_row(r: Value, found: list[Value]) -> list[Value]:
        row = rows.at + r * rows.stride

        def look(column: Value, bad: list[Value], count: int) -> list[Value]:
            x = read(f, c, row + column * rows.step, count) * (f.splat(factor, count) if count > 1 else factor)
            return [f.select(held.holds(x), bad[0], f.splat(one, count) if count > 1 else one)]

        (register,) = f.fold(0, chunks, c.lanes, [f.splat(none, c.lanes)], lambda n, bad: look(n, bad, c.lanes))
        (single,) = f.fold(chunks, rows.size, 1, [none], lambda n, bad: look(n, bad, 1))
        bad = f.cast("zext", any_lane(f, register.ne(0)) | single.ne(0), "i32")
        f.store(bad | f.load("i32", flags + r * 4) if more else bad, flags + r * 4)
        return [found[0] | bad]

    (found,) = f.fold(0, rows.count, 1, [none], of_row)
    f.ret(f.cast("zext", found, "i64"))
    return f


def emit_rescore(module: Module, c: Config, width: int) -> Routine:
    """The scores of the rows [first, last) once more by multiply-adds: for every lane where the row is one of those
    that parts cannot hold, else for the lanes that are. They are raw products, the first on the first line."""
    f = Routine(module, f"rescore_{width}", work=Work.of(c), unheld=Unheld.kind(), first="i64", last="i64")
    work, unheld, first, last = f.parameters
    panel, flags = Lines(unheld.wide, c.line), Lines(unheld.lanes, c.word_line)
    own = [flags.load(0, j).ne(0) for j in range(width)]
    some = any_lane(f, own[0])
    for lanes_ in own[1:]:
        some = some | any_lane(f, lanes_)
    zero = f.const(c.vector, 0.0)
    with f.range(first, last) as row:
        here = f.load("i32", unheld.keys + row * 4).ne(0)
        with f.when(some | here):
            start = unheld.at + row * unheld.stride

            def step(d: Value, sums: list[Value], start: Value = start) -> list[Value]:
                element = f.splat(read(f, c, start + d * unheld.step), c.lanes)
                return [c.isa.multiply_add(f, element, panel.load(d, j), x) for j, x in enumerate(sums)]

            for j, score in enumerate(f.fold(0, unheld.size, 1, [zero] * width, step)):
                mine = own[j] | f.splat(here, c.lanes)
                work.scores.store(f.select(mine, score, work.scores.load(row - first, j)), row - first, j)
    f.ret()
    return f


def emit_add_unheld(module: Module, c: Config) -> Routine:
    """Weights times those values that are finite and not held, to the sums; for contain.py's are the rest. On tiles
    that add to their sums, weights times ``alpha`` (`emit_make_room`)."""
    kinds: dict[str, Any] = {"weights": Weights.of(c.word_line), "values": Rows.kind(), "sums": Sums.of(c.line)}
    if c.tiles_add:
        kinds |= {"tiny": Tiny.kind(), "alpha": Lines.of(c.line)}
    f = Routine(module, "add_unheld", **kinds)
    weights, values, sums, *rest = f.parameters
    tiny, alpha = rest[:1], rest[1:]
    held = Range.of_values(f, c)
    with f.range(0, values.count) as row:
        totals = _weights_of_row(f, c, weights, row)
        for line in alpha:
            totals = [total * line.load(0, j) for j, total in enumerate(totals)]
        with f.range(0, values.size) as column:
            value = read(f, c, values.at + (row * values.stride + column * values.step))
            unheld = f.select(held.holds(value), f.const("i1", 0), (value * 0.0).eq(0.0))
            with f.when(unheld):
                for j, total in enumerate(totals):  # where it is 0, 0 times a value would turn -0 into 0
                    old = sums.load(column, j)
                    new = c.isa.multiply_add(f, f.splat(value, c.lanes), total, old)
                    sums.store(f.select(total.ne(0.0), new, old), column, j)
                    for noted in tiny:
                        noted.note(c, j, total.ne(0.0))
    f.ret()
    return f


def _weights_of_row(f: Function, c: Config, weights: Weights, row: Value) -> list[Value]:
    """The sums of a row's parts, as numbers."""
    # A word holds two rows: the second one's bits are in their place, the first one's 16 further down.
    shift = f.splat(f.select((row & 1).ne(0), f.const("i32", 0), f.const("i32", 16)), c.lanes)
    mask, totals = f.const(vector(c.lanes, "i32"), -(1 << 16)), [f.const(c.vector, 0.0)] * c.registers
    for part in reversed(range(c.product.parts)):
        for j in range(c.registers):
            word = weights.moved(part * c.weights_part).load(row // c.per_word, j)
            totals[j] = f.bitcast((word << shift) & mask, "float") + totals[j]
    return totals


def emit_make_room(module: Module, c: Config) -> Routine:
    """Before `emit_add_unheld` on tiles that add to their sums, where weights may be 2^RISE: by how much (``alpha``)
    those of a lane that sees a value larger than what is held are to be less. Its maximum is RISE octaves more then,
    its sum of weights less.

    Where that sum is 1 at most, so is what a large value adds to.
    """
    kinds: dict[str, Any] = {"weights": Weights.of(c.word_line), "values": Rows.kind(), "state": State.of(c.line)}
    f = Routine(module, "make_room", **kinds, alpha=Lines.of(c.line), factors=Factors.of(c))
    weights, values, state, alpha, factors = f.parameters
    held, none = Range.of_values(f, c), f.const(c.vector, 0.0)
    alpha.fill(0.0, 1)  # for now the weights that large values meet
    with f.range(0, values.count) as row:

        def look(column: Value, found: list[Value], row: Value = row) -> list[Value]:
            value = read(f, c, values.at + (row * values.stride + column * values.step))
            return [found[0] | held.beyond(value)]

        (large,) = f.fold(0, values.size, 1, [f.const("i1", 0)], look)
        with f.when(large):
            for j, total in enumerate(_weights_of_row(f, c, weights, row)):
                alpha.store(alpha.load(0, j) + total, 0, j)
    # Of a scale that is nearly 0 nothing is said: scores would have to be larger than they can be to rise as far.
    raised = f.splat(f.select(factors.high > 2.0**-96, f.const(c.acc, RISE) / factors.high, 0.0), c.lanes)
    for j in range(c.registers):
        old, total = state.load(0, j), state.load(1, j)
        needs = alpha.load(0, j).ne(0.0) & (total > 1.0)
        new = old + f.select(needs, raised, none)
        factor = f.select(needs, factors.weights(c)(old - new), 1.0)
        state.store(new, 0, j)
        state.store(total * factor, 1, j)
        alpha.store(factor, 0, j)
    f.ret()
    return f
