"""Gradients of a call whose arrays are larger than memory: tiles pass by tiles that stay.

Groups of query tiles stay, with their dQ, while the keys that they see pass with their dK and dV; or groups of key
tiles stay while queries pass: whatever moves fewer bytes (outofcore_plan.py). A pair of tiles is computed once, five
products as in memory; sums that pass leave memory after each group (outofcore_sums.py), as results after the last.
Tasks that share a gradient come in the order of one flow (backward.py), and so do its bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashtile.dtypes import DTYPES, DType
from flashtile.engines.starpu import runtime
from flashtile.engines.starpu.backward import NOTHING, OF_KEYS, BackwardFlow
from flashtile.engines.starpu.jobs import TASK, Job
from flashtile.engines.starpu.outofcore import Needs, Passing, Read, Write, by_tiles, tiled
from flashtile.engines.starpu.outofcore_plan import Order, Side, Stage, Visits, chosen
from flashtile.engines.starpu.outofcore_sums import Sums, Target
from flashtile.engines.starpu.tiles import TiledTensor
from flashtile.kernels import ArrayShapes
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

LOGS = ("lse", "dlse", "delta")  # a number a row
SUMS = " sums"  # after the name of a gradient


class Placed(NamedTuple):
    """The handles of the tiles that are in memory, where they stand in the whole."""

    handles: np.ndarray
    turned: bool = False


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
        folder: Path | None = None,
    ) -> None:
        """results: bytes of gradients in memory; folder: of sums that leave it, None: of temporary files. Raises:
        SpecError for a limit below the smallest working set."""
        self.spec, self.limit, self.folder = spec, limit, folder
        self.storage = DTYPES[spec.dtype]
        self.accumulator = DTYPES[self.storage.accumulator]
        self.narrow = self.accumulator is not self.storage
        self.runtime = runtime.ensure()
        self.workers = max(1, self.runtime.workers("cpu"))
        offsets = offsets if spec.offset is None else None
        made = partial(BackwardFlow, self.runtime, spec, *tiles, offsets=offsets, scoring=scoring, part=NOTHING)
        with self.runtime.working():
            self.flow = made(wanted=wanted & {"q", "k", "v", "sinks"}, arrays=arrays)
        gradients = self.flow.gradients
        of_keys = tuple(x for x in gradients if x in OF_KEYS)
        given = "q", "do", "lse", "delta"
        self.queries = self._side(given, set(gradients) - set(of_keys), spec.group, tiles[0], spec.q_len)
        self.keys = self._side(("k", "v"), of_keys, 1, tiles[1], spec.kv_len)
        rows = spec.batch * spec.heads * spec.q_len * self.accumulator.itemsize
        sums = 0 if self.flow.arrays is None else sum(x.nbytes for x in self.flow.arrays.sums.memory)
        # rows: delta of each
        self.fixed = results + rows + self.workers * self.flow.program.scratch_bytes + 2 * sums
        self.own = np.minimum(np.arange(self.queries.tiles) * tiles[0] // tiles[1], self.keys.tiles - 1)
        self.touched = self.flow.coverage.touched()
        orders = [self._order(self.queries, self.keys, ("query", "key"))]
        if not arrays:  # of which one accumulator gets what tiles add in the order of the rows
            orders.append(self._order(self.keys, self.queries, ("key", "query")))
        every = self.touched.any(0)
        every = np.broadcast_to(every.any(0), (spec.group, *every.shape[1:]))
        self.order = chosen(orders, every, limit, self.workers)

    def _side(self, names: tuple[str, ...], gradients: Collection[str], heads: int, tile: int, length: int) -> Side:
        read, written = (sum(self._row_bytes(x) for x in found) for found in (names, gradients))
        sums = sum(self._row_bytes(x + SUMS) for x in gradients)
        return Side(names, tuple(gradients), heads, tile, length, read, sums, written)

    def _order(self, stays: Side, passes: Side, names: tuple[str, str]) -> Order:
        of_rows = stays is self.queries
        described = 2 * TASK.itemsize * passes.heads * passes.tiles  # the tasks of a tile, and their copies
        needs = Needs(self.fixed, stays.memory + described, passes.memory, names)
        return Order(stays, passes, needs, of_rows, self.own, self.flow.arrays is not None)

    def of_head(self, batch: int, kv_head: int) -> np.ndarray:
        """Which tiles (heads, query tiles, key tiles) of a key/value head meet."""
        spec = self.spec
        heads = slice(kv_head * spec.group, (kv_head + 1) * spec.group)
        whole = np.broadcast_to(self.touched, (spec.batch, spec.heads, *self.touched.shape[2:]))
        return np.asarray(whole[batch, heads])

    def moved(self) -> tuple[int, int]:
        """Bytes of tiles that are read and written, and as few as any order could: those of the step that computes
        delta, which reads do and o once, are not counted."""
        found = least = 0
        for batch, head in np.ndindex(self.spec.batch, self.spec.kv_heads):
            touched = self.of_head(batch, head)
            found += self.order.moved(touched, self.limit, self.workers)
            least += self.order.least(touched)
        return found, least

    def with_sums(self, side: Side) -> tuple[str, ...]:
        """Its gradients, and the sums of those that cannot hold them."""
        return side.gradients + tuple(x + SUMS for x in side.gradients if self.narrow)

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
            if self.flow.pairwise:
                self._run({**given, "delta": read_delta}, targets)
        return self.flow.totals()

    def _run(self, given: Mapping[str, Read], targets: Mapping[str, Target]) -> None:
        order, spec = self.order, self.spec
        passes = order.passes
        count = min(order.needs.room(self.limit, 1, self.workers).buffers, passes.tiles * passes.heads)
        names = *passes.names, *self.with_sums(passes)
        buffers = [{name: self.empty(name, passes.tile) for name in names} for _ in range(count)]
        shapes = {
            x: (side.heads, side.length, self._columns(x)) for side in (order.stays, passes) for x in side.gradients
        }
        # A result in 16 bits has no room for sums.
        places = {x: target._replace(back=None) if self.narrow else target for x, target in targets.items()}
        with Sums(places, shapes, self.accumulator, self.folder) as sums:
            for batch, head in np.ndindex(spec.batch, spec.kv_heads):
                touched = self.of_head(batch, head)
                stages, _ = order.stages(touched, self.limit, self.workers)
                stages, visits = order.visits(stages, touched)
                one = _Head(self, batch, head, sums, visits)
                for stage in stages:
                    _Pass(one, stage).run(given, targets, buffers)
                one.rest(targets)

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
                    self.flow.submit_deltas(job, tensors, (batch, head, first // tile))
                    job.wait()
                finally:
                    job.drain()
                    for tensor in tensors.values():
                        tensor.unregister()


class _Head:
    """A key/value head: which of its tiles have come, and what became of their gradients."""

    def __init__(self, call: StreamedBackward, batch: int, kv_head: int, sums: Sums, visits: Visits) -> None:
        self.call, self.batch, self.kv_head, self.sums, self.visits = call, batch, kv_head, sums, visits
        self.seen = Visits(*(np.zeros_like(x) for x in visits))

    def first_head(self, side: Side) -> int:
        """The number of a side's first head, of all."""
        return self.kv_head * side.heads

    def comes(self, side: Side, head: int, tile: int) -> tuple[bool, bool]:
        """A tile of one of the side's heads: (for the first time, for the last)."""
        at = 0 if side is self.call.order.stays else 1
        self.seen[at][head, tile] += 1
        return self.seen[at][head, tile] == 1, self.seen[at][head, tile] == self.visits[at][head, tile]

    def reading(self, name: str, target: Target, first: bool) -> Mapping[str, Read]:
        """How a gradient begins, and its sums, where these are apart."""
        older = target.read if first else None
        begun: Read = partial(self.sums.read, name) if not first else _zeros
        if not self.call.narrow:
            return {name: older or begun}
        return {name: target.read or _zeros, name + SUMS: begun}

    def writing(self, name: str, target: Target, last: bool) -> tuple[str, Write]:
        """What leaves of a gradient, and how."""
        if last:
            return name, target.write
        return name + SUMS if self.call.narrow else name, partial(self.sums.write, name)

    def rest(self, targets: Mapping[str, Target]) -> None:
        """Zeros of tiles that none meets."""
        for side, visits in zip((self.call.order.stays, self.call.order.passes), self.visits, strict=True):
            for name in side.gradients:
                for head, tile in np.argwhere(visits == 0).tolist() if targets[name].read is None else ():
                    first = tile * side.tile
                    zeros = self.call.empty(name, min(side.tile, side.length - first))
                    zeros[...] = 0
                    targets[name].write(self.batch, self.first_head(side) + head, first, zeros)


