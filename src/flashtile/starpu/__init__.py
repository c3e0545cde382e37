"""The door for programs on StarPU: tiles that are registered once, attention as tasks beside the program's own::

    from flashtile import starpu
    starpu.init()
    q, k, v, o, lse = (starpu.register(x, rows=512) for x in arrays)    # (B, H, S, D); lse (B, H, S)
    starpu.submit_forward(q, k, v, o, lse, causal=True)                  # returns at once
    starpu.wait()                                                        # raises what a task met
    starpu.submit_backward(do, q, k, v, o, lse, dq, dk, dv, causal=True) # gradients, added to dq, dk and dv

Tasks on the same tiles run in the order of their submission, whoever submits them: `q[0, 0, 3].handle` is the
address of StarPU's own handle, and `wrap` takes the program's handles the other way. A program that has called
starpu_init itself keeps its StarPU; `init` joins it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from flashtile.arrays import is_torch, plain, view_of
from flashtile.calls import Request, describe
from flashtile.checks import integer
from flashtile.dtypes import DTYPES, DType, dtype_of
from flashtile.engines.starpu import runtime, session, states
from flashtile.engines.starpu.codelets import LABELS
from flashtile.engines.starpu.flow import COMMUTE, ORDERED, Flow, submit_pair
from flashtile.engines.starpu.jobs import Job
from flashtile.engines.starpu.matching import NAMES, check_heads, check_read, check_tensors
from flashtile.engines.starpu.profile import Profile
from flashtile.engines.starpu.records import TaskRecord
from flashtile.engines.starpu.runtime import schedulers, shutdown
from flashtile.engines.starpu.tiles import Tile, TiledTensor, can_group, can_tile
from flashtile.engines.starpu.vanilla import VanillaFlow
from flashtile.errors import UnavailableError, described, wrong
from flashtile.score.keep import keep_of
from flashtile.signature import Align, Precision, Window
from flashtile.starpu.gradients import PendingGradients, submit_backward

__all__ = [
    "COMMUTE",
    "ORDERED",
    "PendingGradients",
    "Profile",
    "TaskRecord",
    "Tile",
    "TiledTensor",
    "empty",
    "init",
    "profile",
    "register",
    "restrict",
    "schedulers",
    "shutdown",
    "submit_backward",
    "submit_finish",
    "submit_forward",
    "submit_merge",
    "wait",
    "workers",
    "wrap",
]
__dir__ = __all__.copy  # the public names, and not what stands beside them

FLOWS = ("cpu", "vanilla")


def init(
    workers: int | None = None,
    *,
    cuda: int | None = None,
    scheduler: str | None = None,
    calibrate: bool | None = None,
    models: str | os.PathLike[str] | None = None,
    cuda_kernels: str | os.PathLike[str] | None = None,
) -> None:
    """Start StarPU, or join the one that the program has started, which then keeps its own settings.

    Idle workers poll, each on its CPU, from here to shutdown; those that attention(engine="starpu") starts by itself
    pause between calls. Called after such a start, it starts StarPU anew with these settings. Unless
    STARPU_WORKERS_GETBIND=0, workers stay on the CPUs that the process may use (taskset). StarPU's own messages (the
    bus is measured at the first start on a machine, a model's samples differ, workers share a CPU) go to stderr;
    STARPU_SILENT=1 in the environment keeps them back.

    Options:  workers, cuda  numbers of CPU and CUDA workers; else STARPU_NCPU and STARPU_NCUDA, else all there are.
              scheduler      one of schedulers(); else STARPU_SCHED, else StarPU's own choice (lws).
              calibrate      measure every task for the performance models.
              models         folder that keeps the models, for dmda and its kin; else StarPU's (~/.starpu).
              cuda_kernels   folder of an architecture that `flashtile aot` made, for CUDA workers; else
                             FLASHTILE_STARPU_KERNELS, else CUDA workers run nothing of flashtile's.
    Raises:   SpecError for a second call, an unknown scheduler, a number out of range, a limit on memory
              (STARPU_LIMIT_CPU_MEM) without a disk; UnavailableError if StarPU is not installed, has no worker, or
              runs in the process that this one was forked from.
    """
    runtime.init(workers, cuda=cuda, scheduler=scheduler, calibrate=calibrate, models=models, cuda_kernels=cuda_kernels)


def workers(architecture: str | None = None) -> int:
    """Workers that run, of "cpu", of "cuda", or all."""
    if architecture not in (None, *runtime.ARCHITECTURES):
        raise wrong("architecture", repr(architecture), "'cpu', 'cuda' or None")
    return runtime.current().workers(architecture)


def profile() -> Profile:
    """Record the tasks that are submitted inside a `with` block, by this door and by engine="starpu".

    Nothing is recorded outside of a block; inside of one, StarPU reads its clock around each task.

    Returns: the profile: `tasks` (a TaskRecord each), `dependencies`, `workers`, and three pictures. It is read after
             the block, whose end waits for its tasks; what they met is still raised by `wait`.
    Raises:  UnavailableError before init; SpecError for a block inside of another.

    >>> with starpu.profile() as p:  # doctest: +SKIP
    ...     starpu.submit_forward(q, k, v, o, lse, causal=True)
    ...     starpu.wait()
    >>> p.chrome_trace("trace.json"), p.gantt("workers.png"), p.dot("graph.dot")  # doctest: +SKIP
    """
    return Profile()


def restrict(*where: str, dtype: str | None = None) -> None:
    """Let tasks submitted from now on run on "cpu", on "cuda" or on both only, in one dtype or in all.

    A task whose own program has no kernel there is refused when it is submitted, with the reason.
    Raises: UnavailableError if nothing remains: no implementation there, or no worker. Nothing is changed then.
    """
    names = list(DTYPES) if dtype is None else [dtype_of(dtype).name]
    chosen = [session.codelet(operation, name) for operation in LABELS for name in names]
    errors = []
    for one in chosen:
        try:
            one.check(*where)
        except UnavailableError as e:
            errors.append(e)
    if len(errors) == len(chosen):
        raise errors[0]
    for one in chosen:
        one.place(*where)


def register(array: Any, rows: int, heads: int = 1) -> TiledTensor:
    """The tiles of a NumPy array, or of a torch tensor in CPU memory, which stays where it is.

    It lives at least until unregister() (or the end of a `with` block, or shutdown). While it is registered, read and
    write it through acquire only. To StarPU an array that is registered twice is two: tasks on the one do not wait for
    tasks on the other, so do that only where no task writes either.

    Shapes:   q, k, v or o (B, H, S, D); lse (B, H, S). Tiles are (1, heads, rows, D), the last along S may be short.
              Rows of D adjacent elements, any distance apart; lse contiguous along S.
    Options:  heads  of a tile, all of which one task takes: a task costs microseconds, so small tiles want many.
                     Divides H, or is that of several whole batches; of k and v, so many as the heads of q read.
                     Results do not depend on it.
    Raises:   SpecError.
    """
    array, dtype = _memory(array)
    if array.ndim not in (3, 4):
        raise wrong("array", f"shape {array.shape}", "(B, H, S, D), or (B, H, S) for lse")
    if array.ndim == 4 and array.shape[3] < 1:
        raise wrong("array", f"shape {array.shape}", "a head size of at least 1")
    fits = array.strides[2] == dtype.itemsize
    if array.ndim == 4:
        fits = can_tile(array.strides[2:], array.shape[3], dtype.itemsize)
    if array.size and not fits:
        raise wrong("array", f"strides {array.strides}", "rows of adjacent elements that do not overlap")
    runtime.current()
    rows, heads = rows_of(rows), heads_of(heads, array.shape)
    if array.size and not can_group(array.shape, array.strides[:3], rows, heads, dtype.itemsize):
        got = f"{heads} with shape {array.shape}, strides {array.strides}"
        raise wrong("heads", got, "1, or planes, or rows, that lie one after the other")
    address = array.ctypes.data
    return TiledTensor(array.shape, dtype, rows, heads=heads, address=address, strides=array.strides[:3], keep=array)


def _memory(array: Any) -> tuple[np.ndarray, DType]:
    """A NumPy array, or a torch tensor in CPU memory as one over the same memory (bfloat16 as its bits); its dtype."""
    if not is_torch(array):
        array = plain(array, "array")
        return array, dtype_of(array.dtype, "array")
    found, dtype = view_of(array), dtype_of(array.dtype, "array")
    if found.device != "cpu" or array.requires_grad:
        got = "a tensor that requires grad" if array.requires_grad else f"a tensor on {found.device}"
        raise wrong("array", got, "a tensor in CPU memory that does not require grad")
    if dtype.name != "bfloat16":
        return array.numpy(), dtype
    import torch

    return array.view(torch.int16).numpy().view(np.uint16), dtype


def empty(shape: Sequence[int], dtype: Any, rows: int, heads: int = 1) -> TiledTensor:
    """Tiles that StarPU owns: allocated where and when a task first writes them, evicted if memory is short.

    Shapes as in `register`. The contents are read by acquire, once a task or acquire(..., "W") has written
    them; unregister() drops them.
    """
    shape = tuple(integer(n) if integer(n) is not None else -1 for n in shape)  # type: ignore[misc]  # no None
    if len(shape) not in (3, 4) or min(shape) < 0 or 0 in shape[3:]:
        raise wrong("shape", repr(shape), "(B, H, S, D), or (B, H, S) for lse")
    return TiledTensor(shape, dtype_of(dtype), rows_of(rows), heads=heads_of(heads, shape))


def wrap(handles: Any, shape: Sequence[int], dtype: Any, rows: int) -> TiledTensor:
    """Tiles over handles of the program's own: addresses (starpu_data_handle_t) of shape (B, H, tiles along S)."""
    handles = np.asarray(handles)
    if handles.dtype.kind not in "iu":
        raise wrong("handles", f"dtype {handles.dtype}", "integers, the addresses of handles")
    return TiledTensor.wrap(handles.astype(np.uint64), tuple(shape), dtype_of(dtype), rows_of(rows))


