"""Partial results as tiles: two of them merged, or one cast to the outputs' 16-bit dtype."""

from __future__ import annotations

import numpy as np

from flashtile.engines.starpu import cuda
from flashtile.engines.starpu.footprint import footprints
from flashtile.engines.starpu.jobs import TASK, Job
from flashtile.engines.starpu.launches import ROWS, Launches
from flashtile.engines.starpu.programs import Binding, Program
from flashtile.engines.starpu.session import codelet
from flashtile.engines.starpu.tiles import TiledTensor
from flashtile.engines.starpu.units import several, turned_of
from flashtile.errors import wrong
from flashtile.kernels import tile_kernels
from flashtile.kernels.tiles import TileKernel

# What a task's handles set in the parameter block (programs.py).
FINISH = ((0, "parts_o", None), (1, "parts_lse", None), (2, "o", "o_s"))
MERGE = (
    (0, "parts_o", None),
    (1, "parts_lse", None),
    (2, "o_split", None, 0),
    (3, "lse_split", None, 1),
    (0, "o", None),
    (1, "lse", None),
)


def submit_finish(job: Job, state: TiledTensor, lse: TiledTensor, o: TiledTensor) -> int:
    """Submit o = state, cast, tile by tile; returns the number of tasks.

    Shapes:  state and o (B, H, S_q, D_v), lse (B, H, S_q), cut into the same rows; the rows of state without gaps.
    Raises:  SpecError.
    """
    check_state("state", state, lse)
    alike = o.shape == state.shape and (o.rows, o.heads) == (state.rows, state.heads)
    if not alike or o.dtype.accumulator != state.dtype.name:
        came = f"{o.dtype.name} {o.shape} in tiles of {o.cut}"
        raise wrong("o", came, f"{state.shape} in tiles of {state.cut}, of a dtype with {state.dtype.name} sums")
    kernel = tile_kernels().finish(o.dtype.name, o.shape[3])
    gpu = cuda.finish(job.runtime, o.dtype.name, o.shape[3], o.rows, o.heads)
    return _submit(job, "finish", o.dtype.name, kernel, gpu, FINISH, (state, lse, o), ("R", "R", "W"))


def submit_merge(job: Job, o: TiledTensor, lse: TiledTensor, other_o: TiledTensor, other_lse: TiledTensor) -> int:
    """Submit (o, lse) = merge of (o, lse) and (other_o, other_lse), tile by tile; returns the number of tasks.

    Shapes:  o (B, H, S_q, D_v), lse (B, H, S_q), the others alike, of one accumulator dtype; rows without gaps.
    Raises:  SpecError.
    """
    check_state("o", o, lse)
    check_state("other_o", other_o, other_lse)
    alike = (other_o.shape, other_o.rows, other_o.heads, other_o.dtype) == (o.shape, o.rows, o.heads, o.dtype)
    if not alike or other_o is o:
        raise wrong("other_o", f"{other_o.dtype.name} {other_o.shape}", f"another {o.dtype.name} {o.shape}, cut alike")
    kernel = tile_kernels().merging(o.dtype.name, o.shape[3])
    tensors = o, lse, other_o, other_lse
    gpu = cuda.merge(job.runtime, o.dtype.name, o.shape[3], o.heads)
    return _submit(job, "merge", o.dtype.name, kernel, gpu, MERGE, tensors, ("RW", "RW", "R", "R"))


def check_state(name: str, o: TiledTensor, lse: TiledTensor) -> None:
    """Raise SpecError unless (o, lse) is a partial result whose rows lie without gaps."""
    o.check()
    lse.check()
    if len(o.shape) != 4 or o.dtype.accumulator != o.dtype.name:
        raise wrong(name, f"{o.dtype.name} {o.shape}", "(B, H, S_q, D_v) in float32 or float64")
    if lse.shape != o.shape[:3] or (lse.rows, lse.heads) != (o.rows, o.heads) or lse.dtype is not o.dtype:
        came = f"{lse.dtype.name} {lse.shape} in tiles of {lse.cut}"
        raise wrong(f"lse of {name}", came, f"{o.dtype.name} {o.shape[:3]} in tiles of {o.cut}")
    if not o.dense:
        raise wrong(name, "rows that lie apart", "rows without gaps: a contiguous array, or starpu.empty")


def _submit(
    job: Job,
    operation: str,
    dtype: str,
    kernel: TileKernel,
    gpu: Launches | str,
    bindings: tuple[Binding, ...],
    tensors: tuple[TiledTensor, ...],
    modes: tuple[str, ...],
) -> int:
    """One task for each tile of the first tensor."""
    first = tensors[0]
    n = first.handles.size
    *unit, tile = np.unravel_index(np.arange(n), first.grid)
    batch, head = np.divmod((unit[0] * first.grid[1] + unit[1]) * first.heads, max(1, first.shape[1]))
    tasks = np.zeros(n, TASK)
    tasks["heads"], tasks["turned"] = first.heads, turned_of(*tensors)
    tasks["end"] = np.minimum(first.rows, first.shape[2] - tile * first.rows)
    tasks["sizes"][:, ROWS] = tasks["end"]
    tasks["tile"][:, :3] = np.stack([batch, head, tile], axis=1)
    tasks["footprint"] = footprints(several(kernel.identity, first.heads), tasks["end"][:, None])
    tasks["priority"] = np.iinfo(np.int32).max  # what follows may wait for it; StarPU's limits cut it down
    handles = np.stack([x.handles.ravel() for x in tensors], axis=1)
    numbers = np.tile([job.runtime.constant(mode) for mode in modes], (n, 1))
    program = Program(job.runtime, kernel, bindings, (), cuda=gpu, heads=first.shape[1])
    program.submit(job, codelet(operation, dtype), handles, numbers, tasks)
    return n
