"""Tile sizes: a function of the spec and of the kernel's declared capabilities, never of the number of threads."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

from flashtile.plan.capabilities import Capabilities
from flashtile.plan.coverage import visible_pairs
from flashtile.plan.items import Plan
from flashtile.spec import AttentionSpec

# Larger tiles of queries read K and V less often; fewer items than this would leave threads idle at the end.
ENOUGH_ITEMS = 32
MOST_PARTS = 128
MANY_KEYS = 8  # times the queries


def make_plan(spec: AttentionSpec, capabilities: Capabilities) -> Plan:
    """Choose tile sizes from the kernel's menus."""
    tile_q, splits, split_keys = cut_of(spec, capabilities, spec.kv_len)
    return Plan(
        batch=spec.batch,
        heads=spec.heads,
        query_tiles=-(-spec.q_len // tile_q),
        splits=splits,
        tile_q=tile_q,
        tile_k=_tile_of_keys(capabilities, spec.kv_len),
        flops=flops_of(spec),
        split_keys=split_keys,
        head_block=capabilities.head_block,
        at_once=capabilities.at_once,
        waiting=waiting_of(spec),
    )


class Cut(NamedTuple):
    """Rows of a work item; in how many parts keys are attended, and how many keys a part has: 1 and 0 where they are
    not parted."""

    tile_q: int
    splits: int = 1
    split_keys: int = 0


def cut_of(spec: AttentionSpec, capabilities: Capabilities, kv_len: int) -> Cut:
    """How a call is cut that is like `spec` but for its number of keys.

    Keys are parted where few items on long keys would leave threads idle, or where the kernel would not sum all
    accurately. Where they are many beside the queries, parts are found first: K and V are then read, and made ready,
    for more queries at once.
    """
    heads, seen = spec.batch * spec.heads // capabilities.head_block, _keys_seen(spec, kv_len)
    most = 1 if capabilities.part_keys is None else max(1, seen // capabilities.part_keys)
    parts = most if seen >= MANY_KEYS * spec.q_len else 1
    tile_q = capabilities.tile_q[0]
    for candidate in _up_to(capabilities.tile_q, spec.q_len):
        if heads * -(-spec.q_len // candidate) * parts >= ENOUGH_ITEMS:
            tile_q = candidate
    items = heads * -(-spec.q_len // tile_q)
    if capabilities.part_keys is None or items == 0:
        return Cut(tile_q)
    parts = min(-(-(capabilities.enough_items or ENOUGH_ITEMS) // items), most)
    if capabilities.longest_part is not None:
        parts = max(parts, -(-seen // capabilities.longest_part))
    if parts < 2:
        return Cut(tile_q)
    # A window sees a few of many parts, and the merge reads all: their number is bounded.
    tile_k, keys = _tile_of_keys(capabilities, kv_len), max(-(-seen // parts), -(-kv_len // MOST_PARTS))
    split_keys = -(-keys // tile_k) * tile_k
    return Cut(tile_q, -(-kv_len // split_keys), split_keys)


def _keys_seen(spec: AttentionSpec, kv_len: int) -> int:
    """The most of so many keys that the rows of one head can see between them, whatever the offset."""
    if spec.band is None or spec.band.left is None or spec.band.right is None:
        return kv_len
    return min(kv_len, max(0, spec.band.left + spec.band.right + spec.q_len))


def _tile_of_keys(capabilities: Capabilities, kv_len: int) -> int:
    return max(_up_to(capabilities.tile_k, kv_len))


def flops_of(spec: AttentionSpec, offsets: Iterable[int] | None = None) -> int:
    """Floating-point operations of the two products over visible pairs: 2 (D + D_v) each, softmax not counted."""
    if offsets is not None:
        return flops_of_pair(spec) * sum(visible_pairs(spec, offset) for offset in offsets)
    return flops_of_pair(spec) * spec.batch * visible_pairs(spec, spec.offset)


def waiting_of(spec: AttentionSpec) -> int:
    """`Plan.waiting`: an element of K or V takes part in 2 operations for every row that shares it, and a core reads a
    byte of it, from memory or the farther caches, in the time of 1 to 3."""
    return max(1, spec.element_bytes // max(spec.group * spec.q_len, 1))


def flops_of_pair(spec: AttentionSpec) -> int:
    """The same of one query and one key, in all heads."""
    return 2 * spec.heads * (spec.head_size + spec.value_size)


def _up_to(menu: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The sizes of an ascending menu that a length can fill, and the first that covers it."""
    return menu[: bisect_left(menu, length) + 1]