def rows_of(rows: Any) -> int:
    """The rows of a tile, which must be a positive integer."""
    number = integer(rows)
    if number is None or number < 1:
        raise wrong("rows", repr(rows), "a positive integer")
    return number


def heads_of(heads: Any, shape: tuple[int, ...]) -> int:
    """The heads of a tile: a divisor of H, or the heads of several whole batches."""
    number, (batch, count) = integer(heads), shape[:2]
    if number is not None and number > 0 and (number == 1 or (count and batch)):
        several = number > count and not number % count and not batch * count % number
        if number == 1 or not count % number or several:
            return number
    raise wrong("heads", repr(heads), f"a divisor of the {count} heads, or all of batches that divide {batch}")


def submit_forward(
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    score_mod: Any = None,
    causal: bool = False,
    window: Window = None,
    align: Align = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    precision: Precision = "ieee",
    accumulate: str = ORDERED,
    carry: bool | None = None,
    last: bool | None = None,
    kernel: Literal["cpu", "vanilla"] = "cpu",
) -> int:
    """Submit attention: of whole tensors, one task for each pair of tiles that meet; or of one pair of tiles.

    Shapes:   q, k, v, o, lse as registered: all tensors, or all tiles (`q[b, h, i]`, `k[b, h_kv, j]`). q, o and lse
              are cut into the same rows, k and v into the same keys. lse float32 (float64 for float64). o of tiles
              is in lse's dtype, the state; `submit_finish` casts it.
    Options:  as `flashtile.attention`; also
              accumulate  "ordered": key tiles in a fixed order, the same bits always; "commute": in any order, so
                          that a chain need not wait for its next key tile (STARPU_COMMUTE).
              carry, last (of tiles only) whether o and lse hold the state of earlier keys, and whether no key
                          follows, so that sinks are counted.
              kernel      "cpu", the fused codelet; for whole tensors also "vanilla", the three unfused ones.
    Returns:  the number of tasks; 0 for tiles that the mask keeps apart. Does not wait: see `wait`.
    Raises:   SpecError, UnavailableError; what happens in tasks is raised by `wait`.
    """
    given = q, k, v, o, lse
    single = isinstance(q, Tile)
    kind = Tile if single else TiledTensor
    for name, x in zip(NAMES, given, strict=True):
        if not isinstance(x, kind):
            raise wrong(name, described(x), "a tile as q" if single else "a registered tensor")
    tensors = [x.tensor for x in given] if single else list(given)
    if not single and not (carry is last is None):
        raise wrong("carry" if carry is not None else "last", "a value with whole tensors", "None: it is for tiles")
    if kernel not in FLOWS or (single and kernel != "cpu"):
        raise wrong("kernel", repr(kernel), "'cpu'" if single else " or ".join(map(repr, FLOWS)))
    if kernel == "vanilla" and tensors[0].heads > 1:
        raise wrong("kernel", f"'vanilla' with tiles of {tensors[0].heads} heads", "tiles of one")
    if kernel == "vanilla" and accumulate != ORDERED:
        raise wrong("accumulate", repr(accumulate), f"{ORDERED!r} with kernel 'vanilla'")
    keep = keep_of(dropout_p, seed)
    if keep is not None and kernel != "cpu":
        raise UnavailableError(
            f"dropout_p: got {dropout_p} with kernel {kernel!r}, expected 'cpu', whose tasks know it"
        )
    scores = mask, bias, score_mod, softcap, alibi_slopes, sinks, keep
    request = describe(tensors[0], scores, (causal, window, align, scale, precision, kernel, "starpu"))
    check_tensors(*tensors, state=single)
    flow = _flow(tensors, request, accumulate)
    check_heads(tensors[0], flow.heads)
    job = _job()
    if single:
        assert isinstance(flow, Flow)
        return submit_pair(flow, job, *given, carry=bool(carry), last=bool(last))
    return flow.submit(job, *tensors)


