"""The backward kernel: dQ, dK and dV in one pass of five products over key blocks, from o and lse of the forward.

A work item is one head of K and V, or a part of its keys, with all the query heads that share it. For each query head
it walks the key blocks as the forward does (walk.py): K and V of a block are made ready once, every panel of queries
visits it (visit.py), and its dK and dV are done, while dQ of the whole head is summed as it goes. So a row's arithmetic
depends on where its panel and its key blocks stand in the whole problem only, never on the threads.

Results are added to what dQ, dK and dV hold.

Where the configuration says tile, a work item is one query head of some rows on some keys, for engines that hold the
arrays as tiles: delta of its rows is given (delta.py), and all gradients are accumulators.

Source: Dao 2023, FlashAttention-2, section 3.1.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from flashtile.kernels.cpu.block import BACKWARD
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.backward_call import BackwardCall, QueryHead
from flashtile.kernels.cpu.passes.visit import Sizes, Wanted, emit_visits
from flashtile.kernels.cpu.passes.walk import by_band, by_segments
from flashtile.kernels.cpu.steps.add import emit_add_lanes, emit_add_rows, emit_join_rows
from flashtile.kernels.cpu.steps.band import Seen
from flashtile.kernels.cpu.steps.contain import emit_scan
from flashtile.kernels.cpu.steps.differentiate import (
    SinkSums,
    emit_finish_sink,
    emit_known_state,
    emit_row_state,
    emit_sink_sums,
)
from flashtile.kernels.cpu.steps.exchange import emit_exchange_held
from flashtile.kernels.cpu.steps.held import SLOPES, WEIGHTS
from flashtile.kernels.cpu.steps.keep import Kept
from flashtile.kernels.cpu.steps.pack import emit_pack_columns, emit_pack_key_columns, emit_pack_rows, emit_transpose
from flashtile.kernels.cpu.steps.range import any_lane
from flashtile.kernels.cpu.steps.spans import PANELS
from flashtile.kernels.cpu.steps.unheld import Unheld, emit_find
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.lines import Panel, Rows, Sums, Weights, Words
from flashtile.llvm.routines import entry

EXPORTS = ("backward",)


def backward_text(c: Config) -> str:
    """LLVM IR of the module that exports backward (routines.entry)."""
    module = Module()
    _Backward(module, c).emit()
    return module.text()


class _Backward:
    """Emits the exported function; the emitted functions that it calls are its fields."""

    def __init__(self, module: Module, c: Config) -> None:
        self.c = c
        self.transpose = emit_transpose(module, c, "load_lanes", Panel)
        self.pack_rows, self.pack_columns = emit_pack_rows(module, c), emit_pack_columns(module, c)
        self.pack_key_columns = emit_pack_key_columns(module, c) if c.lands_in_memory else self.pack_columns
        self.scan = emit_scan(module, c)
        if c.guarded:
            self.find, self.find_more = emit_find(module, c), emit_find(module, c, more=True)
            self.widen = emit_transpose(module, replace(c, product=c.elements), "widen", Sums, seldom=True)
        if c.tile:
            self.known_state = emit_known_state(module, c)
        else:
            self.row_state = emit_row_state(module, c)
            self.sink_sums, self.finish_sink = emit_sink_sums(module, c), emit_finish_sink(module, c)
        self.join_rows, self.add_rows = emit_join_rows(module, c), emit_add_rows(module, c.output if c.tile else c)
        self.add_lanes = emit_add_lanes(module, c.output, apart=c.lands_in_memory)
        self.visits = emit_visits(module, c)
        self.exchange_held = emit_exchange_held(module, c) if c.lands_in_memory else None
        self.f = entry(module, "backward")

    def emit(self) -> None:
        f, (block, begin, end, scratch) = self.f, self.f.parameters
        p = BACKWARD.load(f, block)
        self.scale = f.cast("fptrunc", p.scale, self.c.acc)
        for name in ("sign", "c_high", "c_low"):
            setattr(p, name, f.cast("fptrunc", getattr(p, name), self.c.acc))
        self.call = call = BackwardCall(f, self.c, p, scratch)
        call.work.alpha.fill(1.0, 1)
        if self.c.product.permission:
            self.c.isa.enter(f)
        with f.range(begin, end) as number, f.range(0, p.group) as n:
            self._head(call.head(number, n))
        if self.c.product.permission:
            self.c.isa.leave(f)
        f.ret(f.const("i32", 0))

    def _head(self, head: QueryHead) -> None:
        f, p, c, call = self.f, self.call.p, self.c, self.call
        grouped = p.group > 1
        with f.when(grouped & head.begins):
            self._clear_totals(head.last_key - head.first_key)
        (self._known_rows if c.tile else self._rows)(head)
        if c.code:
            call.open_frame(head)
            call.frame.write(sums=p.sums, item=head.number, last_row=head.first + head.rows - 1)
        walk = by_segments if c.masked else by_band
        walk(call, head, _Blocks(self, head))
        with f.when(f.is_null(head.dq).eq(0)), f.range(0, head.rows, c.panel) as panel:
            count = f.minimum(head.rows - panel, c.panel)
            self.add_lanes(f, sums=call.dq(panel), rows=call.rows(head, "dq", panel, count), factor=self.scale)
        with f.when(grouped & head.ends):
            self.add_block(head, head.first_key, head.last_key)

    def _rows(self, head: QueryHead) -> None:
        """What is known of each row, and what its sink gets."""
        f, p, c, call = self.f, self.call.p, self.c, self.call
        sink = call.sink(head)
        sunk = f.is_null(head.dsink).eq(0) & head.first_key.eq(0) & sink.ne(-math.inf)
        call.dsink.fill(0.0, SinkSums.LINES)
        with f.range(0, head.rows, c.panel) as panel:
            count = self._start_panel(head, panel)
            rows = {name: call.rows(head, name, panel, count) for name in ("do", "o")}
            lse, dlse = head.lse + panel * c.size, f.select(f.is_null(head.dlse), head.dlse, head.dlse + panel * c.size)
            self.row_state(f, **rows, out=call.state(panel), lse=lse, dlse=dlse, sink=sink)
            with f.when(sunk):
                self.sink_sums(f, state=call.state(panel), sums=call.dsink, sink=sink)
            with f.when(p.kept.ne(0)):
                self.make_ready(head, panel)
        with f.when(sunk):
            self.finish_sink(f, sums=call.dsink, out=head.dsink)

    def _known_rows(self, head: QueryHead) -> None:
        """What is known of each row, from its lse and delta."""
        f, p, c, call = self.f, self.call.p, self.c, self.call
        with f.range(0, head.rows, c.panel) as panel:
            count = self._start_panel(head, panel)
            at = panel * c.size
            self.known_state(f, out=call.state(panel), lse=head.lse + at, delta=head.delta + at, count=count)
            with f.when(p.kept.ne(0)):
                self.make_ready(head, panel)

    def _start_panel(self, head: QueryHead, panel: Value) -> Value:
        """No dQ yet; the number of its rows."""
        self.call.dq(panel).fill(0.0, self.call.p.columns)
        return self.f.minimum(head.rows - panel, self.c.panel)

    def make_ready(self, head: QueryHead, panel: Value) -> None:
        """Q and dO of a panel as lanes, and as rows where they cannot be read as they lie."""
        f, p, c, call = self.f, self.call.p, self.c, self.call
        count = f.minimum(head.rows - panel, c.panel)
        for name, words, sign in (("q", p.key_words, p.sign), ("do", p.value_words, f.const(c.acc, 1.0))):
            rows = call.rows(head, name, panel, count)
            self.transpose(f, rows=rows, words=words, out=call.panel(name, panel), sign=sign, **call.range_of(name))
            pack = getattr(p, f"pack_{name}").ne(0)
            scan = partial(self.scan, f, values=Words(rows.at, rows.stride), count=count, size=rows.size)
            found = f.value_when(pack.eq(0), scan, f.const("i64", 0))
            found = f.value_when(pack, partial(self._pack, name, rows, call.packed(name, panel)), found)
            f.store(found, call.flag(name, panel))
        if c.guarded:
            self._flag_lanes(head, panel, count)

    def _flag_lanes(self, head: QueryHead, panel: Value, count: Value) -> None:
        """Which rows of a panel have a Q, a dO or a delta that parts cannot hold."""
        f, c, call = self.f, self.c, self.call
        flags, bound = call.lane_flags(panel), 2.0**100
        for j in range(c.registers):
            delta = call.state(panel).load(2, j)
            held = (delta > -bound) & (delta < bound)
            flags.store(f.select(held, f.const(c.words, 0), f.const(c.words, 1)), 0, j)
        for name, factor in (("q", call.p.sign), ("do", f.const(c.acc, 1.0))):
            rows = call.rows(head, name, panel, count)
            self.find_more(f, rows=rows, factor=factor, range=call.range_of(name)["held"], flags=flags.at)

    def _pack(self, name: str, rows: Rows, out: Words) -> Value:
        """Rows of Q or dO as words along columns, zeros in place of what is not finite; whether there was any."""
        return self.pack_columns(self.f, rows=rows, columns=getattr(self.call.p, f"{name}_columns"), out=out)

    def rows_of(self, head: QueryHead, name: str, panel: Value) -> tuple[Words, Rows]:
        """The rows of Q or dO of a panel as the exchange reads them, and as they lie, if they are not all finite."""
        f, p, c, call = self.f, self.call.p, self.c, self.call
        rows = call.rows(head, name, panel, f.minimum(head.rows - panel, c.panel))
        pack, broken = getattr(p, f"pack_{name}").ne(0), f.load("i64", call.flag(name, panel)).ne(0)
        packed = call.packed(name, f.select(pack, panel, f.const("i64", 0)))
        with f.when(broken & pack.eq(0)):  # rare: a copy at every visit
            self._pack(name, rows, packed)
        copied = pack | broken
        words = Words(f.select(copied, packed.at, rows.at), f.select(copied, packed.stride, rows.stride))
        count = f.select(broken, rows.count, f.const("i64", 0))
        return words, Rows(rows.at, rows.stride, rows.step, count, rows.size)

    def totals(self, name: str, head: QueryHead, start: Value) -> Words:
        """The totals of dK or dV from a key on: of all keys where several query heads add to them, else of a block."""
        f, p = self.f, self.call.p
        return self.call.gradient(f"{name}_totals", f.select(p.group > 1, start - head.first_key, f.const("i64", 0)))

    def _clear_totals(self, count: Value) -> None:
        for name in ("dk", "dv"):
            self._clear(self.call.gradient(f"{name}_totals"), count)

    def _clear(self, sums: Words, count: Value) -> None:
        f, c = self.f, self.c
        with f.range(0, count * sums.stride, c.register) as at:
            f.store(f.const(c.vector, 0.0), sums.at + at, align=c.register)

    def start_block(self, count: Value) -> None:
        """No sums at hand, and none of the block but those of other query heads."""
        with self.f.when(self.call.p.group.eq(1)):
            self._clear_totals(count)
        for name in ("dk", "dv"):
            self._clear(self.call.gradient(name), count)
        if self.exchange_held:
            self.call.panels_held.clear()

    def join(self, head: QueryHead, start: Value, count: Value) -> None:
        """The sums of a span of panels into those of their block."""
        self._exchange_held(head)
        for name in ("dk", "dv"):
            self.join_rows(self.f, sums=self.call.gradient(name), totals=self.totals(name, head, start), count=count)

    def _exchange_held(self, head: QueryHead) -> None:
        """What panels hold for the exchange, if they do, into the sums at hand."""
        f, p, call = self.f, self.call.p, self.call
        if self.exchange_held is None:
            return
        for name, rows, which, columns in (
            ("dv", "do", WEIGHTS, p.value_registers),
            ("dk", "q", SLOPES, p.key_registers),
        ):
            with f.when(f.is_null(getattr(head, name)).eq(0)):
                self.exchange_held(
                    f,
                    held=call.panels_held,
                    which=f.const("i64", which),
                    sums=call.gradient(name),
                    stride=getattr(p, f"{rows}_row"),
                    columns=columns,
                )
        call.panels_held.clear()

    def add_block(self, head: QueryHead, start: Value, stop: Value) -> None:
        """The totals of keys into dK and dV."""
        f, call = self.f, self.call
        for name, factor in (("dk", self.scale), ("dv", 1.0 / call.share)):
            with f.when(f.is_null(getattr(head, name)).eq(0)):
                rows = call.rows(head, name, start, stop - start)
                self.add_rows(f, sums=self.totals(name, head, start), rows=rows, factor=factor)


class _Blocks:
    """The visitor of the backward: K and V of a block, and one panel after another visits them."""

    def __init__(self, backward: _Backward, head: QueryHead) -> None:
        self.backward, self.head, self.call = backward, head, backward.call

    def end_span(self) -> None:
        """Nothing: dK and dV have spans of panels."""

    def block(self, start: Value, stop: Value) -> Callable[[Value, Seen], None]:
        """K and V of the keys [start, stop): as they lie, or converted into scratch; K also as words along columns."""
        f, call, head, kernel = self.call.f, self.call, self.head, self.backward
        p, c, count = call.p, call.c, stop - start
        self.start, self.stop = start, stop
        kernel.start_block(count)
        if c.guarded:
            self.unheld = self._flag_keys(count)
        beyond = start + (count + (c.rows - 1)) // c.rows * c.rows > p.kv_len  # score tiles read whole
        operands = []
        for name, words in (("k", p.key_words), ("v", p.value_words)):
            rows, row = call.rows(head, name, start, count), getattr(p, f"{name}_row")
            pack, packed = getattr(p, f"pack_{name}").ne(0) | beyond, Words(call.area(name), row)
            with f.when(pack):
                kernel.pack_rows(f, rows=rows, words=words, out=packed, **call.range_of(name))
            operands.append(Words(f.select(pack, packed.at, rows.at), f.select(pack, row, rows.stride)))
        rows, packed = call.rows(head, "k", start, count), call.key_columns
        pack = p.pack_k_columns.ne(0)
        scan = partial(kernel.scan, f, values=Words(rows.at, rows.stride), count=count, size=rows.size)
        copied = pack | f.value_when(pack.eq(0), scan, f.const("i64", 0)).ne(0)
        with f.when(copied):
            kernel.pack_key_columns(f, rows=rows, columns=p.columns, out=packed)
        columns = Words(f.select(copied, packed.at, rows.at), f.select(copied, packed.stride, rows.stride))
        keys, values = operands
        return partial(self._visit, keys, values, columns)

    def _flag_keys(self, count: Value) -> Value:
        """Which keys of the block have a K or a V that parts cannot hold; returns whether any does."""
        f, call, found = self.call.f, self.call, self.call.f.const("i64", 0)
        for name, find in (("k", self.backward.find), ("v", self.backward.find_more)):
            rows = call.rows(self.head, name, self.start, count)
            range_, one = call.range_of(name)["held"], f.const(call.c.acc, 1.0)
            found = found | find(f, rows=rows, factor=one, range=range_, flags=call.area("key_flags"))
        return found

    def _apart(self, panel: Value) -> dict[str, Any]:
        """What is known of the pairs that parts cannot hold; if there may be any, Q and dO are made ready in
        accumulators."""
        f, call, p, kernel, head = self.call.f, self.call, self.call.p, self.backward, self.head
        flags, found = call.lane_flags(panel), self.unheld
        count = f.minimum(head.rows - panel, call.c.panel)
        for j in range(call.c.registers):
            found = found | f.cast("zext", any_lane(f, flags.load(0, j).ne(0)), "i64")
        lying = {name: call.rows(head, name, panel, count) for name in ("q", "do")}
        with f.when(found.ne(0)):
            for name, sign in (("q", p.sign), ("do", f.const(call.c.acc, 1.0))):
                wide = Sums(call.area(f"wide_{name}"), call.c.line)
                kernel.widen(f, rows=lying[name], words=lying[name].size, out=wide, sign=sign)
        result: dict[str, Any] = {"lying_queries": lying["q"], "lying_outputs": lying["do"]}
        for name, keys, lanes in (("unheld", "k", "q"), ("unheld_slopes", "v", "do")):
            rows = call.rows(head, keys, self.start, count)
            as_they_lie = rows.at, rows.stride, rows.step, rows.size
            result[name] = Unheld(found, *as_they_lie, call.area("key_flags"), flags.at, call.area(f"wide_{lanes}"))
        return result

    def end_block(self) -> None:
        f, kernel, head = self.call.f, self.backward, self.head
        kernel.join(head, self.start, self.stop - self.start)
        with f.when(self.call.p.group.eq(1)):
            kernel.add_block(head, self.start, self.stop)

    def _visit(self, keys: Words, values: Words, key_columns: Words, panel: Value, seen: Seen) -> None:
        """One panel's visit, if it sees any of the block: by the function of as many registers as it has."""
        f, call, c, p, kernel, head = self.call.f, self.call, self.call.c, self.call.p, self.backward, self.head
        lanes = f.minimum(head.rows - panel, c.panel)

        def dispatch(n: int, **arguments: object) -> None:
            visit = kernel.visits[n - 1]
            if n == 1:
                visit(f, **arguments)
            else:
                full = lanes > (n - 1) * c.lanes
                f.either(full, lambda: visit(f, **arguments), lambda: dispatch(n - 1, **arguments))

        with f.when(seen.some_from < seen.some_to):
            with f.when(p.kept.eq(0)):
                kernel.make_ready(head, panel)
            if c.code:
                call.frame.write(row=head.first + panel, block=self.start)
            query_rows, _ = kernel.rows_of(head, "q", panel)
            output_rows, broken = kernel.rows_of(head, "do", panel)
            words = call.second.scores.at if c.per_word == 1 else call.area("words")
            wanted = (f.select(f.is_null(x), f.const("i64", 0), f.const("i64", 1)) for x in (head.dq, head.dk, head.dv))
            dropout: dict[str, Any] = {}
            if c.dropout:
                dropout = {"draw": call.draw(head, panel, self.start), "kept": Kept(call.area("kept"), c)}
                dropout["inverse"] = 1.0 / call.share
            apart = self._apart(panel) if c.guarded else {"broken": broken}
            held: dict[str, Any] = {}
            if c.lands_in_memory:
                held = {"held": call.panels_held, "number": panel // c.panel % PANELS}
            dispatch(
                c.registers,
                work=call.work,
                second=call.second,
                words=Weights(words, c.word_line),
                queries=call.panel("q", panel),
                outputs=call.panel("do", panel),
                state=call.state(panel),
                keys=keys,
                values=values,
                key_columns=key_columns,
                query_rows=query_rows,
                output_rows=output_rows,
                dq=call.dq(panel),
                dk=call.gradient("dk"),
                dv=call.gradient("dv"),
                sizes=Sizes(p.key_words, p.value_words, p.columns, p.key_registers, p.value_registers),
                wanted=Wanted(*wanted),
                seen=seen,
                lanes=lanes,
                dense=p.at_dense,
                factors=call.factors,
                **apart,
                **dropout,
                **held,
            )
        with f.when((panel // c.panel % PANELS).eq(PANELS - 1)):
            kernel.join(head, self.start, self.stop - self.start)
