"""Pairs of a row and a lane that the parts of the backward's products cannot hold: what they add, by multiply-adds.

A row is such a one where its K or V is (unheld.py), a lane where its Q, dO or delta is. S and dP of its pairs have been
computed by multiply-adds; here their weights and dS, which those of other pairs need not wait for, are taken out of
what tiles read and joined to dQ, dK and dV from the elements as they lie. So it is in the backward as in the forward:
what a row does not see changes no bit of it, and a pair that is hidden, whose weight and dS are 0, adds nothing.
"""

from __future__ import annotations

from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.pack import read
from flashtile.kernels.cpu.steps.range import any_lane
from flashtile.kernels.cpu.steps.unheld import Unheld
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Lines, Rows, Scores, Sums, Weights, Words
from flashtile.llvm.routines import Routine
from flashtile.llvm.types import lanes as lanes_of
from flashtile.llvm.types import vector

_UPPER = -(1 << 16)  # of a word, as a signed literal


def emit_add_apart(module: Module, c: Config) -> Routine:
    """The pairs of the rows [first, last) of a block, the first on the first line, with the ``count`` lanes of a panel:
    weights and dS as lines, dS also as words of two lines, from which they are taken out. ``unheld``: of K and Q;
    ``queries``, ``outputs``: Q and dO as they lie."""
    kinds: dict[str, Any] = {
        "unheld": Unheld.kind(),
        **dict.fromkeys(("first", "last", "count"), "i64"),
        **dict.fromkeys(("weights", "slopes"), Scores.of(c.weight_line)),
        "words": Weights.of(c.word_line),
        "dq": Sums.of(c.line),
        **dict.fromkeys(("dk", "dv"), Words.kind()),
        **dict.fromkeys(("queries", "outputs"), Rows.kind()),
    }
    f = Routine(module, "add_apart", **kinds)
    unheld, first, last, count, weights, slopes, words, dq, dk, dv, queries, outputs = f.parameters
    flags = [Lines(unheld.lanes, c.word_line).load(0, j) for j in range(c.registers)]
    some = any_lane(f, (flags[0] | flags[1]).ne(0))
    own = [f.shuffle(flags[0], flags[1], range(odd, c.panel, 2)).ne(0) for odd in range(2)]
    with f.range(first, last) as row:
        here = f.load("i32", unheld.keys + row * 4).ne(0)
        with f.when(here | some):
            line = row - first
            _to_lanes(f, c, unheld, row, [x | f.splat(here, c.lanes) for x in own], words, line, dq)
            with f.range(0, count) as lane, f.when(here | f.load("i32", unheld.lanes + lane * 4).ne(0)):
                for lines, rows, sums in ((slopes, queries, dk), (weights, outputs, dv)):
                    found = _taken_out(f, c, lines, line, lane)
                    with f.when(f.bitcast(found, "i32").ne(0)):
                        _to_row(f, c, found, rows, lane, sums.row(row).at)
    f.ret()
    return f


def _total(f: Function, parts: list[Value]) -> Value:
    """The number that is the sum of parts; its first where that is not finite, and the others NaN."""
    *rest, smallest = parts
    total = smallest
    for part in reversed(rest):
        total = part + total
    return f.select((parts[0] * 0.0).eq(0.0), total, parts[0])


def _to_lanes(
    f: Function,
    c: Config,
    unheld: Unheld,
    row: Value,
    pairs: list[Value],
    words: Weights,
    line: Value,
    dq: Sums,
) -> None:
    """dS of a row times its K to dQ, for the even lanes and the odd ones that are such pairs."""
    upper = (line & 1).ne(0)  # of a word is this line's, else the lower half
    shift = f.splat(f.select(upper, f.const("i32", 0), f.const("i32", 16)), c.lanes)
    others = f.splat(f.select(upper, f.const("i32", ~_UPPER), f.const("i32", _UPPER)), c.lanes)
    slopes, added = [], []
    for odd, pair in enumerate(pairs):
        parts = []
        for part in range(c.product.parts):
            of_part = words.moved(part * c.pairs_part)
            word = of_part.load(line // c.per_word, odd)
            parts.append(f.bitcast((word << shift) & _UPPER, "float"))
            of_part.store(f.select(pair, word & others, word), line // c.per_word, odd)
        slopes.append(f.select(pair, _total(f, parts), 0.0))
        added.append(slopes[-1].ne(0.0) | slopes[-1].isnan())
    with f.when(any_lane(f, added[0] | added[1])), f.range(0, unheld.size) as column:
        key = read(f, c, unheld.at + (row * unheld.stride + column * unheld.step))
        for odd, slope in enumerate(slopes):
            old = dq.load(column, odd)
            new = c.isa.multiply_add(f, f.splat(key, c.lanes), slope, old)
            dq.store(f.select(added[odd], new, old), column, odd)


def _taken_out(f: Function, c: Config, lines: Lines, line: Value, lane: Value) -> Value:
    """What a line has for a lane, where 0 is left."""
    parts = []
    for part in range(c.product.parts):
        at = lines.moved(part * c.held_part).line(line).lane(lane).at
        parts.append(c.isa.widen(f, f.load("i16", at), "bfloat"))
        f.store(f.const("i16", 0), at)
    return _total(f, parts)


def _to_row(f: Function, c: Config, factor: Value, rows: Rows, lane: Value, sums: Value) -> None:
    """A lane's row times a factor, to a row of sums."""
    chunks = f.select(rows.adjacent(c.element), rows.size // c.lanes * c.lanes, f.const("i64", 0))
    source = rows.at + lane * rows.stride

    def add(column: Value, kind: str, times: Value) -> None:
        at = sums + column * c.size
        value = read(f, c, source + column * rows.step, lanes_of(kind) if kind[0] == "<" else 1)
        f.store(c.isa.multiply_add(f, value, times, f.load(kind, at)), at)

    with f.range(0, chunks, c.lanes) as column:
        add(column, vector(c.lanes, c.acc), f.splat(factor, c.lanes))
    with f.range(chunks, rows.size) as column:
        add(column, c.acc, factor)
