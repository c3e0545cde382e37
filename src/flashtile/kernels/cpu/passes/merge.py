"""The merge kernel: partial results over parts of the keys, in order, become the result over all of them.

A work item is one query row.  Partials are (o normalised, lse in nats), both in accumulators; a part that saw no
key is o = 0, lse = -inf.

    lse = log sum_n exp(lse_n),   o = sum_n exp(lse_n - lse) o_n

Source: Dao et al. 2023, Flash-Decoding; ``flashtile.merge`` is the same in NumPy.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.pack import write
from flashtile.llvm import math as vmath
from flashtile.llvm.blocks import Block, integers, pointers
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.routines import entry

EXPORTS = ("merge",)

CALL = Block(
    pointers("parts_o parts_lse o lse"),
    # Bytes between the results of two parts at the end.
    integers("o_b o_h o_s o_d heads q_len value_size splits o_split lse_split"),
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
        _weights(f, c, p, row, scratch)
        head, i = row // p.q_len, row % p.q_len
        o = p.o + head // p.heads * p.o_b + head % p.heads * p.o_h + i * p.o_s
        _outputs(f, c, p, p.parts_o + row * p.value_size * c.size, o, scratch)
    f.ret(f.const("i32", 0))
    return module.text()


def _weights(f: Function, c: Config, p: SimpleNamespace, row: Value, weights: Value) -> None:
    """exp(lse_n - lse) of every part into scratch, and lse where it is wanted."""
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
    seen = total.ne(0.0)  # else the largest lse has weight 1
    total = f.select(seen, total, f.const(c.acc, 1.0))
    inverse = 1.0 / total
    with f.range(0, p.splits) as n:
        f.store(f.load(c.acc, weights + n * c.size) * inverse, weights + n * c.size)
    with f.when(f.is_null(p.lse).eq(0)):
        lse = anchor + f.extract(vmath.log2(f, c.isa, f.splat(total, c.lanes)), 0) * math.log(2)
        f.store(f.select(seen, lse, f.const(c.acc, -math.inf)), p.lse + row * c.size, align=1)


def _outputs(f: Function, c: Config, p: SimpleNamespace, parts: Value, o: Value, weights: Value) -> None:
    """The weighted sum of the parts' rows, written in the storage type."""
    size, splits, step = p.value_size, p.splits, c.element
    adjacent = p.o_d.eq(step)
    chunks = f.select(adjacent, size // c.lanes * c.lanes, f.const("i64", 0))

    def merged(column: Value, count: int) -> Value:
        kind = c.vector if count > 1 else c.acc

        def add(n: Value, total: list[Value]) -> list[Value]:
            weight = f.load(c.acc, weights + n * c.size)
            part = f.load(kind, parts + n * p.o_split + column * c.size)
            return [c.isa.multiply_add(f, f.splat(weight, count) if count > 1 else weight, part, total[0])]

        return f.fold(0, splits, 1, [f.const(kind, 0.0)], add)[0]

    with f.range(0, chunks, c.lanes) as column:
        write(f, c, merged(column, c.lanes), o + column * step)
    with f.range(chunks, size) as column:
        write(f, c, merged(column, 1), o + column * p.o_d)
