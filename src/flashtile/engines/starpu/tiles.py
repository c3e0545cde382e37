"""Tensors as tiles: data handles over memory that stays where it is, or over memory that StarPU owns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashtile.arrays import view, view_of
from flashtile.checks import integer
from flashtile.dtypes import DType
from flashtile.engines.starpu import runtime
from flashtile.errors import wrong

FOREIGN = -1  # in place of an address: the handles are someone else's
LARGEST = 2**32 - 1  # of a matrix handle's numbers
HOME, DROP, DROP_LATER = 0, 1, 2  # what ft_unregister does with the contents
MODES = ("R", "W", "RW")
ACQUIRE_POLL_SECONDS = 2e-4


@dataclass(frozen=True, eq=False)
class Tile:
    """One tile of a tensor: what a task is submitted on."""

    tensor: TiledTensor
    index: tuple[int, int, int]

    @property
    def handle(self) -> int:
        """The address of StarPU's handle (starpu_data_handle_t), for tasks of the program's own, which may write it:
        from here on it counts as written."""
        found = self.address
        self.tensor.runtime.unwritten.discard(found)
        return found

    @property
    def address(self) -> int:
        """`handle`, for tasks of this package's own."""
        self.tensor.check()
        return int(self.tensor.handles[self.index])

    @property
    def first(self) -> int:
        """The tile's first row in the tensor."""
        return self.index[2] * self.tensor.rows

    @property
    def height(self) -> int:
        """Rows of the tile; the last one of a tensor may be short."""
        return min(self.tensor.rows, self.tensor.shape[2] - self.first)


