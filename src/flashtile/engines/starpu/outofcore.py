"""A call whose arrays are larger than memory: keys and values pass through a few buffers, tile by tile.

Query tiles are taken in groups as large as the limit allows, and for a group the keys of a head pass once: down from
the group's own to the first, then from the last down, which is the order of every chain in it (flow.py). So bits are
those of the call in memory. A buffer is filled while workers compute on the others, and filled again when the tasks on
it are done: an eviction of our own, by which nothing that is only read is ever written anywhere.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from flashtile.arrayfiles import mapped
from flashtile.arrays import address_of
from flashtile.dtypes import DTYPES, DType
from flashtile.engines.starpu import runtime
from flashtile.engines.starpu.flow import Flow
from flashtile.engines.starpu.jobs import TASK, Job
from flashtile.engines.starpu.session import codelet
from flashtile.engines.starpu.states import submit_finish
from flashtile.engines.starpu.tiles import TiledTensor
from flashtile.errors import wrong
from flashtile.kernels import tile_kernels
from flashtile.progress import Report
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

SPARE_BUFFERS = 2  # beside one a worker: one is filled, one is ready
LEAST_BUFFERS = 2
AROUND = 2 << 20  # bytes: the system maps neighbours of a page that is read, up to so far

Read = Callable[[int, int, int, np.ndarray], None]  # (batch, head, first row, where to): fills (rows, columns)
Write = Callable[[int, int, int, np.ndarray], None]  # (batch, head, first row, rows): stores them, bits as they are


@dataclass(frozen=True)
class Room:
    """How a limit is shared out."""

    group: int  # tiles that stay in memory together, of queries as a rule, of one key/value head
    buffers: int  # tiles that pass by them


@dataclass(frozen=True)
class Needs:
    """Bytes that a call takes beside its inputs: whatever is cut how, a tile that stays, a tile that passes."""

    fixed: int
    stays: int
    passes: int
    names: tuple[str, str] = ("query", "key")  # of what stays, of what passes

    @property
    def least(self) -> int:
        """Of the smallest working set."""
        return self.fixed + self.stays + LEAST_BUFFERS * self.passes

    def check(self, limit: int) -> None:
        """Raise SpecError for a limit below the smallest working set."""
        if limit < self.least:
            stays, passes = self.names
            text = f"at least {self.least} bytes: {self.fixed} for results and workers, {self.stays} for a {stays} "
            text += f"tile, {self.passes} for each of {LEAST_BUFFERS} {passes} tiles"
            raise wrong("memory_limit", f"{limit} bytes", text)

    def room(self, limit: int, tiles: int, workers: int) -> Room:
        """The share of a limit, of so many tiles that are to stay. Raises: SpecError as `check`."""
        self.check(limit)
        left = limit - self.fixed - self.stays
        buffers = min(workers + SPARE_BUFFERS, max(LEAST_BUFFERS, left // 2 // self.passes))
        more = (left - buffers * self.passes) // self.stays
        return Room(min(tiles, 1 + max(0, more)), buffers)


def needs_of(spec: AttentionSpec, tile_q: int, tile_k: int, fixed: int) -> Needs:
    """What a call takes; fixed: bytes of whatever is in memory all the time."""
    dtype = DTYPES[spec.dtype]
    wide = DTYPES[dtype.accumulator].itemsize
    key_tiles = max(1, -(-spec.kv_len // tile_k))
    row = spec.head_size * dtype.itemsize + spec.value_size * wide + wide
    if wide != dtype.itemsize:
        row += spec.value_size * dtype.itemsize
    described = 2 * TASK.itemsize * spec.batch * spec.heads * key_tiles  # the tasks of a query tile, and their copies
    keys = tile_k * (spec.head_size + spec.value_size) * dtype.itemsize
    return Needs(fixed, spec.group * tile_q * row + described, keys)


class Streamed:
    """A call on arrays that are read tile by tile."""

    def __init__(
        self,
        spec: AttentionSpec,
        tiles: tuple[int, int],
        limit: int,
        results: int,
        offsets: np.ndarray | None,
        scoring: Scoring | None,
    ) -> None:
        """results: bytes of outputs in memory. Raises: SpecError for a limit below the smallest working set."""
        self.spec, (self.tile_q, self.tile_k) = spec, tiles
        self.offsets, self.scoring = offsets if spec.offset is None else None, scoring
        self.runtime = runtime.ensure()
        workers = max(1, self.runtime.workers("cpu"))
        at = 0 if self.offsets is None else address_of(self.offsets)
        kernel = tile_kernels().forward(spec, *tiles, offsets=at, scoring=scoring)
        needs = needs_of(spec, *tiles, results + workers * kernel.scratch_bytes)
        self.query_tiles = -(-spec.q_len // self.tile_q)
        self.room = needs.room(limit, self.query_tiles, workers)
        self.storage = DTYPES[spec.dtype]
        self.accumulator = DTYPES[self.storage.accumulator]

    def run(
        self,
        q: Read,
        k: Read,
        v: Read,
        o: Write,
        lse: np.ndarray,
        report: Report | None,
    ) -> None:
        """Compute o (B, H, S_q, D_v), and lse (B, H, S_q).

        Raises: KernelError naming codelet and tile; what reading and writing raise.
        """
        spec = self.spec
        heads = [(b, h) for b in range(spec.batch) for h in range(spec.kv_heads)]
        groups = list(range(0, self.query_tiles, self.room.group))
        total, done = len(heads) * len(groups), 0
        with self.runtime.working():
            sizes = {"k": spec.head_size, "v": spec.value_size}
            buffers = [
                {name: np.empty((self.tile_k, n), self.storage.numpy) for name, n in sizes.items()}
                for _ in range(self.room.buffers if spec.kv_len else 0)
            ]
            for first in groups:
                rows = np.arange(first, min(first + self.room.group, self.query_tiles))
                flow = Flow(
                    self.runtime,
                    spec,
                    self.tile_q,
                    self.tile_k,
                    offsets=self.offsets,
                    scoring=self.scoring,
                    rows=rows,
                )
                for batch, head in heads:
                    _Pass(self, flow, buffers, batch, head, rows).run(q, k, v, o, lse)
                    done += 1
                    if report is not None:
                        report(done, total)


class _Pass:
    """The keys of one head pass by a group of query tiles."""

    def __init__(
        self, call: Streamed, flow: Flow, buffers: list[dict[str, np.ndarray]], batch: int, head: int, rows: np.ndarray
    ) -> None:
        self.call, self.flow = call, flow
        self.passing = Passing(buffers, dict.fromkeys("kv", call.storage))
        self.batch, self.head, self.rows = batch, head, rows
        spec = call.spec
        self.heads = slice(head * spec.group, (head + 1) * spec.group)
        self.first, self.last = int(rows[0]) * call.tile_q, min((int(rows[-1]) + 1) * call.tile_q, spec.q_len)
        self.modes = flow._modes(call.runtime)
        p = flow.pairs
        self.mine = np.flatnonzero((p.batch == batch) & (p.head // spec.group == head))
        self.own = p.query_tile * call.tile_q // call.tile_k

    def run(self, q: Read, k: Read, v: Read, o: Write, lse: np.ndarray) -> None:
        call, spec = self.call, self.call.spec
        height, job = self.last - self.first, Job()
        queries = np.empty((1, spec.group, height, spec.head_size), call.storage.numpy)
        heads = range(self.heads.start, self.heads.stop)
        for n, head in enumerate(heads):
            by_tiles(q, self.batch, head, self.first, queries[0, n], call.tile_q)
        state = np.empty((1, spec.group, height, spec.value_size), call.accumulator.numpy)
        logs = np.empty(state.shape[:3], call.accumulator.numpy)
        out = np.empty(state.shape, call.storage.numpy) if self.flow.narrow else state
        tensors: list[TiledTensor] = []
        try:
            for x, kind in ((queries, call.storage), (state, call.accumulator), (logs, call.accumulator)):
                tensors.append(tiled(x, kind, call.tile_q))
            self._submit(job, tensors, np.flatnonzero(self.flow.pairs.key_tile[self.mine] < 0), None, None)
            for tile, chosen in self._visits():
                first = tile * call.tile_k
                keys = self.passing.next(
                    {"k": k, "v": v}, self.batch, self.head, first, min(call.tile_k, spec.kv_len - first)
                )
                self._submit(job, tensors, chosen, keys["k"], keys["v"])
            if self.flow.narrow:
                tensors.append(tiled(out, call.storage, call.tile_q))
                submit_finish(job, tensors[1], tensors[2], tensors[3])
            job.wait()
        finally:
            job.drain()
            self.passing.release()
            for tensor in tensors:
                tensor.unregister()
        for n, head in enumerate(heads):
            by_tiles(o, self.batch, head, self.first, out[0, n], call.tile_q)
        lse[self.batch, self.heads, self.first : self.last] = logs[0]

    def _visits(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each key tile in the order of the chains, with the numbers of its tasks among `mine`."""
        tiles = self.flow.pairs.key_tile[self.mine]
        behind = tiles > self.own[self.mine]  # those that a chain meets after it has come to the first key
        order = np.lexsort((-tiles, behind))
        order = order[tiles[order] >= 0]
        if not len(order):
            return
        new = np.flatnonzero((np.diff(tiles[order]) != 0) | (np.diff(behind[order].astype(int)) != 0)) + 1
        for chosen in np.split(order, new):
            yield int(tiles[chosen[0]]), np.sort(chosen)

    def _submit(
        self, job: Job, tensors: list[TiledTensor], chosen: np.ndarray, k: TiledTensor | None, v: TiledTensor | None
    ) -> None:
        if not len(chosen):
            return
        p, numbers = self.flow.pairs, self.mine[chosen]
        at = 0, p.head[numbers] - self.heads.start, p.query_tile[numbers] - self.rows[0]
        queries, state, logs = (x.handles[at] for x in tensors[:3])
        read = [queries if x is None else np.full(len(numbers), x.handles[0, 0, 0]) for x in (k, v)]
        handles = np.stack([queries, *read, state, logs], axis=1)
        name = codelet("forward", self.call.spec.dtype)
        self.flow.program.submit(job, name, handles, self.modes[numbers], self.flow.tasks[numbers])


