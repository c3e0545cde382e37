"""The merge kernel: partial results over parts of the keys, in order, become the result over all of them.

A work item is one query row.  Partials are (o normalised, lse in nats), both in accumulators; a part that saw no
key is o = 0, lse = -inf.  The head's sink, which belongs to no part, joins here.

    lse = log (exp(sink) + sum_n exp(lse_n)),   o = sum_n exp(lse_n - lse) o_n

Source: Dao et al. 2023, Flash-Decoding; ``flashtile.merge`` is the same in NumPy.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.finish import Whole
from flashtile.kernels.cpu.steps.pack import write
from flashtile.llvm import math as vmath
from flashtile.llvm.blocks import Block, integers, pointers
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.routines import entry

EXPORTS = ("merge",)

STRIDES = ("o_b", "o_h", "o_s", "o_d")
CALL = Block(
    pointers("parts_o parts_lse o lse sinks"),  # sinks: accumulators, or null
    # Bytes between the results of two parts, and between sinks, at the end.
    integers(STRIDES),
    integers("heads q_len value_size splits o_split lse_split sink_b sink_h"),
)


def scratch_bytes(c: Config, splits: int) -> int:
    """Scratch of a thread: one weight a part."""
    return splits * c.size


def merge_text(c: Config) -> str:
    """LLVM IR of the module that exports merge (routines.entry); items are the rows of (B, H, S_q)."""
    module = Module()
    f = entry(module, "merge")
    block, begin, end, scratch = f.parameters
    p = CALL.load(f, block)
    with f.range(begin, end) as row:
        head, i = row // p.q_len, row % p.q_len
        b, h = head // p.heads, head % p.heads
        sink = _sink(f, c, p, p.sinks + b * p.sink_b + h * p.sink_h)
        half = _weights(f, c, p, row, sink, scratch)
        o = p.o + b * p.o_b + h * p.o_h + i * p.o_s
        _outputs(f, c, p, p.parts_o + row * p.value_size * c.size, o, scratch, half)
    f.ret(f.const("i32", 0))
    return module.text()


def _sink(f: Function, c: Config, p: SimpleNamespace, at: Value) -> Value:
    """The sink there; -inf if there are none."""
    return f.value_when(f.is_null(p.sinks).eq(0), lambda: f.load(c.acc, at), f.const(c.acc, -math.inf))


def _weights(f: Function, c: Config, p: SimpleNamespace, row: Value, sink: Value, weights: Value) -> Value:
    """exp(lse_n - lse) / half of every part into scratch, and lse where it is wanted. Returns half (Whole), in every
    lane."""
    parts = p.parts_lse + row * c.size
    zero = f.const(c.acc, 0.0)

    def lse_of(n: Value) -> Value:
        return f.load(c.acc, parts + n * p.lse_split)

    (top,) = f.fold(0, p.splits, 1, [f.const(c.acc, -math.inf)], lambda n, top: [f.maximum(lse_of(n), top[0])])
    anchor = f.select(top.eq(-math.inf), zero, top)  # -inf - -inf would be NaN

    def weigh(n: Value, total: list[Value]) -> list[Value]:
        exponent = f.splat((lse_of(n) - anchor) * math.log2(math.e), c.lanes)
        weight = f.extract(vmath.exp2(f, c.isa, exponent), 0)
        f.store(weight, weights + n * c.size)
        return [total[0] + weight]

    (total,) = f.fold(0, p.splits, 1, [zero], weigh)
    whole = Whole.of(f, c, f.splat(top, c.lanes), f.splat(total, c.lanes), sink)
    inverse = f.extract(whole.inverse, 0)
    with f.range(0, p.splits) as n:
        f.store(f.load(c.acc, weights + n * c.size) * inverse, weights + n * c.size)
    with f.when(f.is_null(p.lse).eq(0)):
        f.store(f.extract(whole.lse(f, c), 0), p.lse + row * c.size, align=1)
    return whole.half


def _outputs(f: Function, c: Config, p: SimpleNamespace, parts: Value, o: Value, weights: Value, half: Value) -> None:
    """The weighted sum of the parts' rows times half, written in the storage type."""
    size, splits, step = p.value_size, p.splits, c.element
    adjacent = p.o_d.eq(step)
    chunks = f.select(adjacent, size // c.lanes * c.lanes, f.const("i64", 0))

    def merged(column: Value, count: int) -> Value:
        kind = c.vector if count > 1 else c.acc

        def add(n: Value, total: list[Value]) -> list[Value]:
            weight = f.load(c.acc, weights + n * c.size)
            part = f.load(kind, parts + n * p.o_split + column * c.size)
            return [c.isa.multiply_add(f, f.splat(weight, count) if count > 1 else weight, part, total[0])]

        (total,) = f.fold(0, splits, 1, [f.const(kind, 0.0)], add)
        return total * (half if count > 1 else f.extract(half, 0))

    with f.range(0, chunks, c.lanes) as column:
        write(f, c, merged(column, c.lanes), o + column * step)
    with f.range(chunks, size) as column:
        write(f, c, merged(column, 1), o + column * p.o_d)
