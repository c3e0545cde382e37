"""engine="starpu": the gradients of a call as a task flow over tiles of its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from flashtile.engines import BoundBackward
from flashtile.engines.starpu import runtime
from flashtile.engines.starpu.backward import BackwardFlow
from flashtile.engines.starpu.engine import Arrays, tile_sizes
from flashtile.engines.starpu.jobs import Job
from flashtile.engines.starpu.tiles import TiledTensor
from flashtile.errors import UnavailableError
from flashtile.kernels import ArrayShapes, BackwardLayout, Family
from flashtile.progress import Report
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    from flashtile.score.options import Scoring


@dataclass
class Addresses:
    """What one call adds to a prepared one; 0: not given, or not wanted."""

    q: int
    k: int
    v: int
    o: int
    lse: int
    do: int
    dlse: int
    dq: int
    dk: int
    dv: int
    offsets: int
    scoring: Scoring | None = None
    dsinks: int = 0
    flow: BackwardFlow | None = None  # when it has run


def bind_backward(spec: AttentionSpec, layout: BackwardLayout, family: Family, arrays: ArrayShapes) -> BoundBackward:
    """Bind a spec and a layout. Raises: UnavailableError for kernels that only Python can run."""
    if family.name != "cpu":
        raise UnavailableError(f"kernel: got {family.name!r} with engine 'starpu', expected 'cpu': no Python in tasks")
    call = _Call(spec, layout, arrays)
    return BoundBackward(Addresses, call.run, call.totals)


class _Call(Arrays):
    """A prepared call. Its flow is kept, for a start of StarPU, where it holds no values of the call."""

    def __init__(self, spec: AttentionSpec, layout: BackwardLayout, arrays: ArrayShapes) -> None:
        super().__init__(spec, layout, tile_sizes(spec, "backward"))
        self.arrays = arrays
        self._kept: dict[frozenset[str], tuple[runtime.Runtime, BackwardFlow]] = {}

    def run(self, params: Addresses, report: Report | None = None) -> None:
        """Submit every tile of the call and wait. Raises: KernelError naming codelet and tile."""
        rt = runtime.ensure()
        tensors: dict[str, TiledTensor] = {}
        beside: dict[str, np.ndarray] = {}  # gradients whose rows no handle describes
        with rt.working():
            params.flow = flow = self._flow_of(rt, params)
            job = Job()
            try:
                for name in ("q", "k", "v", "o", "do"):
                    tensors[name] = self._tiles(name, self._reachable(name, getattr(params, name)), flow.heads)
                for name in ("lse", "dlse"):
                    if address := getattr(params, name):
                        tensors[name] = self._of_rows(address, flow.heads)
                for name in flow.gradients:
                    where = getattr(params, name)
                    if not self._fits(name):
                        where = beside[name] = np.ascontiguousarray(self._view(name, where))
                    tensors[name] = self._tiles(name, where, flow.heads)
                if params.dsinks:
                    tensors["dsinks"] = self._sinks(params.dsinks, flow.heads)
                total = flow.submit(job, tensors)
                job.wait(report, total)
            finally:
                job.drain()
                for tensor in (*tensors.values(), *flow.boxed):
                    tensor.unregister()
            for name, x in beside.items():
                self._view(name, getattr(params, name), writable=True)[...] = x

    def totals(self, params: Addresses) -> dict[int, np.ndarray]:
        """See BoundBackward."""
        return {} if params.flow is None else params.flow.totals()

    def _flow_of(self, rt: runtime.Runtime, call: Addresses) -> BackwardFlow:
        wanted = frozenset(name for name in "qkv" if getattr(call, f"d{name}")) | ({"sinks"} if call.dsinks else set())
        scoring = call.scoring
        if scoring is not None and scoring.program is scoring.sinks is scoring.keep is None:
            scoring = None
        names = ("q", "k", "v", "o", "do", *(f"d{name}" for name in wanted if name in "qkv"))
        heads = self._heads(rt, names, 5)
        make = partial(BackwardFlow, rt, self.spec, self.tile_q, self.tile_k, wanted=wanted, heads=heads)
        if self.spec.offset is None or scoring is not None:  # values that may differ from call to call
            return make(offsets=self._offsets(call.offsets), scoring=scoring, arrays=self.arrays)
        kept = self._kept.get(wanted)
        if kept is None or kept[0] is not rt:
            kept = self._kept[wanted] = rt, make()
        return kept[1]

    def _sinks(self, address: int, heads: int) -> TiledTensor:
        shape, size = (self.spec.batch, self.spec.heads, 1), self.accumulator.itemsize
        strides = shape[1] * size, size, size
        return TiledTensor(shape, self.accumulator, 1, heads=heads, address=address, strides=strides)
