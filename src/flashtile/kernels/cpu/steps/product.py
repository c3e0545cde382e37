"""The score product: lines of scores, S[row][lane] = sum over depth of rows[row][depth] * panel[depth][lane].

A row's words are broadcast from memory as they lie, so rows need no packing; lanes were transposed once (pack.py). A
tile of a few rows by the panel's registers fills the register file; the contraction is the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.scratch import Work
from flashtile.kernels.cpu.steps.band import Band
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Lines, Panel, Scores, Words
from flashtile.llvm.products.tiles import Tiles
from flashtile.llvm.routines import Operand, Routine

# Words of the left operand for row r of a tile, and of the right one for register j, at a step of depth.
Left = Callable[[Value, int], Value]
Right = Callable[[Value, int], Value]


def outer(
    f: Function, c: Config, depth: Value, left: Left, right: Right, sums: Sequence[Value], live: range
) -> list[Value]:
    """One step of depth of a tile: sums[row][j] += left(row) * right(j), row by row, for the registers ``live``."""
    lines = [right(depth, j) for j in live]
    found = []
    for row in range(len(sums) // len(live)):
        word = f.splat(left(depth, row), c.lanes)
        of_row = sums[row * len(live) : (row + 1) * len(live)]
        found += [
            c.product.multiply_add(f, c.isa, total, word, line) for total, line in zip(of_row, lines, strict=True)
        ]
    return found


def emit_product(
    module: Module, c: Config, width: int, name: str, *, edge: bool = False, first: int = 0, top: bool = True
) -> Routine:
    """One tile of the scores of a panel ``width`` registers wide, from a line on, and the running maximum (unless the
    score program keeps it later: ``top``).

    An ``edge`` tile applies a band, and hides the rows after ``last``, which are readable memory. Registers before
    ``first`` are known to be hidden: their scores are -inf, uncomputed.
    """
    kinds: dict[str, Any] = {
        "work": Work.of(c),
        "panel": Panel.of(c.word_line),
        "rows": Words.kind(),
        "depth": "i64",
        "line": "i64",
    }
    edges: dict[str, Any] = {"last": "i64", "band": Band.kind()} if edge else {}
    f = Routine(module, f"scores_{width}_{name}_{first}", **kinds, **edges)
    work, panel, rows, depth, line, *edge_of = f.parameters
    live = range(first, width)
    scores, tops, hidden = work.scores.line(line), work.tops, f.const(c.vector, -math.inf)
    if c.across:
        _contract_across(f, c, panel, rows, depth, live, scores)
        sums = [scores.load(r, j) for r in range(c.rows) for j in live]
    else:
        sums = _contraction(f, c, panel, rows, depth, live)
    for r in range(c.rows):
        for n, j in enumerate(live):
            at = r * len(live) + n
            if edge:
                last, band = edge_of
                sums[at] = f.select(band.tile_sees(c, r, j, last), sums[at], hidden)
            scores.store(sums[at], r, j)
        for j in range(first):
            scores.store(hidden, r, j)
    for n, j in enumerate(live if top else ()):
        largest = tops.load(0, j)
        for r in range(c.rows):
            largest = f.maximum(sums[r * len(live) + n], largest)
        tops.store(largest, 0, j)
    f.ret()
    return f


@dataclass(frozen=True)
class Apart(Operand):
    """Bytes between the parts of either operand, where a product takes several."""

    WORDS: ClassVar = {"left": "i64", "right": "i64"}
    left: Value
    right: Value


def apart(c: Config, left: Value, right: Value) -> dict[str, Apart]:
    """The further argument of `emit_multiply`'s functions, where they take it."""
    return {"apart": Apart(left, right)} if c.product.parts > 1 else {}


def factor_kinds(c: Config) -> dict[str, Any]:
    """What `emit_multiply`'s functions take."""
    kinds: dict[str, Any] = {"left": Words.kind(), "right": Lines.of(c.word_line), "out": Lines.of(c.line)}
    return {**kinds, "depth": "i64", **({"apart": Apart.kind()} if c.product.parts > 1 else {})}


