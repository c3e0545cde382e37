"""A small kernel around one expression, to hold the LLVM form against the NumPy value."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from flashtile.llvm import jit
from flashtile.llvm.ir import Function, Module
from flashtile.llvm.machines import ISA
from flashtile.llvm.types import vector
from flashtile.score.captures import Block
from flashtile.score.emit import Emission


def module_text(program, root, isa: ISA, accumulator: str) -> str:
    """``run(s, first_row, b, h, j, n, captures, out)``: root at rows first_row ... and scores s[0 : n], by vectors."""
    lanes = isa.lanes(accumulator)
    module = Module()
    types = ["ptr", "i32", "i32", "i32", "i32", "i64", "ptr", "ptr"]
    f = Function(module, "run", "void", types, names=["s", "first", "b", "h", "j", "n", "captures", "out"])
    s, first, b, h, j, n, captures, out = f.args
    outside = Emission(f, isa, accumulator, lanes, Block(program.slots), captures, {"b": b, "h": h, "j": j})
    outside.prepare(root)
    size = {"float": 4, "double": 8}[accumulator]
    with f.range(0, n, lanes) as at:
        lane = f.iota(vector(lanes, "i32"))
        row = f.splat(first + f.cast("trunc", at, "i32"), lanes) + lane
        scores = f.load(vector(lanes, accumulator), s + at * size, align=size)
        value = outside.inner({"i": row, "s": scores}).vector(root)
        if root.type == "bool":
            value = f.cast("zext", value, vector(lanes, "i32"))
        f.store(value, out + at * (size if root.type == "float" else 4), align=4)
    f.ret()
    return module.text()


def compiled(program, root, isa: ISA, real) -> Callable[..., np.ndarray]:
    """``run(s, first_row, b, h, j)``: the expression at rows first_row ..., s (n,) of type `real` giving the scores."""
    accumulator = "double" if np.dtype(real) == np.float64 else "float"
    library = jit.Library(jit.object_code(module_text(program, root, isa, accumulator), isa), ("run",))
    integers = [ctypes.c_int32] * 4
    function = library.function("run", None, ctypes.c_void_p, *integers, ctypes.c_int64, *[ctypes.c_void_p] * 2)

    def run(s: np.ndarray, first_row: int, b: int, h: int, j: int) -> np.ndarray:
        assert s.dtype == real and len(s) % 16 == 0 and library
        captures = Block(program.slots).pack(program.captures)
        out = np.empty(len(s), s.dtype if root.type == "float" else np.int32)
        function(s.ctypes.data, first_row, b, h, j, len(s), captures.ctypes.data, out.ctypes.data)
        return out.astype(bool) if root.type == "bool" else out

    return run
