"""Launches of the forward's codelets on GPUs; those of gradients are in cuda_gradients.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from flashtile.arrays import contiguous
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu.cuda_scores import captured, sinks_of
from flashtile.engines.starpu.launches import (
    ANY_TILE,
    COLUMN,
    COLUMNS,
    KEYS,
    NO_KERNELS,
    QUERY_TILES,
    ROWS,
    SINK,
    Launches,
    Source,
    Stage,
    Value,
    bands,
    changes,
    counts,
    drawn,
    launches,
    marks_of,
    memories,
    one_tile,
    strides,
)
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.host import OPEN
from flashtile.kernels.triton.specialisation import Memory
from flashtile.score.options import Scoring, masked_by_tile
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    from flashtile.engines.starpu.runtime import Runtime


def anchor_of(offsets: np.ndarray, batch: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """What anchors the band within tiles whose first row is `shift` beyond their first key; offsets (B,), or (1,)."""
    return np.clip(offsets[np.minimum(batch, len(offsets) - 1)], -OPEN, OPEN) + shift


def forward(
    runtime: Runtime, spec: AttentionSpec, tile_q: int, tile_k: int, heads: int = 1, scoring: Scoring | None = None
) -> Launches | str:
    """Of the codelet `forward`, for so many heads: the state starts, or where values[0] says so continues, and takes
    the sinks in where values[2] is not 0; else why there is none."""
    if runtime.kernels is None:  # before arrays are looked at
        return NO_KERNELS
    draw, found = drawn(spec, scoring, tile_k), captured(spec, scoring, 5, more=int(spec.sinks))
    if isinstance(draw, str):
        return draw
    if isinstance(found, str):
        return found
    wide, arrays = DTYPES[DTYPES[spec.dtype].accumulator].itemsize, found.arrays
    values = _forward_values(spec, {"q": 0, "k": 1, "v": 2}, 3, 4, heads) | found.values | draw
    values |= strides(spec, {"o": 3}, wide)
    if spec.sinks:
        sinks = sinks_of(scoring)
        if isinstance(sinks, str):
            return sinks
        values["sinks"] = Source("ADDRESS", 5 + len(arrays), SINK)
        arrays = *arrays, sinks
    cases = [
        _twice(spec, values, QUERY_TILES, state=state, last=last)
        for last, state in product((False, True)[: 1 + spec.sinks], (special.PARTIAL, special.CARRIED))
    ]
    which = (0, 2) if spec.sinks else (0, -1)
    return launches(runtime, cases, which=which, scratch=marks_of(heads, tile_q), packed={4: wide}, arrays=arrays)


def accumulate(runtime: Runtime, spec: AttentionSpec, mask: str | None) -> Launches | str:
    """Of the codelet `accumulate`: handles are arrays of all heads, and a mask (rows, keys) of such a dtype comes
    last."""
    if runtime.kernels is None:
        return NO_KERNELS
    scoring = None
    if mask is not None:
        spec, scoring = masked_by_tile(spec, mask)
    found = captured(spec, scoring, 5, itself=True)
    if isinstance(found, str):
        return found
    values = _forward_values(spec, {"k": 0, "q": 1, "v": 3}, 4, 2, spec.heads, whole=True) | found.values
    values |= strides(spec, {"o": 4}, whole=True)
    narrow = DTYPES[spec.dtype].accumulator != spec.dtype
    cases = [_twice(spec, values, QUERY_TILES, state=special.UPDATED if narrow else special.CARRIED)]
    return launches(runtime, cases, scratch=marks_of(spec.heads, spec.q_len))


def _forward_values(
    spec: AttentionSpec, read: dict[str, int], o: int, lse: int, heads: int, whole: bool = False
) -> dict[str, Value]:
    """What both have. read: the handles of q, k and v by name."""
    return {
        **{name: Source("ADDRESS", handle) for name, handle in (read | {"o": o, "lse": lse}).items()},
        "odd": Source("SCRATCH"),
        **strides(spec, read, whole=whole),
        "o_split": 0,
        "lse_split": 0,
        "splits": 1,
        "split_keys": Source("SIZE", KEYS),
        **counts(spec, heads),
        **changes(spec),
        "items": Source("PROGRAMS"),
        "blocks": heads,
        "together": heads,
        "query_tiles": Source("TILES", ROWS),
    }


def _twice(
    spec: AttentionSpec, values: dict[str, Value], grid: tuple[tuple[int, str], ...], *, state: str, last: bool = False
) -> list[list[Stage]]:
    """The two launches of the forward kernel, the second for what is not finite."""
    rare = spec.program is not None or spec.dropout or last or spec.scale < 0  # kernels that no folder has
    return [
        [
            Stage(
                special.forward(s, ANY_TILE, state=state, contain=contain, part=True, last=last, memory=m),
                values,
                grid,
                s if rare else None,
            )
            for s in bands(one_tile(spec))
            for m in memories(spec)
        ]
        for contain in (False, True)
    ]


def merge(runtime: Runtime, dtype: str, value_size: int, heads: int = 1) -> Launches | str:
    """Of the codelet `merge`, in a dtype of accumulators."""
    spec, size = _of_size(dtype, value_size), DTYPES[dtype].itemsize
    values: dict[str, Value] = {
        "parts_o": Source("ADDRESS", 0),
        "parts_lse": Source("ADDRESS", 1),
        "o": Source("ADDRESS", 0),
        "lse": Source("ADDRESS", 1),
        "o_b": 0,
        "o_h": Source("PLANE", 0, 1, size),
        "o_s": value_size,
        "o_split": Source("APART", 2, 0, size),
        "lse_split": Source("APART", 3, 1, size),
        **counts(_heads(spec, heads), heads),
        "query_tiles": Source("TILES", ROWS),
        "splits": 2,
    }
    what = special.merge(spec, ANY_TILE, finished=False, memory=Memory(aligned=False))
    dense = {0: value_size * size, 2: value_size * size}
    packed = dense | {1: size, 3: size}
    return launches(runtime, [[[Stage(what, values, QUERY_TILES)]]], dense=dense, packed=packed)


def finish(runtime: Runtime, dtype: str, value_size: int, rows: int, heads: int = 1) -> Launches | str:
    """Of the codelet `finish`: the merge of one part. Its lse, the state's bits again, goes into scratch memory."""
    spec, size = _of_size(dtype, value_size), DTYPES[DTYPES[dtype].accumulator].itemsize
    values: dict[str, Value] = {
        "parts_o": Source("ADDRESS", 0),
        "parts_lse": Source("ADDRESS", 1),
        "o": Source("ADDRESS", 2),
        "lse": Source("SCRATCH"),
        **strides(spec, {"o": 2}),
        "o_split": 0,
        "lse_split": 0,
        **counts(_heads(spec, heads), heads),
        "query_tiles": Source("TILES", ROWS),
        "splits": 1,
    }
    what = special.merge(spec, ANY_TILE, finished=True, memory=Memory(aligned=False))
    dense = {0: value_size * size}
    packed = dense | {1: size}
    stages = [[[Stage(what, values, QUERY_TILES)]]]
    return launches(runtime, stages, dense=dense, packed=packed, scratch=lambda entry: heads * rows * size)


