"""The parts of dQ that work items on parts of the keys have left, added in their order to what dQ holds.

A work item is one row of (B, H, S_q). Parts are row-major, in accumulators.
"""

from __future__ import annotations

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.pack import read, write
from flashtile.llvm.blocks import Block, integers, pointers, strides_of
from flashtile.llvm.ir import Module, Value
from flashtile.llvm.routines import entry

EXPORTS = ("add_parts",)

CALL = Block(pointers("parts dq"), strides_of(["dq"]), integers("heads q_len head_size splits split"))


def add_parts_text(c: Config) -> str:
    """LLVM IR of the module that exports add_parts (routines.entry)."""
    module = Module()
    f = entry(module, "add_parts")
    block, begin, end, _ = f.parameters
    p = CALL.load(f, block)
    chunks = f.select(p.dq_d.eq(c.element), p.head_size // c.lanes * c.lanes, f.const("i64", 0))
    end = f.select(f.is_null(p.dq), begin, end)

    def add(parts: Value, target: Value, count: int) -> None:
        kind = c.vector if count > 1 else c.acc
        zero = [f.const(kind, 0.0)]
        (total,) = f.fold(0, p.splits, 1, zero, lambda n, t: [t[0] + f.load(kind, parts + n * p.split)])
        write(f, c, read(f, c, target, count) + total, target)

    with f.range(begin, end) as row:
        head, i = row // p.q_len, row % p.q_len
        dq = p.dq + head // p.heads * p.dq_b + head % p.heads * p.dq_h + i * p.dq_s
        parts = p.parts + row * p.head_size * c.size
        with f.range(0, chunks, c.lanes) as column:
            add(parts + column * c.size, dq + column * c.element, c.lanes)
        with f.range(chunks, p.head_size) as column:
            add(parts + column * c.size, dq + column * p.dq_d, 1)
    f.ret(f.const("i32", 0))
    return module.text()
