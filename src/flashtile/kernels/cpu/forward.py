"""The forward kernel: attention of query tiles to all their keys, online softmax, one pass over K and V.

A work item is a tile of queries of one head.  It is cut into panels, a query a lane; the item walks the key
blocks that any of its rows sees, and each panel in turn does scores -> softmax -> outputs on the block.  So K
and V are converted (where they must be) once for all panels of the item, and a row's arithmetic depends on
where its panel and its key blocks stand in the whole problem only: not on the tile size, not on the threads.

Source: Dao 2023, FlashAttention-2, section 3.1; Milakov and Gimelshein 2018 for the online softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashtile.kernels.cpu import params
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.containment import emit_add_nonfinite, emit_collect_nonfinite, emit_scan_values
from flashtile.kernels.cpu.dense import emit_dense
from flashtile.kernels.cpu.finish import emit_load_state, emit_store_outputs
from flashtile.kernels.cpu.pack import emit_load_queries, emit_pack_keys, emit_pack_values
from flashtile.kernels.cpu.panel import PANEL_ARGUMENTS, emit_panel
from flashtile.kernels.cpu.scores import FAR
from flashtile.kernels.cpu.spans import BLOCKS, emit_join_span
from flashtile.llvm.ir import Function, Module, Value

EXPORTS = ("forward",)
SEGMENT = 4  # words of a segment: keys some_from, some_to, all_from, all_to


def forward_text(c: Config) -> str:
    """LLVM IR of the module whose one exported function is

    i32 forward(ptr params, i64 begin, i64 end, ptr scratch): work items [begin, end), 0 on success.
    """
    module = Module()
    _Forward(module, c).emit()
    return module.text()


@dataclass
class _Item:
    """A work item: its rows from ``first`` on, K and V of its head, and the keys it may look at."""

    b: Value
    h: Value
    first: Value
    rows: Value
    k: Value
    v: Value
    first_key: Value
    last_key: Value


@dataclass
class _Block:
    """A key block as the panels read it: where its first key stands, and K and V from there."""

    start: Value
    stop: Value
    k: Value
    k_stride: Value
    v: Value
    v_stride: Value
    raw: Value
    bad: Value


class _Forward:
    """Emits the exported function.  Fields hold what is loaded from the parameter block at its entry.

    ``spans``: there may be sums of earlier spans (spans.py) beside those of the span at hand.
    """

    def __init__(self, module: Module, c: Config):
        self.c = c
        self.helpers = {
            "load_queries": emit_load_queries(module, c),
            "pack_keys": emit_pack_keys(module, c),
            "pack_values": emit_pack_values(module, c),
            "scan_values": emit_scan_values(module, c),
            "join_span": emit_join_span(module, c),
            "store_outputs": emit_store_outputs(module, c.output),
        }
        if c.partial:
            self.helpers["load_outputs"] = emit_load_queries(module, c.output, "load_outputs")
            self.helpers["load_state"] = emit_load_state(module, c)
        containment = emit_collect_nonfinite(module, c), emit_add_nonfinite(module, c)
        dense = [emit_dense(module, c, n) for n in range(len(c.code.dense_loads) if c.code else 0)]
        self.panels = [emit_panel(module, c, n + 1, *containment, dense) for n in range(c.isa.vectors)]
        self.f = Function(module, "forward", "i32", ["ptr", "i64", "i64", "ptr"],
                          names=["params", "begin", "end", "scratch"])  # fmt: skip
        self.scratch = self.f.args[3]

    def emit(self) -> None:
        f, (block, begin, end, _) = self.f, self.f.args
        types = {**dict.fromkeys(params.ADDRESSES, "ptr"), **dict.fromkeys(params.REALS, "double")}
        self.p = {name: f.load(types.get(name, "i64"), block + 8 * i) for name, i in params.INDEX.items()}
        for name in params.REALS:
            if name != "scale":  # the score program's frame takes it as it is
                self.p[name] = f.cast("fptrunc", self.p[name], self.c.acc)
        self.spans = (self.p["kv_len"] > BLOCKS * self.c.key_block) | self.p["carry"].ne(0)
        with f.range(begin, end) as item:
            self._item(item)
        f.ret(f.const("i32", 0))

    def _call(self, helper: str, returns: str, *args: Value) -> Value:
        return self.f.call(self.helpers[helper], returns, args)

    def _item(self, item: Value) -> None:
        f, p, c = self.f, self.p, self.c
        first_key, last_key = f.const("i64", 0), p["kv_len"]
        split = item % p["splits"]
        if c.partial:
            item = item // p["splits"]
            first_key = split * p["split_keys"]
            last_key = f.minimum(first_key + p["split_keys"], last_key)
        head = item // p["query_tiles"]
        b, h = head // p["heads"], head % p["heads"]
        first = item % p["query_tiles"] * p["tile_q"]
        rows = f.minimum(p["q_len"] - first, p["tile_q"])

        def at(tensor: str, head_index: Value, row: Value | int) -> Value:
            base = p[tensor]
            for index, axis in zip((b, head_index, row), "bhs", strict=True):
                base = base + p[f"{tensor}_{axis}"] * index
            return base

        k, v = (at(x, h // p["group"], 0) for x in "kv")
        o, lse = at("o", h, first), self._advance(p["lse"], head * p["q_len"] + first)
        if c.partial:
            o, lse = o + split * p["o_split"], lse + split * p["lse_split"]
        self._start(at("q", h, first), o, lse, rows)
        if c.code:
            self._frame(b, h)
        if c.masked:
            self._walk_segments(_Item(b, h, first, rows, k, v, first_key, last_key))
        else:
            self._walk_band(_Item(b, h, first, rows, k, v, first_key, last_key))
        sink = self._sink(b, h)
        self._finish(o, lse, rows, sink)

    def _walk_band(self, item: _Item) -> None:
        """Every key block between the first key that the first row sees and the last that the last row sees."""
        f, c = self.f, self.c
        low, high = self._band(item.b, item.first)
        start = f.maximum(low, item.first_key)
        stop = f.minimum(high + item.rows, item.last_key)
        start = start // c.key_block * c.key_block
        with f.range(start, stop, c.key_block) as begin:
            with f.when(self._span(begin).ne(self._span(f.maximum(begin - c.key_block, start)))):
                self._join_span(item.rows)
            block = self._block(f.maximum(begin, item.first_key), f.minimum(begin + c.key_block, stop), item)
            with f.range(0, item.rows, c.panel) as panel:
                rows = f.minimum(item.rows - panel, c.panel)
                self._attend(item, panel, block, *self._band_keys(low + panel, high + panel, rows, block))

    def _walk_segments(self, item: _Item) -> None:
        """The key blocks that the plan's segments name (plan/segments.py), skipping those that no panel sees.

        Each panel has a cursor into its segments.  While it does one block, the item notes where the next one
        begins: the least of where its panels go on.
        """
        f, p, c = self.f, self.p, self.c
        cursors = self.scratch + p["at_cursor"]
        next_key = cursors + (item.rows + (c.panel - 1)) // c.panel * 8
        table = p["rows"] + (item.b * p["segment_b"] + item.h * p["segment_h"] + item.first // c.panel) * 8
        f.store(item.last_key, next_key)
        with f.range(0, item.rows, c.panel) as panel:
            at = panel // c.panel * 8
            first = f.load("i64", table + at)
            f.store(self._skip(first, f.load("i64", table + at + 8), item.first_key, next_key), cursors + at)

        def one_block(walk: list[Value]) -> list[Value]:
            key = f.maximum(walk[0], item.first_key)
            span = self._span(key)
            with f.when(span.ne(walk[1])):
                self._join_span(item.rows)
            stop = f.minimum(key // c.key_block * c.key_block + c.key_block, item.last_key)
            block = self._block(f.maximum(key // c.key_block * c.key_block, item.first_key), stop, item)
            f.store(item.last_key, next_key)
            with f.range(0, item.rows, c.panel) as panel:
                at = panel // c.panel * 8
                cursor, end = f.load("i64", cursors + at), f.load("i64", table + at + 8)
                with f.when(cursor < end):
                    self._attend(item, panel, block, *self._segment_keys(cursor, block))
                    f.store(self._skip(cursor, end, stop, next_key), cursors + at)
            return [f.load("i64", next_key), span]

        first = f.load("i64", next_key)
        f.repeat([first, self._span(first)], lambda walk: walk[0] < item.last_key, one_block)

    def _span(self, key: Value) -> Value:
        """The number of the span that a key lies in."""
        return key // (BLOCKS * self.c.key_block)

    def _segment(self, cursor: Value, field: int) -> Value:
        return self.f.load("i64", self.p["segments"] + cursor * (8 * SEGMENT) + 8 * field)

    def _skip(self, cursor: Value, end: Value, key: Value, next_key: Value) -> Value:
        """The first segment from the cursor on that reaches beyond the key; notes where it goes on."""
        f = self.f

        def behind(cursors: list[Value]) -> Value:
            # Past the last segment there is nothing to load: the first one stands in.
            at = f.select(cursors[0] < end, cursors[0], 0)
            inside = f.select(cursors[0] < end, f.const("i64", 1), 0).ne(0)
            return inside & (self._segment(at, 1) <= key)

        cursor = f.repeat([cursor], behind, lambda cursors: [cursors[0] + 1])[0]
        with f.when(cursor < end):
            begins = f.maximum(self._segment(cursor, 0), key)
            f.store(f.minimum(f.load("i64", next_key), begins), next_key)
        return cursor

    def _segment_keys(self, cursor: Value, block: _Block) -> list[Value]:
        """A segment's keys that lie in the block, as ``_attend`` takes them."""
        f, size = self.f, block.stop - block.start
        some_from, some_to, all_from, all_to = (self._segment(cursor, n) - block.start for n in range(SEGMENT))
        zero = f.const("i32", 0)
        return [f.maximum(some_from, 0), f.minimum(some_to, size), f.maximum(all_from, 0), f.minimum(all_to, size),
                zero, zero]  # fmt: skip

    def _frame(self, b: Value, h: Value) -> None:
        """What the score program needs of this head, for every tile."""
        f, p = self.f, self.p
        dense = self.scratch + p["at_dense"]
        fields = {"captures": p["captures"], "b": b, "h": h, "last_row": p["q_len"] - 1, "last_key": p["kv_len"] - 1,
                  "scale": p["scale"], "dense": dense}  # fmt: skip
        for name, value in fields.items():
            f.store(value, self._frame_at(name))

    def _frame_at(self, name: str) -> Value:
        return self.scratch + (params.Scratch(self.c).frame + 8 * params.FRAME.index(name))

    def _sink(self, b: Value, h: Value) -> Value:
        """The head's sink; -inf if there is none."""
        f, p = self.f, self.p
        none = f.const(self.c.acc, -math.inf)
        at = p["sinks"] + b * p["sink_b"] + h * p["sink_h"]
        return f.value_when(f.is_null(p["sinks"]).eq(0), lambda: f.load(self.c.acc, at), none)

    def _band(self, b: Value, row: Value) -> tuple[Value, Value]:
        """The first and the last key that a row sees."""
        f, p = self.f, self.p
        per_batch = f.is_null(p["offsets"]).eq(0)
        offset = f.value_when(per_batch, lambda: f.load("i64", p["offsets"] + b * 8), p["offset"])
        offset = f.clamp(offset, -params.OPEN, params.OPEN)
        return row + offset - p["left"], row + offset + p["right"]

    def _advance(self, lse: Value, rows: Value) -> Value:
        """The lse of a row further on; null, if it is not wanted, stays null."""
        return self.f.select(self.f.is_null(lse), lse, lse + rows * self.c.size)

    def _queries(self, panel: Value) -> Value:
        """Transposed queries of the panel that begins at this row of the item."""
        return self.scratch + (self.p["at_q"] + panel * self.p["key_words"] * self.c.size)

    def _sums(self, panel: Value, level: str = "") -> tuple[Value, Value]:
        """State and outputs of a panel: of the span at hand; of earlier spans and of what was carried ("earlier_"); or
        what these have lost to rounding ("lost_")."""
        p, c = self.p, self.c
        o = self.scratch + (p[f"at_{level}o"] + panel * p["value_columns"] * c.size)
        return self.scratch + (p[f"at_{level}state"] + panel * (2 * c.size)), o

    def _join_span(self, rows: Value) -> None:
        """The sums of the span at hand into those of earlier spans."""
        p = self.p
        with self.f.range(0, rows, self.c.panel) as panel:
            sums = (address for level in ("", "earlier_", "lost_") for address in self._sums(panel, level))
            self._call("join_span", "void", *sums, p["value_columns"], p["c_high"], p["c_low"])

    def _start(self, q: Value, o: Value, lse: Value, rows: Value) -> None:
        """Queries of every panel transposed; no sums yet, or those that are carried."""
        f, p, c = self.f, self.p, self.c
        low = f.const(c.vector, -math.inf)
        top = self.scratch + params.Scratch(c).block_max
        with f.range(0, c.line, c.register) as at:
            f.store(low, top + at, align=c.register)
        with f.range(0, rows, c.panel) as panel:
            here = f.minimum(rows - panel, c.panel)
            self._call("load_queries", "void", q + panel * p["q_s"], p["q_s"], p["q_d"], here, p["head_size"],
                       p["key_words"], self._queries(panel), p["sign"])  # fmt: skip
            self._clear(*self._sums(panel))
            with f.when(self.spans):
                earlier = self._sums(panel, "earlier_")
                self._clear(*earlier)
                self._clear(*self._sums(panel, "lost_"))
                if c.partial:
                    with f.when(p["carry"].ne(0)):
                        self._carry(panel, here, *earlier, o + panel * p["o_s"], lse + panel * c.size)

    def _clear(self, state: Value, o: Value) -> None:
        """Sums 0, maxima -inf."""
        f, c = self.f, self.c
        zero = f.const(c.vector, 0.0)
        with f.range(0, c.line, c.register) as at:
            f.store(f.const(c.vector, -math.inf), state + at, align=c.register)
            f.store(zero, state + (at + c.line), align=c.register)
        with f.range(0, self.p["value_columns"] * c.line, c.register) as at:
            f.store(zero, o + at, align=c.register)

    def _carry(self, panel: Value, rows: Value, state: Value, o: Value, carried_o: Value, carried_lse: Value) -> None:
        """Carried outputs and lse as those of an earlier span; the span at hand begins at their maximum."""
        f, p, c = self.f, self.p, self.c
        size = p["value_size"]
        self._call("load_outputs", "void", carried_o, p["o_s"], p["o_d"], rows, size, size, o, f.const(c.acc, 1.0))
        self._call("load_state", "void", state, carried_lse, rows, p["lse_scale"])
        maxima, _ = self._sums(panel)
        with f.range(0, c.line, c.register) as at:
            f.store(f.load(c.vector, state + at, align=c.register), maxima + at, align=c.register)

    def _block(self, start: Value, stop: Value, item: _Item) -> _Block:
        """K and V of the keys [start, stop): as they lie, or converted into scratch.

        Score tiles read whole: keys whose last tile would reach beyond the end of K are copied, too.
        """
        f, p = self.f, self.p
        k, v, keys = item.k + start * p["k_s"], item.v + start * p["v_s"], stop - start
        packed_k, packed_v = self.scratch + p["at_k"], self.scratch + p["at_v"]
        whole = start + (keys + (self.c.rows - 1)) // self.c.rows * self.c.rows
        pack_k, pack_v = p["pack_k"].ne(0) | (whole > p["kv_len"]), p["pack_v"].ne(0)
        with f.when(pack_k):
            self._call("pack_keys", "void", k, p["k_s"], p["k_d"], keys, p["head_size"], p["key_words"], packed_k,
                       p["k_row"])  # fmt: skip

        def pack() -> Value:
            return self._call("pack_values", "i64", v, p["v_s"], p["v_d"], keys, p["value_size"],
                              p["value_columns"], packed_v, p["v_row"])  # fmt: skip

        def scan() -> Value:
            return self._call("scan_values", "i64", v, p["v_s"], keys, p["value_size"])

        bad = f.value_when(pack_v.eq(0), scan, f.const("i64", 0))
        copied = pack_v | bad.ne(0)
        bad = f.value_when(copied, pack, bad)
        return _Block(start, stop, f.select(pack_k, packed_k, k), f.select(pack_k, p["k_row"], p["k_s"]),
                      f.select(copied, packed_v, v), f.select(copied, p["v_row"], p["v_s"]), v, bad)  # fmt: skip

    def _band_keys(self, low: Value, high: Value, rows: Value, block: _Block) -> list[Value]:
        """Which keys of a block the band shows a panel whose first row sees low ... high, as ``_attend`` takes them.

        Row i sees i further.  The first key is cut down to a whole tile, so that pairs of keys stay together.
        """
        f, c = self.f, self.c
        some_from = f.maximum(low - block.start, 0) // c.rows * c.rows
        some_to = f.minimum(high + rows - block.start, block.stop - block.start)
        all_from = f.maximum(low + rows - 1 - block.start, some_from)
        all_to = f.minimum(high + 1 - block.start, some_to)
        near = [f.cast("trunc", f.clamp(x - block.start, -FAR // 2, FAR // 2), "i32") for x in (high, low)]
        return [some_from, some_to, all_from, all_to, *near]

    def _attend(self, item: _Item, panel: Value, block: _Block, *keys: Value) -> None:
        """One panel against one key block.

        ``keys``, counted from the block's start: [some_from, some_to) that some row sees, [all_from, all_to) that
        all rows see, and the last and the first key that the panel's first row sees (a band's).
        """
        f, p, c = self.f, self.p, self.c
        names = ("some_from", "some_to", "all_from", "all_to", "above", "below")
        rows = f.minimum(item.rows - panel, c.panel)
        if c.code:
            f.store(item.first + panel, self._frame_at("row"))
            f.store(block.start, self._frame_at("block"))
        state, outputs = self._sums(panel)
        values = {
            "scratch": self.scratch, "q": self._queries(panel), "o": outputs, "state": state,
            "k": block.k, "k_stride": block.k_stride, "v": block.v, "v_stride": block.v_stride,
            "words": p["key_words"], "columns": p["value_columns"],
            **dict(zip(names, keys, strict=True)), "rows": rows, "dense": p["at_dense"],
            "bad": block.bad, "raw": block.raw, "raw_stride": p["v_s"], "raw_step": p["v_d"],
            "size": p["value_size"], "extra": self.scratch + p["at_extra"], "c_high": p["c_high"], "c_low": p["c_low"],
        }  # fmt: skip
        args = [values[name] for name in PANEL_ARGUMENTS]
        count = (rows + (c.lanes - 1)) // c.lanes

        def dispatch(n: int) -> None:
            """Call the function for ``count`` vectors, trying the full panel first."""
            if n == 1:
                f.call(self.panels[0], "void", args)
            else:
                f.either(count.eq(n), lambda: f.call(self.panels[n - 1], "void", args), lambda: dispatch(n - 1))

        with f.when(keys[0] < keys[1]):
            dispatch(c.isa.vectors)

    def _finish(self, o: Value, lse: Value, rows: Value, sink: Value) -> None:
        f, p, c = self.f, self.p, self.c
        with f.when(self.spans):
            self._join_span(rows)
        with f.range(0, rows, c.panel) as panel:
            last, earlier = self._sums(panel), self._sums(panel, "earlier_")
            state, outputs = (f.select(self.spans, x, y) for x, y in zip(earlier, last, strict=True))
            here = f.minimum(rows - panel, c.panel)
            self._call("store_outputs", "void", outputs, state, o + panel * p["o_s"], p["o_s"], p["o_d"], here,
                       p["value_size"], self._advance(lse, panel), p["lse_scale"], sink)  # fmt: skip
