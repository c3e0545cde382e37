"""The backward of one panel against one block: two products, dS, and three products that are summed.

Nothing here says query or key: lanes and rows. In the backward as in the forward, lanes are queries, rows are keys:

    scores(work, panel, rows, depth, seen)                          # S = rows panel, banded, through the program
    slopes(...)                                                     # dP: rows of V, panel of dO
    draw(slopes, kept, draw, ...)                                   # dropout, if there is any: zeros in dP
    differentiate(scores, slopes, words, state, count, ...)         # P and dS, from here on as words of products;
                                                                    # a score program has derivative.py in its place
    drop(weights, kept, ...)                                        # dropout: zeros in P
    exchange(sums, lines, rows, ...)                                # dV += P dO, dK += dS Q: sums of rows
    accumulate(sums, alpha, rows, weights, ...)                     # dQ^T += K^T dS: sums of lanes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.panel import BlockScores, lay_out_dense, stretches_of
from flashtile.kernels.cpu.readings import readings
from flashtile.kernels.cpu.scratch import Work
from flashtile.kernels.cpu.steps.accumulate import emit_accumulate
from flashtile.kernels.cpu.steps.band import Seen
from flashtile.kernels.cpu.steps.dense import emit_dense
from flashtile.kernels.cpu.steps.derivative import emit_derivative
from flashtile.kernels.cpu.steps.differentiate import RowState, clear_rest, emit_differentiate
from flashtile.kernels.cpu.steps.exchange import emit_exchange, emit_put_back
from flashtile.kernels.cpu.steps.keep import Draw, Kept, emit_draw, emit_drop
from flashtile.kernels.cpu.steps.product import emit_product
from flashtile.kernels.cpu.steps.softmax import Factors
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Lines, Panel, Rows, Sums, Weights, Words
from flashtile.llvm.routines import Operand, Routine


@dataclass(frozen=True)
class Wanted(Operand):
    """Which gradients are computed: each not 0 if so."""

    WORDS: ClassVar = {"q": "i64", "k": "i64", "v": "i64"}
    q: Value
    k: Value
    v: Value


@dataclass(frozen=True)
class Sizes(Operand):
    """Depths of the two products that contract head sizes, in words; columns of dQ; registers of columns of dK, dV."""

    WORDS: ClassVar = {
        "depth": "i64",
        "value_depth": "i64",
        "columns": "i64",
        "key_registers": "i64",
        "value_registers": "i64",
    }
    depth: Value
    value_depth: Value
    columns: Value
    key_registers: Value
    value_registers: Value


def emit_visits(module: Module, c: Config) -> list[Routine]:
    """The functions for panels of up to 1, 2, ... registers of lanes."""
    shared = emit_exchange(module, c), emit_put_back(module, c)
    dense = [emit_dense(module, c, n) for n in range(len(c.code.dense_loads) if c.code else 0)]
    return [_emit_visit(module, c, n + 1, *shared, dense) for n in range(c.isa.vectors)]


def _emit_visit(
    module: Module, c: Config, width: int, exchange: Routine, put_back: Routine, dense: list[Routine]
) -> Routine:
    weights_and_slopes = (_Derived if c.scored else _Plain)(module, c, width)
    accumulate = emit_accumulate(module, c, width)
    if c.dropout:
        draw, drop = emit_draw(module, c, width), emit_drop(module, c, width)
    kinds: dict[str, Any] = {
        "work": Work.of(c),
        "second": Work.of(c),
        "words": Weights.of(c.word_line),
        "queries": Panel.of(c.word_line),
        "outputs": Panel.of(c.word_line),
        "state": RowState.of(c.line),
        "keys": Words.kind(),
        "values": Words.kind(),
        "key_columns": Words.kind(),
        "query_rows": Words.kind(),
        "output_rows": Words.kind(),
        "dq": Sums.of(c.line),
        "dk": Words.kind(),
        "dv": Words.kind(),
        "broken": Rows.kind(),
        "sizes": Sizes.kind(),
        "wanted": Wanted.kind(),
        "seen": Seen.kind(),
    }
    dropout: dict[str, Any] = {"draw": Draw.kind(), "kept": Kept.of(c), "inverse": c.acc} if c.dropout else {}
    f = Routine(module, f"visit_{width}", **kinds, lanes="i64", dense="i64", factors=Factors.of(c), **dropout)
    work, second, words, queries, outputs, state, keys, values, *others = f.parameters
    key_columns, query_rows, output_rows, dq, dk, dv, broken, sizes, wanted, seen, *others = others
    lanes, dense_at, factors, *drawn = others
    count, first = seen.count, seen.some_from
    reach = count if c.masked else f.cast("sext", seen.above, "i64") + c.lanes - first
    sloped = (wanted.q | wanted.k).ne(0) if not c.arrays else f.const("i1", 1)
    lay_out_dense(f, c, dense, work, dense_at, seen, lanes)
    weights_and_slopes.products(f, work, queries, keys, sizes.depth, seen)
    with f.when(sloped):
        weights_and_slopes.slopes.call(f, second, outputs, values, sizes.value_depth, seen)
    weights, differences = work.scores, second.scores
    among = {"count": count, "reach": reach}
    if c.dropout:
        place, kept, inverse = drawn
        draw(f, slopes=differences, kept=kept, draw=place.further(first), inverse=inverse, **among)
    weights_and_slopes.differentiate(f, work, second, words, state, seen, reach, factors)
    across = {"lanes": lanes, "seen": seen}
    with f.when(wanted.v.ne(0)):
        if c.dropout:
            drop(f, weights=weights, kept=kept, **among)
        lines, sums = Lines(weights.at, c.line), dv.row(first)
        exchange(f, sums=sums, lines=lines, rows=output_rows, columns=sizes.value_registers, **across)
        with f.when(broken.count > 0):
            put_back(f, sums=sums, lines=lines, rows=broken, count=count, reach=reach)
    with f.when(wanted.k.ne(0)):
        lines, sums = Lines(differences.at, c.line), dk.row(first)
        exchange(f, sums=sums, lines=lines, rows=query_rows, columns=sizes.key_registers, **across)
    with f.when(wanted.q.ne(0)):
        start = key_columns.row(first // c.per_word)
        with f.range(0, sizes.columns, c.rows) as column:
            accumulate(
                f,
                sums=dq.line(column),
                alpha=work.alpha,  # of ones: nothing is rescaled
                rows=Words(start.at + column * c.size, start.stride),
                weights=words,
                count=count,
                reach=reach,
            )
    f.ret()
    return f


class _Plain:
    """Scores that no program changes: banded or masked, they are P and dS at once."""

    def __init__(self, module: Module, c: Config, width: int) -> None:
        self.scores, self.slopes = BlockScores(module, c, width), _Slopes(module, c, width)
        self.products, self.pass_ = self.scores.call, emit_differentiate(module, c, width)

    def differentiate(
        self,
        f: Function,
        work: Work,
        second: Work,
        words: Weights,
        state: RowState,
        seen: Seen,
        reach: Value,
        factors: Factors,
    ) -> None:
        lines = {"scores": work.scores, "slopes": second.scores, "words": words}
        self.pass_(f, **lines, state=state, count=seen.count, reach=reach, factors=factors)


class _Derived:
    """Scores that a program changes: raw products, then the pass of derivative.py."""

    def __init__(self, module: Module, c: Config, width: int) -> None:
        self.c, self.width, self.slopes = c, width, _Slopes(module, c, width)
        self.raw = emit_product(module, c, width, "raw", top=False)
        reads = readings(c.code, c.arrays)
        self.passes = {edge: emit_derivative(module, c, width, reads, edge=edge) for edge in (False, True)}

    def products(self, f: Function, work: Work, panel: Panel, rows: Words, depth: Value, seen: Seen) -> None:
        with f.range(seen.some_from, seen.some_to, self.c.rows) as row:
            self.raw(f, work=work, panel=panel, rows=rows.row(row), depth=depth, line=row - seen.some_from)

    def differentiate(
        self,
        f: Function,
        work: Work,
        second: Work,
        words: Weights,
        state: RowState,
        seen: Seen,
        reach: Value,
        factors: Factors,
    ) -> None:
        c, k = self.c, self.c.per_word
        known = {"work": work, "slopes": second.scores, "words": words, "state": state, "factors": factors}
        for first, last, edge in stretches_of(f, c, seen):
            with f.when(first < last):
                self.passes[edge](f, **known, first=first, last=last, origin=seen.some_from, band=seen.band)
        whole = (seen.count + (k - 1)) // k * k
        for lines in (work.scores, second.scores):
            clear_rest(f, c, self.width, lines, whole)


class _Slopes:
    """The functions that fill dP of a block, of which nothing is hidden yet: that is for differentiate.py."""

    def __init__(self, module: Module, c: Config, width: int) -> None:
        self.c = c
        firsts = range(1 if c.masked else width)
        self.tiles = [emit_product(module, c, width, "slopes", first=first, top=False) for first in firsts]

    def call(self, f: Function, work: Work, panel: Panel, rows: Words, depth: Value, seen: Seen) -> None:
        c = self.c
        with f.range(seen.some_from, seen.some_to, c.rows) as row:
            line = row - seen.some_from
            arguments = {"work": work, "panel": panel, "rows": rows.row(row), "depth": depth, "line": line}
            above = seen.above - f.cast("trunc", row, "i32")

            def skip(first: int) -> None:
                """The variant that leaves out every register none of whose lanes sees even the tile's first row."""
                if first == 0:
                    self.tiles[0](f, **arguments)
                else:
                    hidden = above < -(first * c.lanes - 1)
                    f.either(hidden, lambda: self.tiles[first](f, **arguments), lambda: skip(first - 1))

            skip(len(self.tiles) - 1)
