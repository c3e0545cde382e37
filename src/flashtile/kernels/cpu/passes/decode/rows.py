"""Rows as the decode kernel reads them: queries in words, and copies of keys or values that cannot be read in place.

A row of n elements is read as slots of so many elements as fit a register.  The last slot, where n is not a
multiple, begins so early that it ends with the row: nothing beyond the row is read, and the elements that an
earlier slot has counted are masked out.  A row shorter than a slot is copied and filled up with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.pack import read
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Rows, Words
from flashtile.llvm.routines import Routine
from flashtile.llvm.types import like, vector

CACHE_LINE = 64  # bytes
BITS = {"i16": "i16", "float": "i32", "double": "i64"}  # integers as wide as an element in memory


class Row(Words):
    """A row in memory as it lies; bytes between its elements."""


@dataclass(frozen=True)
class Keys(Words):
    """Keys that are read as slots: the elements of each, and the mask of the last slot."""

    WORDS: ClassVar = Words.WORDS | {"size": "i64", "mask": "ptr"}
    size: Value
    mask: Value

    def row(self, n: Value | int) -> Keys:
        return replace(self, at=self.at + n * self.stride)


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
    def of(cls, size: Value, width: int) -> Slots:
        whole = size // width
        padded = size.function.maximum(size, width)
        return cls(size, width, whole, (size + (width - 1)) // width, padded, padded - width)

    @classmethod
    def of_words(cls, c: Config, size: Value) -> Slots:
        return cls.of(size, slot_width(c))

    def place(self, element: Value) -> Value:
        """Where an element stands in an array of slots."""
        edge = self.whole * self.width
        return self.size.function.select(element < edge, element, element - self.last + edge)


def slot_width(c: Config) -> int:
    """Elements of a key that one register holds."""
    return c.lanes * c.per_word


def element(f: Function, c: Config, x: Value) -> Value:
    """Accumulators as elements of words."""
    return x if c.product.operand is None else c.isa.narrow(f, x, c.product.operand)


def emit_query(module: Module, c: Config) -> Routine:
    """One query in slots of words, scaled by a sign; 0 where an earlier slot has counted an element. By registers where
    its elements are adjacent and fill one: a short call spends as long here as on its keys."""
    f = Routine(module, "load_query", query=Row.kind(), size="i64", out=Words.kind(), sign=c.acc)
    query, size, _, _ = f.parameters
    slots = Slots.of_words(c, size)
    adjacent = query.stride.eq(c.element) & (size >= slots.width)
    f.either(adjacent, lambda: _query_registers(f, c, slots), lambda: _query_elements(f, c, slots))
    f.ret()
    return f


def _query_registers(f: Routine, c: Config, slots: Slots) -> None:
    query, _, out, sign = f.parameters
    sign = f.splat(sign, c.lanes)
    with f.range(0, slots.count) as slot:
        first = f.minimum(slot * slots.width, slots.last)
        counted = f.splat(f.cast("trunc", slot * slots.width - first, "i32"), c.lanes)
        for lane in range(0, slots.width, c.lanes):
            value = read(f, c, query.at + (first + lane) * c.element, c.lanes) * sign
            there = f.iota(vector(c.lanes, "i32")) + lane >= counted
            value = element(f, c, f.select(there, value, f.const(c.vector, 0.0)))
            f.store(value, out.row(slot).at + lane * (c.size // c.per_word))


def _query_elements(f: Routine, c: Config, slots: Slots) -> None:
    query, size, out, sign = f.parameters
    with f.range(0, slots.count) as slot:
        f.store(f.const(c.words, 0), out.row(slot).at, align=c.register)
    with f.range(0, size) as d:
        value, place = read(f, c, query.row(d).at) * sign, slots.place(d)
        at = out.at + (place // slots.width * out.stride + place % slots.width * (c.size // c.per_word))
        f.store(element(f, c, value), at)


def emit_mask(module: Module, c: Config) -> Routine:
    """The mask of the last slot of keys of ``size`` elements: all ones where an element is still to be counted."""
    bits = BITS[c.memory]
    f = Routine(module, "slot_mask", size="i64", out="ptr")
    size, out = f.parameters
    slots = Slots.of_words(c, size)
    counted = slots.whole * slots.width - slots.last
    with f.range(0, slots.width) as i:
        f.store(f.select(i < counted, f.const(bits, 0), f.const(bits, -1)), out + i * c.element)
    f.ret()
    return f


def emit_copy(module: Module, c: Config) -> Routine:
    """Rows of any strides as dense rows of ``width`` elements of the same type; those without a source become 0."""
    f = Routine(module, "copy_rows", rows=Rows.kind(), out="ptr", width="i64")
    rows, out, width = f.parameters
    f.either(rows.adjacent(c.element), lambda: _copy_adjacent(f, c), lambda: _copy_apart(f, c))
    f.ret()
    return f


def _copy_adjacent(f: Routine, c: Config) -> None:
    """Elements side by side, in registers. A row's last register also reads and writes what follows the row, which the
    next row overwrites; rows at the end of memory end element by element."""
    rows, out, width = f.parameters
    each, n = c.element, c.lanes
    whole = rows.size // n * n
    kind, integer = vector(n, c.memory), BITS[c.memory]
    end = rows.at + f.maximum((rows.count - 1) * rows.stride, 0) + rows.size * each
    loose = (width - whole + (n - 1)) // n * n  # elements from the last whole register on

    with f.range(0, rows.count) as row:
        source, target = rows.at + row * rows.stride, out + row * (width * each)
        with f.range(0, whole, n) as d:
            f.store(f.load(kind, source + d * each, align=each), target + d * each)
        inside = address(source + (whole + loose) * each) <= address(end)

        def registers(source: Value = source, target: Value = target) -> None:
            with f.range(whole, width, n) as d:
                there = f.iota(vector(n, "i32")) < f.splat(f.cast("trunc", rows.size - d, "i32"), n)
                value = f.cast("bitcast", f.load(kind, source + d * each, align=each), vector(n, integer))
                f.store(f.select(there, value, f.const(value.type, 0)), target + d * each, align=each)

        def elements(source: Value = source, target: Value = target) -> None:
            _copy_elements(f, c, source, target, whole)

        f.either(inside & (row + 1 < rows.count), registers, elements)


def _copy_apart(f: Routine, c: Config) -> None:
    """Elements apart from each other: of transposed rows in squares, through registers; all else one by one. The last
    squares come first: where they reach beyond the end of a row, others overwrite it, or zeros."""
    rows, out, width = f.parameters
    each, n = c.element, c.lanes
    whole_rows = f.select(rows.stride.eq(each), rows.count // n * n, f.const("i64", 0))
    squares = (rows.size + (n - 1)) // n * n
    with f.range(0, squares, n) as behind, f.range(0, whole_rows, n) as row:
        d = squares - n - behind
        source, target = rows.at + row * each, out + (row * width + d) * each
        places = [source + f.minimum(d + t, rows.size - 1) * rows.step for t in range(n)]
        for t, line in enumerate(f.transpose([f.load(vector(n, c.memory), at, align=each) for at in places])):
            f.store(line, target + width * (t * each), align=each)
    with f.range(0, rows.count) as row:
        done = f.select(row < whole_rows, rows.size, f.const("i64", 0))
        _copy_elements(f, c, rows.at + row * rows.stride, out + row * (width * each), done)


def _copy_elements(f: Routine, c: Config, source: Value, target: Value, first: Value) -> None:
    """One row from an element on, and zeros up to the width."""
    rows, _, width = f.parameters
    each = c.element
    with f.range(first, rows.size) as d:
        f.store(f.load(c.memory, source + d * rows.step, align=1), target + d * each)
    with f.range(rows.size, width) as d:
        f.store(f.const(BITS[c.memory], 0), target + d * each)


def address(pointer: Value) -> Value:
    """As a number, to be compared."""
    return pointer.function.cast("ptrtoint", pointer, "i64")


def bytes_ahead(c: Config, stride: Value, read: Value | int, block_keys: Value, rows: int) -> Value:
    """How far ahead memory is told what a tile of so many rows will read, of a block with so many keys: ``read`` bytes
    of each.  Not at all where the processor sees it coming: one row reads most of what lies there, key after key.

    For 16-bit types 256 is the same place in the next key block, which spans the change from K to V and back.  A block
    with fewer keys is the last: what lies beyond may be no memory at all, and to find that out takes longer than to
    read.
    """
    f, none = block_keys.function, block_keys < c.key_block
    if rows == 1 and c.ahead.streams:
        none = none | (stride < read * 2)
    keys = (c.ahead.one if rows == 1 else c.ahead.several) // c.element
    return f.select(none, f.const("i64", 0), stride * keys)


def prefetch(c: Config, at: Value) -> None:
    """Ask for a line of memory to be brought into a cache; any address will do."""
    f = at.function
    read_it, locality, data = (f.const("i32", n) for n in (0, 4 - c.ahead.level, 1))
    f.intrinsic("llvm.prefetch.p0", "void", [at, read_it, locality, data])


def read_slot(f: Function, c: Config, at: Value, mask: Value | None = None) -> Value:
    """One slot of a key in registers, as words or widened; only the elements that the mask keeps."""
    in_words = c.product.operand is not None  # memory holds them as they are
    kind = c.words if in_words else vector(c.lanes, c.memory)
    bits = f.load(kind, at, align=1)
    if mask is not None:
        integer = like(kind, c.word if in_words else BITS[c.memory])
        kept = f.cast("bitcast", bits, integer) & f.load(integer, mask, align=1)
        bits = f.cast("bitcast", kept, kind)
    return bits if in_words or c.memory != "i16" else c.isa.widen(f, bits, c.storage)
