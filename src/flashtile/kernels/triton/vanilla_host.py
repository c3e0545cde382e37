"""The host side of the unfused baseline: three launches, and the memory for S_q x S_kv scores and weights between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashtile.dtypes import DTYPES
from flashtile.errors import wrong
from flashtile.kernels import Layout, Stage
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.device import Bound, Device, Pointer
from flashtile.kernels.triton.host import (
    Call,
    Elements,
    Launches,
    band_values,
    bits,
    captured,
    check_lengths,
    sizes_of,
)
from flashtile.kernels.triton.specialisation import ELEMENTS, Memory, Tile

if TYPE_CHECKING:
    from flashtile.plan import Plan
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec


class Vanilla:
    """The baseline bound to one spec, plan and layout: a `kernels.CompiledKernel` whose work items are whole heads.

    Raises: SpecError for strides that are not whole elements, and for sizes beyond int32.
    """

    scratch_bytes = 0
    merge_stage: Stage | None = None

    def __init__(self, spec: AttentionSpec, plan: Plan, layout: Layout, tile: Tile, device: Device):
        self._spec, self._tile, self._device = spec, tile, device
        self._kernels: dict[Memory, tuple[Bound, ...]] = {}
        self._layout = Elements.of(layout, spec)
        self._query_tiles = -(-spec.q_len // tile.tile_q)
        self._key_tiles = -(-spec.kv_len // tile.tile_k)
        # Programs that one head takes in each stage.
        self._grids = (self._query_tiles * self._key_tiles, self._query_tiles, self._query_tiles)
        check_lengths(spec, spec.batch * spec.heads * max(self._grids))
        if plan.query_tiles > 1 or plan.splits > 1:
            raise wrong("plan", f"{plan.query_tiles} tiles of queries in {plan.splits} parts", "one: a whole head")

    def pack(self, q: int, k: int, v: int, o: int, lse: int, offsets: int, scoring: Scoring | None = None) -> Call:
        """The launches of one call. Addresses on the device; lse 0 if it is not wanted."""
        spec, device = self._spec, self._device
        element, accumulator = ELEMENTS[spec.dtype], ELEMENTS[DTYPES[spec.dtype].accumulator]
        rows = spec.batch * spec.heads * spec.q_len
        stored, memory = special.stored(spec), self._layout.memory((q, k, v, o))
        sinks = None if scoring is None or scoring.sinks is None else device.place(scoring.sinks, accumulator).pointer
        program = None if scoring is None else scoring.program
        values: dict[str, Any] = {
            "q": Pointer(q, element),
            "k": Pointer(k, element),
            "v": Pointer(v, element),
            "o": Pointer(o, element),
            "s": device.empty(rows * spec.kv_len, stored),
            "p": device.empty(rows * spec.kv_len, stored),
            "lse": Pointer(lse, accumulator) if lse else device.empty(rows, accumulator),
            "offsets": Pointer(offsets, "i64"),
            "sinks": sinks,
            "captures": captured(program.captures, device) if program else None,
        }
        kernels = self._kernels.get(memory)
        if kernels is None:
            kernels = self._kernels[memory] = self._bind(memory)
        return Call((Launches(kernels, values),))

    def _bind(self, memory: Memory) -> tuple[Bound, ...]:
        """The three stages, with what is alike for all calls."""
        spec, tile = self._spec, self._tile
        fixed = {
            **self._layout.values("qkvo"),
            **sizes_of(spec),
            **band_values(spec),
            "scale": bits(spec.scale),
            "s_s": spec.kv_len,
            "p_s": spec.kv_len,
            "columns": spec.kv_len,
            "query_tiles": self._query_tiles,
            "key_tiles": self._key_tiles,
        }
        stages = special.scores(spec, tile, memory=memory), special.softmax(spec, tile)
        return tuple(self._device.bind(x, fixed) for x in (*stages, special.output(spec, tile, memory=memory)))

    def run(self, params: Call, begin: int, end: int, scratch: int) -> int:
        """Heads [begin, end) of (B, H), stage after stage."""
        (kernels, values) = params.stages[0]
        for kernel, grid in zip(kernels, self._grids, strict=True):
            if begin < end and grid:
                kernel((end - begin) * grid, {**values, "first": begin * grid})
        return 0