def _zeros(batch: int, head: int, first: int, into: np.ndarray) -> None:
    into[...] = 0


class _Pass:
    """What the tiles of a stage get from all that pass."""

    def __init__(self, head: _Head, stage: Stage) -> None:
        self.one, self.call, self.batch, self.stage = head, head.call, head.batch, stage
        order = self.call.order
        self.stays, self.passes, self.of_rows, self.tiles = order.stays, order.passes, order.of_rows, stage.tiles
        first = head.first_head(self.call.queries)
        heads, others = range(first + stage.heads.start, first + stage.heads.stop), range(self.passes.tiles)
        both = (stage.tiles, others) if self.of_rows else (others, stage.tiles)
        self.flow = self.call.flow.of((range(self.batch, self.batch + 1), heads, *both))
        self.heads = heads if self.of_rows else range(head.kv_head, head.kv_head + 1)
        self.first = stage.tiles.start * self.stays.tile
        self.height = min(stage.tiles.stop * self.stays.tile, self.stays.length) - self.first

    def run(
        self, given: Mapping[str, Read], targets: Mapping[str, Target], buffers: list[dict[str, np.ndarray]]
    ) -> None:
        """See StreamedBackward.run."""
        job = Job()
        tensors: list[TiledTensor] = []
        passing = Passing(buffers, {name: self.call.kind(name) for x in buffers for name in x})
        try:
            placed = {name: self._kept(name, given[name], tensors)[1] for name in self.stays.names}
            placed |= {name: self._placed(name) for name in (*self.passes.names, *self.passes.gradients)}
            leaving, adds = self._begin(targets, placed, tensors)
            turns = self.flow.turns(job)
            tensors.extend([] if turns is None else [turns])
            for head, tile, pairs in self._visits():
                self._visit(job, passing, given, targets, placed, turns, head, tile, pairs)
            for sums, gradient in adds:
                self.flow.submit_add(job, sums, gradient)
            job.wait()
            passing.finish()
        finally:
            job.drain()
            passing.release()
            for tensor in tensors:
                tensor.unregister()
        for write, x in leaving:
            self._move(write, x)

    def _begin(
        self, targets: Mapping[str, Target], placed: dict[str, Placed], tensors: list[TiledTensor]
    ) -> tuple[list[tuple[Write, np.ndarray]], list[tuple[TiledTensor, TiledTensor]]]:
        """The gradients of what stays: (how they leave, and what; sums to be added to gradients before)."""
        leaving, adds = [], []
        base = self.heads.start - self.one.first_head(self.stays)
        tiles = [(base + head, tile) for head in range(len(self.heads)) for tile in self.tiles]
        first, last = [self.one.comes(self.stays, *at) for at in tiles][0]
        for name in self.stays.gradients:
            kept: dict[str, tuple[np.ndarray, TiledTensor]] = {}
            for x, read in self.one.reading(name, targets[name], first).items():
                if x != name or last or not self.call.narrow:
                    rows, placed[name] = self._kept(x, read, tensors)
                    kept[x] = rows, tensors[-1]
            held, write = self.one.writing(name, targets[name], last)
            leaving.append((write, kept[held][0]))
            if last and self.call.narrow:
                adds.append((kept[name + SUMS][1], kept[name][1]))
        return leaving, adds

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
        pairs: np.ndarray,
    ) -> None:
        """A tile passes: its pairs, and what it takes along."""
        side, one, start = self.passes, self.one, tile * self.passes.tile
        first, last = one.comes(side, head - one.first_head(side), tile)
        reads = {x: read for name in side.gradients for x, read in one.reading(name, targets[name], first).items()}

        def leave(rows: Mapping[str, np.ndarray]) -> None:
            for name in side.gradients:
                held, write = one.writing(name, targets[name], last)
                write(self.batch, head, start, rows[held])

        height = min(side.tile, side.length - start)
        then = leave if side.gradients else None
        own = passing.next({**given, **reads}, self.batch, head, start, height, then)
        for name in (*side.names, *side.gradients):
            placed[name].handles[self.batch, head, tile] = own.get(name + SUMS, own[name]).handles[0, 0, 0]
        self.flow.submit_backward(job, placed, turns, pairs)
        for name in side.gradients if last else ():
            if (sums := own.get(name + SUMS)) is not None:
                self.flow.submit_add(job, sums, own[name])

    def _visits(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Each tile that passes, with its head and its pairs: those that are not behind, then those that are."""
        p, call, kind = self.flow.pairs, self.call, self.stage.behind
        behind = p.key_tile > call.own[p.query_tile]
        head, tile = (np.full_like(p.head, self.one.kv_head), p.key_tile) if self.of_rows else (p.head, p.query_tile)
        order = np.lexsort((np.arange(len(tile)), -tile if self.of_rows else tile, behind, head))
        if kind is not None:
            order = order[behind[order] == kind]
        if not len(order):
            return
        new = np.any([np.diff(x[order].astype(np.int64)) != 0 for x in (head, behind, tile)], axis=0)
        for pairs in np.split(order, np.flatnonzero(new) + 1):
            yield int(head[pairs[0]]), int(tile[pairs[0]]), pairs

    def _kept(self, name: str, read: Read, tensors: list[TiledTensor]) -> tuple[np.ndarray, Placed]:
        """What stays of an operand, (1, heads, rows, ...), and its handles."""
        x = self.call.empty(name, 1, len(self.heads), self.height)
        self._move(read, x)
        tensors.append(self.call.tiled(name, x, self.stays.tile))
        return x, self._placed(name.removesuffix(SUMS), tensors[-1])

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

    def _move(self, move: Read | Write, x: np.ndarray) -> None:
        """Read what stays of an operand, or write it, (1, heads, rows, ...)."""
        for n, head in enumerate(self.heads):
            by_tiles(move, self.batch, head, self.first, x[0, n], self.stays.tile)
