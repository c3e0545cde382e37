"""The contract of kernels for engines that hold the arrays as tiles, and fill the parameters of each task themselves.

A family that has such kernels offers `TileKernels`; `kernels.tile_kernels()` finds it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from flashtile.arrays import address_of

if TYPE_CHECKING:
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec


@dataclass(frozen=True)
class TileKernel:
    """Machine code and a parameter block without the words that differ between tasks.

    words names the words of the block; identity is what the cost of an item depends on besides its tiles' sizes.
    inner: a word that is to hold the address of another word of the block, wherever the block is copied to.
    items: how many a call has, where the kernel knows.
    """

    address: int  # of i32 (ptr params, i64 begin, i64 end, ptr scratch)
    block: np.ndarray  # int64
    words: Mapping[str, int]
    scratch_bytes: int
    identity: str
    keep: Any  # what must live as long as tasks may run
    inner: tuple[int, int] = (-1, -1)
    items: int = 0

    def filled(self, **values: int) -> np.ndarray:
        """The block with these words set; it stays where it is."""
        block = self.block.copy()
        for name, value in values.items():
            block[self.words[name]] = value
        word, at = self.inner
        if word >= 0:
            block[word] = address_of(block) + 8 * at
        return block


class TileSums(Protocol):
    """The gradients of captured arrays, to which tiles add. Those that would meet in one element have copies of their
    own, or the same turn: they must run one after the other."""

    turns: int  # how many there are
    apart: bool  # whether tiles that differ along the axis of the copies add to no element of one copy

    def copy_of(self, **at: np.ndarray) -> np.ndarray:
        """The value of the word `copy` for tiles at b, h, i, j, each (n,): int64 (n,)."""
        ...

    def turn_of(self, **at: np.ndarray) -> np.ndarray:
        """Their turns, likewise."""
        ...

    @property
    def sums(self) -> Totals: ...

    def alone(self) -> Totals:
        """Other sums, zero, of one copy: for tiles that run one after the other, the word `sums` being its address."""
        ...


class Totals(Protocol):
    @property
    def address(self) -> int: ...

    @property
    def memory(self) -> list[np.ndarray]:
        """All that has been added up."""
        ...

    def totals(self) -> dict[int, np.ndarray]:
        """The sums by the numbers of their slots, when every tile is done."""
        ...


@dataclass(frozen=True)
class TileBackward:
    """The kernel of a tile's gradients, and where those of captured arrays go, if any are wanted."""

    kernel: TileKernel
    arrays: TileSums | None


class Native:
    """A tile kernel as an engine of work items runs it: a `kernels.Runnable` on the address of a filled block."""

    merge_stage = None

    def __init__(self, kernel: TileKernel) -> None:
        integer, pointer = ctypes.c_int64, ctypes.c_void_p
        self.scratch_bytes, self._keep = kernel.scratch_bytes, kernel
        function = ctypes.CFUNCTYPE(ctypes.c_int32, pointer, integer, integer, pointer)
        self.run: Callable[[int, int, int, int], int] = function(kernel.address)


