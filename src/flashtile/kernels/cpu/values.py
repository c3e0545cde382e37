"""Output tiles: O^T[column][query] = alpha O^T + V^T P^T for a few value columns by one panel of queries."""

from __future__ import annotations

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.ir import Function, Module, Value
from flashtile.kernels.cpu.scores import contract


def emit_values(module: Module, c: Config, vectors: int) -> str:
    """A function for one tile of ``rows`` value columns; its name.

    Arguments: output tile (updated), alpha, values at the tile's first column, bytes between (pairs of) keys,
    weights, number of (pairs of) keys.  Sums of one key block are formed apart and then added to what was
    there: blocked summation, whose error grows with the number of blocks, not of keys.
    """
    name = f"values_{vectors}"
    f = Function(module, name, "void", ["ptr", "ptr", "ptr", "i64", "ptr", "i64"], internal=True,
                 names=["o", "alpha", "v", "stride", "p", "count"])  # fmt: skip
    o, alpha, v, stride, p, count = f.args

    def step(key: Value, acc: list[Value]) -> list[Value]:
        weights = [f.load(c.words, p + (key * c.line + j * c.register), align=c.register) for j in range(vectors)]
        row = v + key * stride
        out = []
        for r in range(c.rows):
            value = f.splat(f.load(c.word, row + r * c.size, align=1), c.lanes)
            out += [contract(f, c, acc[r * vectors + j], value, weights[j]) for j in range(vectors)]
        return out

    def steps(key: Value, acc: list[Value]) -> list[Value]:
        for u in range(c.unroll):
            acc = step(key + u, acc)
        return acc

    whole = count - count % c.unroll
    acc = f.fold(0, whole, c.unroll, [f.const(c.vector, 0.0)] * (c.rows * vectors), steps)
    acc = f.fold(whole, count, 1, acc, step)
    factors = [f.load(c.vector, alpha + j * c.register, align=c.register) for j in range(vectors)]
    for r in range(c.rows):
        for j in range(vectors):
            at = o + (r * c.line + j * c.register)
            before = f.load(c.vector, at, align=c.register)
            f.store(c.isa.multiply_add(f, before, factors[j], acc[r * vectors + j]), at, align=c.register)
    f.ret()
    return name
