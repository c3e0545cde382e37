"""engine="dask": the gradients of arrays in memory, by a graph over tiles that are views of them."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass, field

import numpy as np

from flashtile.arrays import view
from flashtile.dtypes import DTYPES
from flashtile.engines import BoundBackward
from flashtile.engines.dask.engine import check_family
from flashtile.engines.dask.operands import Cut
from flashtile.engines.starpu.engine import Arrays, tile_sizes
from flashtile.engines.starpu.gradients import Addresses
from flashtile.errors import UnavailableError
from flashtile.kernels import ArrayShapes, BackwardLayout, Family
from flashtile.progress import Report
from flashtile.spec import AttentionSpec

LARGEST_ARRAY = 4 << 20  # bytes of a captured array's sums, of which each chain of tasks has its own


def check_arrays(spec: AttentionSpec, arrays: ArrayShapes) -> None:
    """Raise UnavailableError for gradients of captured arrays that are too large to be part of a task's result."""
    size = DTYPES[DTYPES[spec.dtype].accumulator].itemsize
    for _, shape in arrays:
        if (nbytes := math.prod(shape) * size) > LARGEST_ARRAY:
            raise UnavailableError(
                f"wrt: got an array of shape {shape} with engine 'dask', {nbytes} bytes of sums in each task, expected "
                f"at most {LARGEST_ARRAY}, or engine 'direct' or 'starpu'"
            )


def bind_backward(spec: AttentionSpec, layout: BackwardLayout, family: Family, arrays: ArrayShapes) -> BoundBackward:
    """Bind a spec and a layout. Raises: UnavailableError for another kernel than the generated one."""
    check_family(family)
    check_arrays(spec, arrays)
    call = _Call(spec, layout, arrays)
    return BoundBackward(_Given, call.run, lambda params: params.found)


@dataclass
class _Given(Addresses):
    found: dict[int, np.ndarray] = field(default_factory=dict)  # gradients of captured arrays, when it has run


class _Call(Arrays):
    """A prepared call."""

    def __init__(self, spec: AttentionSpec, layout: BackwardLayout, arrays: ArrayShapes) -> None:
        super().__init__(spec, layout, tile_sizes(spec, "backward"))
        self.arrays = arrays
        self.cut = Cut((1,) * spec.batch, (1,) * spec.kv_heads, spec.group, self.tile_q, self.tile_k)

    def run(self, params: _Given, report: Report | None = None) -> None:
        """Compute the graph and add its results to where they belong."""
        import dask

        from flashtile.engines.dask.graph_backward import result
        from flashtile.engines.dask.work_backward import BackwardWork, cast

        spec, real = self.spec, self.accumulator.numpy
        if not spec.batch * spec.q_len:  # nothing to add
            params.found = {number: np.zeros(shape, real) for number, shape in self.arrays}
            return
        offsets = self._offsets(params.offsets)
        work = BackwardWork(spec, params.scoring, offsets, self.tile_q, self.tile_k, arrays=self.arrays)
        given = {name: self._view(name, getattr(params, name)) for name in ("q", "k", "v", "o", "do")}
        shape, size = (*self.shapes["o"][:3], 1), real.itemsize
        steps = shape[1] * shape[2] * size, shape[2] * size, size, size
        given |= {n: view(at, shape, steps, real) for n in ("lse", "dlse") if (at := getattr(params, n))}
        wanted: set[str | int] = {n for n in "qkv" if getattr(params, f"d{n}")}
        wanted |= {"sinks"} if params.dsinks else set()
        found = result(work, self.cut, given, uuid.uuid4().hex, real, frozenset(wanted), rounded=False)
        sums = {n: x for n, x in vars(found).items() if x is not None and n != "totals"}
        sums, params.found = dask.compute(sums, found.totals)
        if params.dsinks:
            target = view(params.dsinks, (spec.batch, spec.heads), (spec.heads * size, size), real, writable=True)
            target += sums.pop("sinks")
        for name, x in sums.items():
            whole = self._view(f"d{name}", getattr(params, f"d{name}"), writable=True)
            whole[...] = cast(work, np.ascontiguousarray(x), np.ascontiguousarray(whole))
