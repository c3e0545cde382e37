"""The task flow of a forward pass: which query tile meets which key tiles, in which order, at which cost.

A query tile i meets its key tiles in one order: i, i - 1, ..., 0, then from the last down to i + 1. It depends on
tile numbers only, and tasks that share a state run in the order of submission, so the bits are the same for any
number of workers and any scheduler. Key tiles that no row of the query tile sees make no task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flashtile.dtypes import DTYPES
from flashtile.engines.starpu import cuda
from flashtile.engines.starpu.coverage import TileCoverage, coverage_of
from flashtile.engines.starpu.footprint import footprint_of, footprints
from flashtile.engines.starpu.jobs import TASK, Job
from flashtile.engines.starpu.launches import ANCHOR, FIRSTS, KEYS, ROWS, SINK
from flashtile.engines.starpu.programs import Program
from flashtile.engines.starpu.runtime import Runtime
from flashtile.engines.starpu.session import codelet
from flashtile.engines.starpu.states import submit_finish
from flashtile.engines.starpu.tiles import DROP_LATER, Tile, TiledTensor
from flashtile.engines.starpu.units import Handles, of_keys, several, turned_of, unit_of
from flashtile.errors import UnavailableError, wrong
from flashtile.kernels import tile_kernels
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    from flashtile.score.options import Scoring

ORDERED, COMMUTE = "ordered", "commute"

# What a task's handles set in the parameter block (programs.py), and the words of its own values.
FORWARD = ((0, "q", "q_s"), (1, "k", "k_s"), (2, "v", "v_s"), (3, "o", "o_s"), (4, "lse", None))
FORWARD_VALUES = ("carry", "kv_len", "sinks", "captures")


@dataclass(frozen=True)
class Pairs:
    """The tasks of a flow, chain by chain: int64 arrays (n,). A chain without a key is one task with key tile -1. head:
    the first of those that a task has."""

    batch: np.ndarray
    head: np.ndarray
    query_tile: np.ndarray
    key_tile: np.ndarray
    place: np.ndarray  # in its chain, from 0
    left: np.ndarray  # tasks of its chain that follow: the critical path


def together(spec: AttentionSpec, coverage: TileCoverage, heads: int) -> int:
    """How many heads, of so many at most, a task may have: those for which the same tiles meet."""
    batches, each = coverage.touched().shape[:2]
    return 1 if each > 1 else min(heads, spec.heads) if batches > 1 else heads


def touched_of(spec: AttentionSpec, coverage: TileCoverage, heads: int) -> np.ndarray:
    """Which tiles meet, by tasks of so many heads, as `together` has found: bool (units, query tiles, key tiles)."""
    touched = coverage.touched()
    every = np.broadcast_to(touched, (spec.batch, spec.heads, *touched.shape[2:]))
    firsts = np.divmod(np.arange(0, spec.batch * spec.heads, heads), max(1, spec.heads))
    return np.asarray(every[firsts])


def pairs_of(spec: AttentionSpec, coverage: TileCoverage, rows: np.ndarray | None = None, heads: int = 1) -> Pairs:
    """Every task of a call, in the order of submission; of query tiles `rows` only, if that is not None; of so many
    heads each, as `together` has found."""
    tile_q, tile_k = coverage.tile_q, coverage.tile_k
    touched = touched_of(spec, coverage, heads)
    mine = np.ones(touched.shape[1], bool) if rows is None else np.isin(np.arange(touched.shape[1]), rows)
    unit, i, j = np.nonzero(touched & mine[:, None])
    none = np.nonzero(~touched.any(axis=2) & mine)
    unit, i = (np.concatenate(x) for x in zip((unit, i), none, strict=True))
    j = np.append(j, np.full(len(none[0]), -1))
    own = np.minimum(i * tile_q // tile_k, max(touched.shape[2] - 1, 0))
    order = np.lexsort((-j, j > own, i, unit))
    unit, i, j = (x[order].astype(np.int64) for x in (unit, i, j))
    batch, head = np.divmod(unit * heads, max(1, spec.heads))
    chain = unit * touched.shape[1] + i
    first = np.flatnonzero(np.diff(chain, prepend=-1))
    length = np.diff(np.append(first, len(chain)))
    place = np.arange(len(chain)) - np.repeat(first, length)
    return Pairs(batch, head, i, j, place, np.repeat(length, length) - 1 - place)


class Flow:
    """The tasks of one spec on tiles of one size; made once, submitted on any tensors of that shape.

    offsets: int64 (B,), where spec.offset is None; scoring: the values of the spec's program and sinks. With either,
    the flow is good for these values only. rows: numbers of the query tiles that it computes, None: all. heads: how
    many a task has, fewer where a mask shows them different tiles.
    """

    def __init__(
        self,
        runtime: Runtime,
        spec: AttentionSpec,
        tile_q: int,
        tile_k: int,
        *,
        accumulate: str = ORDERED,
        offsets: np.ndarray | None = None,
        scoring: Scoring | None = None,
        rows: np.ndarray | None = None,
        heads: int = 1,
    ) -> None:
        if accumulate not in (ORDERED, COMMUTE):
            raise wrong("accumulate", repr(accumulate), f"{ORDERED!r} or {COMMUTE!r}")
        if accumulate == COMMUTE and spec.sinks:
            raise UnavailableError("accumulate: got 'commute' with sinks, expected 'ordered', which has a last task")
        self.spec, self.tile_q, self.tile_k, self.accumulate = spec, tile_q, tile_k, accumulate
        at = 0 if offsets is None else offsets.ctypes.data
        kernels = tile_kernels()
        kernel = kernels.forward(spec, tile_q, tile_k, offsets=at, scoring=scoring)
        self.sinks = int(kernel.block[kernel.words["sinks"]])
        self.narrow = DTYPES[spec.dtype].accumulator != spec.dtype
        self.anchors = np.array([spec.offset or 0], np.int64) if offsets is None else offsets  # (B,), or (1,): shared
        self.coverage = coverage_of(spec, scoring, kernels.rows_at_once(spec), tile_q, tile_k, self.anchors)
        self.heads = together(spec, self.coverage, heads)
        self.pairs = pairs_of(spec, self.coverage, rows, self.heads)
        gpu = cuda.forward(runtime, spec, tile_q, tile_k, self.heads, scoring)
        self.program = Program(
            runtime,
            kernel,
            FORWARD,
            FORWARD_VALUES,
            (offsets, scoring),
            gpu,
            heads=spec.heads,
            per=dict.fromkeys("kv", spec.group),
            moves={"lse": spec.q_len * DTYPES[DTYPES[spec.dtype].accumulator].itemsize},
        )
        self.tasks = self._forward_tasks()
        self.number = np.full((spec.batch, spec.heads, -(-spec.q_len // tile_q), -(-spec.kv_len // tile_k)), -1)
        some = self.pairs.key_tile >= 0
        p = self.pairs
        self.number[p.batch[some], p.head[some], p.query_tile[some], p.key_tile[some]] = np.flatnonzero(some)

    def submit(self, job: Job, q: TiledTensor, k: TiledTensor, v: TiledTensor, o: TiledTensor, lse: TiledTensor) -> int:
        """Submit the whole pass; returns how many tasks. 16-bit outputs have a state of their own until the cast."""
        state = o
        if self.narrow:
            state = TiledTensor(o.shape, DTYPES[DTYPES[self.spec.dtype].accumulator], self.tile_q, heads=self.heads)
        try:
            self.submit_forward(job, q, k, v, state, lse)
            return len(self.tasks) + (submit_finish(job, state, lse, o) if self.narrow else 0)
        finally:
            if self.narrow:
                state.unregister(DROP_LATER)

    def submit_forward(self, job: Job, q: Handles, k: Handles, v: Handles, o: Handles, lse: Handles) -> None:
        """Submit the tasks that meet keys; o is the state, in the accumulator's dtype."""
        p, spec = self.pairs, self.spec
        rows = *unit_of(p.batch, p.head, spec.heads, self.heads), p.query_tile
        queries = q.handles[rows]
        read = [queries, queries]
        if k.handles.size:
            of_one = of_keys(self.heads, spec.group)
            keys = *unit_of(p.batch, p.head // spec.group, spec.kv_heads, of_one), np.maximum(p.key_tile, 0)
            # Where no key is read the queries stand in.
            read = [np.where(p.key_tile < 0, queries, x.handles[keys]) for x in (k, v)]
        handles = np.stack([queries, *read, o.handles[rows], lse.handles[rows]], axis=1)
        self.tasks["turned"] = turned_of(q, k, v, o, lse)
        self.program.submit(job, codelet("forward", self.spec.dtype), handles, self._modes(job.runtime), self.tasks)

    def _modes(self, runtime: Runtime) -> np.ndarray:
        r, w, rw, commute = (runtime.constant(name) for name in ("R", "W", "RW", "COMMUTE"))
        later = rw | commute if self.accumulate == COMMUTE else rw
        modes = np.full((len(self.tasks), 5), r, np.int32)
        modes[:, 3:] = np.where(self.pairs.place == 0, w, later)[:, None]
        return modes

    def _forward_tasks(self) -> np.ndarray:
        spec, p = self.spec, self.pairs
        key_tiles, query_tiles = max(1, -(-spec.kv_len // self.tile_k)), -(-spec.q_len // self.tile_q)
        row, seen = p.query_tile * self.tile_q, np.maximum(p.key_tile, 0)
        key = seen * self.tile_k
        end = np.where(p.key_tile < 0, 0, np.minimum(key + self.tile_k, spec.kv_len))
        head = p.batch * spec.heads + p.head
        tasks = np.zeros(len(row), TASK)
        tasks["begin"] = (head * query_tiles + p.query_tile) * key_tiles + seen
        tasks["end"] = tasks["begin"] + 1
        tasks["heads"], tasks["step"] = self.heads, query_tiles * key_tiles
        tasks["rows"][:, :4] = np.stack([row, key, key, row], axis=1)
        tasks["bytes"][:, 4] = (head * spec.q_len + row) * DTYPES[DTYPES[spec.dtype].accumulator].itemsize
        tasks["values"][:, :3] = np.stack([p.place > 0, end, np.where(p.left == 0, self.sinks, 0)], axis=1)
        tasks["values"][:, FORWARD_VALUES.index("captures")] = self.program.block_word("captures")
        anchor = cuda.anchor_of(self.anchors, p.batch, row - key)
        firsts = dict(zip(FIRSTS, (p.batch, p.head, row, key), strict=True))
        sizes = {ROWS: np.minimum(self.tile_q, spec.q_len - row), KEYS: end - key, ANCHOR: anchor, **firsts}
        sizes[SINK] = head * DTYPES[DTYPES[spec.dtype].accumulator].itemsize
        for place, numbers in sizes.items():
            tasks["sizes"][:, place] = numbers
        tasks["tile"] = np.stack([p.batch, p.head, p.query_tile, p.key_tile], axis=1)
        tasks["priority"] = p.left
        self._add_costs(tasks)
        return tasks

    def _add_costs(self, tasks: np.ndarray) -> None:
        """FLOPs of the two products over visible pairs, and footprints."""
        p, spec, identity = self.pairs, self.spec, several(self.program.kernel.identity, self.heads)
        some = p.key_tile >= 0
        pairs, cases = self.coverage.amount(*(x[some] for x in (p.batch, p.head, p.query_tile, p.key_tile)))
        tasks["flops"][some] = 2.0 * (spec.head_size + spec.value_size) * pairs * self.heads
        carried = np.concatenate([cases, p.place[some, None] > 0], axis=1)
        tasks["footprint"][some] = footprints(identity, carried)
        rows = np.minimum(self.tile_q, spec.q_len - p.query_tile[~some] * self.tile_q)
        tasks["footprint"][~some] = [footprint_of(identity, int(n), 0) for n in rows]


def submit_pair(flow: Flow, job: Job, q: Tile, k: Tile, v: Tile, o: Tile, lse: Tile, *, carry: bool, last: bool) -> int:
    """Submit one pair of tiles; returns 0 if the mask keeps them apart, else 1. Raises: SpecError for tiles that do not
    belong together."""
    spec, i, j = flow.spec, q.index[2], k.index[2]
    b, h = divmod((q.index[0] * q.tensor.grid[1] + q.index[1]) * flow.heads, spec.heads)
    kv, of_one = h // spec.group, of_keys(flow.heads, spec.group)
    own = *unit_of(b, kv, spec.kv_heads, of_one), j
    for name, tile, index in (("k", k, own), ("v", v, own), ("o", o, q.index), ("lse", lse, q.index)):
        if tile.index != index:
            raise wrong(name, f"tile {tile.index}", f"tile {index}, to go with tile {q.index} of q")
    number = flow.number[b, h, i, j]
    if number < 0:
        return 0
    task = flow.tasks[number : number + 1].copy()
    task["values"][0, 0], task["values"][0, 2] = carry, flow.sinks if last else 0
    r, w, rw, commute = (job.runtime.constant(name) for name in ("R", "W", "RW", "COMMUTE"))
    task["turned"] = turned_of(*(x.tensor for x in (q, k, v, o, lse)))
    state = w if not carry else rw | commute if flow.accumulate == COMMUTE else rw
    handles = np.array([[x.address for x in (q, k, v, o, lse)]], np.uint64)
    flow.program.submit(job, codelet("forward", flow.spec.dtype), handles, np.array([[r, r, r, state, state]]), task)
    return 1
