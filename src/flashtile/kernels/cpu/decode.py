"""The kernel of few queries, bound to one plan: a step of a decoder reads keys and values once, in parts where they are
many."""

from __future__ import annotations

import functools
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

from flashtile.kernels import Keys, Layout, Step, Strides, Template
from flashtile.kernels.cpu.block import bounded, scores_in_nats, sides_of, split_scale
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.parts import InParts, Merge, entry, first_stage
from flashtile.kernels.cpu.passes.decode import kernel as decode
from flashtile.kernels.cpu.passes.decode.rows import slot_width
from flashtile.kernels.cpu.score_values import NO_SCORES, ScoreValues, sink_steps
from flashtile.kernels.cpu.templates import in_parts, scores_of
from flashtile.llvm.blocks import WORD, strides_of

if TYPE_CHECKING:
    from flashtile.plan import Plan
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec, Band


class Decode:
    """A compiled decode kernel with the parameter blocks of one plan and layout; `least`: of fewer keys another kernel
    is the faster one."""

    def __init__(self, c: Config, spec: AttentionSpec, plan: Plan, layout: Layout, least: float):
        self._config, self._least, self._items = c, least, plan.items
        self.run, self.merge_stage = entry("decode", c), None
        self._merge = Merge(c, spec, plan, layout.o) if plan.splits > 1 else None
        sizes = spec.heads, spec.kv_heads, spec.q_len, spec.head_size, spec.value_size
        self._fixed_for = functools.partial(_fixed, c, sizes, spec.scale, spec.band, layout.q)
        self._steps = layout.k[3], layout.v[3]
        self._fixed, self.scratch_bytes = self._fixed_for(*self._steps)
        self._o, self._splits, self._between = layout.o, plan.splits, (0, 0, 0)
        if self._merge is not None:
            self._o, steps = self._merge.strides, self._merge.steps
            self._between = 1, steps["o_split"], steps["lse_split"]
            self.scratch_bytes = max(self.scratch_bytes, self._merge.scratch_bytes)
            self.run, self.merge_stage = first_stage(self.run), self._merge.stage
        self._set(Keys(spec.kv_len, spec.offset, layout.k, layout.v), plan.split_keys)

    def _set(self, keys: Keys, split_keys: int) -> None:
        n, offset, k, v = keys
        if self._steps != (steps := (k[3], v[3])):
            self._steps, (self._fixed, _) = steps, self._fixed_for(*steps)
        parts = self._splits, split_keys or n, *self._between
        self._tail = _of_keys(*k, *v, *self._o, n, bounded(offset) if offset else 0, *parts) + self._fixed

    def at(self, keys: Keys, split_keys: int) -> Decode | None:
        """See Family.at."""
        if keys.kv_len < self._least:
            return None
        other = object.__new__(Decode)
        other.__dict__.update(self.__dict__)
        other._set(keys, split_keys)
        return other

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

    def template(self, scoring: Scoring | None) -> Template | None:
        """See kernels.Runnable."""
        scores = scores_of(scoring, self._config, mapped=False)
        step = Step(entry("decode", self._config), self._items)
        return in_parts(decode.CALL, self._tail, scores, scoring, step, self._merge)


_of_keys = struct.Struct(f"{len(decode.OF_KEYS)}q").pack


@functools.lru_cache(maxsize=256)
def _fixed(
    c: Config,
    sizes: tuple[int, int, int, int, int],
    scale: float,
    band: Band | None,
    q: Strides,
    k_step: int,
    v_step: int,
) -> tuple[bytes, int]:
    """The last words of a decode block, which no number of keys decides, and the bytes of scratch memory."""
    heads, kv_heads, q_len, head_size, value_size = sizes
    rows = decode.row_group(heads // kv_heads * q_len)
    areas = decode.areas(c, rows, head_size, value_size)
    words = {
        **dict.fromkeys(decode.OF_KEYS, 0),
        **dict(zip(strides_of("q"), q, strict=True)),
        **dict(zip(("heads", "kv_heads", "q_len", "head_size", "value_size"), sizes, strict=True)),
        **sides_of(band),
        **sink_steps(c, heads),
        **areas.at,
        **(scores_in_nats if c.scored else split_scale)(scale, c.acc),
        "pack_k": int(k_step != c.element or head_size < slot_width(c)),
        "pack_v": int(v_step != c.element or value_size < c.lanes),
        "row_group": rows,
    }
    return decode.CALL.tail(words)[len(decode.OF_KEYS) * WORD :], areas.bytes
