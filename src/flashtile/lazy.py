"""Attention of arrays that are not in memory: Dask's, whose values are yet to be computed, and stored ones, as Zarr's.

The results are Dask arrays: nothing is read and nothing computed before they are asked for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from flashtile.arrays import is_dask, is_lazy, is_stored, is_torch, plain
from flashtile.calls import Request, check_rows, describe, family_of, gathered
from flashtile.checks import check_flag
from flashtile.dtypes import dtype_of
from flashtile.engines import pick
from flashtile.engines.dask.operands import Cut
from flashtile.errors import UnavailableError, described, owned, wrong
from flashtile.gradient_problem import ByIdentity, Gradients, Problem, slots_of, wrt_of
from flashtile.kernels import tile_kernels
from flashtile.score.capture import ArrayCapture
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

SMALL_CHUNK = 512  # rows of a stored chunk below which a tile takes several


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    return_lse: bool,
    progress: Any,
    out: Any,
    **keywords: Any,
) -> Any:
    """`flashtile.attention` where q, k or v is lazy: the same arguments, none left out.

    Chunks:   those of a Dask array along S are tiles, if all but the last are equal (with a mask, and whole panels of
              the kernel): results depend on them as they do on a kernel. Its chunks along B and H are kept where q's
              and k's can be the same heads; D becomes one chunk.
    Returns:  o, or (o, lse), as Dask arrays.
    Raises:   as flashtile.attention, at the call; KernelError when the result is computed.
    """
    check_flag("return_lse", return_lse)
    _check(progress, out, keywords)
    from flashtile.engines.dask.graph import result
    from flashtile.engines.dask.work import Work

    arrays = {name: _array(x, name) for name, x in (("q", q), ("k", k), ("v", v))}
    call = _Call.of(arrays, keywords)
    cut = cut_of(call.spec, *arrays.values())
    _check_family(call.spec, keywords["kernel"])
    token = call.token(cut, q, k, v, keywords["bias"])
    work = Work(call.spec, call.scoring, call.offsets, cut.tile_q, cut.tile_k, call.slot, token)
    found = result(work, cut, list(arrays.values()), token, call.q.dtype, call.blocks)
    first = (0,) * (4 - len(call.q.shape))
    return (found.o[first], found.lse[first]) if return_lse else found.o[first]


def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    dlse: Any,
    wrt: Any,
    out: Any,
    accumulate: bool,
    **keywords: Any,
) -> Gradients:
    """`flashtile.attention_backward` where one of the arrays is lazy: the same arguments, none left out.

    Chunks:   as `attention`; do, o, lse and dlse are cut as q is.
    Returns:  Gradients of Dask arrays, those of sinks, slopes and captured arrays among them.
    Raises:   as flashtile.attention_backward, at the call; UnavailableError also for the gradient of a bias that is a
              Dask array, and of captured arrays of more than 4 MB; KernelError when a result is computed.
    """
    _check(None, out, keywords)
    if accumulate is not False:
        raise wrong("accumulate", repr(accumulate), "False: the results are Dask arrays")
    given = {"q": q, "k": k, "v": v, "do": do, "o": o, "lse": lse, "dlse": dlse}
    arrays = {name: _array(x, name) for name, x in given.items() if x is not None or name != "dlse"}
    names = wrt_of(wrt)
    if "bias" in names and is_dask(keywords["bias"]):
        raise UnavailableError("wrt: got 'bias' with a bias that is a Dask array, expected a NumPy array")
    call = _Call.of(arrays, keywords)
    views = tuple(_view(arrays[n], n) for n in "qkv")
    problem = Problem.of(views, call.request, names)
    rows = {n: arrays.get(n) for n in ("do", "o", "lse", "dlse")}
    check_rows(call.spec, views[0].shape[:-1], views[2].shape[-1:], **rows)
    _check_family(call.spec, keywords["kernel"], "backward")
    return _planned(call, problem, arrays, (*given.values(), keywords["bias"], *names))


def _planned(call: _Call, problem: Problem, arrays: dict[str, Any], values: tuple[Any, ...]) -> Gradients:
    """The graph of a backward call; values: everything that was given to it."""
    from flashtile.engines.dask.gradients import check_arrays
    from flashtile.engines.dask.graph_backward import result
    from flashtile.engines.dask.work_backward import BackwardWork

    cut = cut_of(call.spec, arrays["q"], arrays["k"], arrays["v"], "backward")
    shapes = sorted(problem.scoring.shapes(problem.wanted).items())
    kept = tuple((n, shape) for n, shape in shapes if 0 not in shape)
    check_arrays(call.spec, kept)
    token = call.token(cut, *values)
    fields = call.spec, call.scoring, call.offsets, cut.tile_q, cut.tile_k, call.slot, f"{token}-gradients", kept
    blocks = {n: _columns(x) if n in ("lse", "dlse") else x for n, x in arrays.items()}
    wanted = problem.wanted
    found = result(BackwardWork(*fields), cut, blocks, token, call.q.dtype, wanted, bias=call.blocks)
    return _gradients(problem, found, len(call.q.shape))


def _gradients(problem: Problem, found: Any, rank: int) -> Gradients:
    """All that is asked for, as Dask arrays in the shapes and dtypes of their sources."""
    import dask.array as da

    made: dict[str, Any] = {}
    captured: list[tuple[Any, Any]] = []
    for name, source in problem.sources:
        if name in ("q", "k", "v"):
            made[name] = getattr(found, name)[(0,) * (4 - rank)]
            continue
        if name == "sinks":
            total = found.sinks.sum(axis=0) if source.ndim == 1 else found.sinks
        else:
            parts = [found.totals[n] for n in sorted(slots_of(problem.scoring, source)) if n in found.totals]
            total = da.broadcast_to(sum(parts[1:], start=parts[0]) if parts else da.zeros(()), source.shape)
        if name == "captured":
            captured.append((source, total.astype(source.dtype)))
        else:
            made[name] = total.astype(source.dtype)
    return Gradients(**made, captured=ByIdentity(captured) if "captured" in problem.names else None)


def _array(x: Any, name: str) -> Any:
    if is_torch(x):
        raise wrong(name, "a torch tensor among arrays that are not in memory", "a NumPy array")
    return x if is_lazy(x) else plain(x, name)


def _columns(x: Any) -> Any:
    """A number a row as rows of one element."""
    import dask.array as da

    if is_stored(x):
        x = da.from_array(x, chunks=x.chunks or -1)
    return x[..., None]


class _Call(NamedTuple):
    """What a call asks for: of the bias, where that is a Dask array, only its shape."""

    q: Any  # its shape and dtype
    request: Request
    spec: AttentionSpec
    scoring: Scoring | None
    offsets: np.ndarray | None
    blocks: Any  # the bias that comes block by block, and the number of its slot
    slot: int | None

    @classmethod
    def of(cls, arrays: dict[str, Any], keywords: dict[str, Any]) -> _Call:
        """Raises: SpecError."""
        q, k, v = (_view(arrays[n], n) for n in "qkv")
        bias = keywords["bias"]
        blocks = bias if bias is not None and is_dask(bias) else None
        stand_in = bias if blocks is None else _stand_in(bias)
        request = describe(q, *gathered(**keywords | {"bias": stand_in, "engine": "dask"}))
        spec, values = request.of(q, k, v)
        scoring = None if request.scores is None else values
        _check_sizes(spec)
        slot = None
        if blocks is not None:
            assert scoring is not None and scoring.program is not None
            (slot,) = (n for n, x in enumerate(scoring.program.captures) if getattr(x, "source", None) is stand_in)
        offsets = request.offsets if spec.offset is None else None
        return cls(q, request, spec, scoring, offsets, blocks, slot)

    def token(self, cut: Cut, *given: Any) -> str:
        """A name that follows from all values; that of a memory map from its file's."""
        from dask.base import tokenize

        found: str = tokenize(given, repr(self.spec), cut, _values(self.scoring), self.request.offsets)
        return found