def submit_finish(state: TiledTensor, lse: TiledTensor, o: TiledTensor) -> int:
    """Submit o = state, cast to o's dtype; lse is only read. Returns the number of tasks.

    Shapes:   state and o (B, H, S_q, D_v), lse (B, H, S_q), cut into the same rows.
    Numerics: rounds to nearest even; a row that saw no key is 0.
    Raises:   SpecError.
    """
    return states.submit_finish(_job(), state, lse, o)


def submit_merge(o: TiledTensor, lse: TiledTensor, other_o: TiledTensor, other_lse: TiledTensor) -> int:
    """Submit (o, lse) = merge of (o, lse) and (other_o, other_lse), as `flashtile.merge`. Returns the number of tasks.

    Shapes:   o (B, H, S_q, D_v), lse (B, H, S_q), the others alike: partial results over disjoint keys, in float32 or
              float64.
    Raises:   SpecError.
    """
    return states.submit_merge(_job(), o, lse, other_o, other_lse)


def wait() -> None:
    """Return when every task submitted through this door is done; Ctrl-C skips those that have not begun.

    Raises:   KernelError naming the codelet and the tile that failed first. Tasks after it were skipped, so outputs
              are undefined; StarPU and the tensors stay usable.
    """
    _job().wait()


def _job() -> Job:
    return session.current().door_job()


def _flow(tensors: list[TiledTensor], request: Request, accumulate: str) -> Flow | VanillaFlow:
    """The flow of these options on tensors of these shapes; remembered, unless it holds values of the call."""
    now = runtime.current()
    fused = request.options.kernel == "cpu" or not tensors[1].shape[2]  # without keys there are no scores to store
    kind = partial(Flow, accumulate=accumulate, heads=tensors[0].heads) if fused else VanillaFlow
    q, k, v = (SimpleNamespace(shape=t.shape, dtype=t.dtype.name) for t in tensors[:3])
    tiles = tensors[0].rows, tensors[1].rows
    spec, scoring = request.of(q, k, v)
    if request.scores is not None or spec.offset is None:
        offsets = request.offsets if spec.offset is None else None
        check_read(dict(zip(NAMES[3:], tensors[3:], strict=True)), scoring, offsets)
        return kind(now, spec, *tiles, offsets=offsets, scoring=scoring if request.scores else None)
    key = spec, tiles, tensors[0].heads, accumulate, request.options.kernel
    return session.current().flow(key, lambda: kind(now, spec, *tiles))
