"""Compiles what is timed, in processes beside the checks: Triton's cache on disk is shared."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from .timing import HEAD_SIZES


class Job(NamedTuple):
    """One kernel."""

    size: int
    causal: bool
    dtype: str
    contain: bool


def jobs(dtypes: tuple[str, ...] = ("bfloat16", "float16")) -> list[Job]:
    """The kernels of the timed cases: forward and, for values that are not finite, its second launch."""
    return [
        Job(size, causal, t, c)
        for t in dtypes
        for size in HEAD_SIZES
        for causal in (False, True)
        for c in (False, True)
    ]


def compile_one(job: Job, arch: str) -> str:
    """A line that says how it went."""
    from flashtile.arrays import contiguous
    from flashtile.kernels.triton import specialisation, tiles
    from flashtile.kernels.triton.compiler import compiled
    from flashtile.spec import AttentionSpec

    began = time.monotonic()
    view: Any = contiguous((1, 1, 1, job.size), job.dtype)
    spec = AttentionSpec.of(view, view, view, causal=job.causal)
    try:
        compiled(specialisation.forward(spec, tiles.forward_tile(spec, arch), contain=job.contain), arch)
    except Exception as error:
        return f"{job}: {type(error).__name__} {str(error)[:120]}"
    return f"{job}: {time.monotonic() - began:.1f} s"


def run(arch: str, processes: int, only: int | None = None) -> None:
    """Compile all jobs, or the first few."""
    chosen = jobs()[:only]
    with ProcessPoolExecutor(processes) as pool:
        for line in pool.map(compile_one, chosen, [arch] * len(chosen)):
            print(line, flush=True)
