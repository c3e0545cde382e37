"""Accumulators for gradients of captured arrays, and which work items may add to them at the same time.

Work items that would meet in one element each have an accumulator of their own, where that is small, and these are
added in their order; else they run one after the other, and the array has one accumulator, however many heads there
are. Both are decided by shapes alone, so the bits do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashtile.arrays import address_of
from flashtile.kernels.cpu.readings import COLUMN, LANES, TOTAL, Reading
from flashtile.score.operations import variable

if TYPE_CHECKING:
    from flashtile.kernels.cpu.config import Config

COPIES_BYTES = 4 << 20  # that accumulators of single work items may take, for all arrays of a call


@dataclass(frozen=True)
class Items:
    """Work items (b * kv_heads + h) * parts + part: how many there are along each axis."""

    batch: int
    kv_heads: int
    parts: int

    @property
    def count(self) -> int:
        return self.batch * self.kv_heads * self.parts

    @property
    def axes(self) -> dict[str, int]:
        return {"b": self.batch, "h": self.kv_heads, "j": self.parts}

    def chains(self, shared: frozenset[str]) -> np.ndarray:
        """Numbers of items, a row for those that differ along the shared axes alone, ascending."""
        numbers = np.arange(self.count).reshape(self.batch, self.kv_heads, self.parts)
        last = [n for n, axis in enumerate(self.axes) if axis in shared]
        first = [n for n in range(3) if n not in last]
        length = math.prod(numbers.shape[n] for n in last)
        return np.sort(numbers.transpose(*first, *last).reshape(-1, length), axis=1)


@dataclass(frozen=True)
class Layout:
    """How the accumulator of one array lies: its axes in this order, and room at both ends of the last."""

    slot: Any
    shape: tuple[int, ...]
    order: tuple[int, ...]
    room: int
    keeps_lost: bool
    shared: frozenset[str]  # axes along which work items meet in one element

    @classmethod
    def of(cls, reads: Sequence[Reading], shape: tuple[int, ...], lanes: int, shared: frozenset[str]) -> Layout:
        innermost = next((x.innermost for x in reads if x.innermost is not None), None)
        order = [n for n in range(len(shape)) if n != innermost]
        return cls(
            reads[0].gradient.slot,
            shape,
            tuple(order if innermost is None else [*order, innermost]),
            lanes if any(x.how in (LANES, COLUMN) for x in reads) else 0,
            any(x.how == TOTAL for x in reads),
            shared,
        )

    @property
    def padded(self) -> tuple[int, ...]:
        """The lengths of the axes in memory; ahead of them what has been lost to rounding, if that is kept."""
        lengths = [self.shape[n] for n in self.order]
        if lengths and self.room:
            lengths[-1] += 2 * self.room
        return (1 + self.keeps_lost, *lengths)

    def words(self, memory: np.ndarray, own: bool) -> list[int]:
        """What the kernel knows of it (steps/arrays.py)."""
        strides = dict(zip(self.order, memory.strides[2:], strict=True))
        return [
            address_of(memory) + self.room * memory.itemsize,
            memory.strides[0] if own else 0,
            memory.strides[1] if self.keeps_lost else 0,
            *(strides[n] for n in range(len(self.shape))),
        ]

    def total(self, memory: np.ndarray) -> np.ndarray:
        """The sums, in the array's own shape: of all copies, in their order."""
        found = memory[0, 0] if memory.shape[:2] == (1, 1) else memory.sum(axis=(0, 1), dtype=np.float64)
        inside = found[..., self.room : found.shape[-1] - self.room] if self.room else found
        return (
            np.asarray(inside)
            .transpose(tuple(self.order.index(n) for n in range(len(self.order))))
            .astype(memory.dtype, copy=False)
        )


def _apart(reads: Sequence[Reading], axis: str) -> bool:
    """Whether items that differ along an axis never meet: one index of every load says which of them it is. An index
    that may leave the array does not: out there items add 0 to the last element, all to the same (steps/arrays.py)."""

    def tells(x: Reading, n: int) -> bool:
        if x.gradient.clamp[n]:
            return False
        if axis != "j":
            return x.gradient.index[n] is variable(axis)
        place = x.axes[n]
        return place is not None and place.i == 0 and place.j != 0 and not place.rest.variables

    return any(all(tells(x, n) for x in reads) for n in range(len(reads[0].axes)))


class ArraySums:
    """The accumulators of one call, zero at first.

    words   their block (steps/arrays.py)
    """

    def __init__(self, plan: ArrayPlan | TileArrays, alone: bool = False) -> None:
        """alone: without copies, for work that never meets."""
        self._plan = plan
        many = [1 if alone else copies for _, copies in plan.layouts]
        self.memory = [np.zeros((n, *x.padded), plan.real) for n, (x, _) in zip(many, plan.layouts, strict=True)]
        words: list[int] = []
        for n, (layout, _), memory in zip(many, plan.layouts, self.memory, strict=True):
            words += layout.words(memory, own=n > 1)
        self.words = np.array(words, np.int64)

    @property
    def address(self) -> int:
        """Of the words."""
        return address_of(self.words)

    def totals(self) -> dict[int, np.ndarray]:
        """The sums by the numbers of their slots."""
        pairs = zip(self._plan.layouts, self.memory, strict=True)
        return {layout.slot.number: layout.total(memory) for (layout, _), memory in pairs}


