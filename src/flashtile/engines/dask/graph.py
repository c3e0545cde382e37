"""The graph of a call: for each block of heads and each query tile a chain of tasks, one for each key tile that some
row of it sees, in the order in which the StarPU engine takes them. Tiles that nobody sees are not in the graph, so
what would compute or read them never runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import numpy as np

from flashtile.dtypes import DTYPES
from flashtile.engines.dask.operands import Cut, Operand, of, of_bias
from flashtile.engines.dask.work import CARRY, LAST, NO_KEYS, VISIT, Work, step
from flashtile.engines.starpu.coverage import coverage_of
from flashtile.engines.starpu.flow import pairs_of
from flashtile.kernels import tile_kernels


@dataclass(frozen=True)
class Result:
    """o (B, H, S_q, D_v) and lse (B, H, S_q) as Dask arrays, of so many tasks."""

    o: Any
    lse: Any
    tasks: int


def result(work: Work, cut: Cut, arrays: Sequence[Any], token: str, dtype: Any, bias: Any = None) -> Result:
    """The graph of a call on q, k and v, of any kind that `operands.of` takes.

    bias: a Dask array whose blocks the tasks read instead of the captured array in work's slot `bias`.
    """
    import dask.array as da
    from dask.highlevelgraph import HighLevelGraph

    spec, (q, k, v) = work.spec, arrays
    operands = [
        of(q, f"flashtile-q-{token}", cut, tile=cut.tile_q, grouped=True),
        of(k, f"flashtile-k-{token}", cut, tile=cut.tile_k, grouped=False),
        of(v, f"flashtile-v-{token}", cut, tile=cut.tile_k, grouped=False),
    ]
    rows, keys = sizes_of(spec.q_len, cut.tile_q), sizes_of(spec.kv_len, cut.tile_k)
    needs = [x.collection for x in operands if x.collection is not None]
    if bias is not None:
        bias = of_bias(bias, cut, rows, keys)
        needs.append(bias)
    name = f"flashtile-attention-{token}"
    layer: dict[Any, Any] = {f"{name}-work": work}
    for operand in operands:
        layer |= operand.graph or {}
    ends, count = _chains(layer, name, work, cut, operands, bias)
    graph = HighLevelGraph.from_collections(name, layer, dependencies=needs)
    chunks = cut.batches, cut.heads, rows
    real = DTYPES[DTYPES[spec.dtype].accumulator].numpy
    o = picked(graph, name, "o", {(*at, 0): (getitem, key, 0) for at, key in ends.items()})
    lse = picked(graph, name, "lse", {at: (getitem, key, 1) for at, key in ends.items()})
    return Result(
        da.Array(o, f"{name}-o", (*chunks, (spec.value_size,)), dtype=dtype, meta=np.empty((0,) * 4, dtype)),
        da.Array(lse, f"{name}-lse", chunks, dtype=real, meta=np.empty((0,) * 3, real)),
        count,
    )


def picked(graph: Any, name: str, what: str, tasks: dict[Any, Any]) -> Any:
    """The graph with a layer that takes one result out of each chain's last."""
    from dask.highlevelgraph import HighLevelGraph

    own = f"{name}-{what}"
    layers = {**graph.layers, own: {(own, *at): task for at, task in tasks.items()}}
    return HighLevelGraph(layers, {**graph.dependencies, own: {name}})


def sizes_of(length: int, tile: int) -> tuple[int, ...]:
    """The rows of each tile."""
    return tuple(min(tile, length - first) for first in range(0, length, tile)) or (0,)


def _chains(
    layer: dict[Any, Any], name: str, work: Work, cut: Cut, operands: list[Operand], bias: Any
) -> tuple[dict[tuple[int, int, int], Any], int]:
    """Put every task into the layer: the keys of the last ones, by batch block, head block and query tile."""
    q, k, v = operands
    visits = Visits(work)
    ends: dict[tuple[int, int, int], Any] = {}
    count = 0
    for b, batch in enumerate(cut.firsts(cut.batches)):
        for h, head in enumerate(cut.firsts(cut.heads)):
            for i in range(visits.flags.shape[2]):
                state = None
                steps = list(visits.chain(slice(batch, batch + cut.batches[b]), slice(head, head + cut.heads[h]), i))
                for n, (j, todo) in enumerate(steps):
                    key = (name, b, h, i, n)
                    keys = (None, None) if j < 0 else (k.block(b, h, j), v.block(b, h, j))
                    extra = () if bias is None or j < 0 else (bias_key(bias, b, h, i, j),)
                    place = batch, head, i, j, todo, n == len(steps) - 1
                    layer[key] = (step, f"{name}-work", *place, state, q.block(b, h, i), *keys, *extra)
                    state = key
                ends[b, h, i] = state
                count += len(steps)
    return ends, count


def bias_key(bias: Any, *numbers: int) -> Any:
    """The key of the block of a bias for a block of scores."""
    own = numbers[4 - bias.ndim :]
    return (bias.name, *(n if len(sizes) > 1 else 0 for n, sizes in zip(own, bias.chunks, strict=True)))


class Visits:
    """Who meets whom: `flags` (B, H, query tiles, key tiles) of what a task does for each head."""

    def __init__(self, work: Work) -> None:
        spec = work.spec
        anchors = np.array([spec.offset or 0], np.int64) if work.offsets is None else work.offsets
        panel = tile_kernels().rows_at_once(spec)
        pairs = pairs_of(spec, coverage_of(spec, work.scoring, panel, work.tile_q, work.tile_k, anchors))
        key_tiles = max(1, -(-spec.kv_len // work.tile_k))
        self.flags = np.zeros((spec.batch, spec.heads, -(-spec.q_len // work.tile_q), key_tiles), np.uint8)
        doing = VISIT + CARRY * (pairs.place > 0) + LAST * (pairs.left == 0) + NO_KEYS * (pairs.key_tile < 0)
        self.flags[pairs.batch, pairs.head, pairs.query_tile, np.maximum(pairs.key_tile, 0)] = doing
        self.own = np.minimum(np.arange(self.flags.shape[2]) * work.tile_q // work.tile_k, key_tiles - 1)

    def chain(self, batches: slice, heads: slice, i: int) -> Iterator[tuple[int, Any]]:
        """(key tile or -1, what to do for each head of a block), in order."""
        flags = self.flags[batches, heads, i]
        own, last = int(self.own[i]), flags.shape[2] - 1
        for j in (*range(own, -1, -1), *range(last, own, -1)):
            todo = flags[:, :, j]
            if not todo.any():
                continue
            # A head without keys is settled with any others' tile; alone, without one.
            alone = bool((todo[todo > 0] & NO_KEYS).all())
            yield (-1 if alone else j), int(todo.flat[0]) if (todo == todo.flat[0]).all() else todo.copy()
