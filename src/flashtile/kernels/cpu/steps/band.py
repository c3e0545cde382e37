"""The band: what causal and window show of a block, as two distances from a panel's first lane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.llvm.ir import Value
from flashtile.llvm.routines import Operand
from flashtile.llvm.types import vector

FAR = 1 << 30  # beyond any distance inside a tile, and no overflow when a lane number is added
OPEN = 1 << 61  # beyond every position, window and offset that a spec may hold: the open side of a band


@dataclass(frozen=True)
class Band(Operand):
    """Lane i sees row r iff  i + above >= r  and  i + below <= r."""

    WORDS: ClassVar = {"above": "i32", "below": "i32"}
    above: Value
    below: Value

    def moved(self, row: Value) -> Band:
        """The band as seen from a row on."""
        return Band(self.above - row, self.below - row)

    def sees(self, c: Config, register: int, row: Value) -> Value:
        """Lanes of a register that see a row."""
        f = self.function
        lane, near = f.iota(vector(c.lanes, "i32"), register * c.lanes), f.cast("trunc", row, "i32")
        low, high = (f.splat(x - near, c.lanes) for x in (self.below, self.above))
        return (lane + high >= 0) & (lane + low <= 0)

    def tile_sees(self, c: Config, row: int, register: int, last: Value) -> Value:
        """Lanes of a register that see a row of a tile whose rows end with ``last``."""
        f = self.function
        lane = f.iota(vector(c.lanes, "i32"), register * c.lanes)
        above = f.select(last < row, f.const("i32", -FAR), self.above - row)
        return (lane + f.splat(above, c.lanes) >= 0) & (lane + f.splat(self.below - row, c.lanes) <= 0)


@dataclass(frozen=True)
class Seen(Operand):
    """What a panel sees of a block, rows counted from its start: [some_from, some_to) are seen by some lane, [all_from,
    all_to) by every lane; and its band."""

    WORDS: ClassVar = {
        "some_from": "i64",
        "some_to": "i64",
        "all_from": "i64",
        "all_to": "i64",
        "above": "i32",
        "below": "i32",
    }
    some_from: Value
    some_to: Value
    all_from: Value
    all_to: Value
    above: Value
    below: Value

    @property
    def band(self) -> Band:
        return Band(self.above, self.below)

    def between(self, first: Value, last: Value) -> Seen:
        """What is seen of the rows [first, last)."""
        f = self.function
        starts, ends = (self.some_from, self.all_from), (self.some_to, self.all_to)
        some_from, all_from = (f.maximum(x, first) for x in starts)
        some_to, all_to = (f.minimum(x, last) for x in ends)
        return Seen(some_from, some_to, all_from, all_to, self.above, self.below)

    @property
    def count(self) -> Value:
        return self.some_to - self.some_from
