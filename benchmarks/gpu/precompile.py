"""Compiles what is timed, in processes beside the checks: Triton's cache on disk is shared."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

from .timing import HEAD_SIZES


class Job(NamedTuple):
    """One kernel: of the forward, or of dQ, or of dK and dV."""

    size: int
    causal: bool
    dtype: str
    contain: bool
    kernel: str = "forward"


def jobs(dtypes: tuple[str, ...] = ("bfloat16", "float16")) -> list[Job]:
    """The kernels of the timed cases: forward and, for values that are not finite, its second launch; of the first
    dtype the same of gradients."""
    every = tuple(itertools.product(HEAD_SIZES, (False, True), (False, True)))
    found = [Job(size, causal, t, contain) for t in dtypes for size, causal, contain in every]
    of_gradients = itertools.product(("backward_q", "backward_kv"), every)
    return found + [Job(size, causal, dtypes[0], contain, kernel) for kernel, (size, causal, contain) in of_gradients]


def specialised(job: Job, arch: str) -> Any:
    """What calls on aligned arrays compile for it, where heads and rows are many."""
    from flashtile.arrays import contiguous
    from flashtile.kernels.triton import backward_forms as forms
    from flashtile.kernels.triton import specialisation, tiles
    from flashtile.kernels.triton.backward_tiles import backward_tiles
    from flashtile.spec import AttentionSpec

    view: Any = contiguous((1, 1, 1, job.size), job.dtype)
    spec = AttentionSpec.of(view, view, view, causal=job.causal)
    if job.kernel == "forward":
        return specialisation.forward(spec, tiles.forward_tile(spec, arch, described=True), contain=job.contain)
    of_q, of_kv = backward_tiles(spec, arch) or ()
    how = {"contain": job.contain, "memory": specialisation.Memory()}
    first = job.kernel == "backward_q"
    return forms.backward_q(spec, of_q, **how) if first else forms.backward_kv(spec, of_kv, **how)


def compile_one(job: Job, arch: str) -> str:
    """A line that says how it went."""
    from flashtile.kernels.triton.compiler import compiled

    began = time.monotonic()
    try:
        compiled(specialised(job, arch), arch)
    except Exception as error:
        return f"{job}: {type(error).__name__} {str(error)[:120]}"
    return f"{job}: {time.monotonic() - began:.1f} s"


def run(arch: str, processes: int, only: int | None = None) -> None:
    """Compile all jobs, or the first few."""
    chosen = jobs()[:only]
    # Not forked: who asked for the architecture has CUDA's threads, which a fork does not have.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for line in pool.map(compile_one, chosen, [arch] * len(chosen)):
            print(line, flush=True)