class TiledTensor:
    """A tensor (B, H, S, D), or lse (B, H, S), as tiles (1, 1, rows, D), each a data handle.

    The handles of a tensor with columns are matrices (StarPU's matrix interface, a row apart by `stride` bytes),
    those of lse are variables; so are those of a tensor that StarPU owns, which exists tile by tile, from the first
    task that writes it. Tiles of several heads are blocks: of planes, one a head, or of rows, where the heads of a row
    lie closer together than the rows of a head (`turned`).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: DType,
        rows: int,
        *,
        heads: int = 1,
        address: int = 0,
        strides: tuple[int, ...] = (0, 0, 0),
        keep: Any = None,
    ) -> None:
        """address 0: StarPU owns the memory. strides: bytes along B, H, S, and more. keep: what owns the memory. heads:
        of a tile, so many as `can_group` finds to lie well."""
        self.runtime = runtime.current()
        self.shape, self.dtype, self.rows, self.heads = shape, dtype, rows, heads
        if heads > 1 and shape[1] == 1:  # heads of a tile are batches; no head lies a stride from the only one
            strides = strides[0], strides[0], strides[2]
        self.owned, self._keep, self._strides = address == 0, keep, strides
        self.columns = shape[3] if len(shape) == 4 else None
        self.extent, self.writable = (0, 0), True  # bytes of memory that it spans, if it is not StarPU's
        if isinstance(keep, np.ndarray):
            described = view_of(keep)._replace(dtype=dtype.name)  # bfloat16 may come as its bits
            self.extent = tuple(address + end for end in described.extent())  # type: ignore[assignment]  # two
            self.writable = keep.flags.writeable and not described.may_overlap_itself()
        batch, count, length = shape[:3]
        units = (batch, count // heads) if heads <= count else (batch * count // heads, 1)
        self.grid = *units, -(-length // rows)
        self.turned = heads > 1 and address != 0 and self.columns is not None and strides[1] < strides[2]
        height = np.minimum(rows, length - rows * np.arange(self.grid[2]))
        first = np.divmod(np.arange(units[0] * units[1]) * heads, max(1, count))
        starts = (first[0] * strides[0] + first[1] * strides[1]).reshape(*units, 1)
        starts = starts + np.arange(self.grid[2]) * (strides[2] * rows)
        self.handles = np.empty(self.grid, np.uint64)
        self.live, self.foreign = True, False
        if address == FOREIGN:
            return
        where = np.zeros(self.grid) if self.owned else address + np.broadcast_to(starts, self.grid)
        self._register(where.astype(np.uint64), np.broadcast_to(height, self.grid))
        if self.owned:
            self.runtime.unwritten.update(self.handles.ravel().tolist())
        self.runtime.handles.update(dict.fromkeys(self.handles.ravel().tolist(), self))

    def _register(self, where: np.ndarray, count: np.ndarray) -> None:
        size = self.dtype.itemsize
        if self.heads > 1:
            self._register_blocks(where, count)
            return
        if self.columns is None or self.owned:
            self.handles[...] = self.runtime.register(where, count * (size * (self.columns or 1))).reshape(self.grid)
            return
        numbers = (self._strides[2] // size, self.columns, count)  # leading dimension, columns, rows
        at = self.runtime.ffi.from_buffer
        matrices = [at("uint32_t[]", np.ascontiguousarray(np.broadcast_to(x, self.grid), np.uint32)) for x in numbers]
        self.runtime.lib.ft_register_matrices(
            where.size, at("uint64_t[]", where), *matrices, size, at("uint64_t[]", self.handles)
        )

    def _register_blocks(self, where: np.ndarray, count: np.ndarray) -> None:
        size = self.dtype.itemsize
        nx: Any = count
        ny: Any = np.ones_like(count)
        if self.columns is not None:
            nx, ny = np.full_like(count, self.columns), count
        row, plane = (nx, nx * ny) if self.owned else (self._strides[2] // size, self._strides[1] // size)
        nz: Any = self.heads
        if self.columns is None:
            row = nx
        if self.turned:
            ny, nz, row, plane = self.heads, count, plane, row
        at = self.runtime.ffi.from_buffer
        sizes = [
            at("uint32_t[]", np.ascontiguousarray(np.broadcast_to(x, self.grid), np.uint32))
            for x in (row, plane, nx, ny, nz)
        ]
        self.runtime.lib.ft_register_blocks(
            where.size, at("uint64_t[]", where), *sizes, size, at("uint64_t[]", self.handles)
        )

    @classmethod
    def wrap(cls, handles: np.ndarray, shape: tuple[int, ...], dtype: DType, rows: int) -> TiledTensor:
        """Over handles that the program registered itself, of shape (B, H, tiles along S).

        They are matrices, or contiguous vectors or variables, of exactly a tile's bytes. They stay the program's:
        unregister() only forgets them.
        Raises: SpecError if there are more or fewer handles than tiles, or of another size or interface.
        """
        tensor = cls(shape, dtype, rows, address=FOREIGN)
        tensor.foreign = True
        if handles.shape != tensor.grid:
            raise wrong("handles", f"shape {handles.shape}", f"{tensor.grid}, one a tile")
        tensor.handles[...] = handles
        for index in np.ndindex(*tensor.grid):
            address = int(handles[index])
            nbytes = int(tensor.runtime.lib.ft_nbytes(address))
            expected = Tile(tensor, index).height * (tensor.columns or 1) * dtype.itemsize
            if nbytes != expected:
                got = {-1: "one of another interface", -2: f"{address:#x}"}.get(nbytes, f"one of {nbytes} bytes")
                raise wrong(f"handle {index}", got, f"a matrix, vector or variable of {expected} bytes")
        return tensor

    @property
    def dense(self) -> bool:
        """Whether the rows of a tile lie without gaps."""
        return self.owned or self.columns is None or self._strides[2] == self.columns * self.dtype.itemsize

    @property
    def cut(self) -> str:
        """What a tile has of it."""
        return f"{self.rows} rows" + (f" of {self.heads} heads" if self.heads > 1 else "")

    def __repr__(self) -> str:
        grid = " x ".join(map(str, self.grid))
        state = "" if self.live and not self.runtime.over else ", unregistered"
        return f"<TiledTensor {self.shape} {self.dtype.name}, {grid} tiles of {self.cut}{state}>"

    def __getitem__(self, index: Any) -> Tile:
        """The tile (batch, head, tile along S). Raises: SpecError outside the grid."""
        numbers = tuple(integer(n) for n in index) if isinstance(index, tuple) else (integer(index),)
        inside = [n is not None and 0 <= n < size for n, size in zip(numbers, self.grid, strict=False)]
        if len(numbers) != 3 or not all(inside):
            raise wrong("tile", repr(index), f"three numbers (batch, head, tile) within {self.grid}")
        return Tile(self, numbers)  # type: ignore[arg-type]  # None was refused

    @contextmanager
    def acquire(self, index: tuple[int, int, int], mode: str = "R") -> Iterator[np.ndarray]:
        """The contents of one tile, once every task submitted on it before is done: (rows, D), or (rows,) of lse; of a
        tile of several heads (heads, rows, D), or (heads, rows).

        Mode R, W (what is there may be lost) or RW. While a tile is held no task can be submitted on it; release
        it by leaving the block. bfloat16 comes as its bits, uint16.
        Raises: SpecError for another mode, a tile already held or never written (but by W), an unregistered tensor.
        """
        tile = self[index]
        handle = tile.address
        if mode not in MODES:
            raise wrong("mode", repr(mode), "one of " + ", ".join(map(repr, MODES)))
        if handle in self.runtime.held:
            raise wrong("acquire", f"tile {index}, which is held already", "a tile released before")
        if mode != "W" and handle in self.runtime.unwritten:
            raise wrong(
                "acquire", f"mode {mode!r} on tile {index}, which was never written", "'W', or a tile written before"
            )
        with self.runtime.working():
            while self.runtime.lib.ft_acquire(handle, self.runtime.constant(mode)):
                time.sleep(ACQUIRE_POLL_SECONDS)  # Ctrl-C comes through here
            self.runtime.held.add(handle)
            self.runtime.unwritten.discard(handle)
            try:
                yield self._contents(tile, handle, mode)
            finally:
                self.runtime.release(handle)

    def _contents(self, tile: Tile, handle: int, mode: str) -> np.ndarray:
        between = self.runtime.ffi.new("int64_t[2]")
        address = int(self.runtime.lib.ft_pointer(handle, self.turned, between, between + 1))
        size, shape, strides = self.dtype.itemsize, [tile.height], [self.dtype.itemsize]
        if self.columns is not None:
            shape, strides = [tile.height, self.columns], [between[0] or size * self.columns, size]
        if self.heads > 1:
            shape, strides = [self.heads, *shape], [between[1], *strides]
        return view(address, tuple(shape), tuple(strides), self.dtype.numpy, writable=mode != "R")

    def check(self) -> None:
        """Raise SpecError if the tensor was unregistered, UnavailableError if StarPU does not run in this process."""
        if runtime.current() is not self.runtime or not self.live:
            raise wrong("tensor", "one that was unregistered", "a registered one")

    def unregister(self, how: int | None = None) -> None:
        """Wait for the tasks on the tiles, and give the memory back: contents of an array are then in the array.

        Raises: SpecError if it was done before, or if a tile is held.
        """
        self.check()
        handles = self.handles.ravel().tolist()
        if not self.runtime.held.isdisjoint(handles):
            raise wrong("unregister", "a tensor with a tile that is acquired", "every tile released")
        self.live = False
        if self.foreign:
            return
        if how is None:
            how = DROP if self.owned else HOME
        try:
            with self.runtime.working():
                self.runtime.unregister(self.handles, how)
        finally:  # after Ctrl-C, too, which comes when StarPU has let go
            self.runtime.unwritten.difference_update(handles)
            for handle in handles:
                self.runtime.handles.pop(handle, None)
            self._keep = None

    def __enter__(self) -> TiledTensor:
        return self

    def __exit__(self, *_: object) -> None:
        if self.live and not self.runtime.over:
            self.unregister()


def can_tile(strides: tuple[int, ...], columns: int, itemsize: int) -> bool:
    """Whether rows of `columns` elements lie so that a matrix handle describes them: strides of (S, D) in bytes."""
    row, inner = strides
    step, rest = divmod(row, itemsize)
    return inner == itemsize and not rest and columns <= step <= LARGEST


def can_group(shape: tuple[int, ...], strides: tuple[int, ...], rows: int, heads: int, itemsize: int) -> bool:
    """Whether blocks describe tiles of so many heads and rows, with strides of (B, H, S) in bytes."""
    batch, count, length, *columns = shape
    between_batches, plane, row = strides[:3]
    if heads == 1:
        return True
    if count == 1:
        plane = between_batches
    if heads > count and (heads % count or batch * count % heads or between_batches != count * plane):
        return False
    if (heads <= count and count % heads) or plane % itemsize or not 0 < plane <= LARGEST * itemsize:
        return False
    if not columns:
        return plane >= min(rows, length) * itemsize
    if plane < row:
        return plane >= columns[0] * itemsize and row >= heads * plane
    return plane >= min(rows, length) * row
