"""Gradients of a call whose arrays are larger than memory: tiles pass by tiles that stay.

Where the queries of a head fit in memory, with their dQ, its keys pass by once, and leave with their dK and dV: five
products a pair of tiles. Else there are two passes. The first keeps groups of query tiles, with their dQ, while the
keys that they see pass; the second keeps groups of key tiles, with their dK and dV, while the queries that see them
pass: scores and dP are computed in both, seven products. Every gradient is so written once, and no sum ever leaves
memory before it is whole. Tasks that share a gradient come in the order of one flow (backward.py), and so do its bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from flashtile.dtypes import DTYPES, DType
from flashtile.engines.starpu import runtime
from flashtile.engines.starpu.backward import NOTHING, OF_KEYS, BackwardFlow
from flashtile.engines.starpu.jobs import TASK, Job
from flashtile.engines.starpu.outofcore import Needs, Passing, Read, Room, Write, by_tiles, tiled
from flashtile.engines.starpu.tiles import TiledTensor
from flashtile.kernels import ArrayShapes
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

LOGS = ("lse", "dlse", "delta")  # a number a row
SUMS = " sums"  # after the name of a gradient


class Target(NamedTuple):
    """Where a gradient goes; read: what it is added to, None for zeros."""

    write: Write
    read: Read | None = None


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
        queries, keys = (replace(x, gradients=()) for x in (self.queries, self.keys))
        self.passes = [
            _Passes(self.of_rows, self.queries, keys, self._needs(self.queries, keys, ("query", "key"))),
            _Passes(self.of_keys, self.keys, queries, self._needs(self.keys, queries, ("key", "query"))),
        ]
        max((x.needs for x in self.passes), key=lambda x: x.least).check(limit)
        if self.queries.gradients and self.keys.gradients and not arrays and self._once():
            needs = self._needs(self.queries, self.keys, ("query", "key"))
            every = self.queries.tiles
            if limit >= needs.least and needs.room(limit, every, self.workers).group == every:
                with self.runtime.working():
                    flow = made(wanted=wanted & {"q", "k", "v"})
                self.passes = [_Passes(flow, self.queries, self.keys, needs)]

    def _once(self) -> bool:
        """Whether every key tile passes all queries at once: see _Pass._visits."""
        touched = self.of_rows.coverage.touched()
        behind = np.arange(touched.shape[3]) > _own(self, np.arange(touched.shape[2]))[:, None]
        return not ((touched & behind).any(axis=2) & (touched & ~behind).any(axis=2)).any()

    def _needs(self, stays: Side, passes: Side, names: tuple[str, str]) -> Needs:
        one, row = (sum(self._row_bytes(x) for x in (*side.names, *self.with_sums(side))) for side in (passes, stays))
        one *= passes.tile
        described = 2 * TASK.itemsize * self.spec.group * passes.tiles  # the tasks of a tile, and their copies
        return Needs(self.fixed, stays.heads * stays.tile * row + described, one, names)

    def with_sums(self, side: Side) -> tuple[str, ...]:
        """Its gradients, and the sums of those that cannot hold them."""
        narrow = self.accumulator is not self.storage
        return side.gradients + tuple(x + SUMS for x in side.gradients if narrow)

    def _columns(self, name: str) -> int:
        return self.spec.value_size if name.removesuffix(SUMS) in ("v", "o", "do", "dv") else self.spec.head_size

    def _row_bytes(self, name: str) -> int:
        return self.kind(name).itemsize * (1 if name in LOGS else self._columns(name))

    def empty(self, name: str, *sizes: int) -> np.ndarray:
        """Memory for rows of an operand."""
        columns = () if name in LOGS else (self._columns(name),)
        return np.empty((*sizes, *columns), self.kind(name).numpy)

    def tiled(self, name: str, x: np.ndarray, rows: int) -> TiledTensor:
        """An operand, or a gradient, as tiles."""
        return tiled(x, self.kind(name), rows)

    def kind(self, name: str) -> DType:
        """An operand's dtype."""
        return self.accumulator if name in LOGS or name.endswith(SUMS) else self.storage

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
        names = *passing.names, *self.with_sums(passing)
        buffers = [{name: self.empty(name, passing.tile) for name in names} for _ in range(count)]
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
                        by_tiles(given[name], batch, head, first, x[0, 0], tile)
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
        passing = Passing(buffers, {name: self.call.kind(name) for x in buffers for name in x})
        gradients: dict[str, np.ndarray] = {}
        try:
            placed = {name: self._kept(name, given[name], tensors) for name in self.stays.names}
            placed |= {name: self._placed(name) for name in (*self.passes.names, *self.passes.gradients)}
            given = {**given, **self._begun_by(targets)}
            adds = []
            for name in self.stays.gradients:
                gradients[name] = self._begun(name, targets[name])
                tensors.append(self.call.tiled(name, gradients[name], self.stays.tile))
                adds.append((self.flow.sums_of(job, tensors[-1]), tensors[-1]))
                tensors.extend(sums for sums, gradient in adds[-1:] if sums is not gradient)
                placed[name] = self._placed(name, adds[-1][0])
            turns = self.flow.turns(job)
            tensors.extend([] if turns is None else [turns])
            unseen = set(range(self.passes.tiles)) if self.passes.gradients else set()
            for head, tile, chosen in self._visits():
                self._visit(job, passing, given, targets, placed, turns, head, tile, chosen)
                unseen.discard(tile)
            for sums, gradient in adds:
                if sums is not gradient:
                    self.flow.submit_add(job, sums, gradient)
            job.wait()
            passing.finish()
        finally:
            job.drain()
            passing.release()
            for tensor in tensors:
                tensor.unregister()
        for name, x in gradients.items():
            self._move(targets[name].write, x)
        self._nothing(targets, sorted(unseen))

    def _begun_by(self, targets: Mapping[str, Target]) -> dict[str, Read]:
        """What gradients of tiles that pass begin with."""
        found: dict[str, Read] = {}
        for name in self.call.with_sums(self.passes):
            older = None if name.endswith(SUMS) else targets[name].read
            found[name] = older or (lambda batch, head, first, into: into.fill(0))
        return found

    def _visit(
        self,
        job: Job,
        passing: Passing,
        given: Mapping[str, Read],
        targets: Mapping[str, Target],
        placed: Mapping[str, Placed],
        turns: TiledTensor | None,
        head: int,
        tile: int,
        chosen: np.ndarray,
    ) -> None:
        """A tile passes: its pairs, and what it takes along."""
        side, first = self.passes, tile * self.passes.tile

        def leave(rows: Mapping[str, np.ndarray]) -> None:
            for name in side.gradients:
                targets[name].write(self.batch, head, first, rows[name])

        height = min(side.tile, side.length - first)
        own = passing.next(given, self.batch, head, first, height, leave if side.gradients else None)
        for name in (*side.names, *side.gradients):
            placed[name].handles[self.batch, head, tile] = own.get(name + SUMS, own[name]).handles[0, 0, 0]
        self.flow.submit_backward(job, placed, turns, chosen)
        for name in side.gradients:
            if (sums := own.get(name + SUMS)) is not None:
                self.flow.submit_add(job, sums, own[name])

    def _nothing(self, targets: Mapping[str, Target], tiles: Sequence[int]) -> None:
        """Of tiles that nothing that stays sees."""
        for name in self.passes.gradients:
            for tile in tiles if targets[name].read is None else ():
                first = tile * self.passes.tile
                zeros = self.call.empty(name, min(self.passes.tile, self.passes.length - first))
                zeros[...] = 0
                targets[name].write(self.batch, self.kv_head, first, zeros)

    def _visits(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Each tile that passes, with its head and its pairs, in the order of the chains of what stays. A chain comes
        to the last tile after the first, so a tile that is behind some and ahead of others passes twice."""
        p, call = self.flow.pairs, self.call
        behind = p.key_tile > _own(call, p.query_tile)
        head, tile = (np.full_like(p.head, self.kv_head), p.key_tile) if self.of_rows else (p.head, p.query_tile)
        order = np.lexsort((np.arange(len(tile)), -tile if self.of_rows else tile, behind, head))
        if not len(order):
            return
        new = np.any([np.diff(x[order].astype(np.int64)) != 0 for x in (head, behind, tile)], axis=0)
        for chosen in np.split(order, np.flatnonzero(new) + 1):
            yield int(head[chosen[0]]), int(tile[chosen[0]]), chosen

    def _kept(self, name: str, read: Read, tensors: list[TiledTensor]) -> Placed:
        """What stays of an operand, (1, heads, rows, ...)."""
        x = self.call.empty(name, 1, len(self.heads), self.height)
        self._move(read, x)
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
        if target.read is None:
            x[...] = 0
        else:
            self._move(target.read, x)
        return x

    def _move(self, move: Read | Write, x: np.ndarray) -> None:
        """Read what stays of an operand, or write it, (1, heads, rows, ...)."""
        for n, head in enumerate(self.heads):
            by_tiles(move, self.batch, head, self.first, x[0, n], self.stays.tile)


def _own(call: StreamedBackward, query_tile: np.ndarray) -> np.ndarray:
    """The key tile with which the chain of a query tile begins: see backward.py."""
    return np.asarray(np.minimum(query_tile * call.queries.tile // call.keys.tile, call.keys.tiles - 1))
