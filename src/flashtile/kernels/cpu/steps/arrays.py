"""Gradients of captured arrays: what a block gives to each of them joins its accumulator, in a fixed order.

readings.py says which of six ways a load takes. All but the last add whole registers, or sums of them; the last goes
lane by lane, since lanes may meet in one element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.readings import COLUMN, GATHER, ROW, TILES, TOTAL, Reading
from flashtile.kernels.cpu.scratch import dense_bytes
from flashtile.kernels.cpu.steps.frame import Frame
from flashtile.llvm.ir import Function, Value
from flashtile.llvm.lines import Lines
from flashtile.llvm.types import like
from flashtile.score.capture import Slot
from flashtile.score.emit import Emission
from flashtile.score.operations import variable

WORD = 8
# Words of an accumulator: its first element, bytes from a work item's to the next one's, bytes from a sum to what it
# has lost to rounding; then the stride of each axis.
POINTER, STEP, LOST, STRIDES = range(4)


def words_of(slot: Slot) -> int:
    return STRIDES + slot.rank


@dataclass(frozen=True)
class Given:
    """What some lanes of a row give to one element each: numbers, and for GATHER bytes from the first element."""

    numbers: Value
    offsets: Value | None = None


class ArraySums:
    """Emits the additions of one pass over the rows of a block."""

    def __init__(self, f: Function, c: Config, reads: Sequence[Reading], frame: Frame, head: Emission | None) -> None:
        """``head``: the place in the code where batch and head are known; None without a program, which reads none."""
        self.f, self.c, self.reads, self.frame = f, c, reads, frame
        if head is None:
            return
        self.head = head
        self.lane = frame.integer("row")
        words, item = frame.read("sums"), frame.read("item")
        self.words = {}
        for slot in sorted({x.gradient.slot for x in reads}, key=lambda slot: slot.number):
            self.words[slot] = words
            words = words + words_of(slot) * WORD
        self.bases = []
        for x in reads:
            start = self._word(x, POINTER, "ptr") + item * self._word(x, STEP)
            still = [n for n, axis in enumerate(x.axes) if axis and not axis.i and not axis.j]
            self.bases.append(self._moved(x, start, head, still))
        assert c.code is not None
        after, tiled = len(c.code.dense_loads), [x for x in reads if x.how == TILES]
        dense = frame.read("dense")
        self.tiles = {x: Lines(dense + (after + n) * dense_bytes(c), c.line) for n, x in enumerate(tiled)}

    def start(self, width: int) -> list[Value]:
        """What `row` carries from row to row: sums of the registers of a panel, 0 before the first."""
        carried = sum(x.how in (COLUMN, TOTAL) for x in self.reads)
        return [self.f.const(self.c.vector, 0.0)] * (carried * width)

    def given(self, place: Emission, ds: Value, seen: Value) -> list[Given]:
        """What one register of lanes gives to each reading; ``place``: where the score is known. Branches nowhere."""
        f, found = self.f, []
        for x in self.reads:
            value = place.vector(x.gradient.value)
            # Selected: what is not taken, or not seen, may be infinite.
            numbers = f.select(seen & value.ne(0.0), ds * value, f.const(self.c.vector, 0.0))
            found.append(Given(numbers, self._offsets(x, place) if x.how == GATHER else None))
        return found

    def row(self, place: Emission, line: Value, given: Sequence[Sequence[Given]], carry: list[Value]) -> list[Value]:
        """Add what the registers of a panel gave for one row; ``place``: where the row is known; ``line``: its number
        among the lines of the block."""
        f, c, width = self.f, self.c, len(given)
        kept: list[Value] = []
        for n, x in enumerate(self.reads):
            numbers = [of_register[n].numbers for of_register in given]
            if x.how in (COLUMN, TOTAL):
                sums = carry[len(kept) : len(kept) + width]
                kept += [a + b for a, b in zip(sums, numbers, strict=True)]
                continue
            if x.how == TILES:
                for register, value in enumerate(numbers):
                    self.tiles[x].store(value, line, register)
                continue
            if x.how == GATHER:
                for of_register in given:
                    self._scatter(n, of_register[n])
                continue
            moving = [k for k, axis in enumerate(x.axes) if axis and not axis.i and axis.j]
            at = self._moved(x, self.bases[n], place, moving)
            if x.how == ROW:
                f.store(f.load(c.acc, at) + self._across(numbers), at)
            else:
                self._add_lines(x, at, place, numbers)
        return kept

    def finish(self, carry: list[Value], width: int, first: Value, last: Value, origin: Value) -> None:
        """Add what was summed over the rows [first, last), and tiles of them; ``origin`` stands on the first line."""
        f, c = self.f, self.c
        for n, x in enumerate(self.reads):
            if x.how == TILES:
                self._add_tiles(n, width, first, last, origin)
            if x.how not in (COLUMN, TOTAL):
                continue
            sums, carry = carry[:width], carry[width:]
            if x.how == COLUMN:
                self._add_lines(x, self.bases[n], self.head, sums)
                continue
            # One element may be a sum over all scores: what it loses is kept beside it (Kahan 1965).
            at = self.bases[n]
            lost_at = at + self._word(x, LOST)
            before, added = f.load(c.acc, at), self._across(sums) + f.load(c.acc, lost_at)
            total = before + added
            lost = added - (total - before)
            f.store(total, at)
            f.store(f.select(lost.isnan(), f.const(c.acc, 0.0), lost), lost_at)

    # -- addresses -------------------------------------------------------------------------------------

    def _word(self, x: Reading, word: int, type_: str = "i64") -> Value:
        return self.f.load(type_, self.words[x.gradient.slot] + word * WORD, align=WORD)

    def _moved(self, x: Reading, pointer: Value, place: Emission, axes: Sequence[int]) -> Value:
        """The pointer moved along axes whose indices are the same for every lane."""
        for n in axes:
            index = self._clamped(x, n, place.value(x.gradient.index[n]), place)
            pointer = pointer + self.f.cast("sext", index, "i64") * self._word(x, STRIDES + n)
        return pointer

    def _clamped(self, x: Reading, n: int, index: Value, place: Emission, room: int = 0) -> Value:
        """An index brought within so many elements of the array. Where it was outside 0 is added."""
        f = self.f
        slot = x.gradient.slot
        last = place.block.field(place, slot, "i32", 1 + 2 * n) - (0 if room else 1)
        index, last = place.together([index, last])
        return f.maximum(f.minimum(index, last), -room)

    def _offsets(self, x: Reading, place: Emission) -> Value:
        """Bytes from the first element, lane by lane; of axes that move with lanes or rows."""
        f, total = self.f, self.f.const(like(self.c.vector, "i64"), 0)
        for n, axis in enumerate(x.axes):
            if axis and not axis.i and not axis.j:  # in the base
                continue
            index = self._clamped(x, n, place.vector(x.gradient.index[n]), place)
            stride = place.widen(self._word(x, STRIDES + n))
            total = total + f.cast("sext", index, total.type) * stride
        return total

    # -- additions -------------------------------------------------------------------------------------

    def _add_lines(self, x: Reading, at: Value, place: Emission, numbers: Sequence[Value]) -> None:
        """Registers of lanes to neighbouring elements along the axis that lies innermost."""
        f, c = self.f, self.c
        assert x.innermost is not None
        axis = x.axes[x.innermost]
        assert axis is not None
        rest = place.value(axis.rest)
        if axis.j:
            j = place.variable("j")
            rest = rest + (j if axis.j == 1 else j * axis.j)
        for register, line in enumerate(numbers):
            first = self.lane + register * c.lanes
            if axis.i > 0:
                start = rest + first
            else:  # the last lane reads the first element
                start = rest - (first + (c.lanes - 1))
                line = f.shuffle(line, line, range(c.lanes - 1, -1, -1))
            start = self._clamped(x, x.innermost, start, place, room=c.lanes)
            here = at + f.cast("sext", start, "i64") * c.size
            f.store(f.load(c.vector, here, align=c.size) + line, here, align=c.size)

    def _add_tiles(self, n: int, width: int, first: Value, last: Value, origin: Value) -> None:
        """Lines as rows of the accumulator, one for each lane that stands for a query: squares of lanes x lanes go
        through registers, as in dense.py; the lines that are left over go one by one."""
        f, c, frame, x = self.f, self.c, self.frame, self.reads[n]
        stride = self._word(x, STRIDES + x.gradient.index.index(variable("i")))
        start = self.bases[n] + frame.read("row") * stride + (frame.read("block") + first) * c.size
        lines, count, size = self.tiles[x].line(first - origin), last - first, c.lanes
        lanes = f.minimum(frame.read("last_row") + 1 - frame.read("row"), width * size)
        whole = count // size * size
        with f.range(0, lanes, size) as lane, f.range(0, whole, size) as line:
            corner = lines.moved(line * c.line.bytes + lane * c.size)
            for r, values in enumerate(f.transpose([corner.load(t) for t in range(size)])):
                with f.when(lane + r < lanes):
                    at = start + ((lane + r) * stride + line * c.size)
                    f.store(f.load(c.vector, at, align=c.size) + values, at, align=c.size)
        with f.range(0, lanes) as lane, f.range(whole, count) as line:
            at = start + (lane * stride + line * c.size)
            value = f.load(c.acc, lines.at + (line * c.line.bytes + lane * c.size))
            f.store(f.load(c.acc, at) + value, at)

    def _across(self, registers: Sequence[Value]) -> Value:
        """The sum over registers and lanes."""
        f, total = self.f, registers[0]
        for register in registers[1:]:
            total = total + register
        lanes = self.c.lanes
        while lanes > 1:
            lanes //= 2
            total = f.shuffle(total, total, range(lanes)) + f.shuffle(total, total, range(lanes, 2 * lanes))
        return f.extract(total, 0)

    def _scatter(self, n: int, given: Given) -> None:
        """Lane after lane."""
        f, c = self.f, self.c
        assert given.offsets is not None
        for lane in range(c.lanes):
            at = self.bases[n] + f.extract(given.offsets, lane)
            f.store(f.load(c.acc, at) + f.extract(given.numbers, lane), at)
