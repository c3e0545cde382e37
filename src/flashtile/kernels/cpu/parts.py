"""Kernels whose keys are computed in parts by separate work items, and merged: what binds them to one plan."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flashtile.arrays import address_of
from flashtile.kernels import Layout, Stage, Strides
from flashtile.kernels.cpu.block import band_of, scores_in_nats, split_scale
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes import merge
from flashtile.kernels.cpu.passes.decode import kernel as decode
from flashtile.kernels.cpu.passes.decode.rows import slot_width
from flashtile.kernels.cpu.score_values import NO_SCORES, ScoreValues, sink_steps
from flashtile.llvm import jit
from flashtile.llvm.blocks import strides_of
from flashtile.llvm.products import FMA

if TYPE_CHECKING:
    from flashtile.llvm.jit import Library
    from flashtile.plan import Plan
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec

_MODULES: dict[str, tuple[Callable[[Config], str], tuple[str, ...]]] = {
    "decode": (decode.decode_text, decode.EXPORTS),
    "merge": (merge.merge_text, merge.EXPORTS),
}
_STRIDES = tuple(strides_of("qkvo"))
MERGE_WORK = 4  # operations an output element and part, beside 2 * D of the products that made it


@functools.cache
def library_of(name: str, c: Config) -> Library:
    text, exports = _MODULES[name]
    return jit.load(lambda: text(c), f"{name} {c!r}", c.isa, exports)


@functools.cache
def entry(name: str, c: Config) -> Callable[..., int]:
    """The exported function (params, begin, end, scratch) -> status of a kernel; its code stays in memory."""
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    return library_of(name, c).function(name, ctypes.c_int32, ctypes.c_char_p, integer, integer, pointer)


@functools.lru_cache(maxsize=256)
def _merge_config(c: Config) -> Config:
    """Of the merge of parts that were computed by another configuration."""
    return replace(c, partial=False, product=FMA, code=None, dropout=False)


class InParts(NamedTuple):
    """The parameters of one call in parts: a block for each stage, and the memory that lies between them."""

    parts: bytes
    merge: bytes
    workspace: np.ndarray


def first_stage(run: Callable[..., int]) -> Callable[[InParts, int, int, int], int]:
    """The native function of the items of a plan in parts, taking the call's parameters."""
    return lambda call, begin, end, scratch: run(call.parts, begin, end, scratch)


class Merge:
    """The second stage of a plan in parts: partial results in a workspace, merged into o and lse.

    The workspace holds o (splits, B, H, S_q, D_v), then lse (splits, B, H, S_q), in accumulators.
    """

    def __init__(self, c: Config, spec: AttentionSpec, plan: Plan, o: Strides):
        rows = spec.batch * spec.heads * spec.q_len
        row_bytes = spec.value_size * c.size
        o_split, lse_split = rows * row_bytes, rows * c.size
        self.scratch_bytes = merge.scratch_bytes(c, plan.splits)
        self.strides = (spec.heads * spec.q_len * row_bytes, spec.q_len * row_bytes, row_bytes, c.size)
        self.steps = {"o_split": o_split, "lse_split": lse_split}  # bytes between the results of two parts
        self._lse_at = plan.splits * o_split
        sizes = {**_of(spec, "heads q_len value_size"), "splits": plan.splits, **self.steps, **sink_steps(c, spec)}
        self._tail = merge.CALL.tail({**dict(zip(("o_b", "o_h", "o_s", "o_d"), o, strict=True)), **sizes})
        run = entry("merge", _merge_config(c))
        self.stage = Stage(
            items=rows,
            run=lambda call, begin, end, scratch: run(call.merge, begin, end, scratch),
            work=MERGE_WORK * rows * spec.value_size * plan.splits,
            workspace_bytes=plan.splits * (o_split + lse_split),
        )

    def pack(self, parts: Callable[[int, int], bytes], o: int, lse: int, sinks: int) -> InParts:
        """The parameters of one call; ``parts`` gives the items' block, from where they write o and lse."""
        memory = np.empty(self.stage.workspace_bytes, np.uint8)
        parts_o = address_of(memory)
        parts_lse = parts_o + self._lse_at
        block = merge.CALL.head(parts_o, parts_lse, o, lse, sinks) + self._tail
        return InParts(parts(parts_o, parts_lse), block, memory)


class Decode:
    """A compiled decode kernel with the parameter blocks of one plan and layout."""

    def __init__(self, c: Config, spec: AttentionSpec, plan: Plan, layout: Layout):
        self._config = c
        self.run, self.merge_stage = entry("decode", c), None
        self._merge = Merge(c, spec, plan, layout.o) if plan.splits > 1 else None
        rows = decode.row_group(spec.group * spec.q_len)
        areas = decode.areas(c, rows, spec.head_size, spec.value_size)
        self.scratch_bytes = areas.bytes
        if self._merge is not None:
            self.scratch_bytes = max(self.scratch_bytes, self._merge.scratch_bytes)
            self.run, self.merge_stage = first_stage(self.run), self._merge.stage
        sizes = {**_strides(layout, self._merge), **_sizes(c, spec, plan, layout, self._merge), **areas.at}
        factors = (scores_in_nats if c.scored else split_scale)(spec.scale, c.acc)
        self._tail = decode.CALL.tail({**sizes, "row_group": rows, **factors})

    def pack(
        self, q: int, k: int, v: int, o: int, lse: int, offsets: int, scoring: Scoring | None = None
    ) -> bytes | InParts:
        """The parameters of one call; in parts, with a workspace of its own."""
        extra = ScoreValues.of(scoring, self._config, mapped=False) if scoring else NO_SCORES
        if self._merge is not None:
            parts = replace(extra, sinks=0)
            return self._merge.pack(lambda o, lse: self._block(parts, q, k, v, o, lse, offsets), o, lse, extra.sinks)
        return self._block(extra, q, k, v, o, lse, offsets)

    def _block(self, scores: ScoreValues, *addresses: int) -> bytes:
        return scores.hold(decode.CALL.head(*addresses, scores.captures, scores.sinks) + self._tail)


def _strides(layout: Layout, merging: Merge | None) -> dict[str, int]:
    o = merging.strides if merging else layout.o
    return dict(zip(_STRIDES, (*layout.q, *layout.k, *layout.v, *o), strict=True))


def _sizes(c: Config, spec: AttentionSpec, plan: Plan, layout: Layout, merging: Merge | None) -> dict[str, int]:
    """Lengths, band, parts, and whether K and V must be copied before their rows can be read as slots."""
    return {
        **_of(spec, "heads kv_heads q_len kv_len head_size value_size"),
        "splits": plan.splits,
        "split_keys": plan.split_keys or spec.kv_len,
        **band_of(spec),
        "pack_k": int(layout.k[3] != c.element or spec.head_size < slot_width(c)),
        "pack_v": int(layout.v[3] != c.element or spec.value_size < c.lanes),
        "partial": int(merging is not None),
        **(merging.steps if merging else {"o_split": 0, "lse_split": 0}),
        **sink_steps(c, spec),
    }


def _of(spec: AttentionSpec, names: str) -> dict[str, int]:
    found = names.split()
    return dict(zip(found, map(spec.__getattribute__, found), strict=True))
