"""Kernels for engines that hold the arrays as tiles: one work item is one query tile on one key tile.

The forward kernel runs unchanged. A task gives it the addresses of its tiles, moved back to where the whole tensors
would begin if they were of one piece, so rows and keys keep their global numbers: masks, score programs and offsets
per batch need nothing more. The state (o, lse) is carried from key tile to key tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flashtile.errors import wrong
from flashtile.kernels import Layout, cpu
from flashtile.kernels.cpu import isa as isas
from flashtile.kernels.cpu import merge, params, parts
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.ir import SIZES
from flashtile.plan import Plan

if TYPE_CHECKING:
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec


@dataclass(frozen=True)
class TileKernel:
    """Machine code and a parameter block without the words that differ between tasks.

    words names the words of the block; identity is what the cost of an item depends on besides its tiles' sizes.
    """

    address: int  # of i32 (ptr params, i64 begin, i64 end, ptr scratch)
    block: np.ndarray  # int64
    words: Mapping[str, int]
    scratch_bytes: int
    identity: str
    keep: Any  # what must live as long as tasks may run
    config: Config


class InPlace(Config):
    """A configuration whose carried outputs are stored in the input's own dtype, so 16-bit ones round at every tile."""

    @property
    def output(self) -> Config:
        return self


def forward(
    spec: AttentionSpec,
    tile_q: int,
    tile_k: int,
    *,
    in_place: bool = False,
    offsets: int = 0,
    scoring: Scoring | None = None,
) -> TileKernel:
    """The kernel that attends query tiles of tile_q rows to key tiles of tile_k keys.

    Item ((b * heads + h) * query_tiles + i) * key_tiles + j is query tile i on key tile j; a last tile may be short.
    Words that tasks set: q, k, v, o, lse (addresses), q_s, k_s, v_s, o_s (bytes between rows), carry (1: continue the
    state), kv_len (where key tile j ends, counted from key 0), sinks (0, or the address for a row's last task).
    o is in the accumulator's dtype, or with in_place in the input's; offsets is the address of int64[B], or 0;
    scoring has the values of the spec's program and sinks.
    Raises: SpecError if a mask comes with query tiles that cut panels.
    """
    c = replace(cpu.config_of(spec), partial=True)
    if in_place:
        c = InPlace(**vars(c))
    if c.masked and tile_q % c.panel and tile_q < spec.q_len:
        raise wrong("tile rows", f"{tile_q} with a mask", f"a multiple of {c.panel}, or all {spec.q_len} rows")
    query_tiles, key_tiles = max(1, -(-spec.q_len // tile_q)), max(1, -(-spec.kv_len // tile_k))
    plan = Plan(spec.batch, spec.heads, query_tiles, 1, -(-tile_q // c.panel) * c.panel, tile_k, 0)
    step, wide = SIZES[c.memory], SIZES[c.output.memory]
    rows = {name: (0, 0, size * step, step) for name, size in (("q", spec.head_size), ("v", spec.value_size))}
    layout = Layout(rows["q"], rows["q"], rows["v"], (0, 0, spec.value_size * wide, wide))
    kernel = cpu.Forward(c, spec, plan, layout)
    packed = kernel.pack(0, 0, 0, 0, 0, offsets, scoring)
    assert isinstance(packed, bytes)  # not in parts
    block, words = np.frombuffer(packed, np.int64).copy(), params.INDEX
    block[words["tile_q"]] = tile_q
    block[words["splits"]], block[words["split_keys"]] = key_tiles, tile_k
    library = cpu._library(c)
    identity = f"forward {c!r} {spec.head_size} {spec.value_size}"
    return TileKernel(library.address("forward"), block, words, kernel.scratch_bytes, identity, (library, packed), c)


def finish(dtype: str, value_size: int) -> TileKernel:
    """The kernel that casts a carried output to the input's dtype: item n is row n of a tile.

    Words that tasks set: parts_o, parts_lse, o (addresses), o_s (bytes between rows of o).
    """
    return _merging(Config(isas.current(), cpu._STORAGE[dtype]), value_size, parts_count=1)


def merging(dtype: str, value_size: int) -> TileKernel:
    """The kernel that merges a second partial result into a first: item n is row n of both tiles; dtype is theirs.

    Words that tasks set: parts_o, parts_lse and o, lse (addresses of the first), o_split, lse_split (the second's
    addresses less the first's). The rows lie without gaps.
    """
    return _merging(Config(isas.current(), cpu._STORAGE[dtype]), value_size, parts_count=2)


def _merging(c: Config, value_size: int, parts_count: int) -> TileKernel:
    step = SIZES[c.memory]
    values = {"o_b": 0, "o_h": 0, "o_s": value_size * step, "o_d": step, "heads": 1, "q_len": 1 << 40,
              "value_size": value_size, "splits": parts_count, "o_split": 0, "lse_split": 0}  # fmt: skip
    block = np.frombuffer(merge.pack_addresses(0, 0, 0, 0) + merge.pack_tail(values), np.int64).copy()
    library = parts._library("merge", c)
    words = {name: n for n, name in enumerate(merge.FIELDS)}
    identity = f"merge {parts_count} {c!r} {value_size}"
    return TileKernel(library.address("merge"), block, words, merge.scratch_bytes(c, parts_count), identity, library, c)
