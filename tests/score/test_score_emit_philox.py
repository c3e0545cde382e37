"""Dropout's generator in machine code, bit for bit its NumPy form, on every instruction set of this machine."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from flashtile.llvm import jit
from flashtile.llvm import machines as isas
from flashtile.llvm.ir import Function, Module
from flashtile.llvm.machines import ISA
from flashtile.llvm.types import vector
from flashtile.score import emit_philox, philox
from flashtile.score.keep import Keep

ISAS = [name for name in isas.usable() if not name.endswith("emulated")]
ROWS = 64


def module_text(lanes: int) -> str:
    """``run(low, high, threshold, group, head, first, words, keeps)`` of ROWS rows from `first` on; words (4, ROWS),
    keeps (8, ROWS), all 32 bits."""
    module = Module()
    f = Function(module, "run", "void", ["i32"] * 6 + ["ptr"] * 2)
    low, high, threshold, group, head, first, words_at, keeps_at = f.args
    key, type_ = emit_philox.round_keys(f, low, high), vector(lanes, "i32")
    with f.range(0, ROWS, lanes) as at:
        rows = f.splat(first + f.cast("trunc", at, "i32"), lanes) + f.iota(type_)
        drawn = emit_philox.words(f, group, rows, head, key)
        for n, word in enumerate(drawn):
            f.store(word, words_at + at * 4 + 4 * ROWS * n, align=4)
        for n, keep in enumerate(emit_philox.keeps(f, drawn, threshold)):
            f.store(f.cast("zext", keep, type_), keeps_at + at * 4 + 4 * ROWS * n, align=4)
    f.ret()
    return module.text()


@pytest.mark.parametrize("accumulator", ["float", "double"])
@pytest.mark.parametrize("name", ISAS)
def test_machine_code_draws_the_numpy_bits(name: str, accumulator: str) -> None:
    isa: ISA = isas.known()[name]
    library = jit.Library(jit.object_code(module_text(isa.lanes(accumulator)), isa), ("run",))
    run = library.function("run", None, *[ctypes.c_uint32] * 6, *[ctypes.c_void_p] * 2)
    rng = np.random.default_rng(0)
    cases = [(0, 0, 0, 1), (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**16 - 1)]
    cases += [(int(rng.integers(2**63)) * 2 + n % 2, *map(int, rng.integers(0, 2**32, 2)), 1 << n) for n in range(16)]
    for seed, group, head, threshold in cases:
        keep, first = Keep(threshold, seed), int(rng.integers(0, 2**31))
        words, kept = np.empty((4, ROWS), np.uint32), np.empty((8, ROWS), np.uint32)
        run(*keep.key, threshold, group, head, first, words.ctypes.data, kept.ctypes.data)
        rows = first + np.arange(ROWS)
        np.testing.assert_array_equal(words, philox.words((group, rows, head, 0), keep.key).T)
        np.testing.assert_array_equal(kept.T, keep.of(head, rows, 8 * group + np.arange(8)))
