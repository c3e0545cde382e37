"""Gradients of a call whose arrays are larger than memory: two passes of tiles by tiles.

The first keeps groups of query tiles in memory, with their dQ, while the keys that they see pass by; the second keeps
groups of key tiles, with their dK and dV, while the queries that see them pass. Every gradient is so written once, and
no sum ever leaves memory before it is whole; scores and dP are computed in both passes, seven products in place of
five. Tasks that share a gradient come in the order of one flow (backward.py), and so do its bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from flashtile.dtypes import DTYPES
from flashtile.engines.starpu import runtime
from flashtile.engines.starpu.backward import NOTHING, OF_KEYS, BackwardFlow
from flashtile.engines.starpu.jobs import TASK, Job
from flashtile.engines.starpu.outofcore import Needs, Read, Room, Written, tiled
from flashtile.engines.starpu.tiles import TiledTensor
from flashtile.kernels import ArrayShapes
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

LOGS = ("lse", "dlse", "delta")  # a number a row


class Target(NamedTuple):
    """Where a gradient goes, (B, H, S, D), its bits stored as they are; fresh: whatever was there is no part of it."""

    array: np.ndarray
    fresh: bool
    written: Written  # hears of every part that is there


class Placed(NamedTuple):
    """The handles of the tiles that are in memory, where they stand in the whole."""

    handles: np.ndarray
    turned: bool = False


@dataclass(frozen=True)
class Side:
    """The queries of a call, or its keys."""

    names: tuple[str, ...]  # what tasks read of them
    gradients: tuple[str, ...]  # that are wanted
    heads: int  # for one key/value head
    tile: int
    length: int

    @property
    def tiles(self) -> int:
        return -(-self.length // self.tile)


class _Passes(NamedTuple):
    """Groups of tiles of one side, by which the other passes."""

    flow: BackwardFlow
    stays: Side
    passes: Side
    needs: Needs


class StreamedBackward:
    """A backward call on arrays that are read tile by tile."""

    def __init__(
        self,
        spec: AttentionSpec,
        tiles: tuple[int, int],
        limit: int,
        results: int,
        offsets: np.ndarray | None,
        scoring: Scoring | None,
        wanted: frozenset[str | int],
        arrays: ArrayShapes,
    ) -> None:
        """results: bytes of gradients in memory. Raises: SpecError for a limit below the smallest working set."""
        self.spec, self.limit = spec, limit
        self.storage = DTYPES[spec.dtype]
        self.accumulator = DTYPES[self.storage.accumulator]
        self.runtime = runtime.ensure()
        self.workers = max(1, self.runtime.workers("cpu"))
        offsets = offsets if spec.offset is None else None
        made = partial(BackwardFlow, self.runtime, spec, *tiles, offsets=offsets, scoring=scoring, part=NOTHING)
        with self.runtime.working():
            # Arrays have one accumulator, to which one flow adds: that of the rows.
            self.of_rows = made(wanted=wanted & {"q", "sinks"}, arrays=arrays)
            self.of_keys = made(wanted=wanted & {"k", "v"})
        self.queries = Side(("q", "do", "lse", "delta"), self.of_rows.gradients, spec.group, tiles[0], spec.q_len)
        self.keys = Side(("k", "v"), self.of_keys.gradients, 1, tiles[1], spec.kv_len)
        rows = spec.batch * spec.heads * spec.q_len * self.accumulator.itemsize
        scratch = max(x.program.scratch_bytes for x in (self.of_rows, self.of_keys))
        sums = 0 if self.of_rows.arrays is None else sum(x.nbytes for x in self.of_rows.arrays.sums.memory)
        self.fixed = results + rows + self.workers * scratch + 2 * sums  # rows: delta of each
        self.passes = [
            _Passes(self.of_rows, self.queries, self.keys, self._needs(self.queries, self.keys, ("query", "key"))),
            _Passes(self.of_keys, self.keys, self.queries, self._needs(self.keys, self.queries, ("key", "query"))),
        ]
        max((x.needs for x in self.passes), key=lambda x: x.least).check(limit)

    def _needs(self, stays: Side, passes: Side, names: tuple[str, str]) -> Needs:
        one = sum(self._row_bytes(x) for x in passes.names) * passes.tile
        row = sum(self._row_bytes(x) for x in stays.names)
        for name in stays.gradients:
            row += self._row_bytes(name)
            if self.accumulator is not self.storage:  # sums of its own
                row += self._columns(name) * self.accumulator.itemsize
        described = 2 * TASK.itemsize * self.spec.group * passes.tiles  # the tasks of a tile, and their copies
        return Needs(self.fixed, stays.heads * stays.tile * row + described, one, names)

    def _columns(self, name: str) -> int:
        return self.spec.value_size if name in ("v", "o", "do", "dv") else self.spec.head_size

    def _row_bytes(self, name: str) -> int:
        return self.accumulator.itemsize if name in LOGS else self._columns(name) * self.storage.itemsize

    def empty(self, name: str, *sizes: int) -> np.ndarray:
        """Memory for rows of an operand."""
        if name in LOGS:
            return np.empty(sizes, self.accumulator.numpy)
        return np.empty((*sizes, self._columns(name)), self.storage.numpy)

    def tiled(self, name: str, x: np.ndarray, rows: int) -> TiledTensor:
        """An operand, or a gradient, as tiles."""
        return tiled(x, self.accumulator if name in LOGS else self.storage, rows)

    def run(
        self, given: Mapping[str, Read], targets: Mapping[str, Target], dsinks: np.ndarray | None
    ) -> dict[int, np.ndarray]:
        """Compute the gradients of targets (dq, dk, dv), and add those of sinks to dsinks (B, H); returns those of
        captured arrays. given: the readers of do, q, k, v, o, lse, possibly dlse.

        Raises: KernelError naming codelet and tile; what the readers raise.
        """
        spec = self.spec
        delta = np.empty((spec.batch, spec.heads, spec.q_len), self.accumulator.numpy)

        def read_delta(batch: int, head: int, first: int, into: np.ndarray) -> None:
            into[...] = delta[batch, head, first : first + len(into)]

        with self.runtime.working():
            self._deltas(given, delta, dsinks)
            given = {**given, "delta": read_delta}
            for passes in self.passes:
                if passes.flow.pairwise:
                    self._run(passes, given, targets)
        return self.of_rows.totals()

    def _run(self, passes: _Passes, given: Mapping[str, Read], targets: Mapping[str, Target]) -> None:
        flow, stays, passing, needs = passes
        room = needs.room(self.limit, stays.tiles, self.workers) if stays.tiles else Room(1, 0)
        count = min(room.buffers, passing.tiles * passing.heads)
        buffers = [{name: self.empty(name, passing.tile) for name in passing.names} for _ in range(count)]
        for first in range(0, stays.tiles, room.group):
            tiles = range(first, min(first + room.group, stays.tiles))
            for batch, head in np.ndindex(self.spec.batch, self.spec.kv_heads):
                _Pass(self, flow, stays, passing, batch, head, tiles).run(given, targets, buffers)

    def _deltas(self, given: Mapping[str, Read], delta: np.ndarray, dsinks: np.ndarray | None) -> None:
        """delta of every row, a few tiles at a time, and what sinks get."""
        spec, tile = self.spec, self.queries.tile
        names = [name for name in ("do", "o", "lse", "dlse") if name in given]
        one = sum(self._row_bytes(name) for name in names) * tile
        rows = tile * min(2 * self.workers, max(1, (self.limit - self.fixed) // one))
        for batch, head in np.ndindex(spec.batch, spec.heads):
            for first in range(0, spec.q_len, rows):
                height = min(rows, spec.q_len - first)
                job, tensors = Job(), {}
                try:
                    for name in names:
                        x = self.empty(name, 1, 1, height)
                        self.fill(given[name], batch, head, first, x[0, 0], tile)
                        tensors[name] = self.tiled(name, x, tile)
                    part = delta[batch : batch + 1, head : head + 1, first : first + height]
                    tensors["delta"] = self.tiled("delta", part, tile)
                    if dsinks is not None:
                        sink = dsinks[batch : batch + 1, head : head + 1, None]
                        tensors["dsinks"] = tiled(sink, self.accumulator, 1)
                    self.of_rows.submit_deltas(job, tensors, (batch, head, first // tile))
                    job.wait()
                finally:
                    job.drain()
                    for tensor in tensors.values():
                        tensor.unregister()

    def fill(self, read: Read, batch: int, head: int, first: int, into: np.ndarray, tile: int) -> None:
        """Read rows tile by tile, so that no more of a file is in memory."""
        for row in range(0, len(into), tile):
            read(batch, head, first + row, into[row : row + tile])


class _Pass:
    """What the tiles of one key/value head that stay get from all that pass."""

    def __init__(
        self,
        call: StreamedBackward,
        flow: BackwardFlow,
        stays: Side,
        passes: Side,
        batch: int,
        kv_head: int,
        tiles: range,
    ) -> None:
        self.call, self.stays, self.passes, self.batch, self.kv_head = call, stays, passes, batch, kv_head
        self.of_rows = stays is call.queries
        group = call.spec.group
        heads, others = range(kv_head * group, (kv_head + 1) * group), range(passes.tiles)
        both = (tiles, others) if self.of_rows else (others, tiles)
        self.flow = flow.of((range(batch, batch + 1), heads, *both))
        self.heads = heads if self.of_rows else range(kv_head, kv_head + 1)
        self.tiles, self.first = tiles, tiles.start * stays.tile
        self.height = min(tiles.stop * stays.tile, stays.length) - self.first

    def run(
        self, given: Mapping[str, Read], targets: Mapping[str, Target], buffers: list[dict[str, np.ndarray]]
    ) -> None:
        """See StreamedBackward.run."""
        job = Job()
        tensors: list[TiledTensor] = []
        held: list[dict[str, TiledTensor]] = [{} for _ in buffers]
        gradients: dict[str, np.ndarray] = {}
        try:
            placed = {name: self._kept(name, given[name], tensors) for name in self.stays.names}
            placed |= {name: self._placed(name) for name in self.passes.names}
            adds = []
            for name in self.stays.gradients:
                gradients[name] = self._begun(name, targets[name])
                tensors.append(self.call.tiled(name, gradients[name], self.stays.tile))
                adds.append((self.flow.sums_of(job, tensors[-1]), tensors[-1]))
                tensors.extend(sums for sums, gradient in adds[-1:] if sums is not gradient)
                placed[name] = self._placed(name, adds[-1][0])
            turns = self.flow.turns(job)
            tensors.extend([] if turns is None else [turns])
            for n, (head, tile, chosen) in enumerate(self._visits()):
                self._load(held[n % len(held)], buffers[n % len(held)], given, placed, head, tile)
                self.flow.submit_backward(job, placed, turns, chosen)
            for sums, gradient in adds:
                if sums is not gradient:
                    self.flow.submit_add(job, sums, gradient)
            job.wait()
        finally:
            job.drain()
            for tensor in (*tensors, *(x for own in held for x in own.values())):
                tensor.unregister()
        for name, x in gradients.items():
            self._write(targets[name], x)

    def _visits(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Each tile that passes, with its head and its pairs, in the order of the chains of what stays. A chain comes
        to the last tile after the first, so a tile that is behind some and ahead of others passes twice."""
        p, call = self.flow.pairs, self.call
        own = np.minimum(p.query_tile * call.queries.tile // call.keys.tile, call.keys.tiles - 1)
        behind = p.key_tile > own
        head, tile = (np.full_like(p.head, self.kv_head), p.key_tile) if self.of_rows else (p.head, p.query_tile)
        order = np.lexsort((np.arange(len(tile)), -tile if self.of_rows else tile, behind, head))
        if not len(order):
            return
        new = np.any([np.diff(x[order].astype(np.int64)) != 0 for x in (head, behind, tile)], axis=0)
        for chosen in np.split(order, np.flatnonzero(new) + 1):
            yield int(head[chosen[0]]), int(tile[chosen[0]]), chosen

    def _load(
        self,
        own: dict[str, TiledTensor],
        buffer: dict[str, np.ndarray],
        given: Mapping[str, Read],
        placed: dict[str, Placed],
        head: int,
        tile: int,
    ) -> None:
        """A tile in the place of an older one."""
        while own:
            own.popitem()[1].unregister()  # waits for the tasks that read it
        first = tile * self.passes.tile
        height = min(self.passes.tile, self.passes.length - first)
        for name, memory in buffer.items():
            filled = memory[:height]
            given[name](self.batch, head, first, filled)
            own[name] = self.call.tiled(name, filled[None, None], self.passes.tile)
            placed[name].handles[self.batch, head, tile] = own[name].handles[0, 0, 0]

    def _kept(self, name: str, read: Read, tensors: list[TiledTensor]) -> Placed:
        """What stays of an operand, (1, heads, rows, ...)."""
        x = self.call.empty(name, 1, len(self.heads), self.height)
        for n, head in enumerate(self.heads):
            self.call.fill(read, self.batch, head, self.first, x[0, n], self.stays.tile)
        tensors.append(self.call.tiled(name, x, self.stays.tile))
        return self._placed(name, tensors[-1])

    def _placed(self, name: str, tensor: TiledTensor | None = None) -> Placed:
        """Room for the handles of an operand, with those of the tiles that stay."""
        spec = self.call.spec
        heads, tiles = (
            (spec.kv_heads, self.call.keys.tiles) if name in OF_KEYS else (spec.heads, self.call.queries.tiles)
        )
        handles = np.zeros((spec.batch, heads, tiles), np.uint64)
        if tensor is not None:
            handles[self.batch, self.heads.start : self.heads.stop, self.tiles.start : self.tiles.stop] = tensor.handles
        return Placed(handles)

    def _begun(self, name: str, target: Target) -> np.ndarray:
        """What a gradient is added to."""
        x = self.call.empty(name, 1, len(self.heads), self.height)
        if target.fresh:
            x[...] = 0
            return x
        for part, of_target in self._parts(x, target):
            part[...] = of_target
            target.written(of_target)  # what was read need not stay, either
        return x

    def _write(self, target: Target, x: np.ndarray) -> None:
        for part, of_target in self._parts(x, target):
            of_target[...] = part
            target.written(of_target)

    def _parts(self, x: np.ndarray, target: Target) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What stays, tile by tile, with its place in the target."""
        for n, head in enumerate(self.heads):
            for row in range(0, self.height, self.stays.tile):
                part = x[0, n, row : row + self.stays.tile]
                yield part, target.array[self.batch, head, self.first + row : self.first + row + len(part)]