def emit_multiply(module: Module, c: Config, width: int, *, onto: bool = False) -> Routine:
    """A tile of a product whose sums land in memory, for a panel ``width`` registers wide: of every product that has
    the panel's lanes. ``onto``: sums begin with what is there."""
    f = Routine(module, f"{'add_product' if onto else 'multiply'}_{width}", **factor_kinds(c))
    left, right, out, depth, *between = f.parameters
    multiply(f, c, width, left, right, out, depth, *between, onto=onto)
    f.ret()
    return f


def multiply(
    f: Function,
    c: Config,
    width: int,
    left: Words,
    right: Lines,
    out: Lines,
    depth: Value,
    *between: Apart,
    onto: bool = False,
    beside: Callable[[Value, int], None] | None = None,
) -> None:
    """What `emit_multiply`'s functions do."""
    assert isinstance(c.product, Tiles)
    line = f.const("i64", c.line.bytes)

    def step(word: Value) -> tuple[Words, Words]:
        return Words(left.at + word * c.size, left.stride), Words(right.place(word), line)

    bytes_ = (between[0].left, between[0].right) if between else None
    lines = Words(out.at, line)
    c.product.multiply(f, c.isa, step, lines, depth, width, apart=bytes_, onto=onto, beside=beside)


def _contraction(f: Function, c: Config, panel: Panel, rows: Words, depth: Value, live: range) -> list[Value]:
    """The sums of a tile, row by row."""
    starts = [rows.at]
    while len(starts) < c.rows:
        starts.append(starts[-1] + rows.stride)

    def left(d: Value, row: int) -> Value:
        return f.load(c.word, starts[row] + d * c.size, align=1)

    def step(d: Value, sums: list[Value]) -> list[Value]:
        return outer(f, c, d, left, panel.load, sums, live)

    zero = [f.const(c.vector, 0.0)] * (c.rows * len(live))
    unroll = c.unroll if c.isa.fused else 2 * c.unroll

    def steps(d: Value, sums: list[Value]) -> list[Value]:
        # Without a fused multiply-add every product is rounded, too. Some summed first meet the large sum less often,
        # for the same instructions.
        short = sums if c.isa.fused else zero
        for u in range(unroll):
            short = step(d + u, short)
        return short if c.isa.fused else [a + b for a, b in zip(sums, short, strict=True)]

    whole = depth - depth % unroll
    sums = f.fold(0, whole, unroll, zero, steps)
    return f.fold(whole, depth, 1, sums, step)


def _contract_across(
    f: Function, c: Config, panel: Panel, rows: Words, depth: Value, live: range, scores: Scores
) -> None:
    """The same sums, stored, in the order of passes/decode, whose lanes run over the depth: a sum for each lane, of the
    words that its slots have there, and its tree over lanes (scores.add_across).

    A weight is as far off as its score is from the one that lse was made with, and of few rows nothing averages it out.
    """
    n, zero = c.lanes, f.const(c.vector, 0.0)
    whole, last = depth // n * n, f.maximum(depth - n, 0)  # the word that the last slot begins with, if it is not whole

    with f.range(0, c.rows) as row:
        start = rows.row(row).at

        def word(d: Value, start: Value = start) -> Value:
            return f.load(c.word, start + d * c.size, align=1)

        for j in live:

            def slot(first: Value, sums: list[Value], j: int = j) -> list[Value]:
                pairs = ((f.splat(word(first + t), n), panel.load(first + t, j)) for t in range(n))
                return [c.product.multiply_add(f, c.isa, x, *pair) for x, pair in zip(sums, pairs, strict=True)]

            def rest(t: Value, sums: list[Value], j: int = j) -> list[Value]:
                """The sums take turns: all have had one in the end."""
                first, *others = sums
                counted, d = (last + t >= whole) & (last + t < depth), f.minimum(last + t, depth - 1)
                pair = (f.select(counted, x, f.const(x.type, 0)) for x in (f.splat(word(d), n), panel.load(d, j)))
                return [*others, c.product.multiply_add(f, c.isa, first, *pair)]

            sums = f.fold(0, whole, n, [zero] * n, slot)
            sums = f.fold(0, f.select(whole < depth, f.const("i64", n), f.const("i64", 0)), 1, sums, rest)
            while len(sums) > 1:
                half = len(sums) // 2
                sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
            scores.store(sums[0], row, j)
