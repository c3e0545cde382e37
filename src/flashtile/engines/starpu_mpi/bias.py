"""A bias that is cut by query rows: each rank has the rows of its queries, and tasks read no others.

The backward computes scores where the keys are: for it ranks exchange rows for columns beforehand, so that each has,
beside its rows, the columns of its keys; and the gradient's columns for rows afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from flashtile.arrays import address_of
from flashtile.engines.starpu_mpi.parts import rows_of
from flashtile.errors import wrong
from flashtile.kernels import tile_kernels
from flashtile.score.captures import Block
from flashtile.score.program import Program
from flashtile.spec import AttentionSpec

ROWS, KEYS = 2, 3  # axes of (b, h, i, j)


class Tiles(Protocol):
    """How sequences lie over ranks: collective.Cut."""

    @property
    def ranks(self) -> int: ...

    @property
    def tile(self) -> int: ...

    def tiles(self, length: int, rank: int) -> np.ndarray: ...


class RowsOfBias(NamedTuple):
    """This rank's rows of a bias, and what stands for all of it: zeros of the whole's shape, without memory."""

    mine: np.ndarray
    whole: np.ndarray

    @classmethod
    def of(cls, mine: np.ndarray, rows: int) -> RowsOfBias:
        """rows: of the whole."""
        shape = (*mine.shape[:-2], rows, mine.shape[-1])
        return cls(mine, np.broadcast_to(np.zeros((), mine.dtype), shape))

    def slot(self, program: Program) -> int:
        """The number of its slot in a call's program."""
        found = (n for n, x in enumerate(program.captures) if getattr(x, "source", None) is self.whole)
        return next(found)

    def check(self, spec: AttentionSpec, tile: int, direction: str = "forward") -> None:
        """Raise SpecError for tiles of which a kernel would read rows beyond the end."""
        panel = tile_kernels().rows_at_once(spec, direction)
        if tile % panel:
            raise wrong("tile", f"{tile} with a bias cut by rows", f"a multiple of {panel}, or the whole bias")


def blocks_of(program: Program, slot: int, part: np.ndarray, axis: int, tiles: np.ndarray, tile: int) -> list[Any]:
    """For each of some tiles the block of captures by which its tasks read `part`, which has just these tiles of the
    captured array along an axis, one after the other."""
    made: dict[int, np.ndarray] = {}
    found = []
    for place, number in enumerate(tiles):
        shift = (int(number) - place) * tile
        if shift not in made:
            first = [shift if n == axis else 0 for n in range(4)]
            made[shift] = Block(program.slots).pack_part(program.captures, program.slots[slot], part, first)
        found.append(made[shift])
    return found


def point(words: np.ndarray, tiles: np.ndarray, own: np.ndarray, blocks: Sequence[np.ndarray]) -> None:
    """Let the tasks of a rank's own tiles read through these blocks. words (n,): where each task has the address; tiles
    (n,): its tile."""
    where = np.zeros(int(tiles.max(initial=-1)) + 1, np.int64)
    for number, block in zip(own, blocks, strict=True):
        if number < len(where):
            where[number] = address_of(block)
    words[...] = where[tiles]


def columns_of(comm: Any, cut: Tiles, spec: AttentionSpec, rows: np.ndarray, out: np.ndarray) -> None:
    """Exchange: from this rank's rows of all keys to all rows of its keys, `out`. On all ranks together.

    Shapes:  rows (..., own rows, S_kv), out (..., S_q, own keys); or one key in both, where the bias has but one.
    """
    rank, ranks, tile = comm.Get_rank(), cut.ranks, cut.tile
    keys = [rows_of(cut.tiles(spec.kv_len, r), spec.kv_len, tile) for r in range(ranks)]
    tiles = [cut.tiles(spec.q_len, r) for r in range(ranks)]
    for distance in range(ranks):
        to, source = (rank + distance) % ranks, (rank - distance) % ranks
        # Tile by tile, since a message's size is an int to MPI; as often on every rank, whoever has fewer.
        for n in range(max(map(len, tiles))):
            part = rows[..., n * tile : (n + 1) * tile, :]
            block = np.ascontiguousarray(part if rows.shape[-1] == 1 else part[..., keys[to]])
            came = comm.sendrecv(block, dest=to, source=source) if distance else block
            if n < len(tiles[source]):
                first = int(tiles[source][n]) * tile
                out[..., first : first + came.shape[-2], :] = came


def from_columns(comm: Any, cut: Tiles, spec: AttentionSpec, columns: np.ndarray, out: np.ndarray) -> None:
    """The way back: from all rows of this rank's keys to its own rows of all keys, `out`. On all ranks together.

    Shapes:  columns (..., S_q, S_kv), of which this rank has those of its keys; out (..., own rows, S_kv).
    """
    rank, ranks, tile = comm.Get_rank(), cut.ranks, cut.tile
    keys = [rows_of(cut.tiles(spec.kv_len, r), spec.kv_len, tile) for r in range(ranks)]
    tiles = [cut.tiles(spec.q_len, r) for r in range(ranks)]
    for distance in range(ranks):
        to, source = (rank + distance) % ranks, (rank - distance) % ranks
        for n in range(max(map(len, tiles))):
            first = int(tiles[to][n]) * tile if n < len(tiles[to]) else spec.q_len
            block = np.ascontiguousarray(columns[..., first : first + tile, :][..., keys[rank]])
            came = comm.sendrecv(block, dest=to, source=source) if distance else block
            if n < len(tiles[rank]):
                out[..., n * tile : n * tile + came.shape[-2], keys[source]] = came