def unfused(runtime: Runtime, spec: AttentionSpec, row: int) -> dict[str, Launches | str]:
    """Of the codelets `scores`, `softmax` and `output`, whose stored scores have rows of so many elements; padding, and
    weights of hidden keys, are told as kernels/cpu/passes/unfused.py does."""
    if spec.program is not None or spec.sinks:
        reason = "score programs and sinks of the unfused stages run on CPUs only"
        return dict.fromkeys(("scores", "softmax", "output"), reason)
    spec = one_tile(spec)
    wide = DTYPES[DTYPES[spec.dtype].accumulator].itemsize
    shared = {**counts(spec, 1), "query_tiles": Source("TILES", ROWS), "s_s": row, "p_s": row}
    scores: dict[str, Value] = {
        "q": Source("ADDRESS", 0),
        "k": Source("ADDRESS", 1),
        "s": Source("ADDRESS", 2, COLUMN),
        **shared,
        **strides(spec, {"q": 0, "k": 1}),
        **changes(spec),
        "columns": Source("SIZE", COLUMNS),
        "key_tiles": Source("TILES", COLUMNS),
    }
    softmax: dict[str, Value] = {
        **shared,
        "s": Source("ADDRESS", 0),
        "p": Source("ADDRESS", 0),
        "lse": Source("ADDRESS", 1),
        "kv_len": row,
    }
    output: dict[str, Value] = {
        "p": Source("ADDRESS", 0, COLUMN),
        "v": Source("ADDRESS", 1),
        "o": Source("ADDRESS", 2),
        **shared,
        **strides(spec, {"v": 1}),
        **strides(spec, {"o": 2}, wide),
    }
    known, grid = memories(spec), (*QUERY_TILES, (COLUMNS, "keys"))
    first = [Stage(special.scores(s, ANY_TILE, memory=m), scores, grid) for s in bands(spec) for m in known]
    second = [Stage(special.softmax(spec, ANY_TILE), softmax, QUERY_TILES)]
    third = [
        [[Stage(special.output(spec, ANY_TILE, state=state, memory=m), output, QUERY_TILES) for m in known]]
        for state in (special.PARTIAL, special.CARRIED)
    ]
    return {
        "scores": launches(runtime, [[first]]),
        "softmax": launches(runtime, [[second]]),
        "output": launches(runtime, third, which=(0, -1)),
    }


def _of_size(dtype: str, value_size: int) -> AttentionSpec:
    view = contiguous((1, 1, 1, value_size), dtype)
    return AttentionSpec.of(view, view, view)


def _heads(spec: AttentionSpec, heads: int) -> AttentionSpec:
    return replace(spec, heads=heads, kv_heads=heads)
