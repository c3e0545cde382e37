"""The Dask engine: attention as a Dask graph over tiles, for threads, processes or a cluster.

work.py      what a task runs: one block of queries on one key tile, in machine code
operands.py  inputs as blocks: arrays in memory, Dask's, and arrays in storage that are read block by block
graph.py     the graph of a call: chains of tasks, in the StarPU engine's order of keys
engine.py    a call on arrays in memory, computed at once
work_backward.py, graph_backward.py, gradients.py    the same of gradients

`flashtile.lazy` is the way in for Dask's arrays, whose results are computed when they are asked for.
"""

from __future__ import annotations

import importlib.util

from flashtile.engines import Bound, BoundBackward, Engine
from flashtile.engines.starpu import tile_sizes
from flashtile.kernels import ArrayShapes, BackwardLayout, Family, Layout
from flashtile.spec import AttentionSpec

INSTALL = "pip install 'dask[array]'"


def unavailable() -> str | None:
    """Why Dask cannot be used here; None if it can."""
    return None if importlib.util.find_spec("dask") else f"the Python package dask is not installed: {INSTALL}"


def remark() -> str:
    """Dask's version, for doctor; a Dask that no installer has put there says none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"Dask {version('dask')}"
    except PackageNotFoundError:
        return "Dask"


def bind(spec: AttentionSpec, layout: Layout, family: Family) -> Bound:
    """A call as a graph, computed when it runs."""
    from flashtile.engines.dask import engine

    return engine.bind(spec, layout, family)


def bind_backward(spec: AttentionSpec, layout: BackwardLayout, family: Family, arrays: ArrayShapes) -> BoundBackward:
    """Its gradients, likewise."""
    from flashtile.engines.dask import gradients

    return gradients.bind_backward(spec, layout, family, arrays)


ENGINE = Engine("dask", unavailable, bind, bind_backward, tile_sizes, remark)
