"""Runs an emitted expression over whole arrays, a register at a time, on a chosen instruction set."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from flashtile.llvm import jit
from flashtile.llvm import machines as isas
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.machines import ISA
from flashtile.llvm.types import SIZES, vector

_ELEMENTS = {
    np.dtype(np.float32): "float",
    np.dtype(np.float64): "double",
    np.dtype(np.int16): "i16",
    np.dtype(np.int32): "i32",
    np.dtype(np.int64): "i64",
}
_DTYPES = {element: dtype for dtype, element in _ELEMENTS.items()}


def every_isa() -> list[object]:
    """A test parameter for each instruction set; those that this machine lacks are skipped, with the reason."""
    params = []
    for isa in isas.known().values():
        reason = isas.unavailable(isa)
        marks = [pytest.mark.skip(reason=f"{isa.name}: {reason}")] if reason else []
        params.append(pytest.param(isa, id=isa.name, marks=marks))
    return params


def run(isa: ISA, expression: Callable[..., Value], *arrays: np.ndarray, count: int | None = None) -> np.ndarray:
    """expression(f, a, b, ...) of every element of the arrays: vectors of ``count`` lanes, or scalars if that is 1."""
    n = count or isa.vector_bytes // max(a.itemsize for a in arrays)
    length = len(arrays[0])
    padded = [np.ascontiguousarray(np.resize(a, -(-length // n) * n)) for a in arrays]
    module = Module()
    f = Function(module, "run", "void", ["ptr"] * (len(arrays) + 1) + ["i64"])
    with f.range(0, f.args[-1], n) as i:
        loaded = []
        for pointer, array in zip(f.args, arrays, strict=False):
            element = _ELEMENTS[array.dtype]
            type_ = vector(n, element) if n > 1 else element
            loaded.append(f.load(type_, pointer + i * SIZES[element], align=1))
        value = expression(f, *loaded)
        element = value.type.split(" x ")[-1].rstrip(">")
        f.store(value, f.args[-2] + i * SIZES[element], align=1)
    f.ret()
    out = np.empty(len(padded[0]), _DTYPES[element])
    library = jit.Library(jit.object_code(module.text(), isa), ("run",))
    function = library.function("run", None, *[ctypes.c_void_p] * (len(arrays) + 1), ctypes.c_int64)
    function(*(a.ctypes.data for a in padded), out.ctypes.data, len(out))
    return out[:length]


def ulps(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Distance of each element from the exact value, in units in the last place of the exact one."""
    info = np.finfo(got.dtype)
    exponent = np.frexp(np.maximum(np.abs(exact), info.tiny))[1] - 1
    return np.abs(got.astype(exact.dtype) - exact) / np.ldexp(exact.dtype.type(info.eps), exponent)
