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


def tiny_call(door: str) -> dict[str, float]:
    """Median microseconds of a whole call of `door`, module.function, at (1, 1, 16, 64), after the first."""
    from .cases import Case
    from .data import make_inputs

    arrays: list[Any] = list(make_inputs(Case("tiny", "f32", 1, 1, 1, 16, 16, 64)))
    if "torch" in door:
        import torch

        arrays = [torch.from_numpy(x) for x in arrays]
    module, name = door.rsplit(".", 1)
    call = getattr(importlib.import_module(module), name)
    q, k, v = arrays
    batches = []
    call(q, k, v)
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(2000):
            call(q, k, v)
        batches.append((time.perf_counter() - start) / 2000)
    return {"microseconds": statistics.median(batches) * 1e6}


class ImportClock:
    """Seconds spent in import statements, nested ones counted once."""

    def __init__(self) -> None:
        import importlib._bootstrap as bootstrap

        self.seconds, self.depth = 0.0, 0
        self._find = bootstrap._find_and_load  # type: ignore[attr-defined]
        bootstrap._find_and_load = self  # type: ignore[attr-defined]

    def __call__(self, *arguments: Any) -> Any:
        self.depth += 1
        start = time.perf_counter()
        try:
            return self._find(*arguments)
        finally:
            self.depth -= 1
            if self.depth == 0:
                self.seconds += time.perf_counter() - start


def first_call() -> dict[str, float]:
    """First minus second call of this process at (1, 8, 1024, 64), less what the first spent importing."""
    import flashtile

    from .cases import Case
    from .data import make_inputs

    flashtile.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    q, k, v = make_inputs(Case("first", "f32", 1, 8, 8, 1024, 1024, 64))
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


if __name__ == "__main__":
    snippets: dict[str, Callable[..., dict[str, float]]]
    snippets = {"tiny_call": tiny_call, "first_call": first_call, "long_head": long_head}
    print(json.dumps(snippets[sys.argv[1]](*sys.argv[2:])))
