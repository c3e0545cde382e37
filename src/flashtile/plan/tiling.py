"""Tile sizes: a function of the spec and of the kernel's declared capabilities, never of the number of threads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashtile.plan.coverage import visible_pairs
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    from flashtile.kernels import Capabilities

# Larger tiles of queries read K and V less often; fewer items than this would leave threads idle at the end.
ENOUGH_ITEMS = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """The work items of a call. Item ((b * heads + h) * query_tiles + query_tile) * splits + split computes rows
    [query_tile * tile_q, min(q_len, (query_tile + 1) * tile_q)) of head h of batch b."""

    batch: int
    heads: int
    query_tiles: int
    splits: int  # parts of the key range that are computed apart and merged
    tile_q: int  # rows of a work item, a multiple of the kernel's query_block
    tile_k: int  # keys of a key tile
    flops: int  # of the two products, visible pairs only (an upper bound if offsets come with the call)

    @property
    def items(self) -> int:
        return self.batch * self.heads * self.query_tiles * self.splits

    def locate(self, item: int) -> tuple[int, int, int, int]:
        """(batch, head, query tile, split) of a work item."""
        rest, split = divmod(item, self.splits)
        rest, query_tile = divmod(rest, self.query_tiles)
        batch, head = divmod(rest, self.heads)
        return batch, head, query_tile, split


def make_plan(spec: AttentionSpec, capabilities: Capabilities) -> Plan:
    """Choose tile sizes from the kernel's menus."""
    heads = spec.batch * spec.heads
    tile_q = capabilities.tile_q[0]
    for candidate in _up_to(capabilities.tile_q, spec.q_len):
        if heads * -(-spec.q_len // candidate) >= ENOUGH_ITEMS:
            tile_q = candidate
    return Plan(
        batch=spec.batch,
        heads=spec.heads,
        query_tiles=-(-spec.q_len // tile_q),
        splits=1,
        tile_q=tile_q,
        tile_k=max(_up_to(capabilities.tile_k, spec.kv_len)),
        flops=flops_of(spec),
    )


def flops_of(spec: AttentionSpec, offsets: Iterable[int] | None = None) -> int:
    """Floating-point operations of the two products over visible pairs: 2 (D + D_v) each, softmax not counted."""
    per_pair = 2 * spec.heads * (spec.head_size + spec.value_size)
    if offsets is not None:
        return per_pair * sum(visible_pairs(spec, offset) for offset in offsets)
    return per_pair * spec.batch * visible_pairs(spec, spec.offset)


def _up_to(menu: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The sizes of an ascending menu that a length can fill, and the first that covers it."""
    smaller = sum(size < length for size in menu)
    return menu[: smaller + 1]
