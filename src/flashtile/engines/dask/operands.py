"""Inputs as blocks, whatever holds them: arrays in memory, Dask's arrays, arrays in storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from flashtile.arrays import is_dask, is_stored
from flashtile.engines.dask.work import read


@dataclass(frozen=True)
class Cut:
    """How a call is cut: sizes of its blocks of batches and of key/value heads, rows of its tiles."""

    batches: tuple[int, ...]
    kv_heads: tuple[int, ...]
    group: int
    tile_q: int
    tile_k: int

    @property
    def heads(self) -> tuple[int, ...]:
        """Sizes of its blocks of query heads."""
        return tuple(n * self.group for n in self.kv_heads)

    def firsts(self, sizes: Sequence[int]) -> list[int]:
        """Where each block of these sizes begins."""
        return [0, *accumulate(sizes)][:-1]


@dataclass(frozen=True)
class Operand:
    """An array of the graph as `of` made it. `collection`, `graph`: what the graph needs of it."""

    name: str
    rank: int
    bounds: tuple[tuple[int, ...], ...]  # block boundaries along B, H and S
    collection: Any = None  # a Dask array, cut into those blocks
    graph: dict[Any, Any] | None = None  # or a stored array under its name

    def block(self, batch: int, head: int, tile: int) -> Any:
        """The graph's expression for a block: its key; or a read within the task that asks for it, so that nobody keeps
        a block of an array that is larger than memory."""
        if self.collection is not None:
            return (self.name, batch, head, tile, 0)
        numbers = zip(self.bounds, (batch, head, tile), strict=True)
        return (read, self.name, self.rank, *(edge for axis, n in numbers for edge in axis[n : n + 2]))


def of(x: Any, name: str, cut: Cut, *, tile: int, grouped: bool) -> Operand:
    """An array of 2 to 4 axes as blocks of four; grouped: its heads are those of queries."""
    import dask.array as da

    sizes = cut.batches, cut.heads if grouped else cut.kv_heads
    shape = (1,) * (4 - len(x.shape)) + tuple(x.shape)
    rows = tuple(min(tile, shape[2] - first) for first in range(0, shape[2], tile)) or (0,)
    bounds = tuple((0, *accumulate(n)) for n in (*sizes, rows))
    if is_stored(x):
        return Operand(name, len(x.shape), bounds, graph={name: x})
    if not is_dask(x):
        x = da.from_array(x, chunks=x.shape, name=name)
    whole = x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x
    whole = whole.rechunk((*sizes, rows, (shape[3],)))
    return Operand(whole.name, 4, bounds, collection=whole)


def of_bias(x: Any, cut: Cut, rows: tuple[int, ...], keys: tuple[int, ...]) -> Any:
    """A Dask array that broadcasts to the scores, cut as they are; axes of one element stay."""
    sizes = (cut.batches, cut.heads, rows, keys)[4 - x.ndim :]
    return x.rechunk(tuple((1,) if n == 1 else axis for n, axis in zip(x.shape, sizes, strict=True)))