class ArrayPlan:
    """How many accumulators each array has, and which work items run one after the other.

    layouts   of each array, and its copies
    shared    the axes along which work items must not run at the same time
    chains    the numbers of work items, a row for those that must run one after the other
    """

    def __init__(
        self, reads: Sequence[Reading], shapes: Mapping[int, tuple[int, ...]], c: Config, items: Items
    ) -> None:
        self.real = np.dtype(np.float64 if c.acc == "double" else np.float32)
        left, shared = COPIES_BYTES, frozenset[str]()
        self.layouts: list[tuple[Layout, int]] = []
        for number in sorted({x.slot for x in reads}):
            own = [x for x in reads if x.slot == number]
            meet = frozenset(axis for axis, n in items.axes.items() if n > 1 and not _apart(own, axis))
            layout = Layout.of(own, shapes[number], c.lanes, meet)
            size = items.count * math.prod(layout.padded) * self.real.itemsize
            copied = bool(layout.shared) and size <= left
            left -= size if copied else 0
            shared |= frozenset() if copied else layout.shared
            self.layouts.append((layout, items.count if copied else 1))
        self.shared, self.chains = shared, items.chains(shared)

    def run(self, native: Callable[..., int]) -> Callable[..., int]:
        """The native function of work items as one of chains of them."""
        if self.chains.shape[1] == 1:
            return native

        def run(params: Any, begin: int, end: int, scratch: int) -> int:
            for items in self.chains[begin:end].tolist():
                for item in items:
                    if status := native(params, item, item + 1, scratch):
                        return status
            return 0

        return run


@dataclass(frozen=True)
class Tiles:
    """Tiles of a call: how many there are along each axis, of how many rows and keys."""

    batch: int
    heads: int
    queries: int
    keys: int
    tile_q: int
    q_len: int
    kv_len: int

    @property
    def axes(self) -> dict[str, int]:
        return {"b": self.batch, "h": self.heads, "i": self.queries, "j": self.keys}

    def number(self, axes: Sequence[str], at: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of tiles at these places, counted along some axes only."""
        sizes = self.axes
        found = np.zeros_like(at["b"])
        for axis in axes:
            found = found * sizes[axis] + at[axis]
        return found


class TileArrays:
    """The same where the work is a tile of queries on a tile of keys, and what runs when is a matter of tasks.

    Tiles that would meet in one element have different copies, along `apart`, where these are small; else they have
    the same turn, and are to run in their order. axis: "i" or "j", along which there are copies.
    """

    def __init__(
        self,
        reads: Sequence[Reading],
        shapes: Mapping[int, tuple[int, ...]],
        c: Config,
        tiles: Tiles,
        axis: str = "i",
    ) -> None:
        self.real = np.dtype(np.float64 if c.acc == "double" else np.float32)
        self._tiles = tiles
        sizes = tiles.axes
        own = {n: [x for x in reads if x.slot == n] for n in sorted({x.slot for x in reads})}
        meet = {n: _meet(found, shapes[n], c, tiles) for n, found in own.items()}
        layouts = {n: Layout.of(found, shapes[n], c.lanes, meet[n]) for n, found in own.items()}
        for apart in (f"bh{axis}", f"h{axis}", axis, ""):
            copies = {n: math.prod(sizes[x] for x in apart) if meet[n] & set(apart) else 1 for n in own}
            room = sum(n * math.prod(layouts[slot].padded) for slot, n in copies.items() if n > 1)
            if room * self.real.itemsize <= COPIES_BYTES:
                break
        self._apart = tuple(apart)
        self.layouts = [(layouts[n], copies[n]) for n in own]
        in_turn = frozenset[str]().union(*(meet[n] - set(apart) for n in own))
        self._turn = tuple(axis for axis in sizes if axis not in in_turn)
        self.apart = axis in self._turn
        self.turns = math.prod(sizes[axis] for axis in self._turn)
        self.sums = ArraySums(self)

    def copy_of(self, **at: np.ndarray) -> np.ndarray:
        """Which copy a tile at (b, h, i, j) adds to."""
        return self._tiles.number(self._apart, at)

    def alone(self) -> ArraySums:
        """See TileSums.alone."""
        return ArraySums(self, alone=True)

    def turn_of(self, **at: np.ndarray) -> np.ndarray:
        """Which turn it takes: 0 <= n < `turns`."""
        return self._tiles.number(self._turn, at)


def _meet(reads: Sequence[Reading], shape: tuple[int, ...], c: Config, tiles: Tiles) -> frozenset[str]:
    """The axes along which tiles meet in one element: all but those of which one index of every load is the very
    variable, within the array. Registers of lanes reach into the next tile of rows that are no whole panels."""
    lengths = {"b": tiles.batch, "h": tiles.heads, "i": tiles.q_len, "j": tiles.kv_len}

    def tells(n: int, axis: str) -> bool:
        return shape[n] >= lengths[axis] and all(x.gradient.index[n] is variable(axis) for x in reads)

    def apart(axis: str) -> bool:
        if axis == "i" and tiles.tile_q % c.panel:
            return False
        return any(tells(n, axis) for n in range(len(shape)))

    return frozenset(axis for axis, n in tiles.axes.items() if n > 1 and not apart(axis))
