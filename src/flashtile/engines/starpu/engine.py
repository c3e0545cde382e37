"""engine="starpu": a call of flashtile.attention as a task flow over tiles of its arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flashtile.arrays import contiguous, view
from flashtile.dtypes import DTYPES
from flashtile.engines import Bound
from flashtile.engines.starpu import runtime, units
from flashtile.engines.starpu.flow import Flow
from flashtile.engines.starpu.jobs import Job
from flashtile.engines.starpu.tiles import TiledTensor, can_group, can_tile
from flashtile.engines.starpu.vanilla import VanillaFlow
from flashtile.errors import UnavailableError
from flashtile.kernels import Family, Layout, Strides, tile_kernels
from flashtile.progress import Report
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    from flashtile.score.options import Scoring

# Rows and keys of a tile. A task of full tiles takes a millisecond or two, long beside its 10 us of StarPU, and its
# queries, keys and values stay in a core's second-level cache. Fewer chains than ENOUGH would leave workers idle.
TILE_Q, TILE_K = (128, 256, 512, 1024), 1024
ENOUGH = 32


FLOWS: dict[str, type[Flow] | type[VanillaFlow]] = {"cpu": Flow, "vanilla": VanillaFlow}
UNFUSED = frozenset(("band", "program", "sinks"))  # options of a spec that the unfused flow knows
OPTIONS = UNFUSED | {"dropout"}


class Addresses(NamedTuple):
    """What one call adds to a prepared one."""

    q: int
    k: int
    v: int
    o: int
    lse: int  # 0: not wanted
    offsets: int  # of int64 (B,); 0: the spec has the offset
    scoring: Scoring | None = None  # the values of the spec's score program and sinks


def bind(spec: AttentionSpec, layout: Layout, family: Family) -> Bound:
    """Bind a spec and a layout.

    The family "cpu" is the fused flow, "vanilla" the three unfused codelets (vanilla.py).
    Raises: UnavailableError for kernels that only Python can run, and for options that no flow knows.
    """
    if family.name not in FLOWS:
        names = " or ".join(map(repr, FLOWS))
        got = f"{family.name!r} with engine 'starpu'"
        raise UnavailableError(f"kernel: got {got}, expected {names}: no Python in tasks")
    if missing := spec.options - (OPTIONS if family.name == "cpu" else UNFUSED):
        unknown = ", ".join(sorted(missing))
        got = f"'starpu' with kernel {family.name!r} and {unknown}"
        raise UnavailableError(f"engine: got {got}, which its tasks do not know, expected 'direct'")
    call = _Call(spec, layout, FLOWS[family.name] if spec.kv_len else Flow)  # without keys there are no scores to store
    return Bound(Addresses, call.run)


class Arrays:
    """The arrays of a call as tiles, by their addresses."""

    def __init__(self, spec: AttentionSpec, layout: Layout, tiles: tuple[int, int]) -> None:
        self.spec, self.layout = spec, layout
        self.accumulator = DTYPES[DTYPES[spec.dtype].accumulator]
        shapes = {
            "q": (spec.batch, spec.heads, spec.q_len, spec.head_size),
            "k": (spec.batch, spec.kv_heads, spec.kv_len, spec.head_size),
            "v": (spec.batch, spec.kv_heads, spec.kv_len, spec.value_size),
            "o": (spec.batch, spec.heads, spec.q_len, spec.value_size),
        }
        self.shapes = shapes | {f"d{name}": shape for name, shape in shapes.items()}
        self.tile_q, self.tile_k = tiles

    def _offsets(self, address: int) -> np.ndarray | None:
        """A copy of those of this call, where the spec has none."""
        if self.spec.offset is not None:
            return None
        return view(address, (self.spec.batch,), (8,), np.dtype(np.int64)).copy()

    def _view(self, name: str, address: int, writable: bool = False) -> np.ndarray:
        strides, dtype = getattr(self.layout, name), DTYPES[self.spec.dtype].numpy
        return view(address, self.shapes[name], strides, dtype, writable=writable)

    def _fits(self, name: str) -> bool:
        return can_tile(getattr(self.layout, name)[2:], self.shapes[name][3], DTYPES[self.spec.dtype].itemsize)

    def _reachable(self, name: str, address: int) -> np.ndarray | int:
        """The address; or a copy, where no matrix handle describes how the rows lie."""
        return address if self._fits(name) else np.ascontiguousarray(self._view(name, address))

    def _heads(self, rt: runtime.Runtime, names: Iterable[str], products: float) -> int:
        """How many heads a task should have: of those that lie well in the arrays of these names. products: as many
        FLOPs a pair of elements and head size as so many products of queries and keys."""
        spec = self.spec
        keys = min(self.tile_k, max(1, spec.kv_len))
        flops = products * (spec.head_size + spec.value_size) * self.tile_q * keys
        most = units.most(rt, spec, -(-spec.q_len // self.tile_q), flops)
        found = 1
        for n in units.sizes(spec):
            if n > most:
                break
            if all(self._can_group(name, n) for name in names):
                found = n
        return found

    def _can_group(self, name: str, heads: int) -> bool:
        shape, size = self.shapes[name], DTYPES[self.spec.dtype].itemsize
        strides: tuple[int, ...] = getattr(self.layout, name)
        if not self._fits(name):  # a copy will be made
            strides = contiguous(shape, self.spec.dtype).strides
        return can_group(shape, strides[:3], self._rows(name), self._heads_of(name, heads), size)

    def _rows(self, name: str) -> int:
        return self.tile_k if name[-1] in "kv" else self.tile_q

    def _heads_of(self, name: str, heads: int) -> int:
        """Of a tile of an array, where tasks have so many."""
        return units.of_keys(heads, self.spec.group) if name[-1] in "kv" else heads

    def _tiles(self, name: str, where: np.ndarray | int, heads: int) -> TiledTensor:
        dtype, shape = DTYPES[self.spec.dtype], self.shapes[name]
        made = partial(TiledTensor, shape, dtype, self._rows(name), heads=self._heads_of(name, heads))
        if isinstance(where, np.ndarray):
            return made(address=where.ctypes.data, strides=where.strides, keep=where)
        strides: Strides = getattr(self.layout, name)
        return made(address=where, strides=strides)

    def _of_rows(self, address: int, heads: int) -> TiledTensor:
        """lse, or a state that goes by this name where it is not wanted; or dlse."""
        shape, size = self.shapes["o"][:3], self.accumulator.itemsize
        strides = (shape[1] * shape[2] * size, shape[2] * size, size)
        return TiledTensor(shape, self.accumulator, self.tile_q, heads=heads, address=address, strides=strides)


class _Call(Arrays):
    """A prepared call. Its flow is made at the first run, for each start of StarPU anew."""

    def __init__(self, spec: AttentionSpec, layout: Layout, flow: type[Flow] | type[VanillaFlow]) -> None:
        super().__init__(spec, layout, tile_sizes(spec))
        self.flow = flow
        self._flow: tuple[runtime.Runtime, Flow | VanillaFlow] | None = None

    def run(self, params: Addresses, report: Report | None = None) -> None:
        """Submit every tile of the call and wait. Raises: KernelError naming codelet and tile."""
        if not self.spec.batch * self.spec.q_len:
            return
        rt = runtime.ensure()
        tensors: list[TiledTensor] = []
        with rt.working():
            flow = self._flow_of(rt, params)
            job = Job()
            try:
                for name in "qkv":
                    tensors.append(self._tiles(name, self._reachable(name, getattr(params, name)), flow.heads))
                o = self._output(params)
                tensors += [self._tiles("o", o, flow.heads), self._of_rows(params.lse, flow.heads)]
                total = flow.submit(job, *tensors)
                job.wait(report, total)
            finally:
                job.drain()
                for tensor in tensors:
                    tensor.unregister()
            if isinstance(o, np.ndarray):
                self._view("o", params.o, writable=True)[...] = o

    def _flow_of(self, rt: runtime.Runtime, call: Addresses) -> Flow | VanillaFlow:
        spec = self.spec
        make: Callable[..., Flow | VanillaFlow] = partial(self.flow, rt, spec, self.tile_q, self.tile_k)
        if self.flow is Flow:
            make = partial(make, heads=self._heads(rt, "qkvo", 2))
        if spec.offset is None or call.scoring is not None:  # values that may differ from call to call
            return make(offsets=self._offsets(call.offsets), scoring=call.scoring)
        if self._flow is None or self._flow[0] is not rt:
            self._flow = rt, make()
        return self._flow[1]

    def _output(self, call: Addresses) -> np.ndarray | int:
        return call.o if self._fits("o") else np.empty(self.shapes["o"], DTYPES[self.spec.dtype].numpy)


def tile_sizes(spec: AttentionSpec, direction: str = "forward") -> tuple[int, int]:
    """Rows of a query tile, in whole panels of the kernel, and keys of a key tile: a matter of shapes and instruction
    set only, and so are the bits."""
    panel, heads = tile_kernels().rows_at_once(spec, direction), spec.batch * spec.heads
    menu = [max(1, rows // panel) * panel for rows in TILE_Q]
    enough = [rows for rows in menu if heads * -(-spec.q_len // rows) >= ENOUGH]
    return min(max(enough, default=menu[0]), max(1, spec.q_len)), min(TILE_K, max(1, spec.kv_len))
