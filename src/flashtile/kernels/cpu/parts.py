"""Kernels whose keys are computed in parts by separate work items, and merged: what binds them to one plan."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flashtile.arrays import address_of
from flashtile.kernels import Inside, NativeRun, Stage, Step, Strides, Template
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.passes import merge
from flashtile.kernels.cpu.passes.decode import kernel as decode
from flashtile.kernels.cpu.score_values import sink_steps
from flashtile.llvm import jit
from flashtile.llvm.blocks import ALIGNMENT, WORD, Block
from flashtile.llvm.processors import Ahead
from flashtile.llvm.products import FMA

if TYPE_CHECKING:
    from flashtile.llvm.jit import Library
    from flashtile.plan import Plan
    from flashtile.spec import AttentionSpec

_MODULES: dict[str, tuple[Callable[[Config], str], tuple[str, ...]]] = {
    "decode": (decode.decode_text, decode.EXPORTS),
    "merge": (merge.merge_text, merge.EXPORTS),
}
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
    return replace(c, partial=False, product=FMA, code=None, dropout=False, ahead=Ahead(), asks=False)


@functools.lru_cache(maxsize=256)
def _merge_words(c: Config, o: Strides, heads: int, q_len: int, value_size: int) -> dict[str, int]:
    """The words of a merge's block that no number of parts decides."""
    strides = dict(zip(merge.STRIDES, o, strict=True))
    return {**strides, "heads": heads, "q_len": q_len, "value_size": value_size, **sink_steps(c, heads)}


@functools.lru_cache(maxsize=256)
def _merge_run(c: Config) -> NativeRun:
    return NativeRun(entry("merge", _merge_config(c)), InParts._fields.index("merge"))


class InParts(NamedTuple):
    """The parameters of one call in parts: a block for each stage, and the memory that lies between them."""

    parts: bytes
    merge: bytes
    workspace: np.ndarray


def first_stage(function: Callable[..., int]) -> NativeRun:
    """The native function of the items of a plan in parts, taking the call's parameters."""
    return NativeRun(function, InParts._fields.index("parts"))


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
        words = _merge_words(c, o, spec.heads, spec.q_len, spec.value_size)
        self._tail = merge.CALL.tail({**words, "splits": plan.splits, **self.steps})
        self._run = _merge_run(c)
        self.stage = Stage(
            items=rows,
            run=self._run,
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

    def template(self, found: Template, block: Block, sinks: bool) -> Template:
        """That of a call, from the template of its items, which has no places for results; block: theirs."""
        at = _aligned(len(found.memory))
        memory = found.memory.ljust(at, b"\0") + merge.CALL.head(*[0] * 5) + self._tail
        memory = memory.ljust(_aligned(len(memory)), b"\0")
        o, lse = Inside(len(memory)), Inside(len(memory) + self._lse_at)
        own: dict[str, str | Inside] = {"parts_o": o, "parts_lse": lse, "o": "o", "lse": "lse"}
        own |= {"sinks": "sinks"} if sinks else {}
        places = found.places + tuple((WORD * block.index[name], x) for name, x in (("o", o), ("lse", lse)))
        places += tuple((at + WORD * merge.CALL.index[name], x) for name, x in own.items())
        steps = (*found.steps, Step(self._run.function, self.stage.items, at))
        return found._replace(memory=memory, places=places, steps=steps, room=self.stage.workspace_bytes)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
