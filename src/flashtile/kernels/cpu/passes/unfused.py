"""The unfused kernels: scores, softmax and output as three stages that meet in memory, a tile of queries a time.

What fused kernels replace, and are measured against as tasks of a runtime.  Scores are stored in the input's dtype,
row-major, the keys of each key tile padded to whole steps; lanes run over keys, then over value columns.  Plain on
purpose: vectorised, a few registers of one row at a time, nothing kept over rows.

    scores   s = program(scale * q.k), -inf where hidden or padding          item: (batch, head, query tile, key tile)
    softmax  s becomes p in place, and lse; hidden keys are marked by -0.0   item: (batch, head, query tile)
    output   o (+)= p v in accumulators                                      item: (batch, head, query tile, key tile)

Source: Vaswani et al. 2017, Attention Is All You Need, section 3.2.1; ``kernels.vanilla`` is the same in NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.band import FAR, OPEN
from flashtile.kernels.cpu.steps.pack import read, write
from flashtile.llvm import math as vmath
from flashtile.llvm.blocks import Areas, Block, integers, pointers, reals
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.routines import entry
from flashtile.llvm.types import vector
from flashtile.score.captures import Block as Captures
from flashtile.score.emit import Emission

EXPORTS = ("scores", "softmax", "output")

CALL = Block(
    pointers("q k v o lse stored offsets captures sinks"),
    # stored_s: bytes of a row of stored scores.
    integers("q_s k_s v_s o_s stored_s heads q_len kv_len head_size value_size tile_q tile_k query_tiles key_tiles"),
    # columns: keys of a key tile with their padding. carry: o holds the sum over earlier key tiles.
    integers("columns carry offset left right sink_b sink_h at_keys"),
    reals("scale c_high c_low"),
)

REGISTERS = 4  # sums that a row has at work at once: enough to hide the latency of a multiply-add


def columns_of(c: Config, keys: int) -> int:
    """Keys of a tile with their padding."""
    step = REGISTERS * c.lanes
    return -(-keys // step) * step


def areas(c: Config, head_size: int, columns: int, key_tiles: int) -> Areas:
    """A thread's scratch memory: a row of scores or a query in accumulators, then a key tile transposed."""
    row = max(head_size, columns * key_tiles) * c.size
    return Areas({"row": row, "at_keys": head_size * columns * c.size})


def unfused_text(c: Config) -> str:
    """LLVM IR of the module that exports scores, softmax and output (routines.entry)."""
    module = Module()
    for name, stage in zip(EXPORTS, (_scores, _softmax, _output), strict=True):
        f = entry(module, name)
        block, begin, end, scratch = f.parameters
        p = CALL.load(f, block)
        with f.range(begin, end) as item:
            stage(f, c, p, _place(f, p, item, name != "softmax"), scratch)
        f.ret(f.const("i32", 0))
    return module.text()


@dataclass
class _Place:
    """A work item: its batch and head, its rows from ``first`` on, its keys from ``key`` on."""

    b: Value
    h: Value
    first: Value
    rows: Value
    key: Value
    keys: Value
    column: Value  # where its keys stand in a row of stored scores


def _place(f: Function, p: SimpleNamespace, item: Value, has_key_tile: bool) -> _Place:
    tile = f.const("i64", 0)
    if has_key_tile:
        tile, item = item % p.key_tiles, item // p.key_tiles
    head, first = item // p.query_tiles, item % p.query_tiles * p.tile_q
    key = tile * p.tile_k
    return _Place(
        head // p.heads,
        head % p.heads,
        first,
        f.minimum(p.q_len - first, p.tile_q),
        key,
        f.minimum(p.kv_len - key, p.tile_k),
        tile * p.columns,
    )


# -- scores -------------------------------------------------------------------------------------------


