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
from flashtile.kernels.cpu.finish import emit_load_state, emit_store_outputs
from flashtile.kernels.cpu.ir import Function, Module, Value
from flashtile.kernels.cpu.pack import emit_load_queries, emit_pack_keys, emit_pack_values
from flashtile.kernels.cpu.panel import PANEL_ARGUMENTS, emit_panel
from flashtile.kernels.cpu.scores import FAR

EXPORTS = ("forward",)


def forward_text(c: Config) -> str:
    """LLVM IR of the module whose one exported function is

    i32 forward(ptr params, i64 begin, i64 end, ptr scratch): work items [begin, end), 0 on success.
    """
    module = Module()
    _Forward(module, c).emit()
    return module.text()


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
    """Emits the exported function.  Fields hold what is loaded from the parameter block at its entry."""

    def __init__(self, module: Module, c: Config):
        self.c = c
        self.helpers = {
            "load_queries": emit_load_queries(module, c),
            "pack_keys": emit_pack_keys(module, c),
            "pack_values": emit_pack_values(module, c),
            "scan_values": emit_scan_values(module, c),
            "store_outputs": emit_store_outputs(module, c.output),
        }
        if c.partial:
            self.helpers["load_outputs"] = emit_load_queries(module, c.output, "load_outputs")
            self.helpers["load_state"] = emit_load_state(module, c)
        containment = emit_collect_nonfinite(module, c), emit_add_nonfinite(module, c)
        self.panels = [emit_panel(module, c, n + 1, *containment) for n in range(c.isa.vectors)]
        self.f = Function(module, "forward", "i32", ["ptr", "i64", "i64", "ptr"],
                          names=["params", "begin", "end", "scratch"])  # fmt: skip
        self.scratch = self.f.args[3]

    def emit(self) -> None:
        f, (block, begin, end, _) = self.f, self.f.args
        types = {**dict.fromkeys(params.ADDRESSES, "ptr"), **dict.fromkeys(params.REALS, "double")}
        self.p = {name: f.load(types.get(name, "i64"), block + 8 * i) for name, i in params.INDEX.items()}
        for name in params.REALS:
            self.p[name] = f.cast("fptrunc", self.p[name], self.c.acc)
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
        low, high = self._band(b, first)
        self._start(at("q", h, first), o, lse, rows)
        start = f.maximum(low, first_key)
        stop = f.minimum(high + rows, last_key)
        with f.range(start // c.key_block * c.key_block, stop, c.key_block) as begin:
            block = self._block(f.maximum(begin, first_key), f.minimum(begin + c.key_block, stop), k, v)
            with f.range(0, rows, c.panel) as panel:
                self._attend(panel, f.minimum(rows - panel, c.panel), low + panel, high + panel, block)
        self._finish(o, lse, rows)

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

    def _areas(self, panel: Value) -> tuple[Value, Value, Value]:
        """Transposed queries, outputs and state of the panel that begins at this row of the item."""
        p, c = self.p, self.c
        q = self.scratch + (p["at_q"] + panel * p["key_words"] * c.size)
        o = self.scratch + (p["at_o"] + panel * p["value_columns"] * c.size)
        return q, o, self.scratch + (p["at_state"] + panel * (2 * c.size))

    def _start(self, q: Value, o: Value, lse: Value, rows: Value) -> None:
        """Queries of every panel transposed; outputs and sums 0, maxima -inf, or as carried."""
        f, p, c = self.f, self.p, self.c
        low, zero = f.const(c.vector, -math.inf), f.const(c.vector, 0.0)
        top = self.scratch + params.Scratch(c).block_max
        with f.range(0, c.line, c.register) as at:
            f.store(low, top + at, align=c.register)
        with f.range(0, rows, c.panel) as panel:
            queries, outputs, state = self._areas(panel)
            here = f.minimum(rows - panel, c.panel)
            self._call("load_queries", "void", q + panel * p["q_s"], p["q_s"], p["q_d"], here, p["head_size"],
                       p["key_words"], queries, p["sign"])  # fmt: skip
            with f.range(0, c.line, c.register) as at:
                f.store(low, state + at, align=c.register)
                f.store(zero, state + (at + c.line), align=c.register)
            with f.range(0, p["value_columns"] * c.line, c.register) as at:
                f.store(zero, outputs + at, align=c.register)
            if c.partial:
                with f.when(p["carry"].ne(0)):
                    size = p["value_size"]
                    self._call("load_outputs", "void", o + panel * p["o_s"], p["o_s"], p["o_d"], here, size, size,
                               outputs, f.const(c.acc, 1.0))  # fmt: skip
                    self._call("load_state", "void", state, lse + panel * c.size, here, p["lse_scale"])

    def _block(self, start: Value, stop: Value, k: Value, v: Value) -> _Block:
        """K and V of the keys [start, stop): as they lie, or converted into scratch.

        Score tiles read whole: keys whose last tile would reach beyond the end of K are copied, too.
        """
        f, p = self.f, self.p
        k, v, keys = k + start * p["k_s"], v + start * p["v_s"], stop - start
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

    def _attend(self, panel: Value, rows: Value, low: Value, high: Value, block: _Block) -> None:
        """One panel against one key block: which of its keys any row sees, and which all rows see.

        ``low`` and ``high`` are the first and last key that the panel's first row sees; row i sees i further.
        Counts are relative to the block's start; the first is cut down to a whole tile, so that pairs of keys
        stay together.
        """
        f, p, c = self.f, self.p, self.c
        keys = block.stop - block.start
        some_from = f.maximum(low - block.start, 0) // c.rows * c.rows
        some_to = f.minimum(high + rows - block.start, keys)
        all_from = f.maximum(low + rows - 1 - block.start, some_from)
        all_to = f.minimum(high + 1 - block.start, some_to)
        queries, outputs, state = self._areas(panel)
        near = [f.cast("trunc", f.clamp(x - block.start, -FAR // 2, FAR // 2), "i32") for x in (high, low)]
        values = {
            "scratch": self.scratch, "q": queries, "o": outputs, "state": state,
            "k": block.k, "k_stride": block.k_stride, "v": block.v, "v_stride": block.v_stride,
            "words": p["key_words"], "columns": p["value_columns"],
            "some_from": some_from, "some_to": some_to, "all_from": all_from, "all_to": all_to,
            "above": near[0], "below": near[1], "bad": block.bad, "raw": block.raw, "raw_stride": p["v_s"],
            "raw_step": p["v_d"], "size": p["value_size"], "extra": self.scratch + p["at_extra"],
            "c_high": p["c_high"], "c_low": p["c_low"],
        }  # fmt: skip
        args = [values[name] for name in PANEL_ARGUMENTS]
        count = (rows + (c.lanes - 1)) // c.lanes

        def dispatch(n: int) -> None:
            """Call the function for ``count`` vectors, trying the full panel first."""
            if n == 1:
                f.call(self.panels[0], "void", args)
            else:
                f.either(count.eq(n), lambda: f.call(self.panels[n - 1], "void", args), lambda: dispatch(n - 1))

        with f.when(some_from < some_to):
            dispatch(c.isa.vectors)

    def _finish(self, o: Value, lse: Value, rows: Value) -> None:
        f, p, c = self.f, self.p, self.c
        with f.range(0, rows, c.panel) as panel:
            _, outputs, state = self._areas(panel)
            here = f.minimum(rows - panel, c.panel)
            self._call("store_outputs", "void", outputs, state, o + panel * p["o_s"], p["o_s"], p["o_d"], here,
                       p["value_size"], self._advance(lse, panel), p["lse_scale"])  # fmt: skip
