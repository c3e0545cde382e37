"""CPU kernels generated from Python as LLVM IR: exact, fused, no S x S array, no compiler on the machine.

config.py    what a kernel depends on        block.py, scratch.py    its parameter blocks, its scratch memory
backward.py  the backward kernel, bound to one spec and layout      few.py    which kernel computes few queries
passes/      kernels: forward.py (item.py, walk.py, panel.py), backward.py (visit.py), decode, merge, add_parts, unfused
steps/       what passes are made of, in terms of lanes and rows: pack, product, band, program (frame, dense),
             softmax, keep, accumulate, spans, contain, finish; differentiate, exchange, add
parts.py     keys split over work items, and merged          tiles.py    for engines that hold tiles
score_values.py    the addresses of what a score program reads
reach.py     segments from values that come with a call, found by machine code (passes/reach.py)
templates.py       the parameters of calls whose arrays come later
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flashtile.kernels import (
    ArrayShapes,
    BackwardLayout,
    Capabilities,
    CompiledBackward,
    CompiledKernel,
    Family,
    Keys,
    Layout,
    Step,
    Strides,
    Template,
)
from flashtile.kernels.cpu import few, scratch
from flashtile.kernels.cpu.block import CALL, band_of, bounded, scores_in_nats, split_scale
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.score_values import NO_SCORES, ScoreValues, score_steps
from flashtile.kernels.cpu.steps.range import least_of_scores
from flashtile.kernels.tiles import TileKernels
from flashtile.llvm import machines as isas
from flashtile.llvm import processors
from flashtile.llvm.blocks import WORD, strides_of
from flashtile.llvm.products import FMA

if TYPE_CHECKING:
    from flashtile.kernels.cpu.decode import Decode
    from flashtile.kernels.cpu.parts import InParts
    from flashtile.llvm.jit import Library
    from flashtile.llvm.processors import Choice
    from flashtile.plan import Plan
    from flashtile.score.code import Code
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec

_STORAGE = {"float64": "double", "float32": "float", "float16": "half", "bfloat16": "bfloat"}
_PANELS = (1, 2, 4, 8)  # panels a work item may hold
_TILED_PANELS = (*_PANELS, 16, 32)  # where products are so fast that making a block ready is felt
_ANYWHERE, IN_REGISTERS = ("registers", "memory"), ("registers",)  # where sums of a product may be
_STRIDES, _STRIDES_KV = tuple(strides_of("qkvo")), tuple(strides_of("kv"))
_PART_KEYS = 1024  # a part of one row takes some 0.1 ms: long beside handing it out and merging it
# Where scores rise from key block to key block, every one of them rescales the sums by a factor that was rounded.
_LONGEST_PART = 16384


def unavailable() -> str | None:
    """None: there is an instruction set for every machine. Raises: UnavailableError where FLASHTILE_ISA names none of
    this machine's, rather than leave the call to another family in silence."""
    isas.current()
    return None


def config_of(spec: AttentionSpec, *, lands: tuple[str, ...] = _ANYWHERE) -> Config:
    """The configuration that computes this spec on the current instruction set. ``lands``: where the sums of its
    product may be: passes for few queries take them from registers alone."""
    return _configured(*_choosing(spec), lands)


def backward_config(spec: AttentionSpec) -> Config:
    """That of its backward. Of few queries, whose lse comes from passes/decode, it has the products of that, summed in
    its order: a weight is off by what its two scores differ by, in fewer bits by a factor where scores are large."""
    choosing = _choosing(spec)
    decoded = spec.kv_len >= _decodes_from(spec.q_len, spec.group, *choosing) and not _stacks(spec, *choosing)
    return _across_config(_decode_config(*choosing)) if decoded else _configured(*choosing, _ANYWHERE)


@functools.lru_cache(maxsize=256)
def _configured(
    setting: str, dtype: str, precision: str, code: Code | None, dropout: bool, lands: tuple[str, ...]
) -> Config:
    product = _choice(setting, dtype, precision, lands).product
    return Config(isas.named(setting), _STORAGE[dtype], product=product, code=code, dropout=dropout)