def _scores(f: Function, c: Config, p: SimpleNamespace, at: _Place, scratch: Value) -> None:
    step, keys = c.element, scratch + p.at_keys
    scale = f.splat(f.cast("fptrunc", p.scale, c.acc), c.lanes)
    with f.range(0, p.columns) as column, f.range(0, p.head_size) as d:  # padding repeats the last key
        source = p.k + (at.key + f.minimum(column, at.keys - 1)) * p.k_s
        f.store(read(f, c, source + d * step), keys + (d * p.columns + column) * c.size)
    program = _Program(f, c, p, at)
    with f.range(0, at.rows) as r:
        row = at.first + r
        query = p.q + row * p.q_s
        with f.range(0, p.head_size) as d:
            f.store(read(f, c, query + d * step), scratch + d * c.size)
        target = p.stored + r * p.stored_s + at.column * step
        seen, change = _seen_by(f, c, p, at, row), program.row(row)
        with f.range(0, p.columns, REGISTERS * c.lanes) as first:
            line = keys + first * c.size

            def add(d: Value, sums: list[Value], line: Value = line) -> list[Value]:
                factor, at_d = f.splat(f.load(c.acc, scratch + d * c.size), c.lanes), line + d * (p.columns * c.size)
                loaded = (f.load(c.vector, at_d + n * c.register, align=c.size) for n in range(REGISTERS))
                return [c.isa.multiply_add(f, factor, key, total) for key, total in zip(loaded, sums, strict=True)]

            products = f.fold(0, p.head_size, 1, [f.const(c.vector, 0.0)] * REGISTERS, add)
            for n, raw in enumerate(products):
                column = first + n * c.lanes
                score, shown = change(column, raw * scale)
                visible = seen(column) if shown is None else seen(column) & shown
                write(f, c, f.select(visible, score, f.const(c.vector, -math.inf)), target + column * step)


def _seen_by(f: Function, c: Config, p: SimpleNamespace, at: _Place, row: Value) -> Callable[[Value], Value]:
    """Which lanes, from a column on, are keys that the band shows to this row."""
    per_batch = f.is_null(p.offsets).eq(0)
    offset = f.value_when(per_batch, lambda: f.load("i64", p.offsets + at.b * 8), p.offset)
    middle = row + f.clamp(offset, -OPEN, OPEN) - at.key
    low, high = f.maximum(middle - p.left, 0), f.minimum(middle + p.right, at.keys - 1)
    ends = [f.splat(f.cast("trunc", f.clamp(x, -FAR, FAR), "i32"), c.lanes) for x in (low, high)]

    def seen(column: Value) -> Value:
        lane = f.iota(vector(c.lanes, "i32"), 0) + f.splat(f.cast("trunc", column, "i32"), c.lanes)
        return (lane >= ends[0]) & (lane <= ends[1])

    return seen


class _Program:
    """The score program, its lanes over keys; without one, scores stay as they are."""

    def __init__(self, f: Function, c: Config, p: SimpleNamespace, at: _Place) -> None:
        self.f, self.c, self.at = f, c, at
        if c.code is not None:
            self.roots = [root for root in (c.code.score, c.code.mask) if root is not None]
            batch, head = (f.cast("trunc", x, "i32") for x in (at.b, at.h))
            values = {"b": batch, "h": head}
            self.outer = Emission(f, c.isa, c.acc, c.lanes, Captures(c.code.slots), p.captures, values)
            self.outer.prepare(*self.roots)

    def row(self, row: Value) -> Callable[[Value, Value], tuple[Value, Value | None]]:
        """(column, scores) -> changed scores of a register of keys, and which of them the mask shows (None: all)."""
        f, c, code = self.f, self.c, self.c.code
        if code is None:
            return lambda column, s: (s, None)
        place = self.outer.inner({"i": f.cast("trunc", row, "i32")})
        place.prepare(*self.roots)

        def change(column: Value, s: Value) -> tuple[Value, Value | None]:
            first, last = (f.cast("trunc", x, "i32") for x in (self.at.key + column, self.at.key + self.at.keys - 1))
            kind = vector(c.lanes, "i32")
            j = f.minimum(f.iota(kind, 0) + f.splat(first, c.lanes), f.splat(last, c.lanes))
            inner = place.inner({"j": j, "s": s})
            score = s if code.score is None else inner.vector(code.score)
            return score, None if code.mask is None else inner.vector(code.mask)

        return change


# -- softmax ------------------------------------------------------------------------------------------


