"""The task flow of unfused attention: three codelets that meet in stored scores, S_q x S_kv of them.

The baseline of the fused flow on the same tiles, handles and workers. A query tile's scores are one handle that
StarPU owns, in the input's dtype; every pair of tiles is computed, hidden or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flashtile.dtypes import DTYPES
from flashtile.engines.starpu import cuda
from flashtile.engines.starpu.footprint import footprints
from flashtile.engines.starpu.jobs import TASK, Job
from flashtile.engines.starpu.launches import ANCHOR, COLUMN, COLUMNS, KEYS, ROWS
from flashtile.engines.starpu.programs import Program
from flashtile.engines.starpu.runtime import Runtime
from flashtile.engines.starpu.session import codelet
from flashtile.engines.starpu.states import submit_finish
from flashtile.engines.starpu.tiles import DROP_LATER, TiledTensor
from flashtile.kernels import tile_kernels
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    from flashtile.score.options import Scoring

# What a task's handles set in the parameter block, and the words of its own values (programs.py).
BINDINGS = {
    "scores": ((0, "q", "q_s"), (1, "k", "k_s"), (2, "stored", None)),
    "softmax": ((0, "stored", None), (1, "lse", None)),
    "output": ((0, "stored", None), (1, "v", "v_s"), (2, "o", "o_s")),
}
VALUES = {"scores": (), "softmax": (), "output": ("carry",)}


class VanillaFlow:
    """The three stages of one spec on tiles of one size; arguments as those of flow.Flow."""

    heads = 1  # of a task

    def __init__(
        self,
        runtime: Runtime,
        spec: AttentionSpec,
        tile_q: int,
        tile_k: int,
        *,
        offsets: np.ndarray | None = None,
        scoring: Scoring | None = None,
    ) -> None:
        self.spec, self.tile_q, self.tile_k = spec, tile_q, tile_k
        at = 0 if offsets is None else offsets.ctypes.data
        stages = tile_kernels().unfused(spec, tile_q, tile_k, offsets=at, scoring=scoring)
        self.anchors = np.array([spec.offset or 0], np.int64) if offsets is None else offsets
        words, block = stages["scores"].words, stages["scores"].block
        self.columns, self.row_elements = int(block[words["columns"]]), int(block[words["stored_s"]]) // self._itemsize
        gpu = cuda.unfused(runtime, spec, self.row_elements)
        self.programs = {
            name: Program(runtime, kernel, BINDINGS[name], VALUES[name], (offsets, scoring), gpu[name])
            for name, kernel in stages.items()
        }
        self.accumulator = DTYPES[DTYPES[spec.dtype].accumulator]
        self.grid = spec.batch, spec.heads, -(-spec.q_len // tile_q), -(-spec.kv_len // tile_k)

    @property
    def _itemsize(self) -> int:
        return DTYPES[self.spec.dtype].itemsize

    def submit(self, job: Job, q: TiledTensor, k: TiledTensor, v: TiledTensor, o: TiledTensor, lse: TiledTensor) -> int:
        """Submit scores, softmax and output of every pair of tiles; returns how many tasks."""
        spec, dtype = self.spec, DTYPES[self.spec.dtype]
        narrow = dtype is not self.accumulator
        shape = spec.batch, spec.heads, spec.q_len
        stored = TiledTensor((*shape, max(1, self.row_elements)), dtype, self.tile_q)
        sums = TiledTensor((*shape, spec.value_size), self.accumulator, self.tile_q) if narrow else o
        try:
            n = self._submit_stages(job, q, k, v, stored, lse, sums)
            return n + (submit_finish(job, sums, lse, o) if narrow else 0)
        finally:
            stored.unregister(DROP_LATER)
            if narrow:
                sums.unregister(DROP_LATER)

    def _submit_stages(
        self,
        job: Job,
        q: TiledTensor,
        k: TiledTensor,
        v: TiledTensor,
        stored: TiledTensor,
        lse: TiledTensor,
        o: TiledTensor,
    ) -> int:
        batch, head, i, j = (x.ravel() for x in np.indices(self.grid))
        kv = head // self.spec.group
        rows, keys = (batch, head, i), (batch, kv, j)
        r, w, rw = (job.runtime.constant(name) for name in ("R", "W", "RW"))
        later = np.where(j == 0, w, rw)
        modes = np.stack([np.full_like(j, r), np.full_like(j, r), later], axis=1)

        tasks = self._tasks("scores", batch, head, i, j)
        tasks["flops"] *= self.spec.head_size
        handles = np.stack([q.handles[rows], k.handles[keys], stored.handles[rows]], axis=1)
        self._submit(job, "scores", handles, modes, tasks)

        first = j == 0
        softmax = self._tasks("softmax", batch[first], head[first], i[first], j[first])
        softmax["flops"] = 0
        handles = np.stack([stored.handles[rows], lse.handles[rows]], axis=1)[first]
        self._submit(job, "softmax", handles, np.tile([rw, w], (len(softmax), 1)), softmax)

        tasks = self._tasks("output", batch, head, i, j)
        tasks["flops"] *= self.spec.value_size
        tasks["values"][:, 0] = j > 0
        handles = np.stack([stored.handles[rows], v.handles[keys], o.handles[rows]], axis=1)
        self._submit(job, "output", handles, modes, tasks)
        return 2 * len(tasks) + len(softmax)

    def _submit(self, job: Job, stage: str, handles: np.ndarray, modes: np.ndarray, tasks: np.ndarray) -> None:
        self.programs[stage].submit(job, codelet(stage, self.spec.dtype), handles, modes, tasks)

    def _tasks(self, stage: str, batch: np.ndarray, head: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """The stage's tasks; flops 2 a pair, to be multiplied by a head size."""
        spec, (_, heads, query_tiles, key_tiles) = self.spec, self.grid
        tasks = np.zeros(len(i), TASK)
        row, key = i * self.tile_q, j * self.tile_k
        all_rows = batch * heads + head
        item = all_rows * query_tiles + i
        tasks["begin"] = item if stage == "softmax" else item * key_tiles + j
        tasks["end"] = tasks["begin"] + 1
        places = {"q": row, "k": key, "v": key, "o": row}
        for handle, name, stride in BINDINGS[stage]:
            if stride is not None:
                tasks["rows"][:, handle] = places[name]
            elif name == "lse":
                tasks["bytes"][:, handle] = (all_rows * spec.q_len + row) * self.accumulator.itemsize
        rows = np.minimum(self.tile_q, spec.q_len - row)
        keys = np.minimum(self.tile_k, spec.kv_len - key) if stage != "softmax" else np.full_like(row, spec.kv_len)
        anchor = cuda.anchor_of(self.anchors, batch, row - key)
        at = j * self.columns * self._itemsize
        sizes = {ROWS: rows, KEYS: keys, ANCHOR: anchor, COLUMN: at, COLUMNS: self.columns}
        for place, numbers in sizes.items():
            tasks["sizes"][:, place] = numbers
        tasks["flops"] = 2.0 * rows * keys
        cases = np.stack([rows, keys, j > 0], axis=1)
        tasks["footprint"] = footprints(self.programs[stage].kernel.identity, cases)
        tasks["tile"] = np.stack([batch, head, i, j], axis=1)
        tasks["priority"] = {"scores": 0, "softmax": 1, "output": 2}[stage]  # what is stored shall not pile up
        return tasks
