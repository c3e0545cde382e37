"""What a task of a gradient's graph runs, in machine code and without the GIL: pure, as those of the forward (work.py).

A query tile's dQ, and a key tile's dK and dV, each have a chain of tasks of their own: a pair of tiles that meet is a
task of either, so scores and dP are computed twice, in place of states that each of two chains would wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flashtile.arrays import address_of
from flashtile.dtypes import DTYPES
from flashtile.engines.dask.work import Work, adjacent, captures_of, scratch_at, start_of
from flashtile.errors import KernelError
from flashtile.kernels import ArrayShapes, tile_kernels
from flashtile.kernels.tiles import Native, TileBackward, TileKernel

State = tuple[
    list[np.ndarray], list[np.ndarray]
]  # gradients in accumulators (b, h, rows, ...), sums of captured arrays


@dataclass(eq=False)
class BackwardWork(Work):
    """arrays: slots and shapes of captured arrays whose gradients are wanted: those of a chain belong to its state."""

    arrays: ArrayShapes = ()

    def _made(self, arrays: ArrayShapes) -> tuple[TileBackward, Native]:
        at = 0 if self.offsets is None else address_of(self.offsets)
        given: dict[str, Any] = {"offsets": at, "scoring": self.scoring, "arrays": arrays}
        found = tile_kernels().backward(self.spec, self.tile_q, self.tile_k, **given)
        return found, Native(found.kernel)

    @cached_property
    def of_rows(self) -> tuple[TileBackward, Native]:
        return self._made(self.arrays)

    @cached_property
    def of_keys(self) -> tuple[TileBackward, Native]:
        return self._made(()) if self.arrays else self.of_rows

    @cached_property
    def deltas(self) -> tuple[TileKernel, Native]:
        kernel = tile_kernels().deltas(self.spec, scoring=self.scoring)
        return kernel, Native(kernel)

    @cached_property
    def adding(self) -> dict[int, tuple[TileKernel, Native]]:
        """By head size."""
        spec = self.spec
        kernels = {n: tile_kernels().adding(spec, n) for n in (spec.head_size, spec.value_size)}
        return {n: (kernel, Native(kernel)) for n, kernel in kernels.items()}


def deltas(
    work: BackwardWork, batch: int, head: int, i: int, sunk: bool, do: Any, o: Any, lse: Any, dlse: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """rowsum(dO * O) - dlse of query tile i of a block of heads, (b, h, rows), and what its rows give to sinks (b, h).

    Shapes:  do, o (b, h, rows, D_v), lse, dlse (b, h, rows, 1).
    """
    kernel, native = work.deltas
    do, o, lse = adjacent(do), adjacent(o), np.ascontiguousarray(lse)
    dlse = None if dlse is None else np.ascontiguousarray(dlse)
    rows = do.shape[:3]
    delta = np.empty(rows, work.accumulator)
    dsinks = np.zeros(rows[:2], work.accumulator) if sunk else None
    block = kernel.filled(do_s=do.strides[2], o_s=o.strides[2], row_count=rows[2])
    for b, h in np.ndindex(*rows[:2]):
        for name, x in (("do", do), ("o", o), ("lse", lse), ("dlse", dlse), ("delta", delta), ("dsinks", dsinks)):
            if x is not None:
                block[kernel.words[name]] = address_of(x) + b * x.strides[0] + h * x.strides[1]
        item = (batch + b) * work.spec.heads + head + h
        if status := native.run(address_of(block), item, item + 1, scratch_at(kernel.scratch_bytes)):
            tile = f"batch {batch + b}, head {head + h}, query tile {i}"
            raise KernelError(f"dask: the delta kernel failed on {tile} with status {status}")
    return delta, dsinks


def gradients(
    work: BackwardWork,
    names: str,
    batch: int,
    head: int,
    i: int,
    j: int,
    meet: Any,
    final: bool,
    state: State | None,
    given: Sequence[Any],
    bias: np.ndarray | None = None,
) -> State:
    """Add to gradients what query tile i of a block of heads and key tile j give them; with `final` they are cast,
    16-bit ones as bits.

    Shapes:  given q (b, h, rows, D), do (b, h, rows, D_v), lse (b, h, rows, 1), delta (its task's), k (b, h_kv, keys,
             D), v (b, h_kv, keys, D_v): batches from `batch` and query heads from `head` on.
    names:   "q", with the sums of captured arrays; or those among "kv" that are wanted.
    meet:    which heads have the two tiles meet, bool that broadcasts to (b, h). bias: as in work.step.
    Raises:  KernelError naming the tile.
    """
    of_rows = names == "q"
    found, native = work.of_rows if of_rows else work.of_keys
    spec, kernel = work.spec, found.kernel
    q, do, k, v = (adjacent(x) for x in (given[0], given[1], given[4], given[5]))
    lse, delta = np.ascontiguousarray(given[2]), given[3][0]
    tensors = {"q": q, "do": do, "k": k, "v": v}
    if state is None:
        sums = [np.zeros(tensors[n].shape, work.accumulator) for n in names]
    else:
        sums = [x.copy() for x in state[0]]
    tensors |= {f"d{n}": x for n, x in zip(names, sums, strict=True)}
    row, key = i * work.tile_q, j * work.tile_k
    words = {f"{n}_s": x.strides[2] for n, x in tensors.items()}
    words |= {"first_row": row, "row_count": q.shape[2], "first_key": key, "kv_len": key + k.shape[2], "copy": 0}
    captures = None if bias is None else captures_of(work, bias, batch, head, row, key)
    words |= {} if captures is None else {"captures": address_of(captures)}
    own = None if found.arrays is None or not of_rows else found.arrays.alone()
    if own is not None:
        words["sums"] = own.address
        for mine, before in zip(own.memory, [] if state is None else state[1], strict=state is not None):
            mine[...] = before
    block, scratch = kernel.filled(**words), scratch_at(kernel.scratch_bytes)
    for b, h in np.argwhere(np.broadcast_to(meet, q.shape[:2])).tolist():
        for name, x in tensors.items():
            of_keys = name[-1] in "kv"
            block[kernel.words[name]] = start_of(x, b, h // spec.group if of_keys else h, key if of_keys else 0)
        for name, x in (("lse", lse), ("delta", delta)):
            block[kernel.words[name]] = address_of(x) + b * x.strides[0] + h * x.strides[1]
        item = (batch + b) * spec.heads + head + h
        if status := native.run(address_of(block), item, item + 1, scratch):
            tile = f"batch {batch + b}, head {head + h}, query tile {i}, key tile {j}"
            raise KernelError(f"dask: the backward kernel failed on {tile} with status {status}")
    if final:
        sums = [cast(work, x) for x in sums]
    return sums, [] if own is None else list(own.memory)


def cast(work: BackwardWork, sums: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
    """Sums, added to a gradient (contiguous, in the inputs' dtype, its bits) where there is one, rounded once."""
    if not work.narrow:
        return sums if before is None else before + sums
    kernel, native = work.adding[sums.shape[3]]
    out = np.zeros(sums.shape, DTYPES[work.spec.dtype].numpy) if before is None else before.copy()
    block = kernel.filled(parts=address_of(sums), dq=address_of(out), dq_s=out.strides[2])
    rows = sums.size // max(1, sums.shape[3])
    if status := native.run(address_of(block), 0, rows, scratch_at(kernel.scratch_bytes)):
        raise KernelError(f"dask: the cast of a gradient failed with status {status}")
    return out


def added(one: list[np.ndarray], other: State) -> list[np.ndarray]:
    """The sums of captured arrays of chains so far, and of one more."""
    return [x + y for x, y in zip(one, other[1], strict=True)] if one else other[1]


def totals(work: BackwardWork, sums: list[np.ndarray]) -> dict[int, np.ndarray]:
    """The gradients of captured arrays by the numbers of their slots; 0 where no tile met."""
    arrays = work.of_rows[0].arrays
    if arrays is None:
        return {}
    own = arrays.alone()
    for mine, given in zip(own.memory, sums, strict=bool(sums)):
        mine[...] = given
    return own.totals()


def of_sinks(parts: Sequence[tuple[int, int, Any]], shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """What rows gave to sinks, (batch, head, (delta, (b, h))) each, added in their order: (B, H)."""
    found = np.zeros(shape, np.float64)
    for batch, head, (_, given) in parts:
        found[batch : batch + given.shape[0], head : head + given.shape[1]] += given
    return found.astype(dtype)
