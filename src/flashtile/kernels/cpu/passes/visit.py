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
from types import SimpleNamespace
from typing import Any, ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.panel import BlockScores, lay_out_dense, stretches_of
from flashtile.kernels.cpu.readings import readings
from flashtile.kernels.cpu.scratch import Work
from flashtile.kernels.cpu.steps.accumulate import emit_accumulate
from flashtile.kernels.cpu.steps.band import Seen
from flashtile.kernels.cpu.steps.dense import emit_dense
from flashtile.kernels.cpu.steps.derivative import emit_derivative
from flashtile.kernels.cpu.steps.differentiate import RowState, clear_lanes, clear_lines, clear_rest, emit_differentiate
from flashtile.kernels.cpu.steps.exchange import emit_exchange, emit_put_back
from flashtile.kernels.cpu.steps.held import Held
from flashtile.kernels.cpu.steps.keep import Draw, Kept, emit_draw, emit_drop
from flashtile.kernels.cpu.steps.product import emit_multiply, emit_product
from flashtile.kernels.cpu.steps.softmax import Factors
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Lines, Panel, Rows, Scores, Sums, Weights, Words
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


@dataclass(frozen=True)
class _Shared:
    """What the visits of panels of every width call: ``exchange`` or, where products land in memory, ``add_product``,
    that of dQ: of both registers of words, for even lanes and odd ones, however few lanes there are."""

    exchange: Routine | None
    add_product: Routine | None
    put_back: Routine
    dense: list[Routine]


def emit_visits(module: Module, c: Config) -> list[Routine]:
    """The functions for panels of up to 1, 2, ... registers of lanes."""
    shared = _Shared(
        None if c.lands_in_memory else emit_exchange(module, c),
        emit_multiply(module, c, c.registers, onto=True) if c.lands_in_memory else None,
        emit_put_back(module, c),
        [emit_dense(module, c, n) for n in range(len(c.code.dense_loads) if c.code else 0)],
    )
    return [_emit_visit(module, c, n + 1, shared) for n in range(c.registers)]


def _kinds(c: Config) -> dict[str, Any]:
    """The parameters of a visit."""
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
        "lanes": "i64",
        "dense": "i64",
        "factors": Factors.of(c),
    }
    if c.dropout:
        kinds |= {"draw": Draw.kind(), "kept": Kept.of(c), "inverse": c.acc}
    if c.lands_in_memory:
        kinds |= {"held": Held.of(c), "number": "i64"}
    return kinds


def _emit_visit(module: Module, c: Config, width: int, shared: _Shared) -> Routine:
    exchange, put_back = shared.exchange, shared.put_back
    weights_and_slopes = (_Landed if c.lands_in_memory else _Derived if c.scored else _Plain)(module, c, width)
    add_lanes = _AddLanes(module, c, width, shared.add_product)
    if c.dropout:
        draw, drop = emit_draw(module, c, width), emit_drop(module, c, width)
    f = Routine(module, f"visit_{width}", **_kinds(c))
    v = SimpleNamespace(**dict(zip(f.kinds, f.parameters, strict=True)))
    seen, count, first = v.seen, v.seen.count, v.seen.some_from
    reach = count
    if not (c.masked or c.lands_in_memory):
        reach = f.cast("sext", seen.above, "i64") + c.lanes - first
    sloped = (v.wanted.q | v.wanted.k).ne(0) if not c.arrays else f.const("i1", 1)
    lay_out_dense(f, c, shared.dense, v.work, v.dense, seen, v.lanes)
    weights_and_slopes.products(f, v.work, v.queries, v.keys, v.sizes.depth, seen)
    with f.when(sloped):
        weights_and_slopes.slopes.call(f, v.second, v.outputs, v.values, v.sizes.value_depth, seen)
    weights, differences = weights_and_slopes.lines(v)
    among = {"count": count, "reach": reach}
    if c.dropout:
        draw(f, slopes=v.second.scores, kept=v.kept, draw=v.draw.further(first), inverse=v.inverse, **among)
    weights_and_slopes.differentiate(f, v, reach)
    across = {"lanes": v.lanes, "seen": seen}
    with f.when(v.wanted.v.ne(0)):
        if c.dropout:
            drop(f, weights=weights, kept=v.kept, **among)
        lines, sums = Lines(weights.at, weights.shape), v.dv.row(first)
        if exchange:
            exchange(f, sums=sums, lines=lines, rows=v.output_rows, columns=v.sizes.value_registers, **across)
        with f.when(v.broken.count > 0):
            put_back(f, sums=sums, lines=lines, rows=v.broken, **among)
    if exchange:
        with f.when(v.wanted.k.ne(0)):
            lines, sums = Lines(differences.at, differences.shape), v.dk.row(first)
            exchange(f, sums=sums, lines=lines, rows=v.query_rows, columns=v.sizes.key_registers, **across)
    else:
        v.held.note(v.number, first, seen.some_to, v.output_rows.at, v.query_rows.at)
    with f.when(v.wanted.q.ne(0)):
        add_lanes.call(f, v, **among)
    f.ret()
    return f


