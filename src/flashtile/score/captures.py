"""The capture block: how a program's captured values reach compiled code.

64-bit words in the order of the slots. A scalar is one word: an int32 in its low half, or a double. An array is
its address, then for each axis its length and its stride in bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..arrays import address_of
from ..llvm.types import SIZES, vector
from .capture import Access, ArrayCapture, ScalarCapture, Slot

if TYPE_CHECKING:
    from ..llvm.ir import Function, Value
    from ..llvm.machines import ISA

# Element -> (LLVM type in memory, how it becomes a bool, i32 or float).
STORAGE = {
    "bool": ("i8", ""),
    "i8": ("i8", "sext"),
    "u8": ("i8", "zext"),
    "i16": ("i16", "sext"),
    "u16": ("i16", "zext"),
    "i32": ("i32", ""),
    "u32": ("i32", ""),
    "i64": ("i64", "trunc"),
    "u64": ("i64", "trunc"),
    "f16": ("i16", "half"),
    "bf16": ("i16", "bfloat"),
    "f32": ("float", ""),
    "f64": ("double", ""),
}


class Site(Protocol):
    """A place in a function under construction, as loads use it: an `emit.Emission`."""

    f: Function
    isa: ISA
    accumulator: str
    lanes: int
    captures: Value

    def like(self, x: Value, element: str) -> str: ...

    def widen(self, x: Value) -> Value: ...

    def together(self, args: Iterable[Value]) -> list[Value]: ...


class Block:
    """The layout of a program's capture block, from its slots."""

    def __init__(self, slots: Sequence[Slot]):
        self._word: list[int] = []
        self.words = 0
        for slot in slots:
            self._word.append(self.words)
            self.words += 1 if slot.rank < 0 else 1 + 2 * slot.rank

    def word(self, slot: Slot) -> int:
        """The slot's first word."""
        return self._word[slot.number]

    def pack(self, captures: Sequence[ArrayCapture | ScalarCapture]) -> np.ndarray:
        """The block for a call, int64 (words,). It holds addresses: keep the captures alive while it is used."""
        words: list[int] = []
        for value in captures:
            if isinstance(value, ScalarCapture):
                words.append(int(value.value) if value.type == "int" else _bits(value.value))
                continue
            array = value.array
            words.append(address_of(array))
            strides = array.strides if value.place is None else value.place.strides
            words += [n for axis in zip(array.shape, strides, strict=True) for n in axis]
        return np.array(words, np.int64)

    def pack_part(
        self, captures: Sequence[ArrayCapture | ScalarCapture], slot: Slot, part: np.ndarray, first: Sequence[int]
    ) -> np.ndarray:
        """The block where an array stands for a part of a captured one, which begins there at `first`: an index for
        each axis that is longer than one, from (b, h, i, j). Only elements of the part may be read."""
        found, at = self.pack(captures), self.word(slot)
        whole = captures[slot.number].array  # type: ignore[union-attr]  # it is an array's
        address = part.ctypes.data
        for axis, start in enumerate(first[4 - whole.ndim :]):
            if whole.shape[axis] > 1:
                address -= start * part.strides[axis]
            found[at + 1 + 2 * axis : at + 3 + 2 * axis] = whole.shape[axis], part.strides[axis]
        found[at] = address
        return found

    # -- emitted code --------------------------------------------------------------------------------

    def field(self, at: Site, slot: Slot, type_: str, word: int) -> Value:
        return at.f.load(type_, at.captures + (self.word(slot) + word) * 8, align=8)

    def load(self, at: Site, access: Access, index: list[Value]) -> Value:
        """The element at the indices, clamped where the access says so; scalar if all indices are."""
        f = at.f
        slot, pointer, lanes = self._place(at, access, index)
        stored, _ = STORAGE[slot.element]
        raw = f.load(stored, pointer, align=1) if lanes is None else _gather(at, stored, pointer, lanes)
        return widened(at, raw, slot.element)

    def adjacent(self, at: Site, access: Access, axis: int) -> Value:
        """Whether elements that follow each other along an axis lie side by side."""
        assert isinstance(access.source, Slot)
        return self.field(at, access.source, "i64", 2 + 2 * axis).eq(SIZES[STORAGE[access.source.element][0]])

    def run(self, at: Site, access: Access, index: list[Value]) -> Value:
        """As many adjacent elements as lanes, from that at the (scalar) indices on."""
        slot, pointer, _ = self._place(at, access, index)
        stored, _ = STORAGE[slot.element]
        return widened(at, at.f.load(vector(at.lanes, stored), pointer, align=1), slot.element)

    def _place(self, at: Site, access: Access, index: list[Value]) -> tuple[Slot, Value, Value | None]:
        """The slot, an address in it, and how far from there each lane's element is, if they differ."""
        f, slot = at.f, access.source
        assert isinstance(slot, Slot)
        pointer = self.field(at, slot, "ptr", 0)
        lanes: Value | None = None
        for axis, i in enumerate(index):
            stride = self.field(at, slot, "i64", 2 + 2 * axis)
            if access.clamp[axis]:
                last = self.field(at, slot, "i32", 1 + 2 * axis) - 1  # lengths that matter fit: an index is int32
                i, last = at.together([i, last])
                i = f.maximum(f.minimum(i, last), 0)
            if i.type[0] != "<":
                pointer = pointer + f.cast("sext", i, "i64") * stride
                continue
            step = f.cast("sext", i, at.like(i, "i64")) * at.widen(stride)
            lanes = step if lanes is None else lanes + step
        return slot, pointer, lanes

    def inside(self, at: Site, access: Access, index: list[Value]) -> Value:
        """Whether every index is in bounds."""
        result = at.f.const("i1", 1)
        for axis, i in enumerate(index):
            length = self.field(at, access.source, "i32", 1 + 2 * axis)  # type: ignore[arg-type]  # a Slot
            i, length = at.together([i, length])
            result, here = at.together([result, i.ult(length)])
            result = result & here
        return result


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _gather(at: Site, stored: str, pointer: Value, offsets: Value) -> Value:
    """One load a lane: any element, any instruction set."""
    f = at.f
    result = f.const(at.like(offsets, stored), 0)
    for lane in range(at.lanes):
        result = f.insert(result, f.load(stored, pointer + f.extract(offsets, lane), align=1), lane)
    return result


def widened(at: Site, raw: Value, element: str) -> Value:
    """A stored element (or a vector of them) as a bool, an i32 or the accumulator's type."""
    f, (_, how) = at.f, STORAGE[element]
    if element == "bool":
        return raw.ne(0)
    if how in ("sext", "zext", "trunc"):
        return f.cast(how, raw, at.like(raw, "i32"))
    if how:
        raw = at.isa.widen(f, raw, how)
    if not raw.is_float:
        return raw
    wide = at.like(raw, at.accumulator)
    narrows = element == "f64" and at.accumulator == "float"
    return raw if raw.type == wide else f.cast("fptrunc" if narrows else "fpext", raw, wide)
