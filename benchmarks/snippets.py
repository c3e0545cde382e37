"""What needs a process of its own: `python -m benchmarks.snippets NAME ARGUMENTS...` prints one line of JSON."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def tiny_call(door: str, *how: str) -> dict[str, float]:
    """Median microseconds of a whole call of `door`, module.function, at (1, 1, 16, 64), after the first. how: "mask",
    with a boolean one; "step", a backward follows."""
    from .cases import Case
    from .data import make_inputs

    arrays: list[Any] = list(make_inputs(Case("tiny", "f32", 1, 1, 1, 16, 16, 64)))
    if "torch" in door:
        import torch

        arrays = [torch.from_numpy(x) for x in arrays]
    module, name = door.rsplit(".", 1)
    attend = getattr(importlib.import_module(module), name)
    options = {"attn_mask": torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()} if "mask" in how else {}
    q, k, v = arrays

    def step() -> None:
        attend(q, k, v, **options).backward(k)
        for x in given:
            x.grad = None

    def call() -> None:
        attend(q, k, v, **options)

    given = [x.requires_grad_() for x in arrays] if "step" in how else []
    run, batches = step if given else call, []
    run()
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(2000):
            run()
        batches.append((time.perf_counter() - start) / 2000)
    return {"microseconds": statistics.median(batches) * 1e6}


def new_length(begin: str, layout: str) -> dict[str, float]:
    """Median microseconds that one query on n keys, (1, 32/8, 1, n, 128) fp32, takes beyond its repeat where no call
    has had n keys yet, as at a decoder's steps: for 300 n, from `begin` on. layout: "part" of a longer cache, or
    arrays of their "own"."""
    import flashtile

    from .cases import Case
    from .data import make_inputs

    flashtile.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    first, lengths = int(begin), 300
    q, k, v = make_inputs(Case("step", "f32", 1, 32, 8, 1, first + lengths, 128))
    beyond, repeats = [], []
    for n in range(first, first + lengths):
        arrays = q, k[:, :, :n], v[:, :, :n]
        if layout == "own":
            arrays = q, arrays[1].copy(), arrays[2].copy()
        times = []
        for _ in range(3):  # of the three the second repeats, as the first does, what the caches hold
            start = time.perf_counter()
            flashtile.attention(*arrays)
            times.append(time.perf_counter() - start)
        beyond.append(times[0] - times[1])
        repeats.append(times[1])
    return {"microseconds": statistics.median(beyond) * 1e6, "repeat": statistics.median(repeats) * 1e6}


def gpu_host(option: str, rounds: str = "60") -> dict[str, float]:
    """Least microseconds of a GPU call's host side: see gpu/host.py."""
    from .gpu import host

    return host.measure(option, int(rounds))


def xla_entry(option: str) -> dict[str, Any]:
    """Microseconds from XLA's call to the kernel: see xla_entry.py."""
    from . import xla_entry as entry

    return entry.measure(option, int(os.environ["OMP_NUM_THREADS"]))


def door(name: str, *arguments: str) -> dict[str, float]:
    """Seconds of a door and of what it stands in for: see door_calls.py."""
    from . import door_calls

    return door_calls.measure(name, *arguments)


def larger(queries: str, keys: str, rounds: str) -> dict[str, float]:
    """Seconds of calls on files within a limit, and in memory: see larger.py."""
    from . import larger as calls

    return calls.measure(int(queries), int(keys), int(rounds))


class ImportClock:
    """Seconds spent in import statements, nested ones counted once."""

    def __init__(self) -> None:
        bootstrap: Any = importlib.import_module("importlib._bootstrap")

        self.seconds, self.depth = 0.0, 0
        self._find = bootstrap._find_and_load
        bootstrap._find_and_load = self

    def __call__(self, *arguments: Any) -> Any:
        self.depth += 1
        start = time.perf_counter()
        try:
            return self._find(*arguments)
        finally:
            self.depth -= 1
            if self.depth == 0:
                self.seconds += time.perf_counter() - start


