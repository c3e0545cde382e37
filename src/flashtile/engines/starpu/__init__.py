"""The StarPU engine: attention as a sequential task flow over tiles that are data handles.

    shim.h, shim.c  C, compiled against the installed StarPU by build.py: trampoline, jobs, batches
    runtime.py      StarPU in this process: start, stop, and what is checked before a C call
    codelets.py     operations as StarPU knows them          jobs.py       submit, wait, errors
    session.py      what one start keeps: codelets, flows    programs.py   kernels as tasks call them
    matching.py     tensors that fit together
    tiles.py        tensors as handles                       states.py     partial results merged and cast
    coverage.py     which tiles meet, and how much of them   footprint.py  what a task costs
    flow.py         the tasks of a forward pass, in order    vanilla.py    those of the unfused stages
    backward.py     the tasks of a backward pass, in order   gradients.py  a call of its gradients
    accumulation.py one key tile added to a state            engine.py     a call of attention
    accumulated_gradients.py   one key tile's, added
    records.py      what is known of a task that ran         graph.py      which tasks wait for which
    pictures.py     a profile drawn                          trace.py      a profile for Perfetto
    profile.py      what tasks did, while a block lasts      report.py     StarPU, for doctor
    units.py        which heads a task takes
    launches.py     what programs launch on GPUs             manifest.py   kernels compiled ahead of time
    cuda.py         launches of the forward's codelets       made.py       kernels of score programs, compiled here
    cuda_scores.py  captured values as launches take them    cuda_gradients.py   launches of the gradients' codelets
    launch.h, .c    C that launches them through NVIDIA's driver, without CUDA's headers and without Python

`flashtile.starpu` is the door for programs that hold tiles themselves.
"""

from __future__ import annotations

from flashtile.engines import Bound, BoundBackward, Engine
from flashtile.kernels import ArrayShapes, BackwardLayout, Family, Layout
from flashtile.spec import AttentionSpec


def unavailable() -> str | None:
    """Why StarPU cannot be used on this machine; None if it can, built or to be built at first use."""
    from flashtile.engines.starpu import build

    return build.missing()


def remark() -> str:
    """StarPU's version, workers and limits, for doctor."""
    from flashtile.engines.starpu.report import remark as text

    return text()


def tile_sizes(spec: AttentionSpec, direction: str) -> tuple[int, int]:
    """Rows of a query tile, and keys of a key tile."""
    from flashtile.engines.starpu import engine

    return engine.tile_sizes(spec, direction)


def bind(spec: AttentionSpec, layout: Layout, family: Family) -> Bound:
    """A call as tasks, of the fused or the unfused codelets."""
    from flashtile.engines.starpu import engine

    return engine.bind(spec, layout, family)


def bind_backward(spec: AttentionSpec, layout: BackwardLayout, family: Family, arrays: ArrayShapes) -> BoundBackward:
    """The gradients of a call as tasks."""
    from flashtile.engines.starpu import gradients

    return gradients.bind_backward(spec, layout, family, arrays)


ENGINE = Engine("starpu", unavailable, bind, bind_backward, tile_sizes, remark)