class _AddLanes:
    """dQ: sums of lanes, of all rows that the panel sees."""

    def __init__(self, module: Module, c: Config, width: int, product: Routine | None) -> None:
        self.c, self.product = c, product
        if product is None:
            self.accumulate = emit_accumulate(module, c, width)

    def call(self, f: Function, v: SimpleNamespace, count: Value, reach: Value) -> None:
        c, word = self.c, v.seen.some_from // self.c.per_word
        if self.product:  # a row of keys for each column
            rows = Words(v.key_columns.at + word * c.size, v.key_columns.stride)
            words, depth = Lines(v.words.at, c.word_line), (count + (c.rows - 1)) // c.rows * (c.rows // c.per_word)
            with f.range(0, v.sizes.columns, c.rows) as column:
                out = Lines(v.dq.line(column).at, c.line)
                self.product(f, left=rows.row(column), right=words, out=out, depth=depth)
            return
        start = v.key_columns.row(word)
        with f.range(0, v.sizes.columns, c.rows) as column:
            self.accumulate(
                f,
                sums=v.dq.line(column),
                alpha=v.work.alpha,  # of ones: nothing is rescaled
                rows=Words(start.at + column * c.size, start.stride),
                weights=v.words,
                count=count,
                reach=reach,
            )


def _in_place(v: SimpleNamespace) -> tuple[Scores, Scores]:
    """Where weights and dS stand: in the place of scores and dP."""
    return v.work.scores, v.second.scores


class _Plain:
    """Scores that no program changes: banded or masked, they are P and dS at once."""

    lines = staticmethod(_in_place)

    def __init__(self, module: Module, c: Config, width: int) -> None:
        self.scores, self.slopes = BlockScores(module, c, width), _Slopes(module, c, width)
        self.products, self.pass_ = self.scores.call, emit_differentiate(module, c, width)

    def differentiate(self, f: Function, v: SimpleNamespace, reach: Value) -> None:
        lines = {"scores": v.work.scores, "slopes": v.second.scores, "words": v.words}
        self.pass_(f, **lines, state=v.state, count=v.seen.count, reach=reach, factors=v.factors)


class _Derived:
    """Scores that a program changes: raw products, then the pass of derivative.py."""

    slopes: Any
    lines = staticmethod(_in_place)

    def __init__(self, module: Module, c: Config, width: int) -> None:
        self.c, self.width, self.slopes = c, width, _Slopes(module, c, width)
        self.raw = emit_product(module, c, width, "raw", top=False)
        self._emit_passes(module)

    def _emit_passes(self, module: Module) -> None:
        c, reads = self.c, readings(self.c.code, self.c.arrays)
        self.passes = {edge: emit_derivative(module, c, self.width, reads, edge=edge) for edge in (False, True)}

    def products(self, f: Function, work: Work, panel: Panel, rows: Words, depth: Value, seen: Seen) -> None:
        with f.range(seen.some_from, seen.some_to, self.c.rows) as row:
            self.raw(f, work=work, panel=panel, rows=rows.row(row), depth=depth, line=row - seen.some_from)

    def differentiate(self, f: Function, v: SimpleNamespace, reach: Value) -> None:
        c, k = self.c, self.c.per_word
        self.passes_over(f, v)
        whole = (v.seen.count + (k - 1)) // k * k
        for lines in (v.work.scores, v.second.scores):
            clear_rest(f, c, self.width, lines, whole)

    def passes_over(self, f: Function, v: SimpleNamespace, **held: Scores) -> None:
        """The pass over every stretch of rows."""
        known = {"work": v.work, "slopes": v.second.scores, "words": v.words, "state": v.state, "factors": v.factors}
        for first, last, edge in stretches_of(f, self.c, v.seen):
            with f.when(first < last):
                rows = {"first": first, "last": last, "origin": v.seen.some_from, "band": v.seen.band}
                self.passes[edge](f, **known, **rows, **held)


class _Landed(_Derived):
    """Products that landed in memory are raw: the pass of derivative.py, with a program or without. What panels leave
    is held for the exchange (held.py)."""

    def __init__(self, module: Module, c: Config, width: int) -> None:
        self.c, self.width = c, width
        self.multiply = emit_multiply(module, c, width)
        self.slopes = self
        self._emit_passes(module)

    def call(self, f: Function, work: Work, panel: Panel, rows: Words, depth: Value, seen: Seen) -> None:
        """S or dP of every tile of rows."""
        c, words = self.c, Lines(panel.at, panel.shape)
        with f.range(seen.some_from, seen.some_to, c.rows) as row:
            out = Lines(work.scores.at, c.line).line(row - seen.some_from)
            self.multiply(f, left=rows.row(row), right=words, out=out, depth=depth)

    products = call

    @staticmethod
    def lines(v: SimpleNamespace) -> tuple[Scores, Scores]:
        weights, slopes = (v.held.lines(name, v.number).line(v.seen.some_from) for name in ("weights", "slopes"))
        return weights, slopes

    def differentiate(self, f: Function, v: SimpleNamespace, reach: Value) -> None:
        c, k, count = self.c, self.c.per_word, v.seen.count
        weights, slopes = self.lines(v)
        self.passes_over(f, v, held_weights=weights, held_slopes=slopes)
        first, last = (count + (k - 1)) // k * k, (count + (c.rows - 1)) // c.rows * c.rows
        clear_lines(c, (weights, slopes), v.words, first, last)
        clear_lanes(f, c, (weights, slopes), first, v.lanes)


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
