"""The task flow of a backward pass: which query tile gives what to which key tiles, in which order, at which cost.

A query tile i meets its key tiles in the order of the forward: i, i - 1, ..., 0, then from the last down to i + 1. The
flow goes by places in that order: in each of them every query tile meets another key tile, so that neither dQ nor dK
and dV make one wait for the other. Tasks that share a gradient run in the order of submission, which depends on tile
numbers only, and so do the bits: heads that share keys come one after the other, so a task has only one of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from flashtile.dtypes import DTYPES
from flashtile.engines.starpu import cuda_gradients
from flashtile.engines.starpu.boxes import Boxes, boxes_of
from flashtile.engines.starpu.coverage import coverage_of
from flashtile.engines.starpu.cuda import anchor_of
from flashtile.engines.starpu.flow import Pairs, together, touched_of
from flashtile.engines.starpu.footprint import footprints
from flashtile.engines.starpu.jobs import TASK, Job
from flashtile.engines.starpu.launches import ANCHOR, FIRSTS, KEYS, KV_HEADS, ROWS, SINK, Launches
from flashtile.engines.starpu.programs import Program
from flashtile.engines.starpu.runtime import Runtime
from flashtile.engines.starpu.session import codelet
from flashtile.engines.starpu.tiles import DROP_LATER, TiledTensor
from flashtile.engines.starpu.units import Handles, of_keys, several, turned_of, unit_of
from flashtile.kernels import ArrayShapes, tile_kernels
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    from flashtile.engines.starpu.coverage import TileCoverage
    from flashtile.score.options import Scoring

# Handles in the order of a task's buffers: the words of their addresses and of their bytes between rows (programs.py).
READ = {
    "q": ("q", "q_s"),
    "k": ("k", "k_s"),
    "v": ("v", "v_s"),
    "do": ("do", "do_s"),
    "lse": ("lse", None),
    "delta": ("delta", None),
}
GRADIENTS = {"dq": ("dq", "dq_s"), "dk": ("dk", "dk_s"), "dv": ("dv", "dv_s")}
OF_KEYS = ("k", "v", "dk", "dv")
VALUES = ("first_row", "row_count", "first_key", "kv_len", "copy", "captures")
DELTA = {"do": ("do", "do_s"), "o": ("o", "o_s"), "lse": ("lse", None), "delta": ("delta", None)}
DELTA_MORE = {"dlse": ("dlse", None), "dsinks": ("dsinks", None)}  # where they are given
ADD = ((0, "parts", None), (1, "dq", "dq_s"))
FIRST = np.iinfo(np.int32).max  # the priority of what others wait for; StarPU's limits cut it down

Tensors = Mapping[str, TiledTensor]
Part = tuple[range, range, range, range]  # batches, heads, query tiles, key tiles
NOTHING: Part = (range(0),) * 4


def pairs_of(
    spec: AttentionSpec,
    coverage: TileCoverage,
    part: Part | None = None,
    heads: int = 1,
    steps: np.ndarray | None = None,
) -> Pairs:
    """Every task of a call, or of a part of its tiles, in their order: by heads, then place by place. heads: of a task,
    as `together` has found; with a part, 1. steps (query tiles, key tiles): another order than that of places."""
    if part is None:
        touched = touched_of(spec, coverage, heads)
        unit, i, j = (x.astype(np.int64) for x in np.nonzero(touched))
    else:
        every = coverage.touched()
        touched = np.broadcast_to(every, (spec.batch, spec.heads, *every.shape[2:]))
        found = np.nonzero(touched[tuple(slice(x.start, x.stop) for x in part)])
        batch, head, i, j = (x.astype(np.int64) + axis.start for x, axis in zip(found, part, strict=True))
        unit = batch * spec.heads + head
    key_tiles = max(1, touched.shape[-1])
    own = np.minimum(i * coverage.tile_q // coverage.tile_k, key_tiles - 1)
    step = (own - j) % key_tiles if steps is None else steps[i, j]
    order = np.lexsort((i, step, unit))
    unit, i, j, step = (x[order] for x in (unit, i, j, step))
    batch, head = np.divmod(unit * heads, max(1, spec.heads))
    chain = unit * touched.shape[-2] + i
    by_chain = np.lexsort((step, chain))
    length = np.bincount(chain)[chain] if len(chain) else chain
    first = np.flatnonzero(np.diff(chain[by_chain], prepend=-1))
    place = np.empty_like(chain)
    place[by_chain] = np.arange(len(chain)) - np.repeat(first, length[by_chain][first])
    return Pairs(batch, head, i, j, place, length - 1 - place)


def _places(p: Pairs) -> dict[str, np.ndarray]:
    return {"b": p.batch, "h": p.head, "i": p.query_tile, "j": p.key_tile}


class BackwardFlow:
    """The tasks of one spec on tiles of one size; made once, submitted on any tensors of that shape.

    wanted: names among "q", "k", "v" and "sinks"; arrays: the slots and shapes of captured arrays whose gradients are
    wanted, axis: along which tiles have copies of their sums. offsets, scoring and heads as those of flow.Flow; where
    heads share keys, or may add to one element of an array, a task has one. A flow with arrays is submitted once: their
    sums are its own. part: the tiles that it computes, None: all; see `of`. order: of `touched` (query tiles, key
    tiles) the steps of pairs, None: by places.
    """

    def __init__(
        self,
        runtime: Runtime,
        spec: AttentionSpec,
        tile_q: int,
        tile_k: int,
        *,
        wanted: Collection[str | int],
        offsets: np.ndarray | None = None,
        scoring: Scoring | None = None,
        arrays: ArrayShapes = (),
        axis: str = "i",
        part: Part | None = None,
        heads: int = 1,
        order: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.spec, self.tile_q, self.tile_k, self.scoring = spec, tile_q, tile_k, scoring
        self.accumulator = DTYPES[DTYPES[spec.dtype].accumulator]
        self.gradients = tuple(f"d{name}" for name in "qkv" if name in wanted)
        self.sunk = "sinks" in wanted
        at, kernels = 0 if offsets is None else offsets.ctypes.data, tile_kernels()
        found = kernels.backward(spec, tile_q, tile_k, offsets=at, scoring=scoring, arrays=arrays, axis=axis)
        self.arrays = found.arrays
        given = READ | {name: GRADIENTS[name] for name in self.gradients}
        self.names, keep = tuple(given), (offsets, scoring, self.arrays)
        handles = len(given) + (self.arrays is not None)
        bindings = tuple((n, *words) for n, words in enumerate(given.values()))
        self._deltas = kernels.deltas(spec, scoring=scoring)
        anchors = np.array([spec.offset or 0], np.int64) if offsets is None else offsets
        panel = kernels.rows_at_once(spec, "backward")
        self.anchors = anchors
        self.coverage = coverage_of(spec, scoring, panel, tile_q, tile_k, anchors)
        alone = arrays or part is not None or spec.group > 1
        self.heads = 1 if alone else together(spec, self.coverage, heads)
        per, places = dict.fromkeys(OF_KEYS, spec.group), {name: n for n, name in enumerate(self.names)}
        gpu, self.boxes = self._on_gpus(runtime, places, arrays, whole=part is None and order is None)
        self._box_sums: list[np.ndarray] = []
        self.boxed: list[TiledTensor] = []  # these, while tasks add to them
        handles += len(self.boxes)
        self.program = Program(
            runtime, found.kernel, bindings, VALUES, keep, gpu, handles=handles, heads=spec.heads, per=per
        )
        self._steps = None if order is None else order(np.asarray(self.coverage.touched().any(axis=(0, 1))))
        self._plan(part)

    def _on_gpus(
        self, runtime: Runtime, places: Mapping[str, int], arrays: ArrayShapes, whole: bool
    ) -> tuple[Launches | str, tuple[Boxes, ...]]:
        """What a task launches on GPUs, or why there is nothing, and the boxes of arrays to which it adds."""
        sizes, found = (self.heads, self.tile_q, self.tile_k), tuple[Boxes, ...]()
        if arrays:
            if not whole:
                return "gradients of arrays are summed on CPUs where tasks are submitted part by part", ()
            assert self.scoring is not None and self.scoring.program is not None
            real = np.dtype(self.accumulator.numpy)
            boxes = boxes_of(self.spec, self.scoring.program, arrays, self.tile_q, self.tile_k, real)
            if isinstance(boxes, str):
                return boxes, ()
            found = boxes
        gpu = cuda_gradients.backward(runtime, self.spec, places, *sizes, scoring=self.scoring, boxes=found)
        return gpu, () if isinstance(gpu, str) else found

    def of(self, part: Part) -> BackwardFlow:
        """The tasks of a part of the tiles: with the kernels, the coverage and the sums of arrays of this one."""
        found = copy.copy(self)
        found._plan(part)
        return found

    def _plan(self, part: Part | None) -> None:
        self.pairs = pairs_of(self.spec, self.coverage, part, self.heads, self._steps)
        self.tasks = self._backward_tasks()
        if self.arrays is not None:
            turns = self.arrays.turn_of(**_places(self.pairs))
            self._turns, self._turn = np.unique(turns, return_inverse=True)

    def submit(self, job: Job, given: Tensors) -> int:
        """Submit the whole pass: gradients are added to those of dq, dk, dv and dsinks that are wanted. Returns the
        number of tasks.

        given: do, q, k, v, o, lse, possibly dlse, and the gradients, by name; dq and its kin in the dtype of q, where
        16-bit ones have sums of their own until they are rounded once; dsinks (B, H, 1) in accumulators.
        """
        spec = self.spec
        delta = TiledTensor((spec.batch, spec.heads, spec.q_len), self.accumulator, self.tile_q, heads=self.heads)
        sums = {name: self.sums_of(job, given[name]) for name in self.gradients}
        turns = self.turns(job)
        self._begin_boxes(job)
        own = [delta, *(x for name, x in sums.items() if x is not given[name]), *([] if turns is None else [turns])]
        try:
            n = self.submit_deltas(job, {**given, "delta": delta})
            if self.pairwise:
                self.submit_backward(job, {**given, **sums, "delta": delta}, turns)
                n += len(self.tasks)
            return n + sum(self.submit_add(job, sums[x], given[x]) for x in sums if sums[x] is not given[x])
        finally:
            for tensor in own:
                tensor.unregister(DROP_LATER)

    def submit_backward(
        self,
        job: Job,
        given: Mapping[str, Handles],
        turns: Handles | None,
        some: slice | np.ndarray = slice(None),
    ) -> None:
        """Submit the tasks of pairs of tiles, or of some of them; gradients are sums in accumulators."""
        p, spec = Pairs(*(x[some] for x in vars(self.pairs).values())), self.spec
        rows = *unit_of(p.batch, p.head, spec.heads, self.heads), p.query_tile
        of_one = of_keys(self.heads, spec.group)
        keys = *unit_of(p.batch, p.head // spec.group, spec.kv_heads, of_one), p.key_tile
        columns = [given[name].handles[keys if name in OF_KEYS else rows] for name in self.names]
        modes = ["RW" if name in GRADIENTS else "R" for name in self.names]
        if self.arrays is not None:
            assert turns is not None
            columns.append(turns.handles[0, 0, self._turn[some]])
            modes.append("RW")
        for box, tensor in zip(self.boxes, self.boxed, strict=True):
            columns.append(tensor.handles[0, 0, box.number(**_places(p))])
            modes.append("RW")
        tasks = self.tasks[some]
        tasks["turned"] = turned_of(*(given[name] for name in self.names))
        numbers = np.tile([job.runtime.constant(mode) for mode in modes], (len(tasks), 1))
        handles = np.stack(columns, axis=1)
        self.program.submit(job, codelet("backward", spec.dtype), handles, numbers, tasks)

    @property
    def pairwise(self) -> bool:
        """Whether pairs of tiles give anything that is wanted; sinks get theirs from rows alone."""
        return bool(self.gradients) or self.arrays is not None

    def totals(self) -> dict[int, np.ndarray]:
        """The gradients of captured arrays, by their slots, when the tasks are done and `boxed` is unregistered: what
        workers of either kind have summed up."""
        found = {} if self.arrays is None else self.arrays.sums.totals()
        for box, memory in zip(self.boxes, self._box_sums, strict=False):  # without tasks there are none
            found[box.slot] = (found[box.slot] + box.total(memory)).astype(memory.dtype)
        return found

    def turns(self, job: Job) -> TiledTensor | None:
        """The handles that order tasks which add to the same elements of arrays; None without arrays."""
        return None if self.arrays is None else self._zeros(job, (1, 1, len(self._turns)), 1)

    def sums_of(self, job: Job, gradient: TiledTensor) -> TiledTensor:
        """The gradient; or sums of its own, if it cannot hold them."""
        if gradient.dtype is self.accumulator:
            return gradient
        return self._zeros(job, gradient.shape, gradient.rows, gradient.heads)

    def _begin_boxes(self, job: Job) -> None:
        """Sums of arrays on GPUs, zero, a handle each box. Who waits for the job unregisters `boxed`."""
        for box in self.boxes if len(self.tasks) else ():
            memory = np.zeros((1, 1, box.count * box.elements), self.accumulator.numpy)
            self._box_sums.append(memory)
            self.boxed.append(self._over(job, memory, box.elements))

    def _zeros(self, job: Job, shape: tuple[int, ...], rows: int, heads: int = 1) -> TiledTensor:
        return self._over(job, np.zeros(shape, self.accumulator.numpy), rows, heads)

    def _over(self, job: Job, memory: np.ndarray, rows: int, heads: int = 1) -> TiledTensor:
        job.hold(memory)  # which outlives the tensor: that is unregistered before its tasks have run
        made = partial(TiledTensor, memory.shape, self.accumulator, rows, heads=heads)
        return made(address=memory.ctypes.data, strides=memory.strides, keep=memory)

    def _backward_tasks(self) -> np.ndarray:
        spec, p = self.spec, self.pairs
        row, key = p.query_tile * self.tile_q, p.key_tile * self.tile_k
        tasks = np.zeros(len(row), TASK)
        tasks["begin"] = p.batch * spec.heads + p.head
        tasks["end"] = tasks["begin"] + 1
        tasks["heads"], tasks["step"] = self.heads, 1
        for n, name in enumerate(self.names):
            if name in OF_KEYS:
                tasks["rows"][:, n] = key
        rows, end = np.minimum(self.tile_q, spec.q_len - row), np.minimum(key + self.tile_k, spec.kv_len)
        anchor, kv_heads = anchor_of(self.anchors, p.batch, row - key), of_keys(self.heads, spec.group)
        sizes = {ROWS: rows, KEYS: end - key, ANCHOR: anchor, KV_HEADS: kv_heads}
        sizes |= dict(zip(FIRSTS, (p.batch, p.head, row, key), strict=True))
        for place, numbers in sizes.items():
            tasks["sizes"][:, place] = numbers
        copy = np.zeros_like(row) if self.arrays is None else self.arrays.copy_of(**_places(p))
        captures = np.full_like(row, self.program.block_word("captures"))
        tasks["values"][:, : len(VALUES)] = np.stack([row, rows, key, end, copy, captures], axis=1)
        tasks["tile"] = np.stack([p.batch, p.head, p.query_tile, p.key_tile], axis=1)
        tasks["priority"] = p.left
        pairs, cases = self.coverage.amount(p.batch, p.head, p.query_tile, p.key_tile)
        tasks["flops"] = self._flops_of_pair * pairs * self.heads
        identity = several(f"{self.program.kernel.identity} {self.gradients}", self.heads)
        tasks["footprint"] = footprints(identity, cases)
        return tasks

    @property
    def _flops_of_pair(self) -> float:
        """Of the products that are wanted: scores, dP where something needs dS, and one a gradient."""
        spec = self.spec
        sloped = self.arrays is not None or not {"dq", "dk"}.isdisjoint(self.gradients)
        columns = spec.head_size + sloped * spec.value_size
        columns += sum(spec.value_size if x == "dv" else spec.head_size for x in self.gradients)
        return 2.0 * columns

    def submit_deltas(self, job: Job, given: Tensors, first: tuple[int, int, int] = (0, 0, 0)) -> int:
        """delta of every query tile, and what its rows give to their sink: one head's sum gets them in their order, or
        dsinks (B, H, query tiles) has one for each. first: batch, head and query tile at which the tensors begin."""
        spec, queries = self.spec, given["lse"]
        grid = queries.grid
        batches, units, tile = (x.ravel().astype(np.int64) for x in np.indices(grid))
        batch, head = np.divmod((batches * grid[1] + units) * queries.heads, max(1, queries.shape[1]))
        words = DELTA | ({"dlse": DELTA_MORE["dlse"]} if "dlse" in given else {})
        words |= {"dsinks": DELTA_MORE["dsinks"]} if self.sunk else {}
        bindings = tuple((n, *pair) for n, pair in enumerate(words.values()))
        columns = [given[x].handles[batches, units, np.minimum(tile, given[x].grid[2] - 1)] for x in words]
        modes = [{"delta": "W", "dsinks": "RW"}.get(x, "R") for x in words]
        tasks = np.zeros(len(tile), TASK)
        tasks["begin"] = (batch + first[0]) * spec.heads + head + first[1]
        tasks["end"] = tasks["begin"] + 1
        tasks["heads"], tasks["step"] = queries.heads, 1
        tasks["turned"] = turned_of(*(given[x] for x in words))
        tasks["values"][:, 0] = np.minimum(queries.rows, queries.shape[2] - tile * queries.rows)
        tasks["sizes"][:, ROWS] = tasks["values"][:, 0]
        tasks["sizes"][:, SINK] = tasks["begin"] * self.accumulator.itemsize
        tasks["flops"] = 2.0 * spec.value_size * tasks["values"][:, 0] * queries.heads
        identity = several(f"{self._deltas.identity} {tuple(words)}", queries.heads)
        tasks["footprint"] = footprints(identity, tasks["values"][:, :1])
        tasks["tile"][:, :3] = np.stack([batch, head, tile], axis=1) + first
        tasks["priority"] = FIRST
        numbers = np.tile([job.runtime.constant(mode) for mode in modes], (len(tasks), 1))
        places = {x: n for n, x in enumerate(words)}
        gpu = cuda_gradients.delta(job.runtime, spec, places, queries.heads, scoring=self.scoring)
        program = Program(job.runtime, self._deltas, bindings, ("row_count",), cuda=gpu, heads=spec.heads)
        program.submit(job, codelet("delta", spec.dtype), np.stack(columns, axis=1), numbers, tasks)
        return len(tasks)

    def submit_add(self, job: Job, sums: TiledTensor, gradient: TiledTensor) -> int:
        """Sums, rounded once, to the gradient, tile by tile."""
        *unit, tile = (x.ravel() for x in np.indices(gradient.grid))
        batch, head = np.divmod((unit[0] * gradient.grid[1] + unit[1]) * gradient.heads, max(1, gradient.shape[1]))
        kernel = tile_kernels().adding(self.spec, gradient.shape[3])
        tasks = np.zeros(len(tile), TASK)
        tasks["end"] = np.minimum(gradient.rows, gradient.shape[2] - tile * gradient.rows)
        tasks["tile"][:, :3] = np.stack([batch, head, tile], axis=1)
        tasks["heads"], tasks["turned"] = gradient.heads, turned_of(sums, gradient)
        tasks["footprint"] = footprints(several(kernel.identity, gradient.heads), tasks["end"][:, None])
        tasks["priority"] = FIRST
        handles = np.stack([sums.handles.ravel(), gradient.handles.ravel()], axis=1)
        numbers = np.tile([job.runtime.constant(mode) for mode in ("R", "RW")], (len(tasks), 1))
        tasks["sizes"][:, ROWS] = tasks["end"]
        gpu = cuda_gradients.add(job.runtime, self.spec.dtype, gradient.shape[3], gradient.heads)
        program = Program(job.runtime, kernel, ADD, (), cuda=gpu, heads=gradient.shape[1])
        program.submit(job, codelet("add", self.spec.dtype), handles, numbers, tasks)
        return len(tasks)
