"""The backward of one panel against one block: two products, dS, and three products that are summed.

Nothing here says query or key: lanes and rows. In the backward as in the forward, lanes are queries, rows are keys:

    scores(work, panel, rows, depth, seen)                          # S = rows panel, banded, through the program
    slopes(...)                                                     # dP: rows of V, panel of dO
    draw(slopes, kept, draw, ...)                                   # dropout, if there is any: zeros in dP
    differentiate(scores, slopes, words, state, count, ...)         # P and dS, from here on as words of products;
                                                                    # a score program has derivative.py in its place
    drop(weights, kept, ...)                                        # dropout: zeros in P
    add_apart(...)                                                  # pairs that parts cannot hold, if there are any
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
from flashtile.kernels.cpu.steps.accumulate import emit_accumulate, emit_accumulate_tile
from flashtile.kernels.cpu.steps.apart import emit_add_apart
from flashtile.kernels.cpu.steps.band import Seen
from flashtile.kernels.cpu.steps.dense import emit_dense
from flashtile.kernels.cpu.steps.derivative import emit_derivative
from flashtile.kernels.cpu.steps.differentiate import RowState, clear_lanes, clear_lines, clear_rest, emit_differentiate
from flashtile.kernels.cpu.steps.exchange import emit_exchange, emit_put_back
from flashtile.kernels.cpu.steps.held import Held
from flashtile.kernels.cpu.steps.keep import Draw, Kept, emit_draw, emit_drop
from flashtile.kernels.cpu.steps.product import apart, emit_multiply, emit_product
from flashtile.kernels.cpu.steps.softmax import Factors
from flashtile.kernels.cpu.steps.unheld import Unheld, emit_rescore
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
    """What the visits of panels of every width call: ``exchange`` or, where products land in memory, ``multiply``, by
    the number of registers, and ``add_tile``, the accumulation of dQ: of both registers of words, for even lanes and
    odd ones, however few lanes there are. What is not finite is put back or, where products are sums of parts, is among
    what is added apart."""

    exchange: Routine | None
    multiply: list[Routine]
    add_tile: Routine | None
    put_back: Routine | None
    add_apart: Routine | None
    dense: list[Routine]


def emit_visits(module: Module, c: Config) -> list[Routine]:
    """The functions for panels of up to 1, 2, ... registers of lanes."""
    multiply = [emit_multiply(module, c, n + 1) for n in range(c.registers)] if c.lands_in_memory else []
    add_tile = None
    if c.lands_in_memory:
        add_product = emit_multiply(module, c, c.registers, onto=True) if c.product.coarse else multiply[-1]
        add_tile = emit_accumulate_tile(module, c, c.registers, add_product, between=c.pairs_part)
    shared = _Shared(
        None if c.lands_in_memory else emit_exchange(module, c),
        multiply,
        add_tile,
        None if c.guarded else emit_put_back(module, c),
        emit_add_apart(module, c) if c.guarded else None,
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
    if c.guarded:
        kinds |= dict.fromkeys(("unheld", "unheld_slopes"), Unheld.kind())
        kinds |= dict.fromkeys(("lying_queries", "lying_outputs"), Rows.kind())
    else:
        kinds["broken"] = Rows.kind()
    return kinds


def _emit_visit(module: Module, c: Config, width: int, shared: _Shared) -> Routine:
    exchange, put_back = shared.exchange, shared.put_back
    weights_and_slopes: Any = (_Derived if c.scored else _Plain)(module, c, width) if exchange else None
    if weights_and_slopes is None:
        weights_and_slopes = _Landed(module, c, width, shared.multiply[width - 1])
    add_lanes = _AddLanes(module, c, width, shared.add_tile)
    rescore = emit_rescore(module, c, width) if c.guarded else None
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
    if rescore:
        with f.when(v.unheld.found.ne(0)):
            for work, unheld in ((v.work, v.unheld), (v.second, v.unheld_slopes)):
                rescore(f, work=work, unheld=unheld, first=first, last=seen.some_to)
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
        if put_back:
            with f.when(v.broken.count > 0):
                put_back(f, sums=sums, lines=lines, rows=v.broken, **among)
    if shared.add_apart:
        with f.when(v.unheld.found.ne(0)):
            _add_apart(f, v, shared.add_apart, weights, differences)
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


def _add_apart(f: Function, v: SimpleNamespace, routine: Routine, weights: Scores, slopes: Scores) -> None:
    """What the pairs that parts cannot hold add to dQ, dK and dV."""
    routine(
        f,
        unheld=v.unheld,
        first=v.seen.some_from,
        last=v.seen.some_to,
        count=v.lanes,
        weights=weights,
        slopes=slopes,
        words=v.words,
        dq=v.dq,
        dk=v.dk,
        dv=v.dv,
        queries=v.lying_queries,
        outputs=v.lying_outputs,
    )


class _AddLanes:
    """dQ: sums of lanes, of all rows that the panel sees."""

    def __init__(self, module: Module, c: Config, width: int, tile: Routine | None) -> None:
        self.c, self.tile = c, tile
        if tile is None:
            self.accumulate = emit_accumulate(module, c, width)

    def call(self, f: Function, v: SimpleNamespace, count: Value, reach: Value) -> None:
        c, word = self.c, v.seen.some_from // self.c.per_word
        if self.tile:  # a row of keys for each column
            rows = Words(v.key_columns.at + word * c.size, v.key_columns.stride)
            among = {"count": (count + (c.rows - 1)) // c.rows * c.rows, "landed": v.work.landed}
            with f.range(0, v.sizes.columns, c.rows) as column:
                sums, tile = v.dq.line(column), rows.row(column)
                self.tile(f, sums=sums, alpha=v.work.alpha, rows=tile, weights=v.words, **among)
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

    def __init__(self, module: Module, c: Config, width: int, multiply: Routine) -> None:
        self.c, self.width = c, width
        self.multiply = multiply
        self.slopes = self
        self._emit_passes(module)

    def call(self, f: Function, work: Work, panel: Panel, rows: Words, depth: Value, seen: Seen) -> None:
        """S or dP of every tile of rows."""
        c, words = self.c, Lines(panel.at, panel.shape)
        with f.range(seen.some_from, seen.some_to, c.rows) as row:
            out = Lines(work.scores.at, c.line).line(row - seen.some_from)
            between = apart(c, depth * c.size, depth * c.line.bytes)
            self.multiply(f, left=rows.row(row), right=words, out=out, depth=depth, **between)

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
