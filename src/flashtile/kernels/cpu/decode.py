"""The decode kernel: few queries on long keys.  K and V are read once for all rows that share them.

A work item is one part of the keys of one key/value head, for every query row that uses that head: the rows
of the GQA group, and a few positions of each.  With so few rows nothing is reused often enough to be worth
transposing, so lanes run over the head dimension, and the kernel is as fast as K and V come from memory.  A
row's arithmetic depends on where its key blocks stand in the whole problem only.

Source: Dao et al. 2023, Flash-Decoding; Shazeer 2019 for shared keys and values.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flashtile.kernels.cpu import params
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.decode_pack import Slots, emit_copy_rows, emit_load_query, emit_mask, slot_width
from flashtile.kernels.cpu.decode_scores import KEY_TILE, each_row_tile, emit_score_tiles
from flashtile.kernels.cpu.decode_softmax import STATE, emit_row_softmax, state
from flashtile.kernels.cpu.decode_values import emit_value_tiles
from flashtile.kernels.cpu.pack import write
from flashtile.llvm import math as vmath
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.types import SIZES

EXPORTS = ("decode",)

ADDRESSES = ("q", "k", "v", "o", "lse", "offsets")
STRIDES = tuple(f"{tensor}_{axis}" for tensor in "qkvo" for axis in "bhsd")
SIZES_OF_CALL = ("heads", "kv_heads", "q_len", "kv_len", "head_size", "value_size", "splits", "split_keys",
                 "offset", "left", "right", "pack_k", "pack_v", "partial", "o_split", "lse_split")  # fmt: skip
SCRATCH = ("at_mask", "at_q", "at_state", "at_s", "at_p", "at_o", "at_k", "at_v")
REALS = ("sign", "c_high", "c_low", "lse_scale")
FIELDS = (*ADDRESSES, *STRIDES, *SIZES_OF_CALL, *SCRATCH, *REALS)
# o_split and lse_split: bytes between the results of two parts.  partial: o takes accumulators, to be merged.

pack_addresses = struct.Struct(f"{len(ADDRESSES)}q").pack
_tail = struct.Struct(f"{len(FIELDS) - len(ADDRESSES) - len(REALS)}q{len(REALS)}d")


def pack_tail(values: Mapping[str, float]) -> bytes:
    """All fields of the parameter block but the addresses."""
    return _tail.pack(*(values[name] for name in FIELDS[len(ADDRESSES) :]))


def scratch_layout(c: Config, rows: int, head_size: int, value_size: int) -> tuple[dict[str, int], int]:
    """Offsets of the areas of a thread's scratch memory, and the bytes of all."""
    slots = -(-head_size // slot_width(c))
    columns = -(-value_size // c.lanes) * c.lanes
    each = SIZES[c.memory]
    areas = {
        "at_mask": c.register,
        "at_q": rows * slots * c.register,
        "at_state": rows * len(STATE) * c.size,
        "at_s": rows * c.key_block * c.size,
        "at_p": rows * c.key_block * c.size,
        "at_o": 2 * rows * columns * c.size,
        "at_k": c.key_block * max(head_size, slot_width(c)) * each,
        "at_v": c.key_block * max(value_size, c.lanes) * each,
    }
    offsets, at = {}, 0
    for name, size in areas.items():
        offsets[name] = at
        at += -(-size // 64) * 64
    return offsets, at


def decode_text(c: Config) -> str:
    """LLVM IR of the module whose one exported function is

    i32 decode(ptr params, i64 begin, i64 end, ptr scratch): work items [begin, end), 0 on success.
    """
    module = Module()
    _Decode(module, c).emit()
    return module.text()


@dataclass
class _Rows:
    """The query rows of a work item: row r is position r % q_len of head r // q_len of the group."""

    count: Value
    b: Value
    first_head: Value


class _Decode:
    """Emits the exported function.  Fields hold what is loaded from the parameter block at its entry."""

    def __init__(self, module: Module, c: Config):
        self.c = c
        self.helpers = {
            "load_query": emit_load_query(module, c),
            "slot_mask": emit_mask(module, c),
            "copy_rows": emit_copy_rows(module, c),
            "score_tiles": emit_score_tiles(module, c),
            "row_softmax": emit_row_softmax(module, c),
            "value_tiles": emit_value_tiles(module, c),
            "store_row": emit_store_row(module, c),
        }
        self.f = Function(module, "decode", "i32", ["ptr", "i64", "i64", "ptr"],
                          names=["params", "begin", "end", "scratch"])  # fmt: skip

    def emit(self) -> None:
        f, (block, begin, end, scratch) = self.f, self.f.args
        types = {**dict.fromkeys(ADDRESSES, "ptr"), **dict.fromkeys(REALS, "double")}
        self.p = {name: f.load(types.get(name, "i64"), block + 8 * i) for i, name in enumerate(FIELDS)}
        for name in REALS:
            self.p[name] = f.cast("fptrunc", self.p[name], self.c.acc)
        self.at = {name: scratch + self.p[f"at_{name}"] for name in ("mask", "q", "state", "s", "p", "o", "k", "v")}
        self.k_slots = Slots.of(f, self.p["head_size"], slot_width(self.c))
        self.v_slots = Slots.of(f, self.p["value_size"], self.c.lanes)
        self.o_row = self.v_slots.count * (2 * self.c.register)  # outputs, then what their sums lost to rounding
        self._call("slot_mask", self.p["head_size"], self.at["mask"])
        with f.range(begin, end) as item:
            self._item(item)
        f.ret(f.const("i32", 0))

    def _call(self, helper: str, *args: Value) -> None:
        self.f.call(self.helpers[helper], "void", args)

    def _item(self, item: Value) -> None:
        f, p, c = self.f, self.p, self.c
        head, split = item // p["splits"], item % p["splits"]
        b, kv_head = head // p["kv_heads"], head % p["kv_heads"]
        group = p["heads"] // p["kv_heads"]
        rows = _Rows(group * p["q_len"], b, kv_head * group)
        k, v = (p[x] + b * p[f"{x}_b"] + kv_head * p[f"{x}_h"] for x in "kv")
        per_batch = f.is_null(p["offsets"]).eq(0)
        shift = f.value_when(per_batch, lambda: f.load("i64", p["offsets"] + b * 8), p["offset"])
        shift = f.clamp(shift, -params.OPEN, params.OPEN)
        low, high = shift - p["left"], shift + p["right"] + 1  # keys that the first position sees
        self._start(rows)
        start = f.maximum(low, split * p["split_keys"])
        stop = f.minimum(high + p["q_len"] - 1, f.minimum((split + 1) * p["split_keys"], p["kv_len"]))
        # The first block may begin late, but in step with the lanes: a weight is summed in the lane of its key.
        step = max(KEY_TILE, c.lanes)
        with f.range(start // c.key_block * c.key_block, stop, c.key_block) as block:
            begin = f.maximum(block, start // step * step)
            end = f.minimum(block + c.key_block, stop)
            self._block(rows, k, v, begin, end - begin, low - begin, high - begin)
        self._finish(rows, split)

    def _start(self, rows: _Rows) -> None:
        """Queries laid out; outputs and sums 0, maxima -inf."""
        f, p, c = self.f, self.p, self.c

        def queries(n: int, first: Value) -> None:
            for r in range(n):
                q, apart = self._row(rows, first + r, "q"), f.const("i64", n * c.register)
                to = self.at["q"] + (first * self.k_slots.count + r) * c.register
                self._call("load_query", q, p["q_d"], p["head_size"], to, apart, p["sign"])

        each_row_tile(f, rows.count, queries)
        with f.range(0, rows.count) as row:
            f.store(f.const(c.acc, -math.inf), state(c, self._state(row), "maximum"))
            for name in ("sum", "lost"):
                f.store(f.const(c.acc, 0.0), state(c, self._state(row), name))
        with f.range(0, rows.count * self.o_row, c.register) as at:
            f.store(f.const(c.vector, 0.0), self.at["o"] + at, align=c.register)

    def _row(self, rows: _Rows, row: Value, tensor: str) -> Value:
        """Where a row of q or o begins."""
        p = self.p
        h, i = rows.first_head + row // p["q_len"], row % p["q_len"]
        return p[tensor] + rows.b * p[f"{tensor}_b"] + h * p[f"{tensor}_h"] + i * p[f"{tensor}_s"]

    def _state(self, row: Value) -> Value:
        return self.at["state"] + row * (len(STATE) * self.c.size)

    def _block(self, rows: _Rows, k: Value, v: Value, begin: Value, keys: Value, low: Value, high: Value) -> None:
        """One key block against all rows: scores, softmax, outputs.  Position i sees keys [low + i, high + i)."""
        f, p, c, at = self.f, self.p, self.c, self.at
        self._scores(rows, k + begin * p["k_s"], p["kv_len"] - begin, keys)
        with f.range(0, rows.count) as row:
            i, line = row % p["q_len"], row * (c.key_block * c.size)
            self._call("row_softmax", self._state(row), at["s"] + line, at["p"] + line, low + i,
                       f.minimum(high + i, keys), keys, p["c_high"], p["c_low"])  # fmt: skip
        packed, v = p["pack_v"].ne(0), v + begin * p["v_s"]
        with f.when(packed):
            self._copy(v, "v", keys, self.v_slots)
        v = f.select(packed, at["v"], v)
        stride = f.select(packed, self.v_slots.padded * SIZES[c.memory], p["v_s"])
        self._call("value_tiles", at["o"], self.o_row, at["state"], v, stride, at["p"], at["s"], keys, p["value_size"],
                   rows.count)  # fmt: skip

    def _scores(self, rows: _Rows, k: Value, there: Value, keys: Value) -> None:
        """Scores of a block.  Tiles read whole: keys whose tile would reach beyond the end of K are copied first."""
        f, p, c, at = self.f, self.p, self.c, self.at
        tiles = (keys + (KEY_TILE - 1)) // KEY_TILE * KEY_TILE
        in_place = f.select(tiles <= there, tiles, keys // KEY_TILE * KEY_TILE)
        in_place = f.select(p["pack_k"].ne(0), f.const("i64", 0), in_place)

        def score(k: Value, stride: Value, first: Value | int, count: Value) -> None:
            to = at["s"] + first * f.const("i64", c.size)
            self._call("score_tiles", at["q"], k, stride, self.k_slots.padded, at["mask"], to, count, rows.count)

        score(k, p["k_s"], f.const("i64", 0), in_place)
        with f.when(in_place < keys):
            self._copy(k + in_place * p["k_s"], "k", keys - in_place, self.k_slots)
            score(at["k"], self.k_slots.padded * SIZES[c.memory], in_place, keys - in_place)

    def _copy(self, source: Value, tensor: str, count: Value, slots: Slots) -> None:
        strides = self.p[f"{tensor}_s"], self.p[f"{tensor}_d"]
        self._call("copy_rows", source, *strides, count, slots.size, self.at[tensor], slots.padded)

    def _finish(self, rows: _Rows, split: Value) -> None:
        f, p, c = self.f, self.p, self.c
        with f.range(0, rows.count) as row:
            o = self._row(rows, row, "o") + split * p["o_split"]
            flat = (rows.b * p["heads"] + rows.first_head) * p["q_len"] + row
            lse = f.select(f.is_null(p["lse"]), p["lse"], p["lse"] + split * p["lse_split"] + flat * c.size)
            self._call("store_row", self.at["o"] + row * self.o_row, self._state(row), p["value_size"], o, p["o_d"],
                       p["partial"], lse, p["lse_scale"])  # fmt: skip


def emit_store_row(module: Module, c: Config) -> str:
    """A function that writes one row's normalised outputs and its lse; its name.

    Arguments: outputs (in slots, not normalised), state of the row, elements, outputs in memory, bytes between
    elements, whether they are a partial result (accumulators) or final (of the storage type), lse in memory (or
    null), factor from raw scores to nats.  A row that saw no key: 0 and -inf.
    """
    f = Function(module, "store_row", "void", ["ptr", "ptr", "i64", "ptr", "i64", "i64", "ptr", c.acc], internal=True,
                 names=["o", "state", "size", "out", "step", "partial", "lse", "nats"])  # fmt: skip
    o, row, size, out, step, partial, lse, nats = f.args
    total = f.load(c.acc, state(c, row, "sum"))
    seen = total.ne(0.0)  # a sum that is NaN compares unequal: a poisoned row stays NaN
    inverse = f.select(seen, 1.0 / total, f.const(c.acc, 0.0))
    with f.when(f.is_null(lse).eq(0)):
        log = vmath.log2(f, c.isa, f.splat(f.select(seen, total, f.const(c.acc, 1.0)), c.lanes))
        value = f.load(c.acc, state(c, row, "maximum")) * nats + f.extract(log, 0) * math.log(2)
        f.store(f.select(seen, value, f.const(c.acc, -math.inf)), lse, align=1)
    slots = Slots.of(f, size, c.lanes)

    def each(store: Callable[[Value, Value], None], width: int) -> None:
        """Whole registers where elements are adjacent and there are enough, else one by one."""
        adjacent = step.eq(width) & (size >= c.lanes)

        def registers() -> None:
            with f.range(0, slots.count) as slot:
                x = f.load(c.vector, o + slot * c.register, align=c.register) * f.splat(inverse, c.lanes)
                store(x, out + f.minimum(slot * c.lanes, slots.last) * width)

        def elements() -> None:
            with f.range(0, size) as column:
                store(f.load(c.acc, o + slots.place(f, column) * c.size) * inverse, out + column * step)

        f.either(adjacent, registers, elements)

    f.either(
        partial.ne(0),
        lambda: each(lambda x, at: f.store(x, at, align=1), c.size),
        lambda: each(lambda x, at: write(f, c, x, at), SIZES[c.memory]),
    )
    f.ret()
    return f.name
