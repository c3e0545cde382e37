"""Kernels for engines that hold the arrays as tiles: one work item is one query tile on one key tile.

The forward kernel runs unchanged. A task gives it the addresses of its tiles, moved back to where the whole tensors
would begin if they were of one piece, so rows and keys keep their global numbers: masks, score programs and offsets
per batch need nothing more. The state (o, lse) is carried from key tile to key tile.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from flashtile.arrays import address_of
from flashtile.dtypes import DTYPES
from flashtile.errors import wrong
from flashtile.kernels import BackwardLayout, Layout, cpu
from flashtile.kernels.cpu import backward as gradients
from flashtile.kernels.cpu import parts, scratch
from flashtile.kernels.cpu.array_sums import TileArrays, Tiles
from flashtile.kernels.cpu.block import BACKWARD, CALL, DELTA, band_of, scores_in_nats, split_scale
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes import add_parts, delta, merge
from flashtile.kernels.cpu.passes import unfused as stages
from flashtile.kernels.cpu.readings import readings
from flashtile.kernels.cpu.score_values import NO_SCORES, ScoreValues
from flashtile.kernels.tiles import TileBackward, TileKernel
from flashtile.llvm import jit
from flashtile.llvm import machines as isas
from flashtile.llvm.products import FMA
from flashtile.plan import Plan
from flashtile.score.options import masked_by_tile

if TYPE_CHECKING:
    from flashtile.kernels import ArrayShapes
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec


class InPlace(Config):
    """A configuration whose carried outputs are stored in the input's own dtype, so 16-bit ones round at every tile."""

    @property
    def output(self) -> Config:
        return replace(self, product=self.elements)


def rows_at_once(spec: AttentionSpec, direction: str = "forward") -> int:
    """See TileKernels.rows_at_once."""
    return (cpu.config_of(spec) if direction == "forward" else _backward_config(spec)).panel


