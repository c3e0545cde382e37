"""One panel against one block: product -> band -> program -> maximum -> weights -> keep -> accumulate.

Nothing here says query or key: lanes and rows. In the forward, lanes are queries, rows are keys.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from flashtile.kernels.cpu.block import NEXT
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.decode.rows import CACHE_LINE, prefetch
from flashtile.kernels.cpu.passes.strips import Strips
from flashtile.kernels.cpu.passes.turns import Turns, emit_turns
from flashtile.kernels.cpu.scratch import Work, dense_bytes
from flashtile.kernels.cpu.steps.accumulate import emit_accumulate, emit_accumulate_tile, emit_rescale
from flashtile.kernels.cpu.steps.band import Seen
from flashtile.kernels.cpu.steps.contain import NonFinite, emit_add, emit_collect
from flashtile.kernels.cpu.steps.dense import emit_dense
from flashtile.kernels.cpu.steps.frame import Frame
from flashtile.kernels.cpu.steps.keep import Draw, emit_keep
from flashtile.kernels.cpu.steps.product import apart, emit_multiply, emit_product
from flashtile.kernels.cpu.steps.program import emit_program
from flashtile.kernels.cpu.steps.softmax import Factors, emit_softmax
from flashtile.kernels.cpu.steps.tiny import Tiny, emit_add_aside, emit_set_aside
from flashtile.kernels.cpu.steps.unheld import Unheld, emit_add_unheld, emit_make_room, emit_rescore
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Lines, Panel, Rows, State, Sums, Weights, Words
from flashtile.llvm.routines import Routine


def emit_panels(module: Module, c: Config) -> list[Routine]:
    """The functions that add one block to a panel of up to 1, 2, ... registers of lanes."""
    of_unheld = [emit_add_unheld] * c.lands_in_memory + [emit_make_room] * c.tiles_add
    containment = [emit(module, c) for emit in (emit_collect, emit_add, *of_unheld)]
    dense = [emit_dense(module, c, n) for n in range(len(c.code.dense_loads) if c.code else 0)]
    aside = [emit_set_aside(module, c), emit_add_aside(module, c)] if c.tiles_add else []
    return [_emit_panel(module, c, n + 1, containment, dense, aside) for n in range(c.registers)]


class _Steps:
    """What a panel of one width calls for the scores, the weights and the sums."""

    def __init__(self, module: Module, c: Config, width: int, dense: list[Routine], aside: list[Routine]) -> None:
        self.c, self.dense, self.of_tiny = c, dense, aside
        self.by_turns = c.interleaved and c.tiles_add and width == c.registers
        self.scores = BlockScores(module, c, width, guarded=c.guarded, without_top=self.by_turns)
        self.softmax = emit_softmax(module, c, width)
        if self.scores.multiply is None:
            self.accumulate = emit_accumulate(module, c, width)
        else:
            multiply = emit_multiply(module, c, width, onto=True) if c.product.coarse else self.scores.multiply
            self.accumulate = emit_accumulate_tile(module, c, width, multiply)
        self.rescale = emit_rescale(module, c, width) if c.tiles_add else None
        self.keep = emit_keep(module, c, width) if c.dropout else None

    def lay_out(self, f: Function, v: SimpleNamespace, seen: Seen, line: Value | int = 0) -> None:
        """Dense arrays beside scores that begin with a line."""
        at = v.dense + line * self.c.line.bytes
        lay_out_dense(f, self.c, self.dense, v.work, at, seen, v.lanes)

    def raise_sums(self, f: Function, v: SimpleNamespace) -> None:
        """Times alpha, on tiles, which add to them."""
        if self.rescale is not None:
            self.rescale(f, sums=v.sums, alpha=v.alpha, columns=v.columns)

    @contextlib.contextmanager
    def aside(self, f: Function, v: SimpleNamespace) -> Iterator[None]:
        """Around what adds to the sums, on tiles: what is too small for them (tiny.py)."""
        noted = {"tiny": v.tiny} if self.c.tiles_add else {}
        tiny_before = noted["tiny"].some(self.c) if noted else f.const("i1", 0)
        for set_aside in self.of_tiny[:1]:
            with f.when(tiny_before):
                set_aside(f, sums=v.sums, columns=v.columns, **noted)
        yield
        for add_aside in self.of_tiny[1:]:
            with f.when(tiny_before):
                add_aside(f, sums=v.sums, columns=v.columns, **noted)

    def add_values(self, f: Function, v: SimpleNamespace, seen: Seen, weights: Weights, count: Value) -> None:
        """The values by their weights, added to the sums."""
        c, word = self.c, seen.some_from // self.c.per_word
        if c.lands_in_memory:  # a row of values for each column
            first = Words(v.values.at + word * c.size, v.values.stride)
            extent = {"count": count, "landed": v.work.landed}
        else:
            first = v.values.row(word)
            extent = {"count": v.count, "reach": v.reach}
        with f.range(0, v.columns, c.rows) as column:
            if c.asks:
                share = (n * c.key_block // v.columns for n in (column, column + c.rows))
                ask(f, v.work, "v", *share)
            target = v.sums.line(column)
            tile = first.row(column) if c.lands_in_memory else Words(first.at + column * c.size, first.stride)
            self.accumulate(f, sums=target, alpha=v.alpha, rows=tile, weights=weights, **extent)


def _emit_panel(
    module: Module, c: Config, width: int, contain: list[Routine], dense: list[Routine], aside: list[Routine]
) -> Routine:
    steps = _Steps(module, c, width, dense, aside)
    if not (c.interleaved and c.tiles_add):
        return _emit_attend(module, c, width, steps, contain, "panel")
    attend = _emit_attend(module, c, width, steps, contain, "attend")
    turns = Turns(module, c, width, steps) if steps.by_turns else None
    f, v = _signature(module, c, width, "panel")
    v.tops, v.alpha, v.scores, v.weights = v.work.tops, v.work.alpha, v.work.scores, v.work.weights
    clean = v.nonfinite.found.eq(0) & (v.unheld.found.eq(0) if c.guarded else f.const("i1", 1))
    arguments = dict(zip(attend.kinds, f.parameters, strict=True))
    emit_turns(f, c, v, lambda seen: attend(f, **{**arguments, "seen": seen}), turns, clean)
    return f


def _emit_attend(module: Module, c: Config, width: int, steps: _Steps, contain: list[Routine], name: str) -> Routine:
    """The steps one after the other; but for strips of values (strips.py)."""
    f, v = _signature(module, c, width, name)
    drawn = {"draw": v.draw.further(v.seen.some_from)} if c.dropout else {}  # from the first line on
    v.tops, v.alpha, v.scores, v.count = v.work.tops, v.work.alpha, v.work.scores, v.seen.count
    steps.lay_out(f, v, v.seen)
    steps.scores.call(f, v.work, v.panel, v.rows, v.depth, v.seen, *([v.unheld] if c.guarded else []))
    v.whole = (v.count + (c.rows - 1)) // c.rows * c.rows
    # Rows that a band shows to the first register of lanes; a program's mask may show any. Tiles are read whole.
    v.reach = v.whole if c.lands_in_memory else v.count
    if not (c.masked or c.lands_in_memory):
        v.reach = f.cast("sext", v.seen.above, "i64") + c.lanes - v.seen.some_from
    collect, add, *of_unheld = contain
    broken = v.nonfinite.found.ne(0)
    collected = Sums(v.nonfinite.sums, c.line)
    raw = v.nonfinite.rows(v.seen.some_from, v.count)
    with f.when(broken):
        collect(f, scores=v.scores, values=raw, columns=v.columns, sums=collected, **drawn)

    def add_all() -> None:
        _weigh(f, steps, v, drawn)
        steps.raise_sums(f, v)
        with steps.aside(f, v):
            steps.add_values(f, v, v.seen, v.weights, v.whole)

    if c.interleaved and not c.tiles_add and width == c.registers:
        strips = Strips(module, c, width, steps)
        f.either(v.nonfinite.found.eq(0) & strips.several(v), lambda: strips.attend(f, v), add_all)
        v.weights = v.work.weights
    else:
        add_all()
    with f.when(broken):
        add(f, sums=v.sums, collected=collected, columns=v.columns)
        _add_unheld(f, steps, v, raw, *of_unheld)
    f.ret()
    return f


def _add_unheld(f: Function, steps: _Steps, v: SimpleNamespace, raw: Rows, *routines: Routine) -> None:
    """The share of values that tiles cannot hold, or of those that their sums could not."""
    further: dict[str, Any] = {}
    for make_room in routines[1:]:
        make_room(f, weights=v.weights, values=raw, state=v.state, alpha=v.alpha, factors=v.factors)
        steps.raise_sums(f, v)
        further = {"tiny": v.tiny, "alpha": v.alpha}
    for add in routines[:1]:
        add(f, weights=v.weights, values=raw, sums=v.sums, **further)


def _signature(module: Module, c: Config, width: int, name: str) -> tuple[Routine, SimpleNamespace]:
    """The function of a panel, and what it is given, by name."""
    kinds: dict[str, Any] = {
        "work": Work.of(c),
        "panel": Panel.of(c.word_line),
        "sums": Sums.of(c.line),
        "state": State.of(c.line),
        "rows": Words.kind(),
        "values": Words.kind(),
        "depth": "i64",
        "columns": "i64",
        "seen": Seen.kind(),
        "nonfinite": NonFinite.kind(),
        "lanes": "i64",
        "dense": "i64",
        "factors": Factors.of(c),
    }
    if c.guarded:
        kinds["unheld"] = Unheld.kind()
    if c.tiles_add:
        kinds["tiny"] = Tiny.kind()
    if c.dropout:
        kinds["draw"] = Draw.kind()
    f = Routine(module, f"{name}_{width}", **kinds)
    return f, SimpleNamespace(**dict(zip(kinds, f.parameters, strict=True)))


def _weigh(f: Function, steps: _Steps, v: SimpleNamespace, drawn: dict[str, Any]) -> None:
    """Scores become weights, of which dropout keeps some."""
    extent = {"count": v.whole, "reach": v.reach}
    steps.softmax(f, state=v.state, tops=v.tops, alpha=v.alpha, scores=v.scores, **extent, factors=v.factors)
    v.weights = v.work.weights
    if steps.keep is not None:
        steps.keep(f, weights=v.weights, **extent, **drawn)


def lay_out_dense(
    f: Function, c: Config, dense: list[Routine], work: Work, at: Value, seen: Seen, lanes: Value
) -> None:
    """What the score program loads from dense arrays for the rows that are seen, in scratch memory from ``at`` on."""
    for n, lay_out in enumerate(dense):
        out = Lines(work.at + (at + n * dense_bytes(c)), c.line)
        lay_out(f, frame=Frame(work.frame), first=seen.some_from, count=seen.count, lanes=lanes, out=out)


def stretches_of(f: Function, c: Config, seen: Seen) -> list[tuple[Value, Value, bool]]:
    """The rows that are seen, as (first, last, whether a mask or band cuts them): up to the first tile that every lane
    sees whole, the tiles that every lane does, and to the end."""
    some_from, some_to = seen.some_from, seen.some_to
    whole = f.minimum(some_from + (seen.all_from - some_from + (c.rows - 1)) // c.rows * c.rows, some_to)
    until = f.maximum(whole + f.maximum(seen.all_to - whole, 0) // c.rows * c.rows, whole)
    return [(some_from, whole, True), (whole, until, False), (until, some_to, True)]


def ask(f: Function, work: Work, which: str, first: Value, last: Value) -> None:
    """Ask memory for the rows [first, last) of the next block's K or V: a few at a time, between tiles of a product.
    Asked for in a row, all of them would be waited for."""
    words = which, f"{which}_s", f"{which}_bytes", "count"
    at, stride, size, count = (NEXT.read(f, work.next, name) for name in words)
    with f.range(first, f.minimum(last, count)) as row, f.range(0, size, CACHE_LINE) as byte:
        prefetch(work.c, at + row * stride + byte)


class BlockScores:
    """The functions that fill the scores of a block: edge tiles, which are masked, and full ones, which are not.

    Without a score program a band is applied in the edge tiles themselves. A program comes after the products
    (program.py): its mask to edge tiles alone, its score, if it has one, to all. Scores that land in memory are banded
    in that pass, program or not.
    """

    def __init__(
        self, module: Module, c: Config, width: int, *, guarded: bool = False, without_top: bool = False
    ) -> None:
        """``guarded``: what parts of products cannot hold is looked after; ``without_top``: `passes` are also done
        without keeping maxima."""
        self.c = c
        self.multiply = emit_multiply(module, c, width) if c.lands_in_memory else None
        self.rescore = emit_rescore(module, c, width) if guarded else None
        self.program: dict[bool, Routine] = {}
        self.no_top: dict[bool, Routine] = {}
        if self.multiply is not None:
            self.program = {e: emit_program(module, c, width, edge=e) for e in (False, True)}
            if without_top:
                self.no_top = {
                    e: emit_program(module, c, width, edge=e, top=False) for e in self.program if e or c.scored
                }
            return
        if not c.scored:
            self.full = emit_product(module, c, width, "full")
        if c.code is None:
            self.edges = [emit_product(module, c, width, "edge", edge=True, first=first) for first in range(width)]
        else:
            self.raw = emit_product(module, c, width, "raw", top=False)
            self.program = {e: emit_program(module, c, width, edge=e) for e in (False, True) if e or c.scored}

    def call(
        self, f: Function, work: Work, panel: Panel, rows: Words, depth: Value, seen: Seen, *unheld: Unheld
    ) -> None:
        """Edge rows up to the first tile that every lane sees whole, full tiles, edge rows to the end. ``unheld``: of a
        guarded one."""
        c, some_from = self.c, seen.some_from
        if self.multiply is not None:
            self.products(f, work, panel, rows, depth, seen)
            self.passes(f, work, seen, *unheld)
            return
        stretches = stretches_of(f, c, seen)

        def tile(row: Value, edge: bool) -> None:
            if c.asks:
                ask(f, work, "k", row, row + c.rows)
            arguments = {"work": work, "panel": panel, "rows": rows.row(row), "depth": depth, "line": row - some_from}
            if c.scored or edge and c.code:
                self.raw(f, **arguments)
            elif edge:
                self._edge_tile(f, seen, row, arguments)
            else:
                self.full(f, **arguments)

        for first, last, edge in stretches:
            with f.range(first, last, c.rows) as row:
                tile(row, edge)
        self._run(f, self.program, work, seen, stretches)

    def products(
        self, f: Function, work: Work, panel: Panel, rows: Words, depth: Value, seen: Seen, *, line: Value | int = 0
    ) -> None:
        """Scores that land in memory, raw, from a line on."""
        c = self.c
        assert self.multiply is not None
        with f.range(seen.some_from, seen.some_to, c.rows) as row:
            words, out = Lines(panel.at, panel.shape), Lines(work.scores.at, c.line).line(row - seen.some_from + line)
            between = apart(c, depth * c.size, depth * c.line.bytes)
            self.multiply(f, left=rows.row(row), right=words, out=out, depth=depth, **between)

    def passes(
        self, f: Function, work: Work, seen: Seen, *unheld: Unheld, line: Value | int = 0, top: bool = True
    ) -> None:
        """What is done to them then, where they begin with a line; without ``top`` no maximum is kept."""
        stretches = stretches_of(f, self.c, seen)
        for found in unheld:
            assert self.rescore is not None
            with f.when(found.found.ne(0)):
                self.rescore(f, work=work, unheld=found, first=seen.some_from, last=seen.some_to)
        self._run(f, self.program if top else self.no_top, work, seen, stretches, line)

    def _run(
        self,
        f: Function,
        program: dict[bool, Routine],
        work: Work,
        seen: Seen,
        stretches: list[tuple[Value, Value, bool]],
        line: Value | int = 0,
    ) -> None:
        origin = seen.some_from - line
        for first, last, edge in stretches:
            if edge in program:
                with f.when(first < last):
                    program[edge](f, work=work, first=first, last=last, origin=origin, band=seen.band)
        if self.program:
            self._hide_rest(f, work.scores.line(line), seen.count)

    def _edge_tile(self, f: Function, seen: Seen, row: Value, arguments: dict[str, object]) -> None:
        """The variant that leaves out every register none of whose lanes sees even the tile's first row."""
        band = seen.band.moved(f.cast("trunc", row, "i32"))
        arguments = {**arguments, "last": seen.some_to - row - 1, "band": band}

        def skip(first: int) -> None:
            if first == 0:
                self.edges[0](f, **arguments)
            else:
                hidden = band.above < -(first * self.c.lanes - 1)
                f.either(hidden, lambda: self.edges[first](f, **arguments), lambda: skip(first - 1))

        skip(len(self.edges) - 1)

    def _hide_rest(self, f: Function, scores: Lines, count: Value) -> None:
        """-inf for the lines of the last tile that stand for no row."""
        c, line = self.c, self.c.line.bytes
        end = (count + (c.rows - 1)) // c.rows * c.rows
        with f.range(count * line, end * line, c.register) as at:
            scores.store(f.const(c.vector, -math.inf), 0, at=at)
