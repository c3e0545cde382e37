"""The StarPU engine: attention as a sequential task flow over tiles that are data handles.

    shim.h, shim.c  C, compiled against the installed StarPU by build.py: trampoline, jobs, batches
    runtime.py      start, stop, and what is checked before a C call      jobs.py       submit, wait, errors
    codelets.py     operations as StarPU knows them                       programs.py   kernels as tasks call them
    tiles.py        tensors as handles                                    states.py     partial results merged and cast
    coverage.py     which tiles meet, and how much of them                footprint.py  what a task costs
    flow.py         the tasks of a forward pass, in order                 engine.py     a call of attention
    profile.py      what tasks did, while a block lasts                   graph.py      which tasks wait for which
    trace.py        a profile for Perfetto                                pictures.py   a profile drawn
    cuda.py         what programs launch on GPUs                          manifest.py    kernels compiled ahead of time
    launch.h, .c    C that launches them through NVIDIA's driver, without CUDA's headers and without Python

`flashtile.starpu` is the door for programs that hold tiles themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flashtile.errors import UnavailableError

if TYPE_CHECKING:
    from flashtile.engines import Run
    from flashtile.kernels import CompiledKernel, Layout
    from flashtile.plan import Plan
    from flashtile.spec import AttentionSpec


def unavailable() -> str | None:
    """Why StarPU cannot be used on this machine; None if it can, built or to be built at first use."""
    from flashtile.engines.starpu import build

    return build.missing()


def remark() -> str:
    """StarPU's version, workers and limits, for doctor."""
    from flashtile.engines.starpu.report import remark as text

    return text()


def prepare(plan: Plan, kernel: CompiledKernel) -> Run:
    """Never right: this engine runs tiles, see prepare_tiles."""
    raise UnavailableError("engine: got 'starpu' with work items, expected a call over tiles")


def prepare_tiles(spec: AttentionSpec, layout: Layout, family: ModuleType) -> tuple[Callable[..., Any], Run]:
    """Bind a call: (pack, run), as CompiledKernel.pack and Run, with the codelets of kernels.cpu or kernels.vanilla."""
    from flashtile.engines.starpu import engine

    return engine.prepare_tiles(spec, layout, family.__name__.rpartition(".")[2])