def _choice(setting: str, dtype: str, precision: str, lands: tuple[str, ...] = _ANYWHERE) -> Choice:
    """The product for a dtype at a precision, and why; `setting`: what names the instruction set, if anything does."""
    return processors.choose(isas.named(setting), dtype, precision, forced=bool(setting), lands=lands)


@functools.lru_cache(maxsize=256)
def _decodes_from(q_len: int, group: int, *choosing: Any) -> float:
    """From how many keys on passes/decode is the faster one for so many queries of each head of a group; inf: it never
    is."""
    return few.decodes_from(_configured(*choosing, _ANYWHERE), q_len, group)


def _choosing(spec: AttentionSpec) -> tuple[Any, ...]:
    """What configurations and capabilities depend on, small enough to look them up at every new length."""
    return isas.setting(), spec.dtype, spec.precision, spec.program, spec.dropout


def capabilities(spec: AttentionSpec) -> Capabilities:
    """Tile menus and features for this dtype and precision on the current instruction set."""
    choosing = _choosing(spec)
    if spec.kv_len >= _decodes_from(spec.q_len, spec.group, *choosing):
        return _decoding(spec.q_len, spec.group, _stacks(spec, *choosing), *choosing)
    if spec.group > 1 and few.shares(config_of(spec), spec):
        return _sharing(spec.group, *choosing)
    return _capabilities(*choosing, _ANYWHERE)


def _stacks(spec: AttentionSpec, *choosing: Any) -> bool:
    """Whether a call is computed faster with its heads as rows, which are many, than by passes/decode."""
    if not spec.heads_alike or spec.kv_len >= _decodes_from(spec.group, 1, *choosing):
        return False
    return few.stacks(_configured(*choosing, _ANYWHERE), spec.group)


@functools.lru_cache(maxsize=256)
def _decoding(q_len: int, group: int, stacked: bool, *choosing: Any) -> Capabilities:
    """Those of passes/decode, for so many rows."""
    able, (_, _, precision, *_) = _capabilities(*choosing, IN_REGISTERS), choosing
    product = able.product
    if precision != "ieee":  # which costs few queries nothing: they wait for the memory
        product = f"{FMA.name}: multiply-adds in fp32, whatever the precision: the queries are few"
    return replace(
        able,
        product=product,
        backward_product=product,
        precisions=frozenset(("ieee",)),
        query_block=1,
        tile_q=(max(1, q_len),),
        variant="decode",
        head_block=group,
        stacked=stacked,
        part_keys=_PART_KEYS if group * q_len == 1 else _PART_KEYS // 2,
        longest_part=_LONGEST_PART,
    )


