"""The gradients of one call on all ranks.

Every gradient is summed where its rows are: dQ on the rank that has the query tile, dK and dV on the one that has the
key tile, each in the order in which one process would. So no sum travels, and the bits do not depend on the number of
ranks. Keys and values travel to the rows that see them, as in the forward; Q, dO, lse and delta travel to the keys that
these rows see. A pair of tiles on one rank is one task of five products; on two ranks scores and dP are computed on
both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from flashtile.dtypes import DTYPES, DType
from flashtile.engines.starpu import runtime
from flashtile.engines.starpu.backward import BackwardFlow
from flashtile.engines.starpu.jobs import Job
from flashtile.engines.starpu.tiles import DROP, TiledTensor
from flashtile.engines.starpu.units import Handles
from flashtile.engines.starpu_mpi.collective import Cut, Exchange, agree, keys_seen, queries_seen
from flashtile.engines.starpu_mpi.link import Link
from flashtile.errors import UnavailableError
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
    ) -> None:
        self.comm, self.spec, self.cut, self.wanted = comm, spec, cut, wanted
        self.runtime = runtime.ensure()
        self.link = self.runtime.once(Link)
        offsets = offsets if spec.offset is None else None
        made = partial(BackwardFlow, self.runtime, spec, cut.tile, cut.tile, offsets=offsets, scoring=scoring)
        of_rows, of_keys = wanted & {"q", "sinks"}, wanted & {"k", "v"}
        with self.runtime.working():
            # Arrays have one accumulator on a rank, to which one flow adds: that of its rows.
            self.rows = made(wanted=of_rows, arrays=arrays)
            self.keys = made(wanted=of_keys)
            self.both = None if arrays else made(wanted=of_rows | of_keys)
        if self.rows.arrays is not None and not self.rows.arrays.apart_by_rows and cut.ranks > 1:
            raise UnavailableError(
                "wrt: got an array of more than 4 MB in all its copies, to an element of which rows of several tiles "
                "add, expected one rank"
            )
        touched = self.rows.coverage.touched()
        self.of_keys = Exchange.of(comm, self.link, cut, spec.kv_len, lambda r: keys_seen(spec, cut, touched, r))
        self.of_rows = Exchange.of(comm, self.link, cut, spec.q_len, lambda r: queries_seen(spec, cut, touched, r))

    def run(self, given: Mapping[str, Array], sums: Mapping[str, Array]) -> tuple[Array | None, dict[int, Array]]:
        """Add the gradients of this rank's rows to those of dq, dk and dv in sums; given: do, q, k, v, o, lse, possibly
        dlse, all this rank's. Returns the gradients of sinks, (B, H), and of arrays by their slots: of all ranks.

        Raises: KernelError on every rank, naming the rank, the codelet and the tile that failed first.
        """
        dtype = DTYPES[self.spec.dtype]
        accumulator = DTYPES[dtype.accumulator]
        tensors: list[TiledTensor] = []
        named: dict[str, TiledTensor] = {}
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
        turns = self.rows.turns(job)
        tensors.extend([] if turns is None else [turns])
        placed: dict[str, Handles] = {n: self.of_keys.place(x) for n, x in sums.items() if n != "dq"}
        placed |= {n: self.of_rows.place(x) for n, x in sums.items() if n == "dq"}
        transfers: tuple[tuple[Exchange, tuple[str, ...], bool], ...] = (
            (self.of_keys, ("k", "v"), self.rows.pairwise),
            (self.of_rows, ("q", "do", "lse", "delta"), self.keys.pairwise),
        )
        for exchange, names, needed in transfers:
            own = [named[name] for name in names]
            found = exchange.begin(own, tensors) if needed else [exchange.place(x) for x in own]
            placed |= dict(zip(names, found, strict=True))
        for flow, some in self._runs():
            flow.submit_backward(job, placed, turns, some)
        for name, x in sums.items():
            if x is not named[name]:
                self.rows.submit_add(job, x, named[name])

    def _runs(self) -> list[tuple[BackwardFlow, np.ndarray]]:
        """Which flow submits which pairs, in their order: several in a row where one flow has them."""
        p = self.rows.pairs
        rows, keys = np.isin(p.query_tile, self.of_rows.mine), np.isin(p.key_tile, self.of_keys.mine)
        flows = [self.rows, self.keys, *([] if self.both is None else [self.both])]
        uses: list[Callable[[], np.ndarray]] = [lambda: rows, lambda: keys]
        if self.both is not None:
            uses = [lambda: rows & ~keys, lambda: keys & ~rows, lambda: rows & keys]
        which, pair = np.nonzero([use() & flow.pairwise for flow, use in zip(flows, uses, strict=True)])
        order = np.lexsort((which, pair))
        which, pair = which[order], pair[order]
        starts = np.flatnonzero(np.diff(which, prepend=-1))
        return [(flows[which[part[0]]], pair[part]) for part in np.split(np.arange(len(pair)), starts[1:]) if len(part)]

    def _totals(self, dsinks: Array) -> tuple[Array | None, dict[int, Array]]:
        """Of all ranks. Each element comes from one of them, the others have 0 there: the sums are exact."""
        from mpi4py import MPI

        found = None
        if "sinks" in self.wanted:
            whole = np.zeros((*dsinks.shape[:2], len(self.of_rows.owner)), dsinks.dtype)
            whole[:, :, self.of_rows.mine] = dsinks
            self.comm.Allreduce(MPI.IN_PLACE, whole, MPI.SUM)
            found = whole.sum(axis=2, dtype=np.float64).astype(dsinks.dtype)
        if self.rows.arrays is not None:
            for memory in self.rows.arrays.sums.memory:
                self.comm.Allreduce(MPI.IN_PLACE, memory, MPI.SUM)
        return found, self.rows.totals()