def _values(scoring: Scoring | None) -> list[Any]:
    """What a call's options read."""
    if scoring is None:
        return []
    captures = () if scoring.program is None else scoring.program.captures
    read = [x.array if isinstance(x, ArrayCapture) else x.value for x in captures]
    return [*read, scoring.sinks, repr(scoring.keep)]


def cut_of(spec: AttentionSpec, q: Any, k: Any, v: Any, direction: str = "forward") -> Cut:
    """The blocks of a call, from the chunks of its arrays where those say something."""
    from flashtile.engines.starpu.engine import TILE_K, TILE_Q

    panel = tile_kernels().rows_at_once(spec, direction)
    tile_q = _tile([q], spec.q_len, max(1, max(TILE_Q) // panel) * panel)
    if spec.program is not None and tile_q < spec.q_len:  # a program reads whole panels
        tile_q = min(-(-tile_q // panel) * panel, spec.q_len)
    tile_k = _tile([k, v], spec.kv_len, TILE_K)
    batches, heads = (1,) * spec.batch, (1,) * spec.kv_heads
    for x in (v, k, q):
        if is_dask(x) and x.ndim == 4:
            batches = tuple(x.chunks[0])
        if is_dask(x) and x.ndim >= 3:
            group = spec.group if x is q else 1
            edges = np.cumsum(x.chunks[-3])
            heads = tuple(int(n) for n in np.diff(edges[edges % group == 0] // group, prepend=0))
    return Cut(batches, heads, spec.group, tile_q, tile_k)


def _tile(arrays: list[Any], length: int, usual: int) -> int:
    """Rows of a tile: of even chunks those of a chunk, of uneven ones the largest; whole chunks of storage."""
    for x in arrays:
        if is_dask(x):
            return max(1, *x.chunks[-2])
    for x in arrays:
        if is_stored(x) and x.chunks is not None:
            rows = max(1, int(x.chunks[-2]))
            return min(rows if rows >= SMALL_CHUNK else -(-usual // rows) * rows, max(1, length))
    return min(usual, max(1, length))


def _check(progress: Any, out: Any, keywords: dict[str, Any]) -> None:
    """Raise SpecError for what lazy arrays cannot have."""
    engine = keywords["engine"]
    if engine not in ("auto", "dask"):
        raise wrong("engine", f"{engine!r} with an array that is not in memory", "'dask' or 'auto', or NumPy arrays")
    pick("dask")  # says what is not installed
    if progress is not None and progress is not False:
        raise wrong("progress", repr(progress), "None: the result is computed later (see dask.diagnostics.ProgressBar)")
    if out is not None:
        raise wrong("out", described(out), "None: the result is a Dask array (store it with to_zarr)")
    for name in ("mask", "alibi_slopes", "sinks", "align"):
        if is_lazy(x := keywords[name]):
            raise wrong(name, owned(x), "NumPy's, which decide what is read")


def _check_sizes(spec: AttentionSpec) -> None:
    sizes = {"B": spec.batch, "H": spec.heads, "S_q": spec.q_len, "D": spec.head_size, "D_v": spec.value_size}
    if zeros := [name for name, n in sizes.items() if not n]:
        raise wrong("q", f"{' and '.join(zeros)} of 0 with an array that is not in memory", "sizes above 0")


def _check_family(spec: AttentionSpec, kernel: Any, direction: str = "forward") -> None:
    from flashtile.engines.dask.engine import check_family

    check_family(family_of(spec, kernel, direction))


def _view(x: Any, name: str) -> Any:
    """Shape and dtype of an array. Raises: SpecError where a Dask array does not know its own."""
    shape = tuple(x.shape)
    if any(not isinstance(n, (int, np.integer)) for n in shape):
        raise wrong(name, f"shape {shape}", "known chunk sizes: call compute_chunk_sizes()")
    return SimpleNamespace(shape=tuple(map(int, shape)), dtype=np.dtype(x.dtype))


def _stand_in(bias: Any) -> np.ndarray:
    """An array of the bias's shape and dtype, without memory."""
    shape = _view(bias, "bias").shape
    dtype_of(bias.dtype, "bias")
    return np.broadcast_to(np.zeros((), bias.dtype), shape)
