"""Attention of arrays that are not in memory: Dask's, whose values are yet to be computed, and stored ones, as Zarr's.

The results are Dask arrays: nothing is read and nothing computed before they are asked for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from flashtile.arrays import is_dask, is_lazy, is_stored, plain
from flashtile.calls import describe, family_of
from flashtile.checks import check_flag
from flashtile.dtypes import dtype_of
from flashtile.engines import pick
from flashtile.engines.dask.operands import Cut
from flashtile.errors import wrong
from flashtile.kernels import tile_kernels
from flashtile.score.capture import ArrayCapture
from flashtile.score.keep import keep_of
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

SMALL_CHUNK = 512  # rows of a stored chunk below which a tile takes several


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any,
    bias: Any,
    score_mod: Any,
    causal: bool,
    window: Any,
    align: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    scale: Any,
    dropout_p: float,
    seed: int | None,
    precision: str,
    return_lse: bool,
    kernel: str,
    engine: str,
    progress: Any,
    out: Any,
) -> Any:
    """`flashtile.attention` where q, k or v is lazy: the same arguments, none left out.

    Chunks:   those of a Dask array along S are tiles, if all but the last are equal (with a mask, and whole panels of
              the kernel): results depend on them as they do on a kernel. Its chunks along B and H are kept where q's
              and k's can be the same heads; D becomes one chunk.
    Returns:  o, or (o, lse), as Dask arrays.
    Raises:   as flashtile.attention, at the call; KernelError when the result is computed.
    """
    check_flag("return_lse", return_lse)
    _check(engine, progress, out, {"mask": mask, "alibi_slopes": alibi_slopes, "sinks": sinks, "align": align})
    from dask.base import tokenize

    from flashtile.engines.dask.graph import result
    from flashtile.engines.dask.work import Work

    arrays = [x if is_lazy(x) else plain(x, name) for name, x in (("q", q), ("k", k), ("v", v))]
    given_as = tokenize(q, k, v, bias)  # a memory map by its name, not by its values
    keep = keep_of(dropout_p, seed)
    q_view, k_view, v_view = (_view(x, name) for x, name in zip(arrays, "qkv", strict=True))
    blocks = bias if bias is not None and is_dask(bias) else None
    stand_in = bias if blocks is None else _stand_in(bias)
    scores = mask, stand_in, score_mod, softcap, alibi_slopes, sinks, keep
    request = describe(q_view, scores, (causal, window, align, scale, precision, kernel, "dask"))
    spec, values = request.of(q_view, k_view, v_view)
    scoring = None if request.scores is None else values
    offsets = request.offsets
    _check_sizes(spec)
    _check_family(spec, kernel)
    slot = None
    if blocks is not None:
        assert scoring is not None and scoring.program is not None
        (slot,) = (n for n, x in enumerate(scoring.program.captures) if getattr(x, "source", None) is stand_in)
    cut = cut_of(spec, *arrays)
    token = tokenize(given_as, repr(spec), cut, _values(scoring), offsets)
    work = Work(spec, scoring, offsets if spec.offset is None else None, cut.tile_q, cut.tile_k, slot, token)
    found = result(work, cut, arrays, token, q_view.dtype, blocks)
    first = (0,) * (4 - len(q_view.shape))
    return (found.o[first], found.lse[first]) if return_lse else found.o[first]


def _values(scoring: Scoring | None) -> list[Any]:
    """What a call's options read."""
    if scoring is None:
        return []
    captures = () if scoring.program is None else scoring.program.captures
    read = [x.array if isinstance(x, ArrayCapture) else x.value for x in captures]
    return [*read, scoring.sinks, repr(scoring.keep)]


def cut_of(spec: AttentionSpec, q: Any, k: Any, v: Any) -> Cut:
    """The blocks of a call, from the chunks of its arrays where those say something."""
    from flashtile.engines.starpu.engine import TILE_K, TILE_Q

    panel = tile_kernels().rows_at_once(spec)
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


def _check(engine: Any, progress: Any, out: Any, small: dict[str, Any]) -> None:
    """Raise SpecError for what lazy arrays cannot have."""
    if engine not in ("auto", "dask"):
        raise wrong("engine", f"{engine!r} with an array that is not in memory", "'dask' or 'auto', or NumPy arrays")
    pick("dask")  # says what is not installed
    if progress is not None and progress is not False:
        raise wrong("progress", repr(progress), "None: the result is computed later (see dask.diagnostics.ProgressBar)")
    if out is not None:
        raise wrong("out", f"a {type(out).__name__}", "None: the result is a Dask array (store it with to_zarr)")
    for name, x in small.items():
        if is_lazy(x):
            raise wrong(name, f"a {type(x).__module__}.{type(x).__name__}", "NumPy's, which decide what is read")


def _check_sizes(spec: AttentionSpec) -> None:
    sizes = {"B": spec.batch, "H": spec.heads, "S_q": spec.q_len, "D": spec.head_size, "D_v": spec.value_size}
    if zeros := [name for name, n in sizes.items() if not n]:
        raise wrong("q", f"{' and '.join(zeros)} of 0 with an array that is not in memory", "sizes above 0")


def _check_family(spec: AttentionSpec, kernel: Any) -> None:
    from flashtile.engines.dask.engine import check_family

    check_family(family_of(spec, kernel))


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