@functools.lru_cache(maxsize=256)
def _sharing(group: int, *choosing: Any) -> Capabilities:
    """Those of the forward kernel where a work item has all of so many heads, each of which has fewer rows in it."""
    able = _capabilities(*choosing, _ANYWHERE)
    most = max(able.tile_q[-1] // group, able.query_block)
    return replace(able, head_block=group, tile_q=tuple(rows for rows in able.tile_q if rows <= most))


@functools.lru_cache(maxsize=256)
def _capabilities(
    setting: str, dtype: str, precision: str, code: Code | None, dropout: bool, lands: tuple[str, ...]
) -> Capabilities:
    c = _configured(setting, dtype, precision, code, dropout, lands)
    choice = _choice(setting, dtype, precision, lands)
    backward = _choice(setting, dtype, precision)
    found = {name: _choice(setting, "float32", name).product for name in ("bf16", "tf32", "fp16")}
    return Capabilities(
        name="cpu",
        dtypes=frozenset(_STORAGE),
        precisions=frozenset(("ieee", *(name for name, product in found.items() if product.coarse))),
        max_head_size=None,
        query_block=c.panel,
        tile_q=tuple(n * c.panel for n in (_TILED_PANELS if c.lands_in_memory else _PANELS)),
        tile_k=(c.key_block,),
        options=frozenset(("band", "program", "sinks", "dropout")),
        native=True,
        isa=c.isa.name,
        product=f"{choice.product.name}: {choice.why}",
        backward_product=f"{backward.product.name}: {backward.why}",
        variant="forward",
        part_keys=_PART_KEYS,
        directions=frozenset({"forward", "backward"}),
        backward_options=frozenset({"band", "program", "sinks", "dropout"}),
    )


def compile(spec: AttentionSpec, plan: Plan, layout: Layout) -> CompiledKernel:
    """The kernel of this spec; machine code is shared by all specs with the same configuration."""
    choosing = _choosing(spec)
    decodes_from = _decodes_from(spec.q_len, spec.group, *choosing)
    if spec.kv_len >= decodes_from:
        from flashtile.kernels.cpu.decode import Decode

        return Decode(_ahead_config(_decode_config(*choosing)), spec, plan, layout, decodes_from)
    c = _configured(*choosing, _ANYWHERE)
    return Forward(_planned_config(c, plan.splits > 1, few.asks(c, spec, plan)), spec, plan, layout, decodes_from)


def at(kernel: Forward | Decode, keys: Keys, split_keys: int) -> Forward | Decode | None:
    """A kernel of `compile` for other keys; see Family.at."""
    return kernel.at(keys, split_keys)


@functools.lru_cache(maxsize=256)
def _decode_config(*choosing: Any) -> Config:
    c = _configured(*choosing, IN_REGISTERS)
    return replace(c, product=c.product if c.storage == "bfloat" else FMA)


@functools.lru_cache(maxsize=256)
def _across_config(c: Config) -> Config:
    return replace(c, across=True)


@functools.lru_cache(maxsize=256)
def _ahead_config(c: Config) -> Config:
    return replace(c, ahead=processors.here().ahead)


@functools.lru_cache(maxsize=256)
def _planned_config(c: Config, partial: bool, asks: bool) -> Config:
    return replace(c, partial=partial, asks=asks) if partial or asks else c


def compile_backward(spec: AttentionSpec, layout: BackwardLayout, arrays: ArrayShapes) -> CompiledBackward:
    """The backward kernel of this spec."""
    from flashtile.kernels.cpu.backward import Backward

    return Backward(spec, layout, arrays)


def tile_kernels() -> TileKernels:
    """The kernels of tiles.py, which most calls do not need."""
    from flashtile.kernels.cpu import tiles

    return tiles


FAMILY = Family("cpu", unavailable, capabilities, compile, compile_backward=compile_backward, tiles=tile_kernels, at=at)


@functools.cache
def library_of(c: Config) -> Library:
    from flashtile.kernels.cpu.passes.forward import EXPORTS, forward_text
    from flashtile.llvm import jit

    return jit.load(lambda: forward_text(c), repr(c), c.isa, EXPORTS)


@functools.cache
def _entry(c: Config):  # type: ignore[no-untyped-def]  # a ctypes function type made at run time
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    return library_of(c).function("forward", ctypes.c_int32, ctypes.c_char_p, integer, integer, pointer)


_six_words = struct.Struct("6q").pack
_no_scores = CALL.head(*[0] * 6, *NO_SCORES.addresses)[6 * WORD :]


class Forward:
    """A compiled forward kernel with the parameter block of one plan and layout; `until`: from so many keys on
    passes/decode is the faster one."""

    def __init__(self, c: Config, spec: AttentionSpec, plan: Plan, layout: Layout, until: float = math.inf):
        self._config, self._until = c, until
        self._library = library_of(c)  # keeps the code in memory
        self.run = _entry(c)
        panels = plan.tile_q // c.panel * plan.head_block
        areas = scratch.sized(c, spec.head_size, spec.value_size, panels)
        self.scratch_bytes = areas.bytes
        self.merge_stage, self._merge = None, None
        self._items = plan.items
        parts = {"splits": 1, "split_keys": spec.kv_len, "o_split": 0, "lse_split": 0}
        if plan.splits > 1:
            from flashtile.kernels.cpu.parts import Merge, first_stage

            self._merge = merge = Merge(c, spec, plan, layout.o)
            layout = replace(layout, o=merge.strides)
            parts = {"splits": plan.splits, "split_keys": plan.split_keys, **merge.steps}
            self.run, self.merge_stage = first_stage(self.run), merge.stage
            self.scratch_bytes = max(self.scratch_bytes, merge.scratch_bytes)
        self._set(
            {
                **dict(zip(_STRIDES, (*layout.q, *layout.k, *layout.v, *layout.o), strict=True)),
                **_sizes(c, spec, plan),
                **_packed(c, spec.head_size, spec.value_size, layout.k, layout.v),
                **parts,
                **areas.at,
                **(scores_in_nats if c.scored else split_scale)(spec.scale, c.acc),
            }
        )

    def _set(self, words: dict[str, Any]) -> None:
        self._words, self._tail = words, CALL.tail(words)
        self._plain = _no_scores + self._tail

    def at(self, keys: Keys, split_keys: int) -> Forward | None:
        """See Family.at."""
        if keys.kv_len >= self._until:
            return None
        words, other = self._words, object.__new__(Forward)
        other.__dict__.update(self.__dict__)
        other._set(
            {
                **words,
                **dict(zip(_STRIDES_KV, (*keys.k, *keys.v), strict=True)),
                **_packed(self._config, words["head_size"], words["value_size"], keys.k, keys.v),
                "kv_len": keys.kv_len,
                "offset": bounded(keys.offset or 0),
                "split_keys": split_keys or keys.kv_len,
            }
        )
        return other

    def pack(
        self, q: int, k: int, v: int, o: int, lse: int, offsets: int, scoring: Scoring | None = None
    ) -> bytes | InParts:
        """The parameters of one call: a block, or in parts (parts.py) one for each stage."""
        if scoring is None and self._merge is None:  # as most calls are; a tiny one would feel the detours
            return _six_words(q, k, v, o, lse, offsets) + self._plain
        extra = ScoreValues.of(scoring, self._config) if scoring else NO_SCORES
        if self._merge is not None:
            parts = replace(extra, sinks=0)  # which join when the parts are merged
            return self._merge.pack(lambda o, lse: self._block(parts, q, k, v, o, lse, offsets), o, lse, extra.sinks)
        return self._block(extra, q, k, v, o, lse, offsets)

    def _block(self, scores: ScoreValues, *addresses: int) -> bytes:
        return scores.hold(CALL.head(*addresses, *scores.addresses) + self._tail)

    def template(self, scoring: Scoring | None) -> Template | None:
        """See Runnable."""
        from flashtile.kernels.cpu.templates import in_parts, scores_of

        scores, step = scores_of(scoring, self._config), Step(_entry(self._config), self._items)
        return in_parts(CALL, self._tail, scores, scoring, step, self._merge)


def _packed(c: Config, head_size: int, value_size: int, k: Strides, v: Strides) -> dict[str, int]:
    """Whether K and V of these strides must be converted before the kernels can read them."""
    foreign = c.memory != c.acc  # elements that the multiply-add cannot read from memory
    loose_k, loose_v = k[3] != c.element, v[3] != c.element
    # a row of K is words already
    in_words = c.storage == c.product.operand and c.key_words(head_size) * c.per_word == head_size
    return {
        "pack_k": int(loose_k or (not in_words if c.product.operand else foreign)),
        "pack_v": int(loose_v or c.per_word > 1 or foreign or c.padded(value_size) != value_size),
    }


def _sizes(c: Config, spec: AttentionSpec, plan: Plan) -> dict[str, int]:
    """Lengths and band."""
    columns, words = c.padded(spec.value_size), c.key_words(spec.head_size)
    return {
        "heads": spec.heads,
        "group": spec.group,
        "q_len": spec.q_len,
        "kv_len": spec.kv_len,
        "head_size": spec.head_size,
        "value_size": spec.value_size,
        "value_columns": columns,
        "key_words": words,
        "tile_q": plan.tile_q,
        "query_tiles": plan.query_tiles,
        "carry": 0,
        "head_block": plan.head_block,
        **score_steps(c, spec),
        **band_of(spec),
        "k_row": words * c.size * c.product.parts,
        "least": least_of_scores(c, spec.scale),
        "v_row": c.value_row(spec.value_size),
    }