def forward(
    spec: AttentionSpec,
    tile_q: int,
    tile_k: int,
    *,
    in_place: bool = False,
    offsets: int = 0,
    scoring: Scoring | None = None,
) -> TileKernel:
    """See TileKernels.forward."""
    c = replace(cpu.config_of(spec), partial=True)
    if in_place:
        c = InPlace(**vars(c))
    _check_rows(c, spec, tile_q)
    query_tiles, key_tiles = max(1, -(-spec.q_len // tile_q)), max(1, -(-spec.kv_len // tile_k))
    plan = Plan(spec.batch, spec.heads, query_tiles, 1, -(-tile_q // c.panel) * c.panel, tile_k, 0)
    step, wide = c.element, c.output.element
    rows = {name: (0, 0, size * step, step) for name, size in (("q", spec.head_size), ("v", spec.value_size))}
    layout = Layout(rows["q"], rows["q"], rows["v"], (0, 0, spec.value_size * wide, wide))
    kernel = cpu.Forward(c, spec, plan, layout)
    packed = kernel.pack(0, 0, 0, 0, 0, offsets, scoring)
    assert isinstance(packed, bytes)  # not in parts
    block, words = np.frombuffer(packed, np.int64).copy(), CALL.index
    block[words["tile_q"]] = tile_q
    block[words["splits"]], block[words["split_keys"]] = key_tiles, tile_k
    library = cpu.library_of(c)
    identity = f"forward {c!r} {spec.head_size} {spec.value_size}"
    return TileKernel(library.address("forward"), block, words, kernel.scratch_bytes, identity, (library, packed))


def _check_rows(c: Config, spec: AttentionSpec, tile_q: int) -> None:
    if c.masked and tile_q % c.panel and tile_q < spec.q_len:
        raise wrong("tile rows", f"{tile_q} with a mask", f"a multiple of {c.panel}, or all {spec.q_len} rows")


def _backward_config(spec: AttentionSpec) -> Config:
    return replace(cpu.config_of(spec), tile=True)


def backward(
    spec: AttentionSpec,
    tile_q: int,
    tile_k: int,
    *,
    offsets: int = 0,
    scoring: Scoring | None = None,
    arrays: ArrayShapes = (),
    axis: str = "i",
) -> TileBackward:
    """See TileKernels.backward."""
    c = replace(_backward_config(spec), arrays=tuple(n for n, _ in arrays))
    _check_rows(c, spec, tile_q)
    alone = replace(spec, kv_heads=spec.heads)  # a task has one query head, whichever share its keys
    step, wide = c.element, c.output.element
    tensors = {x: spec.value_size if x in ("v", "o", "do", "dv") else spec.head_size for x in gradients.TENSORS}
    strides = {x: (0, 0, n * (e := wide if x in ("dq", "dk", "dv") else step), e) for x, n in tensors.items()}
    layout = BackwardLayout(**strides)
    values = gradients._values(c, alone, layout, 1)
    values |= {f"dq_{a}": n for a, n in zip("bhsd", layout.dq, strict=True)}
    rows = min(tile_q, spec.q_len)
    values |= gradients.ready(c, values, rows)
    slots = -(-rows // c.panel) if values["kept"] else 1
    areas = scratch.backward(c, values | {"q_len": rows}, slots=slots, keys=c.key_block)
    extra = ScoreValues.of(scoring, c) if scoring else NO_SCORES
    given: dict[str, float] = {**dict.fromkeys(BACKWARD.types, 0), **values, **areas.at}
    given |= (scores_in_nats if c.scored else split_scale)(spec.scale, c.acc)
    given |= dict(zip(("captures", "rows", "segments", "sinks", "keep"), extra.addresses, strict=True))
    given |= {"offsets": offsets, "row_count": rows}
    found = None
    if arrays:
        tiles = Tiles(
            spec.batch, spec.heads, -(-spec.q_len // tile_q), -(-spec.kv_len // tile_k), tile_q, spec.q_len, spec.kv_len
        )
        found = TileArrays(readings(c.code, c.arrays), dict(arrays), c, tiles, axis)
        given["sums"] = address_of(found.sums.words)
    block = np.frombuffer(BACKWARD.pack(given), np.int64).copy()
    library = gradients.library_of(c)
    identity = f"backward {c!r} {spec.head_size} {spec.value_size}"
    keep = library, extra, found
    kernel = TileKernel(library.address("backward"), block, BACKWARD.index, areas.bytes, identity, keep)
    return TileBackward(kernel, found)


def deltas(spec: AttentionSpec, *, scoring: Scoring | None = None) -> TileKernel:
    """See TileKernels.deltas."""
    c = replace(cpu.config_of(spec, lands=cpu.IN_REGISTERS), code=None, dropout=False)
    areas = delta.areas(c)
    sinks = None if scoring is None else scoring.sinks
    size = spec.value_size * c.element
    values = dict.fromkeys(DELTA.types, 0) | areas.at
    values |= {"sinks": 0 if sinks is None else address_of(sinks), "do_s": size, "o_s": size}
    values |= {"value_size": spec.value_size, "heads": spec.heads, "sink_b": spec.heads * c.size, "sink_h": c.size}
    block = np.frombuffer(DELTA.pack(values), np.int64).copy()
    library = _delta_library(c)
    identity = f"delta {c!r} {spec.value_size}"
    return TileKernel(library.address("delta"), block, DELTA.index, areas.bytes, identity, (library, sinks))


def adding(spec: AttentionSpec, size: int) -> TileKernel:
    """See TileKernels.adding."""
    c = replace(cpu.config_of(spec, lands=cpu.IN_REGISTERS), code=None, dropout=False)
    step = c.element
    values = dict.fromkeys(add_parts.CALL.types, 0)
    values |= {"dq_s": size * step, "dq_d": step, "heads": 1, "q_len": 1 << 40, "head_size": size, "splits": 1}
    block = np.frombuffer(add_parts.CALL.pack(values), np.int64).copy()
    library = gradients.adding_library(c)
    return TileKernel(library.address("add_parts"), block, add_parts.CALL.index, 0, f"add {c!r} {size}", library)


def differentiating(spec: AttentionSpec, mask: str | None = None) -> dict[str, TileKernel]:
    """See TileKernels.differentiating."""
    scoring = None
    if mask is not None:
        spec, scoring = masked_by_tile(spec, mask)
    found = backward(spec, max(1, spec.q_len), max(1, spec.kv_len), scoring=scoring).kernel
    block, words, inner = _with_mask(found.block, found.words, spec, scoring)
    step, wide = DTYPES[spec.dtype].itemsize, DTYPES[DTYPES[spec.dtype].accumulator].itemsize
    for name in gradients.TENSORS:
        length = spec.kv_len if name[-1] in "kv" else spec.q_len
        block[words[f"{name}_h"]] = length * block[words[f"{name}_s"]]
    block[words["lse_h"]], block[words["kv_len"]] = spec.q_len * wide, spec.kv_len
    identity = f"differentiate {found.identity}"
    items = spec.heads
    main = replace(found, block=block, words=words, inner=inner, items=items, identity=identity)
    first = deltas(spec)
    block = first.filled(
        do_h=spec.q_len * spec.value_size * step,
        o_h=spec.q_len * spec.value_size * step,
        lse_h=spec.q_len * wide,
        row_count=spec.q_len,
    )
    adds = {f"add_{size}": adding(spec, size) for size in (spec.head_size, spec.value_size)}
    return {"delta": replace(first, block=block, items=items), "backward": main, **adds}


@functools.cache
def _delta_library(c: Config) -> jit.Library:
    return jit.load(lambda: delta.delta_text(c), f"delta {c!r}", c.isa, delta.EXPORTS)


def accumulating(spec: AttentionSpec, mask: str | None = None) -> TileKernel:
    """See TileKernels.accumulating."""
    scoring = None
    if mask is not None:
        spec, scoring = masked_by_tile(spec, mask)
    c = cpu.config_of(spec)
    tile_q = max(1, min(spec.q_len, ACCUMULATED_ROWS // c.panel * c.panel or c.panel))
    kernel = forward(spec, tile_q, max(1, spec.kv_len), in_place=True, scoring=scoring)
    block, words, step = kernel.block, dict(kernel.words), c.element
    lengths = {
        "q": spec.q_len * spec.head_size,
        "k": spec.kv_len * spec.head_size,
        "v": spec.kv_len * spec.value_size,
        "o": spec.q_len * spec.value_size,
    }
    for name, length in lengths.items():
        block[words[f"{name}_h"]] = length * step
    block[words["carry"]], block[words["kv_len"]] = 1, spec.kv_len
    block, words, inner = _with_mask(block, words, spec, scoring)
    items = int(block[words["heads"]] * block[words["query_tiles"]])
    return replace(kernel, block=block, words=words, inner=inner, items=items, identity=f"accumulate {kernel.identity}")


def _with_mask(
    block: np.ndarray, words: Mapping[str, int], spec: AttentionSpec, scoring: Scoring | None
) -> tuple[np.ndarray, dict[str, int], tuple[int, int]]:
    """The block with what its program reads the mask through: the words of its captures, where a task finds the
    address. Also the names of all words, and TileKernel.inner."""
    if scoring is None:
        return block.copy(), dict(words), (-1, -1)
    from flashtile.score.captures import Block

    assert scoring.program is not None
    captures = Block(scoring.program.slots).pack(scoring.program.captures)
    itemsize = scoring.program.captures[0].array.itemsize  # type: ignore[union-attr]  # it is an array's
    captures[1:5] = spec.q_len, spec.kv_len * itemsize, spec.kv_len, itemsize  # length and stride of each axis
    inner = words["captures"], len(block)
    return np.concatenate([block, captures]), {**words, "mask": len(block)}, inner


ACCUMULATED_ROWS = 256  # of an item of `accumulating`: its queries and outputs stay in the second-level cache


def finish(dtype: str, value_size: int) -> TileKernel:
    """See TileKernels.finish."""
    return _merging(Config(isas.current(), cpu._STORAGE[dtype]), value_size, parts_count=1)


def merging(dtype: str, value_size: int) -> TileKernel:
    """See TileKernels.merging."""
    return _merging(Config(isas.current(), cpu._STORAGE[dtype]), value_size, parts_count=2)


def unfused(
    spec: AttentionSpec, tile_q: int, tile_k: int, *, offsets: int = 0, scoring: Scoring | None = None
) -> dict[str, TileKernel]:
    """See TileKernels.unfused, and passes/unfused.py."""
    c = replace(cpu.config_of(spec), product=FMA)
    query_tiles, key_tiles = max(1, -(-spec.q_len // tile_q)), -(-spec.kv_len // tile_k)
    columns = stages.columns_of(c, tile_k)
    areas = stages.areas(c, spec.head_size, columns, key_tiles)
    captures = None
    if scoring is not None and scoring.program is not None:
        from flashtile.score.captures import Block

        captures = Block(scoring.program.slots).pack(scoring.program.captures)
    sinks = None if scoring is None else scoring.sinks
    step = c.element
    values = {
        **dict.fromkeys(stages.CALL.types, 0),
        "offsets": offsets,
        "captures": 0 if captures is None else address_of(captures),
        "sinks": 0 if sinks is None else address_of(sinks),
        **{f"{x}_s": spec.head_size * step for x in "qk"},
        "v_s": spec.value_size * step,
        "o_s": spec.value_size * c.size,
        "stored_s": columns * key_tiles * step,
        "heads": spec.heads,
        "q_len": spec.q_len,
        "kv_len": spec.kv_len,
        "head_size": spec.head_size,
        "value_size": spec.value_size,
        "tile_q": tile_q,
        "tile_k": tile_k,
        "query_tiles": query_tiles,
        "key_tiles": key_tiles,
        "columns": columns,
        "at_keys": areas.at["at_keys"],
        **band_of(spec),
        "sink_b": spec.heads * c.size,
        "sink_h": c.size,
        **{name: x for name, x in split_scale(1.0, c.acc).items() if name in stages.CALL.types},
        "scale": spec.scale,
    }
    block = np.frombuffer(stages.CALL.pack(values), np.int64).copy()
    library = _unfused_library(c)
    keep = library, captures, scoring
    sized = f"{c!r} {spec.head_size} {spec.value_size}"
    return {
        name: TileKernel(library.address(name), block, stages.CALL.index, areas.bytes, f"{name} {sized}", keep)
        for name in stages.EXPORTS
    }


@functools.cache
def _unfused_library(c: Config) -> jit.Library:
    return jit.load(lambda: stages.unfused_text(c), f"unfused {c!r}", c.isa, stages.EXPORTS)


def _merging(c: Config, value_size: int, parts_count: int) -> TileKernel:
    step = c.element
    values = {
        "o_b": 0,
        "o_h": 0,
        "o_s": value_size * step,
        "o_d": step,
        "heads": 1,
        "q_len": 1 << 40,
        "value_size": value_size,
        "splits": parts_count,
        "o_split": 0,
        "lse_split": 0,
    }
    block = np.frombuffer(merge.CALL.pack(dict.fromkeys(merge.CALL.types, 0) | values), np.int64).copy()
    library = parts.library_of("merge", c)
    identity = f"merge {parts_count} {c!r} {value_size}"
    scratch_bytes = merge.scratch_bytes(c, parts_count)
    return TileKernel(library.address("merge"), block, merge.CALL.index, scratch_bytes, identity, library)
