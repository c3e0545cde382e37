"""The gradients of one call on all ranks.

A pair of tiles is one task of five products, on the rank that has its keys: dK and dV are summed there, the sum of dQ
goes from rank to rank as its keys lie (journey.py), and Q, dO, lse and delta travel to the keys that these rows see.
Every sum is made in the order in which one process makes it, so the bits do not depend on the number of ranks.

Gradients of captured arrays are summed where pairs are computed; what ranks have is added up at the end. Where not both
dQ and one of dK and dV are wanted nothing of dQ travels: then it is summed where its rows are, to which keys and values
travel as in the forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from flashtile.dtypes import DTYPES, DType
from flashtile.engines.starpu import runtime
from flashtile.engines.starpu.backward import VALUES, BackwardFlow
from flashtile.engines.starpu.jobs import Job
from flashtile.engines.starpu.tiles import DROP, TiledTensor
from flashtile.engines.starpu.units import Handles
from flashtile.engines.starpu_mpi.bias import KEYS, ROWS, RowsOfBias, blocks_of, columns_of, from_columns, point
from flashtile.engines.starpu_mpi.collective import Cut, Exchange, agree, keys_seen, queries_seen
from flashtile.engines.starpu_mpi.journey import legs_of, stages_of
from flashtile.engines.starpu_mpi.link import Link
from flashtile.engines.starpu_mpi.order import first_use, steps_of
from flashtile.engines.starpu_mpi.parts import rows_of
from flashtile.kernels import ArrayShapes
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

Array = np.ndarray


class CollectiveBackward:
    """A planned backward call on this rank. Made and run on all ranks together, once."""

    def __init__(
        self,
        comm: Any,
        spec: AttentionSpec,
        cut: Cut,
        offsets: np.ndarray | None,
        scoring: Scoring | None,
        wanted: frozenset[str | int],
        arrays: ArrayShapes,
        bias: RowsOfBias | None = None,
    ) -> None:
        """bias: as for Collective."""
        self.comm, self.spec, self.cut, self.wanted = comm, spec, cut, wanted
        self.bias, self._slot = bias, -1
        self.slots = sorted(n for n, _ in arrays)  # as their sums are
        self.runtime = runtime.ensure()
        self.link = self.runtime.once(Link)
        offsets = offsets if spec.offset is None else None
        made = partial(
            BackwardFlow, self.runtime, spec, cut.tile, cut.tile, offsets=offsets, scoring=scoring, order=steps_of
        )
        for_rows, for_keys = wanted & {"q", "sinks"}, wanted & {"k", "v"}
        self.by_keys = bool(for_keys)  # gradients of arrays are summed where the keys of a pair are, else its rows
        self.travels = "q" in wanted and bool(for_keys)  # sums of dQ do
        with self.runtime.working():
            if self.travels:
                self.rows = self.keys = made(wanted=for_rows | for_keys, arrays=arrays, axis="j")
                # As submitted, place by place: a rank that first finished its last key tiles, whose chains have most
                # left, would keep the ranks before it waiting, and so all of them in turn.
                self.rows.tasks["priority"] = np.arange(len(self.rows.tasks))[::-1]
            elif for_keys:
                self.rows, self.keys = made(wanted=for_rows), made(wanted=for_keys, arrays=arrays, axis="j")
            else:
                self.rows, self.keys = made(wanted=for_rows, arrays=arrays), made(wanted=for_keys)
        self.with_arrays = self.keys if self.by_keys else self.rows
        touched = self.rows.coverage.touched()
        p, ranks = self.rows.pairs, cut.ranks
        query_owner, key_owner = cut.owners(spec.q_len), cut.owners(spec.kv_len)
        of_keys = first_use(ranks, query_owner[p.query_tile], p.key_tile, len(key_owner))
        of_rows = first_use(ranks, key_owner[p.key_tile], p.query_tile, len(query_owner))
        seen = partial(keys_seen, spec, cut, touched), partial(queries_seen, spec, cut, touched)
        self.of_keys = Exchange.of(comm, self.link, cut, spec.kv_len, seen[0], of_keys)
        self.of_rows = Exchange.of(comm, self.link, cut, spec.q_len, seen[1], of_rows)
        if bias is not None:
            assert scoring is not None and scoring.program is not None
            bias.check(spec, cut.tile, "backward")
            self._program, self._slot = scoring.program, bias.slot(scoring.program)
            if not self.travels:
                self._point(self.rows, bias.mine, ROWS)

    def _point(self, flow: BackwardFlow, part: Array, axis: int) -> None:
        """Let a flow's tasks read a part of the bias, of this rank's tiles along an axis."""
        own, tiles = self.of_rows.mine, flow.pairs.query_tile
        if axis == KEYS:
            own, tiles = self.of_keys.mine, flow.pairs.key_tile
        blocks = blocks_of(self._program, self._slot, part, axis, own, self.cut.tile)
        self._blocks = [*getattr(self, "_blocks", []), blocks, part]
        point(flow.tasks["values"][:, VALUES.index("captures")], tiles, own, blocks)

    def _columns(self) -> Array | None:
        """Room for the columns of a bias cut by rows, if tasks of this call read some."""
        if self.bias is None or not self.keys.pairwise:
            return None
        keys = len(rows_of(self.of_keys.mine, self.spec.kv_len, self.cut.tile))
        shape = self.bias.whole.shape
        return np.empty((*shape[:-1], keys if shape[-1] > 1 else 1), self.bias.mine.dtype)

    def run(self, given: Mapping[str, Array], sums: Mapping[str, Array]) -> tuple[Array | None, dict[int, Array]]:
        """Add the gradients of this rank's rows to those of dq, dk and dv in sums; given: do, q, k, v, o, lse, possibly
        dlse, all this rank's. Returns the gradients of sinks, (B, H), and of arrays by their slots: of all ranks; of a
        bias cut by rows this rank's rows.

        Raises: KernelError on every rank, naming the rank, the codelet and the tile that failed first.
        """
        dtype = DTYPES[self.spec.dtype]
        accumulator = DTYPES[dtype.accumulator]
        tensors: list[TiledTensor] = []
        named: dict[str, TiledTensor] = {}
        columns: list[Array] = []
        job = Job()
        dsinks = np.zeros((self.spec.batch, self.spec.heads, len(self.of_rows.mine)), accumulator.numpy)

        def tiled(x: Array, kind: DType, rows: int) -> TiledTensor:
            tensors.append(TiledTensor(x.shape, kind, rows, address=x.ctypes.data, strides=x.strides, keep=x))
            return tensors[-1]

        def place() -> None:
            for name, x in {**given, **sums}.items():
                named[name] = tiled(x, accumulator if name in ("lse", "dlse") else dtype, self.cut.tile)
            if "sinks" in self.wanted:
                named["dsinks"] = tiled(dsinks, accumulator, 1)
            named["delta"] = TiledTensor(given["lse"].shape, accumulator, self.cut.tile)
            tensors.append(named["delta"])
            columns.extend(x for x in [self._columns()] if x is not None)

        def exchange() -> None:
            for out in columns:
                assert self.bias is not None
                columns_of(self.comm, self.cut, self.spec, self.bias.mine, out)
                self._point(self.keys, out, KEYS)

        def compute() -> None:
            try:
                self._submit(job, named, tensors)
                job.wait()
            finally:
                job.drain()
                self.link.wait()

        with self.runtime.working():
            try:
                agree(self.comm, place)
                agree(self.comm, exchange)
                agree(self.comm, compute)
            finally:
                for x in tensors:
                    x.unregister(DROP if x.owned else None)
        return self._totals(dsinks)

    def _submit(self, job: Job, named: dict[str, TiledTensor], tensors: list[TiledTensor]) -> None:
        """Every transfer and task of this rank, in the order of one process."""
        self.rows.submit_deltas(job, named)
        sums: dict[str, TiledTensor] = {}
        for name in ("dq", "dk", "dv"):
            if name in named:
                sums[name] = self.rows.sums_of(job, named[name])
                if sums[name] is not named[name]:
                    tensors.append(sums[name])
        turns = self.with_arrays.turns(job)
        tensors.extend([] if turns is None else [turns])
        placed: dict[str, Handles] = {n: self.of_keys.place(x) for n, x in sums.items() if n != "dq"}
        placed |= {n: self.of_rows.place(x) for n, x in sums.items() if n == "dq"}
        transfers: tuple[tuple[Exchange, tuple[str, ...], bool], ...] = (
            (self.of_keys, ("k", "v"), self.rows.pairwise and not self.travels),
            (self.of_rows, ("q", "do", "lse", "delta"), self.keys.pairwise),
        )
        for exchange, names, needed in transfers:
            own = [named[name] for name in names]
            found = exchange.begin(own, tensors) if needed else [exchange.place(x) for x in own]
            placed |= dict(zip(names, found, strict=True))
        if self.travels:
            self._submit_stages(job, placed | {"dq": self.of_rows.room(sums["dq"], tensors)}, turns)
        else:
            for flow, some in self._runs():
                flow.submit_backward(job, placed, turns, some)
        for name, x in sums.items():
            if x is not named[name]:
                self.rows.submit_add(job, x, named[name])

    def _submit_stages(self, job: Job, placed: Mapping[str, Handles], turns: Handles | None) -> None:
        """The pairs of this rank's keys, and the way of the sums of dQ between them."""
        p, rank = self.rows.pairs, self.comm.Get_rank()
        legs = legs_of(p, self.of_rows.owner, self.of_keys.owner)
        tags = self.link.take_tags(len(legs.sender))
        handles = placed["dq"].handles[legs.batch, legs.head, legs.query_tile]
        for stage in stages_of(legs, np.flatnonzero(np.isin(p.key_tile, self.of_keys.mine)), rank):
            come, go = stage.come, stage.go
            self.link.receive(self.comm, handles[come], legs.sender[come], tags[come])
            job.runtime.unwritten.difference_update(handles[come].tolist())
            if len(stage.pairs):
                self.rows.submit_backward(job, placed, turns, stage.pairs)
            self.link.send(self.comm, handles[go], legs.receiver[go], tags[go], first=True)

    def _runs(self) -> list[tuple[BackwardFlow, np.ndarray]]:
        """Which flow submits which pairs, in their order: several in a row where one flow has them."""
        p, flows = self.rows.pairs, [self.rows, self.keys]
        uses = np.isin(p.query_tile, self.of_rows.mine), np.isin(p.key_tile, self.of_keys.mine)
        which, pair = np.nonzero([use & flow.pairwise for flow, use in zip(flows, uses, strict=True)])
        order = np.lexsort((which, pair))
        which, pair = which[order], pair[order]
        starts = np.flatnonzero(np.diff(which, prepend=-1))
        return [(flows[which[part[0]]], pair[part]) for part in np.split(np.arange(len(pair)), starts[1:]) if len(part)]

    def _totals(self, dsinks: Array) -> tuple[Array | None, dict[int, Array]]:
        """Of all ranks. Each element comes from one of them, the others have 0 there, so sums are exact; but for arrays
        without room for copies to whose elements several ranks add."""
        from mpi4py import MPI

        found, arrays = None, self.with_arrays.arrays
        if "sinks" in self.wanted:
            whole = np.zeros((*dsinks.shape[:2], len(self.of_rows.owner)), dsinks.dtype)
            whole[:, :, self.of_rows.mine] = dsinks
            self.comm.Allreduce(MPI.IN_PLACE, whole, MPI.SUM)
            found = whole.sum(axis=2, dtype=np.float64).astype(dsinks.dtype)
        if arrays is None:
            return found, {}
        # Of a bias cut by rows a rank has its own rows, or the columns of its keys, if it has columns.
        apart = self._slot if self.bias is not None and (not self.by_keys or self.bias.whole.shape[-1] > 1) else None
        for slot, memory in zip(self.slots, arrays.sums.memory, strict=True):
            if slot != apart:
                whole = memory if arrays.apart else memory.astype(np.float64)
                self.comm.Allreduce(MPI.IN_PLACE, whole, MPI.SUM)
                memory[...] = whole
        totals = self.with_arrays.totals()
        if self._slot in totals:
            whole, rows = totals[self._slot], rows_of(self.of_rows.mine, self.spec.q_len, self.cut.tile)
            totals[self._slot] = whole[..., rows, :]
            if self.by_keys and apart is not None:
                from_columns(self.comm, self.cut, self.spec, whole, totals[self._slot])
        return found, totals