def _softmax(f: Function, c: Config, p: SimpleNamespace, at: _Place, scratch: Value) -> None:
    step, columns = c.element, p.columns * p.key_tiles
    low = f.const(c.acc, -math.inf)
    sink_at = p.sinks + at.b * p.sink_b + at.h * p.sink_h
    sink = f.value_when(f.is_null(p.sinks).eq(0), lambda: f.load(c.acc, sink_at), low)
    factors = [f.splat(f.cast("fptrunc", x, c.acc), c.lanes) for x in (p.c_high, p.c_low)]

    def exp(x: Value) -> Value:
        return vmath.weight_of(f, c.isa, x, *factors)

    with f.range(0, at.rows) as r:
        row = p.stored + r * p.stored_s

        def score(column: Value, row: Value = row) -> Value:
            return read(f, c, row + column * step, c.lanes)

        tops = f.fold(0, columns, c.lanes, [f.const(c.vector, -math.inf)], lambda n, top: [f.maximum(score(n), top[0])])
        top = _across(f, c, tops[0], f.maximum)
        anchor = f.select(top.eq(-math.inf), f.const(c.acc, 0.0), top)  # -inf - -inf would be NaN

        def weigh(column: Value, total: list[Value], anchor: Value = anchor) -> list[Value]:
            weights = exp(score(column) - f.splat(anchor, c.lanes))
            f.store(weights, scratch + column * c.size, align=c.size)
            return [total[0] + weights]

        sums = f.fold(0, columns, c.lanes, [f.const(c.vector, 0.0)], weigh)
        # A sink above the maximum scales the row, by a weight that may be small beyond the format while the output is
        # not: one half of its exponent with each factor, as in steps/finish.py.
        highest = f.maximum(sink, top)
        reference = f.select(highest.eq(-math.inf), f.const(c.acc, 0.0), highest)
        shift = [f.splat(x, c.lanes) for x in (top, sink, reference)]
        half = vmath.exp_of_difference(f, c.isa, shift[0], shift[2], 0.5)
        total = f.extract(half, 0) * f.extract(half, 0) * _across(f, c, sums[0], lambda a, b: a + b)
        total = total + f.extract(vmath.exp_of_difference(f, c.isa, shift[1], shift[2]), 0)
        seen = total.ne(0.0)
        total = f.select(seen, total, f.const(c.acc, 1.0))
        inverse = half * f.splat(1.0 / total, c.lanes)
        with f.range(0, columns, c.lanes) as column:
            weights = f.load(c.vector, scratch + column * c.size, align=c.size) * half * inverse
            hidden = score(column).eq(-math.inf)
            write(f, c, f.select(hidden, f.const(c.vector, -0.0), weights), row + column * step)
        lse = reference + f.extract(vmath.log2(f, c.isa, f.splat(total, c.lanes)), 0) * math.log(2)
        row_of_all = (at.b * p.heads + at.h) * p.q_len + at.first + r
        f.store(f.select(seen, lse, low), p.lse + row_of_all * c.size, align=1)


def _across(f: Function, c: Config, register: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """All lanes of a register combined into one, in halves."""
    lanes = [f.extract(register, lane) for lane in range(c.lanes)]
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [combine(a, b) for a, b in zip(lanes[:half], lanes[half:], strict=True)]
    return lanes[0]


# -- output -------------------------------------------------------------------------------------------


def _output(f: Function, c: Config, p: SimpleNamespace, at: _Place, scratch: Value) -> None:
    step, wide = c.element, c.size
    v = p.v + at.key * p.v_s
    with f.range(0, at.rows) as r:
        o = p.o + (at.first + r) * p.o_s
        weights = p.stored + r * p.stored_s + at.column * step

        def columns(first: Value, registers: int, lanes: int, o: Value = o, weights: Value = weights) -> None:
            zero = f.const(c.vector if lanes > 1 else c.acc, 0.0)
            places = [first + n * lanes for n in range(registers)]

            def add(key: Value, sums: list[Value]) -> list[Value]:
                weight, hidden = _weight(f, c, weights + key * step)
                factor, row = f.splat(weight, lanes) if lanes > 1 else weight, v + key * p.v_s
                values = (read(f, c, row + column * step, lanes) for column in places)
                seen = (f.select(hidden, zero, value) for value in values)  # 0 * NaN is NaN
                return [c.isa.multiply_add(f, factor, value, total) for value, total in zip(seen, sums, strict=True)]

            for column, total in zip(places, f.fold(0, at.keys, 1, [zero] * registers, add), strict=True):
                target = o + column * wide
                before = f.value_when(p.carry.ne(0), partial(f.load, zero.type, target, align=1), zero)
                f.store(total + before, target, align=1)

        done = f.const("i64", 0)
        for registers, lanes in ((REGISTERS, c.lanes), (1, c.lanes), (1, 1)):
            end = p.value_size // (registers * lanes) * (registers * lanes)
            with f.range(done, end, registers * lanes) as first:
                columns(first, registers, lanes)
            done = end


def _weight(f: Function, c: Config, at: Value) -> tuple[Value, Value]:
    """A stored weight, and whether its bits are those of -0.0: a hidden key."""
    bits = 8 * c.element
    return read(f, c, at), f.load(f"i{bits}", at, align=1).eq(-(1 << (bits - 1)))
