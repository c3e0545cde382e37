"""Tile sizes: a function of the spec and of the kernel's declared capabilities, never of the number of threads."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from flashtile.plan.capabilities import Capabilities
from flashtile.plan.coverage import visible_pairs
from flashtile.plan.items import Plan
from flashtile.spec import AttentionSpec

# Larger tiles of queries read K and V less often; fewer items than this would leave threads idle at the end.
ENOUGH_ITEMS = 32
MOST_PARTS = 128


def make_plan(spec: AttentionSpec, capabilities: Capabilities) -> Plan:
    """Choose tile sizes from the kernel's menus."""
    heads = spec.batch * spec.heads // capabilities.head_block
    tile_q = capabilities.tile_q[0]
    for candidate in _up_to(capabilities.tile_q, spec.q_len):
        if heads * -(-spec.q_len // candidate) >= ENOUGH_ITEMS:
            tile_q = candidate
    tile_k = max(_up_to(capabilities.tile_k, spec.kv_len))
    query_tiles = -(-spec.q_len // tile_q)
    split_keys = _keys_of_a_part(spec, capabilities, heads * query_tiles, tile_k)
    return Plan(
        batch=spec.batch,
        heads=spec.heads,
        query_tiles=query_tiles,
        splits=-(-spec.kv_len // split_keys) if split_keys else 1,
        tile_q=tile_q,
        tile_k=tile_k,
        flops=flops_of(spec),
        split_keys=split_keys,
        head_block=capabilities.head_block,
        at_once=capabilities.at_once,
    )


def _keys_of_a_part(spec: AttentionSpec, capabilities: Capabilities, items: int, tile_k: int) -> int:
    """How many keys a work item attends; 0: all of them.

    Not all where few items on long keys would leave threads idle, or where the kernel would not sum so many accurately.
    """
    if capabilities.part_keys is None or items == 0:
        return 0
    seen = keys_seen(spec)
    parts = min(-(-(capabilities.enough_items or ENOUGH_ITEMS) // items), seen // capabilities.part_keys)
    if capabilities.longest_part is not None:
        parts = max(parts, -(-seen // capabilities.longest_part))
    if parts < 2:
        return 0
    # A window sees a few of many parts, and the merge reads all: their number is bounded.
    keys = max(-(-seen // parts), -(-spec.kv_len // MOST_PARTS))
    return -(-keys // tile_k) * tile_k


def keys_seen(spec: AttentionSpec) -> int:
    """The most keys that the rows of one head can see between them, whatever the offset."""
    if spec.band is None or spec.band.left is None or spec.band.right is None:
        return spec.kv_len
    return min(spec.kv_len, max(0, spec.band.left + spec.band.right + spec.q_len))


def flops_of(spec: AttentionSpec, offsets: Iterable[int] | None = None) -> int:
    """Floating-point operations of the two products over visible pairs: 2 (D + D_v) each, softmax not counted."""
    per_pair = 2 * spec.heads * (spec.head_size + spec.value_size)
    if offsets is not None:
        return per_pair * sum(visible_pairs(spec, offset) for offset in offsets)
    return per_pair * spec.batch * visible_pairs(spec, spec.offset)


def _up_to(menu: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The sizes of an ascending menu that a length can fill, and the first that covers it."""
    return menu[: bisect_left(menu, length) + 1]