class TileKernels(Protocol):
    """What a family offers. All kernels take items [begin, end), on rows of adjacent elements."""

    def rows_at_once(self, spec: AttentionSpec, direction: str = "forward") -> int:
        """Query rows that `forward`, or `backward`, computes together: with a mask, tiles are whole multiples."""
        ...

    def forward(
        self,
        spec: AttentionSpec,
        tile_q: int,
        tile_k: int,
        *,
        in_place: bool = False,
        offsets: int = 0,
        scoring: Scoring | None = None,
    ) -> TileKernel:
        """The kernel that attends query tiles of tile_q rows to key tiles of tile_k keys.

        Item ((b * heads + h) * query_tiles + i) * key_tiles + j is query tile i on key tile j; a last tile may be
        short. Words that tasks set: q, k, v, o, lse (addresses), q_s, k_s, v_s, o_s (bytes between rows), carry (1:
        continue the state), kv_len (where key tile j ends, counted from key 0), sinks (0, or the address for a row's
        last task). o is in the accumulator's dtype, or with in_place in the input's; offsets is the address of
        int64[B], or 0; scoring has the values of the spec's program and sinks.
        Raises: SpecError if a mask comes with query tiles that are no multiple of `rows_at_once`.
        """
        ...

    def backward(
        self,
        spec: AttentionSpec,
        tile_q: int,
        tile_k: int,
        *,
        offsets: int = 0,
        scoring: Scoring | None = None,
        arrays: tuple[tuple[int, tuple[int, ...]], ...] = (),
        axis: str = "i",
    ) -> TileBackward:
        """The kernel that adds to dQ of a query tile, and to dK and dV of a key tile, what the one gives the other.

        Item b * heads + h is one query head. Words that tasks set: q, do, lse, delta, dq (addresses of the query tile),
        k, v, dk, dv (addresses of key 0, wherever that would be), those among dq, dk and dv that are not wanted 0; q_s,
        k_s, v_s, do_s, dq_s, dk_s, dv_s (bytes between rows); first_row and row_count of the query tile; first_key and
        kv_len, where the key tile begins and ends; copy (TileSums).
        Gradients, lse and delta are in accumulators. arrays: slots and shapes of captured arrays whose gradients are
        wanted; axis: "i" or "j", along which tiles have copies of their sums. The rest as in `forward`.
        Raises: SpecError if a mask comes with query tiles that are no multiple of `rows_at_once`.
        """
        ...

    def deltas(self, spec: AttentionSpec, *, scoring: Scoring | None = None) -> TileKernel:
        """The kernel of rowsum(dO * O) - dlse of a query tile, and of what its rows give to their sink.

        Item b * heads + h. Words that tasks set: do, o, lse, dlse (0: none), delta (addresses of the query tile),
        dsinks (0, or the address of the head's sum, which it adds to), do_s, o_s (bytes between rows), row_count.
        """
        ...

    def adding(self, spec: AttentionSpec, size: int) -> TileKernel:
        """The kernel that adds sums to a gradient in the input's dtype, which rounds once: item n is row n of a tile.

        Words that tasks set: parts (address of the sums: rows of so many accumulators without gaps), dq (of the
        gradient), dq_s (bytes between its rows).
        """
        ...

    def accumulating(self, spec: AttentionSpec, mask: str | None = None) -> TileKernel:
        """The kernel that adds one key tile to (o, lse) of a whole query tile, all heads; spec has one batch.

        q, k, v, o are (heads, rows, head size) and lse (heads, rows), without gaps; o in the input's dtype, and lse,
        hold the state of earlier keys. Words that tasks set: q, k, v, o, lse (addresses), offset, and with a mask its
        address: (rows, keys) without gaps, of dtype `mask`, which is added to the scores, or if bool shows the keys
        that are True. The kernel says how many items it has.
        """
        ...

    def differentiating(self, spec: AttentionSpec, mask: str | None = None) -> dict[str, TileKernel]:
        """The kernels of the gradients of one key tile and a whole query tile, all heads; spec has one batch.

        "delta" and "backward" are those of `deltas` and `backward`, with every head an item; "add_N" is `adding` for a
        head size N. Arrays are as in `accumulating`, gradients (heads, rows, head size) in accumulators; words that
        tasks set: addresses, offset, and with a mask its own.
        """
        ...

    def finish(self, dtype: str, value_size: int) -> TileKernel:
        """The kernel that casts a carried output to the input's dtype: item n is row n of a tile.

        Words that tasks set: parts_o, parts_lse, o (addresses), o_s (bytes between rows of o).
        """
        ...

    def merging(self, dtype: str, value_size: int) -> TileKernel:
        """The kernel that merges a second partial result into a first: item n is row n of both tiles; dtype is theirs.

        Words that tasks set: parts_o, parts_lse and o, lse (addresses of the first), o_split, lse_split (the second's
        addresses less the first's). The rows lie without gaps.
        """
        ...

    def unfused(
        self, spec: AttentionSpec, tile_q: int, tile_k: int, *, offsets: int = 0, scoring: Scoring | None = None
    ) -> dict[str, TileKernel]:
        """The kernels of the three unfused stages, "scores", "softmax" and "output", which meet in stored scores.

        Items of scores and output are numbered as in `forward`, those of softmax (b * heads + h) * query_tiles + i.
        Words that tasks set: q, k, v, o, lse, stored (addresses; stored is the query tile's own), q_s, k_s, v_s, o_s
        (bytes between rows), carry (1: add to o). o is in accumulators. Words to read: stored_s, the bytes of a row of
        stored scores, and columns, the keys of a key tile with their padding.
        """
        ...
