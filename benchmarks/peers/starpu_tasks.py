"""A program that submits every task itself, from Python, one by one: flashtile.starpu on registered tiles."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from ..cases import Case
from . import flashtile as direct
from .starpu import refuses, versions

__all__ = ["prepare", "refuses", "versions"]


def prepare(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> tuple[Callable, Callable]:
    from flashtile import starpu
    from flashtile.engines.starpu.engine import tile_sizes
    from flashtile.spec import AttentionSpec

    keywords = direct.options(case)
    spec = AttentionSpec.of(*(SimpleNamespace(shape=x.shape, dtype=x.dtype) for x in (q, k, v)), **keywords)
    rows, keys = tile_sizes(spec)
    starpu.init(workers=threads)
    o, lse = np.empty((*q.shape[:3], v.shape[3]), q.dtype), np.empty(q.shape[:3], np.float32)
    tensors = [starpu.register(x, n) for x, n in ((q, rows), (k, keys), (v, keys), (o, rows), (lse, rows))]
    queries, keys_, values, out, out_lse = tensors
    group = spec.group

    def run() -> None:
        for b, h, i in np.ndindex(queries.grid):
            for j in range(keys_.grid[2]):
                kv = b, h // group, j
                starpu.submit_forward(
                    queries[b, h, i],
                    keys_[kv],
                    values[kv],
                    out[b, h, i],
                    out_lse[b, h, i],
                    carry=j > 0,
                    last=j + 1 == keys_.grid[2],
                    **keywords,
                )
        starpu.wait()

    def to_numpy(_: None) -> np.ndarray:
        for index in np.ndindex(out.grid):
            with out.acquire(index):
                pass  # brings the tile home
        return o

    return run, to_numpy
