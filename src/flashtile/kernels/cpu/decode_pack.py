"""Rows as the decode kernel reads them: queries in words, and copies of keys or values that cannot be read in place.

A row of n elements is read as slots of so many elements as fit a register.  The last slot, where n is not a
multiple, begins so early that it ends with the row: nothing beyond the row is read, and the elements that an
earlier slot has counted are masked out.  A row shorter than a slot is copied and filled up with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.pack import read
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.types import SIZES, like, vector

BITS = {"i16": "i16", "float": "i32", "double": "i64"}  # integers as wide as an element in memory


@dataclass(frozen=True)
class Slots:
    """How a row of ``size`` elements is cut into slots of ``width``."""

    size: Value
    width: int
    whole: Value  # slots that overlap no other
    count: Value
    padded: Value  # elements of a row that can be read: at least one slot
    last: Value  # element at which the last slot begins, if it is not a whole one

    @classmethod
    def of(cls, f: Function, size: Value, width: int) -> Slots:
        whole = size // width
        padded = f.maximum(size, width)
        return cls(size, width, whole, (size + (width - 1)) // width, padded, padded - width)

    def place(self, f: Function, element: Value) -> Value:
        """Where an element stands in an array of slots."""
        edge = self.whole * self.width
        return f.select(element < edge, element, element - self.last + edge)


def slot_width(c: Config) -> int:
    """Elements of a key that one register holds."""
    return c.lanes * c.per_word


def emit_load_query(module: Module, c: Config) -> str:
    """A function that lays one query out in slots, scaled by a sign; its name.

    Arguments: query, bytes between its elements, elements, out, bytes between its slots, sign.  With ``pairs`` the
    elements are bf16, two a word, as the keys are in memory; else accumulators.  What an earlier slot has counted is 0.
    """
    f = Function(module, "load_query", "void", ["ptr", "i64", "i64", "ptr", "i64", c.acc], internal=True,
                 names=["q", "step", "size", "out", "apart", "sign"])  # fmt: skip
    q, step, size, out, apart, sign = f.args
    slots = Slots.of(f, size, slot_width(c))
    each = c.size // c.per_word
    with f.range(0, slots.count) as slot:
        f.store(f.const(c.words, 0), out + slot * apart, align=c.register)
    with f.range(0, size) as d:
        value, place = read(f, c, q + d * step) * sign, slots.place(f, d)
        at = out + (place // slots.width * apart + place % slots.width * each)
        f.store(c.isa.narrow(f, value, "bfloat") if c.pairs else value, at)
    f.ret()
    return f.name


def emit_mask(module: Module, c: Config) -> str:
    """A function that writes the mask of the last slot of a key: all ones where an element is still to be counted.

    Arguments: elements of a key, out.
    """
    bits = BITS[c.memory]
    f = Function(module, "slot_mask", "void", ["i64", "ptr"], names=["size", "out"], internal=True)
    size, out = f.args
    slots = Slots.of(f, size, slot_width(c))
    counted = slots.whole * slots.width - slots.last
    with f.range(0, slots.width) as i:
        f.store(f.select(i < counted, f.const(bits, 0), f.const(bits, -1)), out + i * SIZES[c.memory])
    f.ret()
    return f.name


def emit_copy_rows(module: Module, c: Config) -> str:
    """A function that copies rows of any strides to dense rows in the same type; its name.

    Arguments: source, bytes between rows, bytes between elements, rows, elements, out, elements of an out row, of
    which those without a source become 0.
    """
    f = Function(module, "copy_rows", "void", ["ptr", "i64", "i64", "i64", "i64", "ptr", "i64"], internal=True,
                 names=["x", "stride", "step", "rows", "size", "out", "width"])  # fmt: skip
    x, stride, step, rows, size, out, width = f.args
    each = SIZES[c.memory]
    zero = f.const(BITS[c.memory], 0)
    chunks = f.select(step.eq(each), size // c.lanes * c.lanes, f.const("i64", 0))
    with f.range(0, rows) as row:
        source, target = x + row * stride, out + row * (width * each)
        with f.range(0, chunks, c.lanes) as d:
            f.store(f.load(vector(c.lanes, c.memory), source + d * each), target + d * each)
        with f.range(chunks, size) as d:
            f.store(f.load(c.memory, source + d * step, align=1), target + d * each)
        with f.range(size, width) as d:
            f.store(zero, target + d * each)
    f.ret()
    return f.name


def keys_ahead(f: Function, c: Config, stride: Value, count: Value) -> Value:
    """How far ahead, in bytes, memory is told what comes, where a tile of several rows reads keys out of order.

    For 16-bit types that is the same place in the next key block, which spans the change from K to V and back.  A block
    with fewer keys is the last: what lies beyond may be no memory at all, and to find that out takes longer than to
    read.
    """
    return f.select(count < c.key_block, f.const("i64", 0), stride * (256 // SIZES[c.memory]))


def prefetch(f: Function, at: Value) -> None:
    """Ask for a line of memory to be brought into the second-level cache; any address will do."""
    read_it, second_level, data = (f.const("i32", n) for n in (0, 2, 1))
    f.intrinsic("llvm.prefetch.p0", "void", [at, read_it, second_level, data])


def read_slot(f: Function, c: Config, at: Value, mask: Value | None = None) -> Value:
    """One slot of a key in registers, as words or widened; only the elements that the mask keeps."""
    kind = c.words if c.pairs else vector(c.lanes, c.memory)
    bits = f.load(kind, at, align=1)
    if mask is not None:
        integer = like(kind, "i32" if c.pairs else BITS[c.memory])
        kept = f.cast("bitcast", bits, integer) & f.load(integer, mask, align=1)
        bits = f.cast("bitcast", kept, kind)
    return bits if c.pairs or c.memory != "i16" else c.isa.widen(f, bits, c.storage)