class Passing:
    """Tiles that pass through a few buffers: one is filled while workers compute on the others, and filled again when
    the tasks on it are done."""

    def __init__(self, buffers: Sequence[Mapping[str, np.ndarray]], kinds: Mapping[str, DType]) -> None:
        """buffers: memory for a tile's operands by name; kinds: their dtypes."""
        self._buffers, self._kinds, self._turn = buffers, kinds, 0
        self._held: list[dict[str, TiledTensor]] = [{} for _ in buffers]
        self._then: list[Callable[[], None] | None] = [None] * len(buffers)
        self._where: list[tuple[int, int, int] | None] = [None] * len(buffers)

    def next(
        self,
        read: Mapping[str, Read],
        batch: int,
        head: int,
        first: int,
        height: int,
        then: Callable[[Mapping[str, np.ndarray]], None] | None = None,
    ) -> Mapping[str, TiledTensor]:
        """So many rows of a head, in the place of what came first; `then` is called with them when tasks are done."""
        at = self._turn % len(self._buffers)
        self._turn += 1
        for older, where in enumerate(self._where):  # rows that come back must have left
            if older == at or where == (batch, head, first):
                self._leave(older)
        self._where[at] = batch, head, first
        filled = {name: memory[:height] for name, memory in self._buffers[at].items()}
        for name, rows in filled.items():
            read[name](batch, head, first, rows)
            self._held[at][name] = tiled(rows[None, None], self._kinds[name], len(self._buffers[at][name]))
        self._then[at] = None if then is None else partial(then, filled)
        return self._held[at]

    def finish(self) -> None:
        """Wait for the tasks on all of them, and do what comes then."""
        for at in range(len(self._held)):
            self._leave(at)

    def release(self) -> None:
        """Wait for the tasks on all of them, and do no more."""
        self._then = [None] * len(self._held)
        self.finish()

    def _leave(self, at: int) -> None:
        own, then = self._held[at], self._then[at]
        while own:
            own.popitem()[1].unregister()  # waits for the tasks that read it
        self._then[at] = self._where[at] = None
        if then is not None:
            then()


def by_tiles(move: Read | Write, batch: int, head: int, first: int, rows: np.ndarray, tile: int) -> None:
    """Read rows, or write them, tile by tile, so that no more of a file is in memory."""
    for row in range(0, len(rows), tile):
        move(batch, head, first + row, rows[row : row + tile])


def tiled(x: np.ndarray, kind: Any, rows: int) -> TiledTensor:
    """An array as tiles of so many rows."""
    return TiledTensor(x.shape, kind, rows, address=x.ctypes.data, strides=x.strides, keep=x)


def forget(x: Any, part: np.ndarray) -> None:
    """Tell the system that a part of a memory map need not stay in memory. What was written to it goes to the file; a
    map of one's own copy (mode "c") is left alone, whose changes would be lost."""
    base = mapped(x)
    if base is None or not part.size:
        return
    start = np.frombuffer(base, np.uint8).ctypes.data
    low = part.ctypes.data - start
    high = low + sum((n - 1) * step for n, step in zip(part.shape, part.strides, strict=True)) + part.itemsize
    low, high = max(0, low - AROUND) // AROUND * AROUND, min(high + AROUND, len(base))
    if min(part.strides, default=0) > 0 and low < high:
        base.madvise(mmap.MADV_DONTNEED, low, high - low)
