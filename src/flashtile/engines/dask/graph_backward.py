"""The graph of a call's gradients: of each query tile a chain for dQ, of each key tile one for dK and dV, in the orders
in which the StarPU engine adds them up. What of the results is not asked for is not computed, tiles that nobody sees
are not in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import numpy as np

from flashtile.engines.dask.graph import bias_key, picked, sizes_of
from flashtile.engines.dask.operands import Cut, of, of_bias
from flashtile.engines.dask.work_backward import BackwardWork, added, cast, deltas, gradients, of_sinks, totals
from flashtile.engines.starpu.coverage import coverage_of
from flashtile.kernels import tile_kernels

READ = ("q", "do", "lse", "delta", "k", "v")  # what a task gets, in this order


@dataclass(frozen=True)
class Found:
    """Dask arrays of four axes, None where not wanted; those of sinks (B, H), and of captured arrays by their slots."""

    q: Any
    k: Any
    v: Any
    sinks: Any
    totals: dict[int, Any]


def result(
    work: BackwardWork,
    cut: Cut,
    arrays: Mapping[str, Any],
    token: str,
    dtype: Any,
    wanted: frozenset[str | int],
    *,
    bias: Any = None,
    rounded: bool = True,
) -> Found:
    """The graph of a call on q, k, v, do, o, (B, H, S, 1) lse and possibly dlse, of any kind that `operands.of` takes.

    rounded: gradients are in dtype, else in accumulators. bias: as in graph.result.
    """
    layers = _Layers(work, cut, arrays, token, wanted, bias, rounded)
    dtype = dtype if rounded else work.accumulator
    return layers.found(dtype)


class _Layers:
    """The tasks of all chains, and what takes results out of them."""

    def __init__(
        self,
        work: BackwardWork,
        cut: Cut,
        arrays: Mapping[str, Any],
        token: str,
        wanted: frozenset[str | int],
        bias: Any,
        rounded: bool,
    ) -> None:
        self.work, self.cut, self.wanted, self.rounded = work, cut, wanted, rounded
        self.name = f"flashtile-gradients-{token}"
        spec = work.spec
        self.rows, self.keys = sizes_of(spec.q_len, cut.tile_q), sizes_of(spec.kv_len, cut.tile_k)
        self.bias = None if bias is None else of_bias(bias, cut, self.rows, self.keys)
        self.operands = {
            n: of(x, f"flashtile-{n}-{token}", cut, tile=cut.tile_k if n in "kv" else cut.tile_q, grouped=n not in "kv")
            for n, x in arrays.items()
        }
        anchors = np.array([spec.offset or 0], np.int64) if work.offsets is None else work.offsets
        panel = tile_kernels().rows_at_once(spec, "backward")
        touched = coverage_of(spec, work.scoring, panel, work.tile_q, work.tile_k, anchors).touched()
        self.touched = np.broadcast_to(touched, (spec.batch, spec.heads, *touched.shape[2:]))
        if not spec.kv_len:  # a key tile that nobody meets
            self.touched = np.zeros((*self.touched.shape[:3], 1), bool)
        self.layer: dict[Any, Any] = {f"{self.name}-work": work}
        for operand in self.operands.values():
            self.layer |= operand.graph or {}

    def found(self, dtype: Any) -> Found:
        """Dask arrays of all that is wanted."""
        import dask.array as da
        from dask.highlevelgraph import HighLevelGraph

        cut, spec, name = self.cut, self.work.spec, self.name
        of_keys = "".join(n for n in "kv" if n in self.wanted)
        rows, keys = self._rows(), self._keys(of_keys) if of_keys else {}
        needs = [x.collection for x in self.operands.values() if x.collection is not None]
        needs += [] if self.bias is None else [self.bias]
        graph = HighLevelGraph.from_collections(name, self.layer, dependencies=needs)

        def array(what: str, at: int, ends: dict[Any, Any], heads: Any, lengths: Any, size: int) -> Any:
            tasks = {(*where, 0): (_taken, key, at, dtype) for where, key in ends.items()}
            chunks = cut.batches, heads, lengths, (size,)
            meta = np.empty((0,) * 4, dtype)
            return da.Array(picked(graph, name, what, tasks), f"{name}-{what}", chunks, dtype=dtype, meta=meta)

        made: dict[str, Any] = dict.fromkeys(("q", "k", "v"))
        if "q" in self.wanted:
            made["q"] = array("dq", 0, rows, cut.heads, self.rows, spec.head_size)
        for at, n in enumerate(of_keys):
            size = spec.head_size if n == "k" else spec.value_size
            made[n] = array(f"d{n}", at, keys, cut.kv_heads, self.keys, size)
        return Found(**made, sinks=self._sinks(graph), totals=self._totals(graph))

    def _sinks(self, graph: Any) -> Any:
        import dask.array as da

        if "sinks" not in self.wanted:
            return None
        spec, real = self.work.spec, self.work.accumulator
        parts = [[b, h, self._delta(*at)] for b, h, at in self._query_tiles()]
        shape = spec.batch, spec.heads
        graph = picked(graph, self.name, "dsinks", {(0, 0): (of_sinks, parts, shape, real)})
        return da.Array(
            graph, f"{self.name}-dsinks", tuple((n,) for n in shape), dtype=real, meta=np.empty((0, 0), real)
        )

    def _totals(self, graph: Any) -> dict[int, Any]:
        import dask.array as da

        found, real = {}, self.work.accumulator
        for slot, shape in self.work.arrays:
            what = f"array-{slot}"
            task = (getitem, (self.name, "totals"), slot)
            own = picked(graph, self.name, what, {(0,) * len(shape): task})
            chunks = tuple((n,) for n in shape)
            meta = np.empty((0,) * len(shape), real)
            found[slot] = da.Array(own, f"{self.name}-{what}", chunks, dtype=real, meta=meta)
        return found

    def _query_tiles(self) -> Iterator[tuple[int, int, tuple[int, int, int]]]:
        """(first batch, first head, block) of every block of queries."""
        for b, batch in enumerate(self.cut.firsts(self.cut.batches)):
            for h, head in enumerate(self.cut.firsts(self.cut.heads)):
                for i in range(self.touched.shape[2]):
                    yield batch, head, (b, h, i)

    def _delta(self, b: int, h: int, i: int) -> Any:
        """The key of the task that has delta of a block of queries."""
        key = (self.name, "delta", b, h, i)
        if key not in self.layer:
            do, o, lse = (self.operands[n].block(b, h, i) for n in ("do", "o", "lse"))
            dlse = self.operands["dlse"].block(b, h, i) if "dlse" in self.operands else None
            first = self.cut.firsts(self.cut.batches)[b], self.cut.firsts(self.cut.heads)[h]
            self.layer[key] = (deltas, f"{self.name}-work", *first, i, "sinks" in self.wanted, do, o, lse, dlse)
        return key

    def _rows(self) -> dict[tuple[int, int, int], Any]:
        """The chains of query tiles, where something needs them: their last keys, or zeros."""
        ends: dict[tuple[int, int, int], Any] = {}
        sums: Any = []
        arrays = bool(self.work.arrays)
        for batch, head, (b, h, i) in self._query_tiles():
            self._delta(b, h, i)
            if "q" not in self.wanted and not arrays:
                continue
            own = min(i * self.work.tile_q // self.work.tile_k, len(self.keys) - 1)
            order = [(i, j) for j in (*range(own, -1, -1), *range(len(self.keys) - 1, own, -1))]
            end = self._chain("q", (b, h), (batch, head), i, order)
            if end is None:
                shape = self.cut.batches[b], self.cut.heads[h], self.rows[i], self.work.spec.head_size
                end = self._zeros([shape])
            elif arrays:
                key = (self.name, "sum", b, h, i)
                self.layer[key] = (added, sums, end)
                sums = key
            ends[b, h, i] = end
        if arrays:
            self.layer[self.name, "totals"] = (totals, f"{self.name}-work", sums)
        return ends

    def _keys(self, names: str) -> dict[tuple[int, int, int], Any]:
        """The chains of key tiles, likewise."""
        ends: dict[tuple[int, int, int], Any] = {}
        own = np.arange(len(self.rows)) * self.work.tile_q // self.work.tile_k
        own = np.minimum(own, len(self.keys) - 1)
        spec, cut = self.work.spec, self.cut
        for b, batch in enumerate(cut.firsts(cut.batches)):
            for h, head in enumerate(cut.firsts(cut.heads)):
                for j, keys in enumerate(self.keys):
                    order = [(int(i), j) for i in (*np.flatnonzero(own >= j), *np.flatnonzero(own < j))]
                    end = self._chain(names, (b, h), (batch, head), j, order)
                    if end is None:
                        sizes = [spec.head_size if n == "k" else spec.value_size for n in names]
                        end = self._zeros([(cut.batches[b], cut.kv_heads[h], keys, size) for size in sizes])
                    ends[b, h, j] = end
        return ends

    def _zeros(self, shapes: list[tuple[int, ...]]) -> Any:
        return (_zeros, f"{self.name}-work", [list(x) for x in shapes], self.rounded)

    def _chain(
        self, names: str, block: tuple[int, int], first: tuple[int, int], tile: int, order: list[tuple[int, int]]
    ) -> Any:
        """The tasks of one chain, in this order of (query tile, key tile): the last key, None without any."""
        (b, h), (batch, head) = block, first
        size = self.cut.batches[b], self.cut.heads[h]
        seen = self.touched[batch : batch + size[0], head : head + size[1]]
        steps = [(i, j) for i, j in order if seen[:, :, i, j].any()]
        state = None
        for n, (i, j) in enumerate(steps):
            meet = True if seen[:, :, i, j].all() else seen[:, :, i, j].copy()
            blocks = {x: self.operands[x].block(b, h, j if x in "kv" else i) for x in READ if x != "delta"}
            blocks["delta"] = self._delta(b, h, i)
            given = [blocks[x] for x in READ]
            extra = () if self.bias is None else (bias_key(self.bias, b, h, i, j),)
            final = self.rounded and n == len(steps) - 1
            key = (self.name, names, b, h, tile, n)
            place = names, batch, head, i, j, meet, final
            self.layer[key] = (gradients, f"{self.name}-work", *place, state, given, *extra)
            state = key
        return state


def _taken(state: Any, at: int, dtype: Any) -> np.ndarray:
    """One gradient of a chain's last state."""
    found: np.ndarray = state[0][at].view(dtype)  # bfloat16 is computed as its bits
    return found


def _zeros(work: BackwardWork, shapes: list[list[int]], rounded: bool) -> Any:
    """The state of a chain without tasks."""
    sums = [np.zeros(shape, work.accumulator) for shape in shapes]
    return ([cast(work, x) for x in sums] if rounded else sums), []
