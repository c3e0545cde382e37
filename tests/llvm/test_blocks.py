"""Blocks and areas: what Python packs is what emitted code reads, by the same names."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest

from flashtile.llvm import jit, machines
from flashtile.llvm.blocks import ALIGNMENT, Areas, Block, integers, pointers, reals, strides_of
from flashtile.llvm.ir import Module
from flashtile.llvm.routines import entry

pytestmark = pytest.mark.core

FIELDS = pointers("x y") | integers("n m") | reals("scale") | strides_of("q")
BLOCK = Block(FIELDS)


def values() -> dict[str, float]:
    return {name: (10 + n) * (0.5 if type_ == "double" else 1) for n, (name, type_) in enumerate(FIELDS.items())}


def test_head_and_tail_are_the_block() -> None:
    packed = BLOCK.pack(values())
    assert packed == BLOCK.head(10, 11) + BLOCK.tail(values())
    assert len(packed) == BLOCK.bytes == 8 * len(FIELDS)
    assert struct.unpack("4qd4q", packed) == (10, 11, 12, 13, 7.0, 15, 16, 17, 18)


def test_code_reads_and_writes_words_by_name() -> None:
    """A function adds up n, m and q_s, and writes the sum to m of a second block."""
    module, isa = Module(), machines.current()
    f = entry(module, "add_up")
    source, _, _, target = f.parameters
    p = BLOCK.load(f, source)
    BLOCK.write(f, target, m=p.n + p.m + p.q_s, scale=p.scale * 2.0)
    f.ret(f.const("i32", 0))
    library = jit.load(module.text, "test of blocks", isa, ("add_up",))
    run = library.function("add_up", ctypes.c_int32, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    out = np.zeros(len(FIELDS), np.int64)
    assert run(BLOCK.pack(values()), 0, 0, out.ctypes.data) == 0
    assert out[BLOCK.index["m"]] == 12 + 13 + 17
    assert out.view(np.float64)[BLOCK.index["scale"]] == 14.0
    assert np.count_nonzero(out) == 2


def test_a_word_of_another_type_raises() -> None:
    f = entry(Module(), "wrong")
    with pytest.raises(TypeError, match="scale: got i64, expected double"):
        BLOCK.write(f, f.parameters[0], scale=f.parameters[1])


def test_a_missing_value_raises() -> None:
    incomplete = values()
    del incomplete["m"]
    with pytest.raises(KeyError, match="m"):
        BLOCK.tail(incomplete)


def test_areas_do_not_overlap_and_are_aligned() -> None:
    sizes = {"a": 1, "b": 64, "c": 0, "d": 65, "e": 8}
    areas = Areas(sizes, start=128)
    ends = [areas.at[name] + size for name, size in sizes.items()]
    starts = [*areas.at.values(), areas.bytes]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=True))
    assert all(at % ALIGNMENT == 0 for at in starts) and starts[0] == 128


def test_a_name_given_twice_raises() -> None:
    with pytest.raises(ValueError, match="m, y: named twice"):
        Block(pointers("x y"), integers("n m"), reals("y m"))
