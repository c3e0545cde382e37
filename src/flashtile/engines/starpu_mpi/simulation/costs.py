"""What a task takes: of StarPU's history where it has the case, else measured by running the kernel on such a tile.

A case is what flow.py makes a footprint of: rows and keys of the tile, how the band cuts it, and whether a state is
continued. A call has a dozen of them, however long it is.
"""

from __future__ import annotations

import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flashtile.arrays import address_of
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu.backward import GRADIENTS as WORDS
from flashtile.engines.starpu.flow import Pairs
from flashtile.engines.starpu.footprint import footprints
from flashtile.engines.starpu_mpi.simulation.backward import BackwardPlan
from flashtile.engines.starpu_mpi.simulation.plan import Plan
from flashtile.errors import KernelError
from flashtile.kernels import tile_kernels
from flashtile.kernels.tiles import Native, TileKernel
from flashtile.spec import AttentionSpec

MEASURED_SECONDS = 0.1  # of a case: the median of its runs, of which there are at least RUNS
RUNS = 5
CACHE_LINE = 64
GRADIENTS = tuple(WORDS)  # to which a task of the backward adds
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
    numbers, known = np.flatnonzero(some)[first], history(spec.dtype)
    found = [known.get(int(mark), math.nan) for mark in footprints(kernel.identity, kinds)]
    calls = [partial(_forward_call, plan, kernel, int(n)) for n in numbers]
    times = [t if t == t else measured(call, busy) for t, call in zip(found, calls, strict=True)]
    seconds[some] = np.array(times)[which.reshape(-1)] if len(kinds) else 0.0
    return seconds, _said(found)


def _said(found: list[float]) -> str:
    remembered = sum(t == t for t in found)
    return f"{len(found)} cases: {remembered} of StarPU's models, {len(found) - remembered} measured here"


def seconds_of_backward(
    plan: BackwardPlan, rate: float | None = None, busy: int = 1, models: bool = True
) -> tuple[np.ndarray, str]:
    """Likewise of the backward's tasks. models: look at StarPU's first."""
    if rate is not None:
        return plan.flops / rate, f"{rate:.4g} FLOP/s of a worker, as given"
    p, spec, tile = plan.pairs, plan.plan.coverage.spec, plan.plan.tile
    _, cases = plan.plan.coverage.amount(p.batch, p.head, p.query_tile, p.key_tile)
    kinds, first, which = np.unique(cases, axis=0, return_index=True, return_inverse=True)
    kernel, known = tile_kernels().backward(spec, tile, tile).kernel, history(spec.dtype, "backward") if models else {}
    found = [known.get(int(x), math.nan) for x in footprints(f"{kernel.identity} {GRADIENTS}", kinds)]
    calls = [partial(_backward_call, plan, kernel, int(n)) for n in first]
    times = [t if t == t else measured(call, busy) for t, call in zip(found, calls, strict=True)]
    return np.array(times)[which.reshape(-1)] if len(kinds) else np.zeros(0), _said(found)


def compute(plan: BackwardPlan, stop: threading.Event) -> None:
    """Run the kernel of the plan's first pair until told to stop."""
    spec, tile = plan.plan.coverage.spec, plan.plan.tile
    call = _backward_call(plan, tile_kernels().backward(spec, tile, tile).kernel, 0)
    while not stop.is_set():
        _timed(call, 0.0, 1)


def history(dtype: str, operation: str = "forward") -> dict[int, float]:
    """Seconds by footprint, of this machine's models of a codelet; of several versions the newest."""
    root = os.environ.get("STARPU_PERF_MODEL_DIR")
    homes = (os.environ.get(name) for name in ("XDG_CACHE_HOME", "STARPU_HOME", "HOME"))  # as StarPU looks for its own
    home = next(filter(None, homes), "/nonexistent")
    folder = Path(root) if root else Path(home) / ".starpu" / "sampling"
    host = os.environ.get("STARPU_HOSTNAME") or socket.gethostname()
    found: dict[int, float] = {}
    for file in sorted(folder.glob(f"codelets/*/flashtile_{operation}_{dtype}.{host}")):
        for mark, numbers in _ENTRY.findall(file.read_text(errors="replace")):
            _, _, mean, *_, count = map(float, numbers.split())
            if count > 0 and mean > 0:
                found[int(mark, 16)] = mean * 1e-6
    return found