def first_call(dtype: str = "f32") -> dict[str, float]:
    """First minus second call of this process at (1, 8, 1024, 64), less what the first spent importing."""
    import flashtile

    from .cases import Case
    from .data import make_inputs

    flashtile.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    q, k, v = make_inputs(Case("first", dtype, 1, 8, 8, 1024, 1024, 64))
    clock = ImportClock()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        flashtile.attention(q, k, v)
        times.append(time.perf_counter() - start)
    return {"seconds": times[0] - min(times[1:]) - clock.seconds, "imports": clock.seconds}


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(field)


def long_head(dtype: str, length: str) -> dict[str, float]:
    """Peak resident MB of one long head above what was resident with inputs, output and kernel in place."""
    import flashtile

    from .cases import Case
    from .data import make_inputs

    flashtile.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    q, k, v = make_inputs(Case("long", dtype, 1, 1, 1, int(length), int(length), 64))
    out = q.copy()  # pages touched: the output counts as the caller's
    small = [x[:, :, :512].copy() for x in (q, k, v)]
    before = _status_mb("VmRSS")
    flashtile.attention(*small)
    resident = _status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    flashtile.attention(q, k, v, out=out)
    return {"mb": _status_mb("VmHWM") - resident, "compile_mb": resident - before}


def starpu_tiles(case_name: str) -> dict[str, float]:
    """Median milliseconds of the StarPU engine for each tile size, taking turns with the direct engine."""
    import flashtile
    from flashtile.calls import clear_cache
    from flashtile.engines.starpu import engine

    from .cases import ALL_CASES
    from .data import make_inputs

    flashtile.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    (case,) = [case for case in ALL_CASES if case.name == case_name]
    q, k, v = make_inputs(case)
    times: dict[str, list[float]] = {}
    for _ in range(5):
        for tile_q, tile_k in [(0, 0), *((n, m) for n in (128, 256, 512, 1024) for m in (512, 1024, 2048, 4096))]:
            engine.TILE_Q, engine.TILE_K = (tile_q,), tile_k
            name = f"{tile_q}x{tile_k}" if tile_q else "direct"
            clear_cache()
            for timed in (False, True):
                start = time.perf_counter()
                flashtile.attention(q, k, v, engine="starpu" if tile_q else "direct")
                times.setdefault(name, []).extend([time.perf_counter() - start] if timed else [])
    return {name: round(statistics.median(found) * 1e3, 2) for name, found in times.items()}


def starpu_submission() -> dict[str, Any]:
    """Microseconds per task for 10,000 tasks of empty kernels on five handles each, submitted and executed."""
    import numpy as np

    from flashtile import starpu
    from flashtile.engines.starpu.jobs import TASK, Job
    from flashtile.engines.starpu.session import codelet

    starpu.init(workers=int(os.environ["OMP_NUM_THREADS"]))
    chains, length = 100, 100
    tensors = [starpu.empty((1, 1, chains, 16), "float32", 1) for _ in range(5)]
    for tensor in tensors:
        for index in np.ndindex(tensor.grid):
            with tensor.acquire(index, "W"):
                pass
    job = Job()
    rows = np.repeat(np.arange(chains), length)
    handles = np.stack([tensor.handles[0, 0, rows] for tensor in tensors], axis=1)
    read, update = job.runtime.constant("R"), job.runtime.constant("RW")
    modes = np.tile([read, read, read, update, update], (len(rows), 1))
    tasks = np.zeros(len(rows), TASK)
    whole, submitting = [], []
    for _ in range(15):
        start = time.perf_counter()
        job.submit(codelet("forward", "float32"), handles, modes, tasks)
        submitting.append(time.perf_counter() - start)
        job.wait()
        whole.append(time.perf_counter() - start)
    low, middle, high = statistics.quantiles(whole[1:], n=4, method="inclusive")
    us = 1e6 / len(rows)
    return {
        "microseconds": middle * us,
        "quartiles": (low * us, high * us),
        "submission alone": statistics.median(submitting[1:]) * us,
    }


SNIPPETS: tuple[Callable[..., dict[str, Any]], ...] = (
    tiny_call,
    new_length,
    gpu_host,
    xla_entry,
    door,
    first_call,
    long_head,
    starpu_tiles,
    starpu_submission,
    larger,
)

if __name__ == "__main__":
    snippets = {snippet.__name__: snippet for snippet in SNIPPETS}
    print(json.dumps(snippets[sys.argv[1]](*sys.argv[2:])))
