"""What a task takes: of StarPU's history where it has the case, else measured by running the kernel on such a tile.

A case is what flow.py makes a footprint of: rows and keys of the tile, how the band cuts it, and whether a state is
continued. A call has a dozen of them, however long it is.
"""

from __future__ import annotations

import math
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flashtile.arrays import address_of
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu.footprint import footprints
from flashtile.engines.starpu_mpi.simulation.plan import Plan
from flashtile.errors import KernelError
from flashtile.kernels import tile_kernels
from flashtile.kernels.tiles import Native, TileKernel

MEASURED_SECONDS = 0.1  # of a case: the median of its runs, of which there are at least RUNS
RUNS = 5
CACHE_LINE = 64
_ENTRY = re.compile(r"^([0-9a-f]{8})((?:\s+[-+0-9.naife]+){7})\s*$", re.MULTILINE)


def seconds_of(plan: Plan, rate: float | None = None, busy: int = 1) -> tuple[np.ndarray, str]:
    """(seconds of every pair's task, where they come from). rate: FLOP/s of visible pairs, instead of measuring;
    busy: threads that run the kernel at once while it is measured."""
    p, spec = plan.pairs, plan.coverage.spec
    some = p.key_tile >= 0
    at = tuple(x[some] for x in (p.batch, p.head, p.query_tile, p.key_tile))
    visible, cases = plan.coverage.amount(*at)
    seconds = np.zeros(len(some))
    if rate is not None:
        seconds[some] = 2.0 * (spec.head_size + spec.value_size) * visible / rate
        return seconds, f"{rate:.4g} FLOP/s of a worker, as given"
    carried = np.concatenate([cases, p.place[some, None] > 0], axis=1)
    kinds, first, which = np.unique(carried, axis=0, return_index=True, return_inverse=True)
    kernel = tile_kernels().forward(spec, plan.tile, plan.tile)
    known = history(spec.dtype)
    marks = footprints(kernel.identity, kinds)
    numbers = np.flatnonzero(some)[first]
    found = [known.get(int(mark), math.nan) for mark in marks]
    times = [t if t == t else measured(plan, kernel, int(n), busy) for t, n in zip(found, numbers, strict=True)]
    seconds[some] = np.array(times)[which.reshape(-1)] if len(kinds) else 0.0
    remembered = sum(t == t for t in found)
    return seconds, f"{len(kinds)} cases: {remembered} of StarPU's models, {len(kinds) - remembered} measured here"


def history(dtype: str) -> dict[int, float]:
    """Seconds by footprint, of this machine's models of the codelet `forward`; of several versions the newest."""
    root = os.environ.get("STARPU_PERF_MODEL_DIR")
    home = os.environ.get("STARPU_HOME") or os.environ.get("HOME") or "/nonexistent"
    folder = Path(root) if root else Path(home) / ".starpu" / "sampling"
    host = os.environ.get("STARPU_HOSTNAME") or socket.gethostname()
    found: dict[int, float] = {}
    for file in sorted(folder.glob(f"codelets/*/flashtile_forward_{dtype}.{host}")):
        for mark, numbers in _ENTRY.findall(file.read_text(errors="replace")):
            _, _, mean, *_, count = map(float, numbers.split())
            if count > 0 and mean > 0:
                found[int(mark, 16)] = mean * 1e-6
    return found


def measured(plan: Plan, kernel: TileKernel, number: int, busy: int = 1) -> float:
    """Median seconds of the kernel on tiles that stand as those of this pair do, while so many threads run it."""
    with ThreadPoolExecutor(busy) as pool:
        found = pool.map(lambda _: _timed(plan, kernel, number), range(busy))
        return float(np.median(np.concatenate(list(found))))


def _timed(plan: Plan, kernel: TileKernel, number: int) -> list[float]:
    spec, p = plan.coverage.spec, plan.pairs
    row, key = int(p.query_tile[number]) * plan.tile, int(p.key_tile[number]) * plan.tile
    rows, keys = min(plan.tile, spec.q_len - row), min(plan.tile, spec.kv_len - key)
    dtype, real = DTYPES[spec.dtype], DTYPES[DTYPES[spec.dtype].accumulator]
    rng = np.random.default_rng(0)

    def some(height: int, size: int) -> np.ndarray:
        values = rng.standard_normal((height, size), np.float32)
        if dtype.name == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(dtype.numpy)

    q, k, v = some(rows, spec.head_size), some(keys, spec.head_size), some(keys, spec.value_size)
    o, lse = np.zeros((rows, spec.value_size), real.numpy), np.zeros(rows, real.numpy)
    placed = {"q": (q, row), "k": (k, key), "v": (v, key), "o": (o, row)}
    where = {name: address_of(x) - first * x.strides[0] for name, (x, first) in placed.items()}
    steps = {f"{name}_s": x.strides[0] for name, (x, _) in placed.items()}
    lse_at = address_of(lse) - row * lse.itemsize
    block = kernel.filled(**where, **steps, lse=lse_at, kv_len=key + keys, carry=int(p.place[number] > 0))
    scratch = np.empty(kernel.scratch_bytes + CACHE_LINE, np.uint8)
    item = int(p.query_tile[number]) * plan.touched.shape[1] + int(p.key_tile[number])
    call = Native(kernel).run, address_of(block), item, item + 1, -(-address_of(scratch) // CACHE_LINE) * CACHE_LINE
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < RUNS or time.perf_counter() - begun < MEASURED_SECONDS:
        start = time.perf_counter()
        status = call[0](*call[1:])
        times.append(time.perf_counter() - start)
        if status:
            raise KernelError(f"simulate: the forward kernel failed with status {status}")
    return times