def measured(call: Callable[[], Call], busy: int = 1) -> float:
    """Median seconds of a kernel's call, while so many threads make such calls."""
    with ThreadPoolExecutor(busy) as pool:
        found = pool.map(lambda _: _timed(call()), range(busy))
        return float(np.median(np.concatenate(list(found))))


class Call(NamedTuple):
    """A kernel on tiles of random numbers, ready to run."""

    kernel: TileKernel
    block: np.ndarray
    item: int
    keep: Any


def _forward_call(plan: Plan, kernel: TileKernel, number: int) -> Call:
    """On tiles that stand as those of this pair do."""
    spec, p = plan.coverage.spec, plan.pairs
    row, key, rows, keys = _place(plan, p, number)
    real = DTYPES[DTYPES[spec.dtype].accumulator].numpy
    q, k, v = (
        _some(spec, n, size) for n, size in ((rows, spec.head_size), (keys, spec.head_size), (keys, spec.value_size))
    )
    o, lse = np.zeros((rows, spec.value_size), real), np.zeros(rows, real)
    placed = {"q": (q, row), "k": (k, key), "v": (v, key), "o": (o, row)}
    where = {name: address_of(x) - first * x.strides[0] for name, (x, first) in placed.items()}
    steps = {f"{name}_s": x.strides[0] for name, (x, _) in placed.items()}
    lse_at = address_of(lse) - row * lse.itemsize
    block = kernel.filled(**where, **steps, lse=lse_at, kv_len=key + keys, carry=int(p.place[number] > 0))
    item = int(p.query_tile[number]) * plan.touched.shape[1] + int(p.key_tile[number])
    return Call(kernel, block, item, (q, k, v, o, lse))


def _backward_call(plan: BackwardPlan, kernel: TileKernel, number: int) -> Call:
    """Likewise."""
    spec = plan.plan.coverage.spec
    row, key, rows, keys = _place(plan.plan, plan.pairs, number)
    real = DTYPES[DTYPES[spec.dtype].accumulator].numpy
    sizes = {"q": (rows, spec.head_size), "do": (rows, spec.value_size)}
    sizes |= {"k": (keys, spec.head_size), "v": (keys, spec.value_size)}
    given = {name: _some(spec, *size) for name, size in sizes.items()}
    given |= {name: np.zeros(sizes[name[1:]], real) for name in GRADIENTS}
    where = {n: address_of(x) - (key * x.strides[0] if n[-1] in "kv" else 0) for n, x in given.items()}
    steps = {f"{n}_s": x.strides[0] for n, x in given.items()}
    lse, delta = np.full(rows, 8.0, real), np.zeros(rows, real)
    words = {"first_row": row, "row_count": rows, "first_key": key, "kv_len": key + keys, "copy": 0}
    block = kernel.filled(**where, **steps, **words, lse=address_of(lse), delta=address_of(delta))
    return Call(kernel, block, 0, (given, lse, delta))


def _place(plan: Plan, pairs: Pairs, number: int) -> tuple[int, int, int, int]:
    """First row and key of a pair's tiles, and how many they have."""
    spec = plan.coverage.spec
    row, key = int(pairs.query_tile[number]) * plan.tile, int(pairs.key_tile[number]) * plan.tile
    return row, key, min(plan.tile, spec.q_len - row), min(plan.tile, spec.kv_len - key)


def _some(spec: AttentionSpec, height: int, size: int) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((height, size), np.float32)
    if spec.dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(DTYPES[spec.dtype].numpy)


def _timed(call: Call, seconds: float = MEASURED_SECONDS, runs: int = RUNS) -> list[float]:
    scratch = np.empty(call.kernel.scratch_bytes + CACHE_LINE, np.uint8)
    at = -(-address_of(scratch) // CACHE_LINE) * CACHE_LINE
    run, given = Native(call.kernel).run, (address_of(call.block), call.item, call.item + 1, at)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < runs or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        status = run(*given)
        times.append(time.perf_counter() - start)
        if status:
            raise KernelError(f"simulate: a kernel failed with status {status}")
    return times
