"""Attention of arrays that are larger than memory, within a limit: `flashtile.attention(..., memory_limit=...)`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from flashtile.arrays import address_of, check_outside, is_dask, is_stored, is_torch, plain, view_of
from flashtile.calls import describe, family_of, gathered
from flashtile.calls.prepared import check_out
from flashtile.checks import check_flag, integer
from flashtile.dtypes import DTYPES
from flashtile.engines import pick
from flashtile.engines.starpu.outofcore import Streamed
from flashtile.errors import UnavailableError, wrong
from flashtile.outputs import place_of, reader, writer
from flashtile.progress import reporter
from flashtile.score.options import read_beside
from flashtile.spec import AttentionSpec


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    memory_limit: Any,
    return_lse: bool,
    progress: Any,
    out: Any,
    **keywords: Any,
) -> Any:
    """`flashtile.attention` with a limit: the same arguments, none left out.

    Shapes:   q, k, v NumPy arrays, memory-mapped or not, or arrays in storage (Zarr's, HDF5's).
    Options:  memory_limit  bytes that the call may take beside its inputs, and beside what its options capture.
              out  an array, mapped or not; the name of a file, .npy or .zarr; or an array in storage: see outputs.py.
    Returns:  o; of an .npy file its map, of a Zarr array that, read only. lse is in memory.
    Raises:   as flashtile.attention; SpecError for a limit below the smallest working set, which it names.
    """
    check_flag("return_lse", return_lse)
    limit = limit_of(memory_limit, keywords["engine"])
    arrays = [readable(x, name) for name, x in (("q", q), ("k", k), ("v", v))]
    views = [described(x) for x in arrays]
    request = describe(views[0], *gathered(**keywords | {"engine": "starpu"}))
    spec, values = request.of(views[0], views[1], views[2])
    scoring, offsets = None if request.scores is None else values, request.offsets
    check_call(spec, keywords["kernel"])
    shape, report = views[0].shape[:-1] + views[2].shape[-1:], reporter(progress)
    real = DTYPES[DTYPES[spec.dtype].accumulator].numpy
    with _target(out, shape, views[0].dtype, spec, arrays, tuple(read_beside(scoring, offsets))) as (target, result):
        lse = np.empty(shape[:-1], real)
        results = lse.nbytes + (target.nbytes if out is None else 0)
        call = _streamed(spec, limit, results, offsets, scoring)
        lse4 = lse.reshape((1,) * (4 - len(shape)) + lse.shape)
        q_read, k_read, v_read = (reader(x, given) for x, given in zip(arrays, (q, k, v), strict=True))
        call.run(q_read, k_read, v_read, writer(target), lse4, report)
    o = result()
    return (o, lse) if return_lse else o


def _streamed(spec: AttentionSpec, limit: int, results: int, offsets: Any, scoring: Any) -> Streamed:
    from flashtile.engines.starpu.engine import tile_sizes

    return Streamed(spec, tile_sizes(spec), limit, results, offsets, scoring)


def limit_of(memory_limit: Any, engine: Any) -> int:
    """The limit in bytes, for an engine that keeps one. Raises: SpecError, UnavailableError."""
    limit = integer(memory_limit)
    if limit is None or limit < 1:
        raise wrong("memory_limit", repr(memory_limit), "bytes, a positive integer, or None")
    if engine not in ("auto", "starpu"):
        raise wrong("engine", f"{engine!r} with a memory_limit", "'starpu' or 'auto'")
    pick("starpu")
    return limit


def readable(x: Any, name: str) -> Any:
    """An array in memory, or mapped, as an ndarray; one in storage as it is. Raises: SpecError for any other."""
    expected = 'a NumPy array, or one in storage; of a file np.load(..., mmap_mode="r")'
    if is_torch(x) or is_dask(x) or isinstance(x, (str, os.PathLike)):
        kind = "a torch tensor" if is_torch(x) else "a Dask array" if is_dask(x) else f"the name {str(x)!r}"
        raise wrong(name, f"{kind} with a memory_limit", expected)
    return x if is_stored(x) else plain(x, name)


def described(x: Any) -> Any:
    """What has the shape and dtype of an array, wherever that lies."""
    return SimpleNamespace(shape=tuple(x.shape), dtype=np.dtype(x.dtype))


def check_call(spec: AttentionSpec, kernel: Any, direction: str = "forward") -> None:
    """Raise SpecError, or UnavailableError, for a call that is not computed tile by tile."""
    family = family_of(spec, kernel, direction)
    if family.name != "cpu":
        raise UnavailableError(f"kernel: got {family.name!r} with a memory_limit, expected 'cpu'")
    sizes = {"B": spec.batch, "H": spec.heads, "S_q": spec.q_len, "D": spec.head_size, "D_v": spec.value_size}
    if zeros := [name for name, n in sizes.items() if not n]:
        raise wrong("q", f"{' and '.join(zeros)} of 0 with a memory_limit", "sizes above 0")


@contextlib.contextmanager
def _target(
    out: Any,
    shape: tuple[int, ...],
    dtype: np.dtype,
    spec: AttentionSpec,
    inputs: list[Any],
    beside: Sequence[tuple[str, int, int]],
) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """(where o goes, what gives the result once it is there); beside: as of `read_beside`."""
    place = place_of(out, "out")
    if place is not None:
        place.check(shape, dtype, inputs)
        with place.writing(shape, dtype) as target:
            yield target, place.result
        return
    if out is None:
        target = np.empty(shape, dtype)
        yield target, lambda: target
        return
    check_out(view_of(plain(out, "out")), shape, spec)
    if not out.flags.writeable:
        raise wrong("out", "a read-only array", "a writable one")
    for name, x in zip("qkv", inputs, strict=True):
        if isinstance(x, np.ndarray) and np.may_share_memory(out, x):
            raise wrong("out", f"an array within the memory that {name} spans", "memory of its own")
    below, above = view_of(out).extent()
    check_outside("out", (address_of(out) + below, address_of(out) + above), beside)
    yield out, lambda: out
