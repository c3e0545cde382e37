"""engine="dask" on arrays in memory: a graph over tiles that are views of them, computed by the scheduler at hand."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from flashtile.arrays import view
from flashtile.dtypes import DTYPES
from flashtile.engines import Bound
from flashtile.engines.dask.operands import Cut
from flashtile.engines.dask.work import Work
from flashtile.engines.starpu.engine import Addresses, tile_sizes
from flashtile.errors import UnavailableError
from flashtile.kernels import Family, Layout
from flashtile.progress import Report
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    from flashtile.engines.dask.graph import Result


def check_family(family: Family) -> None:
    """Raise UnavailableError unless tasks can run its kernels."""
    if family.name != "cpu":
        raise UnavailableError(
            f"kernel: got {family.name!r} with engine 'dask', expected 'cpu': tasks run tile kernels"
        )


def bind(spec: AttentionSpec, layout: Layout, family: Family) -> Bound:
    """Bind a spec and a layout. Raises: UnavailableError for another kernel than the generated one."""
    check_family(family)
    return Bound(Addresses, _Call(spec, layout).run)


class _Call:
    """A prepared call."""

    def __init__(self, spec: AttentionSpec, layout: Layout) -> None:
        self.spec, self.layout = spec, layout
        self.tile_q, self.tile_k = tile_sizes(spec)
        self.cut = Cut((1,) * spec.batch, (1,) * spec.kv_heads, spec.group, self.tile_q, self.tile_k)

    def run(self, params: Addresses, report: Report | None = None) -> None:
        """Compute the graph and put its results where they belong."""
        import dask

        from flashtile.engines.dask.graph import result

        spec = self.spec
        if not spec.batch * spec.q_len:
            return
        dtype = DTYPES[spec.dtype].numpy
        rows, keys = (spec.batch, spec.heads, spec.q_len), (spec.batch, spec.kv_heads, spec.kv_len)
        offsets = None
        if spec.offset is None:
            offsets = view(params.offsets, (spec.batch,), (8,), np.dtype(np.int64)).copy()
        work = Work(spec, params.scoring, offsets, self.tile_q, self.tile_k)
        arrays = [
            view(at, (*shape, size), strides, dtype)
            for at, shape, size, strides in (
                (params.q, rows, spec.head_size, self.layout.q),
                (params.k, keys, spec.head_size, self.layout.k),
                (params.v, keys, spec.value_size, self.layout.v),
            )
        ]
        found = result(work, self.cut, arrays, uuid.uuid4().hex, dtype)
        with _reporting(report, found):
            o, lse = dask.compute(found.o, found.lse)
        view(params.o, o.shape, self.layout.o, dtype, writable=True)[...] = o
        if params.lse:
            steps = (spec.heads * spec.q_len * lse.itemsize, spec.q_len * lse.itemsize, lse.itemsize)
            view(params.lse, lse.shape, steps, lse.dtype, writable=True)[...] = lse


@contextlib.contextmanager
def _reporting(report: Report | None, found: Result) -> Iterator[None]:
    """While it lasts tasks that Dask's own schedulers have done are reported, on the calling thread."""
    if report is None:
        yield
        return
    from dask.callbacks import Callback

    done, total, name = 0, found.tasks, found.o.name.removesuffix("-o")

    def one(key: Any, *_: Any) -> None:
        nonlocal done
        if isinstance(key, tuple) and key[0] == name:
            done = min(done + 1, total - 1)
            report(done, total)

    with Callback(posttask=one):
        yield
    report(total, total)
