"""Whether the tensors of a task flow fit together: one error for each way in which they do not, before any task."""

from __future__ import annotations

import numpy as np

from flashtile.arrays import check_outside
from flashtile.dtypes import DTYPES, DType
from flashtile.engines.starpu.tiles import TiledTensor
from flashtile.engines.starpu.units import of_keys
from flashtile.errors import wrong
from flashtile.score.options import Scoring, read_beside

NAMES = ("q", "k", "v", "o", "lse")


def check_tensors(
    q: TiledTensor,
    k: TiledTensor,
    v: TiledTensor,
    o: TiledTensor,
    lse: TiledTensor,
    *,
    state: bool,
    written: bool = True,
) -> None:
    """Raise SpecError unless the tensors fit together; state: o is in the accumulator's dtype; written: o and lse are
    outputs."""
    for name, x in zip(NAMES, (q, k, v, o, lse), strict=True):
        x.check()
        rank = 3 if name == "lse" else 4
        if len(x.shape) != rank:
            raise wrong(name, f"shape {x.shape}", "(B, H, S)" if rank == 3 else "(B, H, S, D)")
    accumulator = DTYPES[q.dtype.accumulator]
    wanted: tuple[tuple[str, TiledTensor, tuple[int, ...], DType, int], ...] = (
        ("o", o, (*q.shape[:3], v.shape[3]), accumulator if state else q.dtype, q.rows),
        ("lse", lse, q.shape[:3], accumulator, q.rows),
        ("v", v, (*k.shape[:3], v.shape[3]), q.dtype, k.rows),
    )
    for name, x, shape, dtype, rows in wanted:
        if x.shape != shape:
            raise wrong(name, f"shape {x.shape}", f"{shape}")
        if x.dtype is not dtype:
            raise wrong(name, f"dtype {x.dtype.name}", dtype.name)
        if x.rows != rows:
            raise wrong(name, f"tiles of {x.rows} rows", f"{rows} as in {'k' if name == 'v' else 'q'}")
    group, rest = divmod(q.shape[1], max(1, k.shape[1]))
    if not rest:  # else it is no attention, and refused as such
        if q.heads % max(1, group) and group % q.heads:
            raise wrong("q", f"tiles of {q.heads} heads", f"a multiple or a divisor of {group}, which share one of k")
        ofkeys = of_keys(q.heads, max(1, group))
        for name, x, heads in (("o", o, q.heads), ("lse", lse, q.heads), ("k", k, ofkeys), ("v", v, ofkeys)):
            if x.heads != heads:
                raise wrong(name, f"tiles of {x.heads} heads", f"{heads}, to go with {q.heads} of q")
    if written:
        check_apart({"o": o, "lse": lse}, {"q": q, "k": k, "v": v, "o": o, "lse": lse})


def check_heads(q: TiledTensor, heads: int) -> None:
    """Raise SpecError unless tasks may have the heads of q's tiles together; heads: so many they may."""
    if q.heads > heads:
        raise wrong(
            "q",
            f"tiles of {q.heads} heads, which differ by options, share keys, or add to arrays",
            f"tiles of {heads}",
        )


def check_apart(outputs: dict[str, TiledTensor], every: dict[str, TiledTensor]) -> None:
    """Two handles on the same bytes would race: StarPU orders tasks by handles."""
    for name, out in outputs.items():
        if not out.writable:
            raise wrong(name, "a read-only array, or one whose elements share memory", "a writable one")
        for other, x in every.items():
            same = x is out and name != other
            if same or (x is not out and max(x.extent[0], out.extent[0]) < min(x.extent[1], out.extent[1])):
                raise wrong(name, f"an array within the memory that {other} spans", "memory of its own")


def check_read(outputs: dict[str, TiledTensor], scoring: Scoring | None, offsets: np.ndarray | None) -> None:
    """Raise SpecError for an output in the memory of what changes scores: tasks read that where the caller has it, and
    no handle says so."""
    read = tuple(read_beside(scoring, offsets))
    for name, out in outputs.items():
        check_outside(name, out.extent, read)


def check_gradients(given: dict[str, TiledTensor]) -> None:
    """Raise SpecError unless the tensors of a backward pass fit together: NAMES, do, and those of dlse, dq, dk and dv
    that are there. Gradients are in the dtype of q or in accumulators."""
    check_tensors(*(given[name] for name in NAMES), state=False, written=False)
    accumulator = DTYPES[given["q"].dtype.accumulator]
    for name, like in (("do", "o"), ("dlse", "lse"), ("dq", "q"), ("dk", "k"), ("dv", "v")):
        if name not in given:
            continue
        x, model = given[name], given[like]
        x.check()
        if x.shape != model.shape:
            raise wrong(name, f"shape {x.shape}", f"{model.shape} as {like}")
        dtypes = (model.dtype, accumulator) if name in ("dq", "dk", "dv") else (model.dtype,)
        if x.dtype not in dtypes:
            raise wrong(name, f"dtype {x.dtype.name}", " or ".join(dict.fromkeys(d.name for d in dtypes)))
        if (x.rows, x.heads) != (model.rows, model.heads):
            raise wrong(name, f"tiles of {x.cut}", f"{model.cut} as in {like}")
    check_apart({name: given[name] for name in ("dq", "dk", "dv") if name in given}, given)
