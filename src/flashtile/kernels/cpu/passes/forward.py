"""The forward kernel: attention of query tiles to all their keys, online softmax, one pass over K and V.

A work item is a tile of queries of one head, or of each that shares its keys where making these ready takes long. It
is cut into panels, one query per lane; the item walks the key blocks that any of its rows sees, and each panel in turn
does scores -> softmax -> outputs on the block. So K and V are converted (where they must be) once for all panels of the
item, and a row's arithmetic depends on where its panel and its key blocks stand in the whole problem only: not on the
tile size, not on the threads, not on other heads.

Source: Dao 2023, FlashAttention-2, section 3.1; Milakov and Gimelshein 2018 for the online softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from flashtile.kernels.cpu.block import CALL
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes.item import Call, Item
from flashtile.kernels.cpu.passes.panel import emit_panels
from flashtile.kernels.cpu.passes.walk import by_band, by_segments
from flashtile.kernels.cpu.steps.band import Seen
from flashtile.kernels.cpu.steps.contain import NonFinite, emit_scan
from flashtile.kernels.cpu.steps.finish import emit_finish, emit_load_state
from flashtile.kernels.cpu.steps.pack import emit_pack_rows, emit_pack_values, emit_transpose
from flashtile.kernels.cpu.steps.range import any_lane
from flashtile.kernels.cpu.steps.spans import emit_join_span
from flashtile.kernels.cpu.steps.unheld import Unheld, emit_find
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.lines import Panel, Rows, State, Sums, Words
from flashtile.llvm.routines import entry

EXPORTS = ("forward",)


def forward_text(c: Config) -> str:
    """LLVM IR of the module whose one exported function is

    i32 forward(ptr params, i64 begin, i64 end, ptr scratch): work items [begin, end), 0 on success.
    """
    module = Module()
    _Forward(module, c).emit()
    return module.text()


class _Forward:
    """Emits the exported function; the emitted functions that it calls are its fields."""

    def __init__(self, module: Module, c: Config) -> None:
        self.c = c
        self.load_queries = emit_transpose(module, c, "load_queries", Panel)
        self.pack_keys, self.pack_values = emit_pack_rows(module, c), emit_pack_values(module, c)
        self.scan = emit_scan(module, c)
        if c.guarded:
            self.find = emit_find(module, c)
            self.widen = emit_transpose(module, replace(c, product=c.elements), "widen", Sums, seldom=True)
        self.join_span = emit_join_span(module, c)
        self.finish = emit_finish(module, c.output)
        if c.partial:
            self.load_outputs = emit_transpose(module, c.output, "load_outputs", Sums)
            self.load_state = emit_load_state(module, c)
        self.panels = emit_panels(module, c)
        self.f = entry(module, "forward")

    def emit(self) -> None:
        f, (block, begin, end, scratch) = self.f, self.f.parameters
        p = CALL.load(f, block)
        for name in ("sign", "c_high", "c_low", "lse_scale"):  # the score program's frame takes ``scale`` as it is
            setattr(p, name, f.cast("fptrunc", getattr(p, name), self.c.acc))
        self.call = Call(f, self.c, p, scratch)
        if self.c.product.permission:
            self.c.isa.enter(f)
        with f.range(begin, end) as number:
            self._item(self.call.item(number))
        if self.c.product.permission:
            self.c.isa.leave(f)
        f.ret(f.const("i32", 0))

    def _item(self, item: Item) -> None:
        call, c = self.call, self.c
        self._start(item)
        if c.code:
            call.open_frame(item)
        walk = by_segments if c.masked else by_band
        walk(call, item, _Attend(self, item))
        self._finish(item)

    def _start(self, item: Item) -> None:
        """Queries of every panel transposed; no sums yet, or those that are carried."""
        f, p, c, call = self.f, self.call.p, self.c, self.call
        call.work.tops.fill(-math.inf, 1)
        with f.range(0, item.end, c.panel) as panel:
            rows = call.query_rows(item, panel)
            self.load_queries(f, rows=rows, words=p.key_words, out=call.queries(panel), sign=p.sign, **call.held)
            for held in call.held.values():
                flags = call.lane_flags(panel)
                flags.fill(0, 1)
                self.find(f, rows=rows, factor=p.sign, range=held, flags=flags.at)
            self._clear(*call.sums(panel))
            if c.tiles_add:
                call.tiny(panel).lines(c).fill(0, 1)
            with f.when(call.spans):
                earlier = call.sums(panel, "earlier_")
                self._clear(*earlier)
                self._clear(*call.sums(panel, "lost_"))
                if c.partial:
                    with f.when(p.carry.ne(0)):
                        self._carry(item, panel, *earlier)

    def _clear(self, state: State, sums: Sums) -> None:
        """Sums 0, maxima -inf."""
        f, c = self.f, self.c
        zero = f.const(c.vector, 0.0)
        with f.range(0, c.line.bytes, c.register) as at:
            state.store(f.const(c.vector, -math.inf), 0, at=at)
            state.store(zero, 1, at=at)
        sums.fill(0.0, self.call.p.value_columns)

    def _carry(self, item: Item, panel: Value, state: State, sums: Sums) -> None:
        """Carried outputs and lse as those of an earlier span; the span at hand begins at their maximum."""
        f, p, c, call = self.f, self.call.p, self.c, self.call
        carried, lse = call.output(item, panel), call.lse(item, panel)
        self.load_outputs(f, rows=carried, words=p.value_size, out=sums, sign=call.share)
        self.load_state(f, state=state, lse=lse, count=carried.count, nats=p.lse_scale)
        now, _ = call.sums(panel)
        with f.range(0, c.line.bytes, c.register) as at:
            now.store(state.load(0, at=at), 0, at=at)

    def _finish(self, item: Item) -> None:
        f, p, c, call = self.f, self.call.p, self.c, self.call
        sink = call.sink(item)
        with f.when(call.spans):
            self.end_span(item)
        with f.range(0, item.end, c.panel) as panel:
            if c.shares:
                sink = call.sink(item, item.head(panel))
            last, earlier = call.sums(panel), call.sums(panel, "earlier_")
            state, sums = (
                type(y)(f.select(call.spans, x.at, y.at), c.line) for x, y in zip(earlier, last, strict=True)
            )
            out, lse = call.output(item, panel), call.lse(item, panel)
            self.finish(f, sums=sums, state=state, out=out, lse=lse, nats=p.lse_scale, sink=sink, share=call.share)

    def end_span(self, item: Item) -> None:
        """The sums of the span at hand into those of earlier spans."""
        f, call = self.f, self.call
        with f.range(0, item.end, self.c.panel) as panel:
            self.join_span(f, **call.levels(panel), columns=call.p.value_columns, factors=call.factors)


class _Attend:
    """The visitor of the forward: K and V of a block, and one panel after another attends to them."""

    def __init__(self, forward: _Forward, item: Item) -> None:
        self.forward, self.item, self.call = forward, item, forward.call

    def end_span(self) -> None:
        self.forward.end_span(self.item)

    def end_block(self) -> None:
        """Nothing: panels keep what they have summed."""

    def block(self, start: Value, stop: Value) -> Callable[[Value, Seen], None]:
        """K and V of the keys [start, stop): as they lie, or converted into scratch.

        Score tiles read whole: keys whose last tile would reach beyond the end of K are copied, too.
        """
        f, call, item, kernel = self.call.f, self.call, self.item, self.forward
        p, c, scratch = call.p, call.c, call.work.at
        k, v, keys = item.k + start * p.k_s, item.v + start * p.v_s, stop - start
        k_rows, v_rows = Rows(k, p.k_s, p.k_d, keys, p.head_size), Rows(v, p.v_s, p.v_d, keys, p.value_size)
        packed_k, packed_v = Words(scratch + p.at_k, p.k_row), Words(scratch + p.at_v, p.v_row)
        if c.asks:
            call.note_next(item, stop)
        whole = start + (keys + (c.rows - 1)) // c.rows * c.rows
        pack_k, pack_v = p.pack_k.ne(0) | (whole > p.kv_len), p.pack_v.ne(0)
        with f.when(pack_k):
            kernel.pack_keys(f, rows=k_rows, words=p.key_words, out=packed_k, **call.held)
        unheld = f.const("i64", 0)
        for held in call.held.values():
            one = f.const(c.acc, 1.0)
            unheld = kernel.find(f, rows=k_rows, factor=one, range=held, flags=scratch + p.at_key_flags)
        scan = partial(kernel.scan, f, values=Words(v, p.v_s), count=keys, size=p.value_size)
        pack = partial(kernel.pack_values, f, rows=v_rows, columns=p.value_columns, out=packed_v)
        found = f.value_when(pack_v.eq(0), scan, f.const("i64", 0))
        copied = pack_v | found.ne(0)
        found = f.value_when(copied, pack, found)
        rows = Words(f.select(pack_k, packed_k.at, k), f.select(pack_k, p.k_row, p.k_s))
        values = Words(f.select(copied, packed_v.at, v), f.select(copied, p.v_row, p.v_s))
        return partial(self._attend, start, rows, values, k, v, unheld, found)

    def _attend(
        self,
        start: Value,
        rows: Words,
        values: Words,
        k: Value,
        v: Value,
        unheld: Value,
        found: Value,
        panel: Value,
        seen: Seen,
    ) -> None:
        """One panel against one key block, if it sees any of it: by the function of as many registers as it has."""
        f, call, c, p = self.call.f, self.call, self.call.c, self.call.p
        lanes = self.item.lanes(c, panel)
        if c.code:
            call.frame.write(row=self.item.first + panel, block=start)
        state, sums = call.sums(panel)
        arguments = {
            "work": call.work,
            "panel": call.queries(panel),
            "sums": sums,
            "state": state,
            "rows": rows,
            "values": values,
            "depth": p.key_words,
            "columns": p.value_columns,
            "seen": seen,
            "lanes": lanes,
            "nonfinite": NonFinite(found, v, p.v_s, p.v_d, p.value_size, call.work.at + p.at_extra),
            "dense": p.at_dense,
            "factors": call.factors,
        }
        if c.guarded:
            arguments["unheld"] = self._unheld(k, unheld, panel)
        if c.tiles_add:
            arguments["tiny"] = call.tiny(panel)
        if c.dropout:
            arguments["draw"] = call.draw(self.item, panel, start)
        count = (lanes + (c.lanes - 1)) // c.lanes

        def dispatch(n: int) -> None:
            """The function for ``count`` registers, trying the full panel first."""
            attend = self.forward.panels[n - 1]
            if n == 1:
                attend(f, **arguments)
            else:
                f.either(count.eq(n), lambda: attend(f, **arguments), lambda: dispatch(n - 1))

        with f.when(seen.some_from < seen.some_to):
            dispatch(c.registers)

    def _unheld(self, k: Value, keys: Value, panel: Value) -> Unheld:
        """What the keys of a block and the queries of a panel hold that parts cannot; if anything, the queries are made
        ready in accumulators."""
        f, call, c, p = self.call.f, self.call, self.call.c, self.call.p
        flags, wide = call.lane_flags(panel), call.work.at + p.at_wide
        for j in range(c.registers):
            keys = keys | f.cast("zext", any_lane(f, flags.load(0, j).ne(0)), "i64")
        with f.when(keys.ne(0)):
            rows = call.query_rows(self.item, panel)
            self.forward.widen(f, rows=rows, words=p.head_size, out=Sums(wide, c.line), sign=p.sign)
        return Unheld(keys, k, p.k_s, p.k_d, p.head_size, call.work.at + p.at_key_flags, flags.at, wide)
