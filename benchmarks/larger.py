"""Calls on files within a limit of a fourth of the keys and values, beside the same calls in memory."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HEADS, SIZE = 2, 64


def measure(queries: int, keys: int, rounds: int) -> dict[str, float]:
    """Median seconds, each call taking turns with the other; fp32, causal from the lower right, results in files too.
    Files are written just before, so the system's cache holds them: the rate is that of the calls, not of a disk."""
    import flashtile
    from flashtile.gradient_problem import Gradients

    flashtile.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rng = np.random.default_rng(0)
    options: dict[str, Any] = {"causal": True, "align": "bottom_right"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arrays = [rng.standard_normal((1, HEADS, n, SIZE), dtype=np.float32) for n in (queries, keys, keys)]
        for letter, x in zip("qkv", arrays, strict=True):
            np.save(folder / f"{letter}.npy", x)
        files = [np.load(folder / f"{letter}.npy", mmap_mode="r") for letter in "qkv"]
        limit = {"memory_limit": 2 * arrays[1].nbytes // 4}
        o, lse = flashtile.attention(*arrays, engine="starpu", return_lse=True, **options)
        out = Gradients(**{letter: folder / f"d{letter}.npy" for letter in "qkv"})
        calls: dict[str, Callable[[], Any]] = {
            "forward_memory": lambda: flashtile.attention(*arrays, engine="starpu", **options),
            "forward_files": lambda: flashtile.attention(*files, out=folder / "o.npy", **limit, **options),
            "backward_memory": lambda: flashtile.attention_backward(o, *arrays, o, lse, engine="starpu", **options),
            "backward_files": lambda: flashtile.attention_backward(o, *files, o, lse, out=out, **limit, **options),
        }
        times: dict[str, list[float]] = {what: [] for what in calls}
        for what in calls:  # compiled, and held against one another
            if what.endswith("files"):
                continue
            whole, part = calls[what](), calls[what.replace("memory", "files")]()
            same = [(whole, part)] if "forward" in what else [(getattr(whole, x), getattr(part, x)) for x in "qkv"]
            if any(x.tobytes() != y.tobytes() for x, y in same):
                raise AssertionError(f"{what}: the call on files has other bits")
        for _ in range(rounds):
            for what, call in calls.items():
                start = time.perf_counter()
                call()
                times[what].append(time.perf_counter() - start)
        return {what: statistics.median(x) for what, x in times.items()}
