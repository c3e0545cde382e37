"""NaN containment: a key that is hidden from a row never changes that row, whatever its value holds.

A hidden key's weight is 0, but 0 * NaN is NaN.  So each block of V is scanned while it is first read; if all is
finite, as always but for broken data, nothing more happens.  Otherwise the block is copied with zeros in
place of what is not finite (pack.py), the fast kernels run on the copy, giving rows that do not see those
keys the bits they would have had, and what is not finite is added to just the rows that see it.
"""

from __future__ import annotations

import math

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.pack import any_nan, read
from flashtile.llvm.ir import SIZES, Function, Module, Value


def emit_scan_values(module: Module, c: Config) -> str:
    """A function that tells whether a block of contiguous value rows holds anything non-finite; its name.

    Arguments: values, bytes between rows, rows, elements.  Reads at the speed of the cache: a product with 0 is
    NaN just for inf and NaN.
    """
    f = Function(module, "scan_values", "i64", ["ptr", "i64", "i64", "i64"], internal=True,
                 names=["v", "stride", "rows", "size"])  # fmt: skip
    v, stride, rows, size = f.args
    chunks = size // c.lanes * c.lanes

    def element(row: Value, column: Value, count: int) -> Value:
        return read(f, c, row + column * SIZES[c.memory], count)

    def one_row(key: Value, bad: list[Value]) -> list[Value]:
        row = v + key * stride
        vectors = f.fold(0, chunks, c.lanes, bad[:1], lambda i, b: [b[0] + element(row, i, c.lanes) * 0.0])
        scalars = f.fold(chunks, size, 1, bad[1:], lambda i, b: [b[0] + element(row, i, 1) * 0.0])
        return [*vectors, *scalars]

    clean = [f.const(c.vector, 0.0), f.const(c.acc, 0.0)]
    f.ret(any_nan(f, c, *f.fold(0, rows, 1, clean, one_row)))
    return f.name


def emit_collect_nonfinite(module: Module, c: Config) -> str:
    """A function that sums, for each row, the non-finite values of the keys it sees; its name.

    Arguments: scores of the block (before the softmax), values, bytes between rows, bytes between elements, keys,
    elements, columns, sums (out, [column][query]).  A weight is positive wherever the score is not -inf, so
    inf and NaN enter unweighted.
    """
    f = Function(module, "collect_nonfinite", "void", ["ptr", "ptr", "i64", "i64", "i64", "i64", "i64", "ptr"],
                 names=["s", "v", "stride", "step", "keys", "size", "columns", "sums"], internal=True)  # fmt: skip
    s, v, stride, step, keys, size, columns, sums = f.args
    with f.range(0, columns * c.line, c.register) as at:
        f.store(f.const(c.vector, 0.0), sums + at, align=c.register)
    with f.range(0, keys) as key, f.range(0, size) as column:
        value = read(f, c, v + (key * stride + column * step))
        with f.when((value * 0.0).isnan()), f.range(0, c.panel * c.size, c.register) as at:
            score = f.load(c.vector, s + (key * c.line + at), align=c.register)
            here = sums + (column * c.line + at)
            seen = f.select(score.eq(-math.inf), f.const(c.vector, 0.0), f.splat(value, c.lanes))
            f.store(f.load(c.vector, here, align=c.register) + seen, here, align=c.register)
    f.ret()
    return f.name


def emit_add_nonfinite(module: Module, c: Config) -> str:
    """A function that adds what ``collect_nonfinite`` summed to a panel's outputs; its name."""
    f = Function(module, "add_nonfinite", "void", ["ptr", "ptr", "i64"], names=["o", "sums", "columns"], internal=True)
    o, sums, columns = f.args
    with f.range(0, columns * c.line, c.register) as at:
        total = f.load(c.vector, o + at, align=c.register) + f.load(c.vector, sums + at, align=c.register)
        f.store(total, o + at, align=c.register)
    f.ret()
    return f.name
