"""Sums of captured arrays' gradients on GPUs: of each array the elements that a task may reach, a box, as a handle.

Along an axis that every load indexes by b, h, i or j itself a box has a tile's share, along any other the whole axis.
Tasks that add to the same box run in their order. Where boxes are small, tasks that would meet in one have copies along
the axes that `_COPIED` names, which are added in their order when all tasks are done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashtile.engines.starpu.launches import FIRSTS, Source, Value
from flashtile.score.operations import variable

if TYPE_CHECKING:
    from flashtile.kernels import ArrayShapes
    from flashtile.score.derivative import ArrayGradient
    from flashtile.score.program import Program
    from flashtile.spec import AttentionSpec

COPIES_BYTES = 4 << 20  # that the boxes of one array may take, for some of them to be copies
LARGEST_BYTES = 128 << 20  # of one box: a worker has about four times as much scratch memory for its sums
_AXES = "bhij"
_COPIED = ("bhi", "hi", "i")


@dataclass(frozen=True)
class Boxes:
    """Those of one array.

    loads: numbers of the program's gradients that add to it; axes: of the array, which of b, h, i, j indexes it where a
    box has a tile's share; lengths: of a box; counted: the axes of tiles by which boxes are numbered; tiles: how many
    there are along each; terms: scores that may add to one element in one task.
    """

    slot: int
    shape: tuple[int, ...]
    loads: tuple[int, ...]
    axes: tuple[str | None, ...]
    lengths: tuple[int, ...]
    counted: tuple[str, ...]
    tiles: Mapping[str, int]
    terms: int
    real: np.dtype[Any]

    @property
    def elements(self) -> int:
        return math.prod(self.lengths)

    @property
    def count(self) -> int:
        return math.prod(self.tiles[axis] for axis in self.counted)

    def number(self, **at: np.ndarray) -> np.ndarray:
        """Of the box to which tiles at b, h, i, j, each (n,), add."""
        found = np.zeros_like(at["b"])
        for axis in self.counted:
            found = found * self.tiles[axis] + at[axis]
        return found

    @property
    def values(self) -> list[Value]:
        """The first index and the length along each axis, as a launch has them."""
        firsts = dict(zip(_AXES, FIRSTS, strict=True))
        pairs = zip(self.axes, self.lengths, strict=True)
        return [x for axis, n in pairs for x in (0 if axis is None else Source("SIZE", firsts[axis]), n)]

    def total(self, memory: np.ndarray) -> np.ndarray:
        """The sums in the array's own shape, float64; of copies, in their order. memory (count * elements,)."""
        boxes = memory.reshape(*(self.tiles[axis] for axis in self.counted), *self.lengths)
        copies = tuple(n for n, axis in enumerate(self.counted) if axis not in self.axes)
        boxes = boxes.sum(axis=copies, dtype=np.float64)
        whole = np.zeros(self.shape)
        apart = [axis for axis in self.counted if axis in self.axes]
        for place in np.ndindex(*(self.tiles[axis] for axis in apart)):
            at = dict(zip(apart, place, strict=True))
            first = [0 if axis is None else at[axis] * n for axis, n in zip(self.axes, self.lengths, strict=True)]
            there = tuple(slice(start, start + n) for start, n in zip(first, self.lengths, strict=True))
            part = whole[there]  # less than a box at the end of an axis
            part += boxes[place][tuple(slice(n) for n in part.shape)]
        return whole


def boxes_of(
    spec: AttentionSpec, program: Program, arrays: ArrayShapes, tile_q: int, tile_k: int, real: np.dtype[Any]
) -> tuple[Boxes, ...] | str:
    """Of every array whose gradient is wanted, in tasks of one head; or why a GPU cannot have them."""
    lengths = {"b": spec.batch, "h": spec.heads, "i": spec.q_len, "j": spec.kv_len}
    share = {"b": 1, "h": 1, "i": min(tile_q, spec.q_len), "j": min(tile_k, spec.kv_len)}
    tiles = {axis: -(-lengths[axis] // max(1, share[axis])) for axis in _AXES}
    found = []
    for slot, shape in sorted(arrays):
        loads = {n: x for n, x in enumerate(program.array_gradients) if x.slot.number == slot}
        axes = tuple(_axis([*loads.values()], n, shape[n], lengths) for n in range(len(shape)))
        sizes = tuple(n if axis is None else share[axis] for axis, n in zip(axes, shape, strict=True))
        nbytes = math.prod(sizes) * real.itemsize
        if not 0 < nbytes <= LARGEST_BYTES:
            return f"a task may reach {math.prod(sizes)} elements of an array whose gradient is wanted"
        several = (tuple(axis for axis in _AXES if axis in axes or axis in more) for more in _COPIED)
        small = (names for names in several if nbytes * math.prod(tiles[x] for x in names) <= COPIES_BYTES)
        counted = next(small, tuple(axis for axis in _AXES if axis in axes))
        terms = len(loads) * math.prod(n for axis, n in share.items() if axis not in axes)
        found.append(Boxes(slot, shape, tuple(loads), axes, sizes, counted, tiles, terms, real))
    return tuple(found)


def _axis(loads: list[ArrayGradient], n: int, length: int, lengths: Mapping[str, int]) -> str | None:
    """Which variable is index n of every load, never beyond the array; None if there is none."""
    for axis in _AXES:
        if length >= lengths[axis] and all(x.index[n] is variable(axis) for x in loads):
            return axis
    return None
