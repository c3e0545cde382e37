"""The work items of a call, numbered."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """The work items of a call. Item ((b * heads + h) / head_block * query_tiles + query_tile) * splits + split
    computes rows [query_tile * tile_q, min(q_len, (query_tile + 1) * tile_q)) of heads h ... h + head_block - 1 of
    batch b, against keys [split * split_keys, (split + 1) * split_keys)."""

    batch: int
    heads: int
    query_tiles: int
    splits: int  # parts of the key range that are computed apart and merged
    tile_q: int  # rows of a work item, a multiple of the kernel's query_block
    tile_k: int  # keys of a key tile
    flops: int  # of the two products, visible pairs only (an upper bound if offsets come with the call)
    split_keys: int = 0  # keys of a part, a multiple of tile_k; split n begins at key n * split_keys. 0: not split
    head_block: int = 1  # query heads of a work item
    at_once: bool = False  # one call computes every item
    waiting: int = 1  # operations in the time of one of these: more than 1 where a core waits for memory

    @property
    def work(self) -> int:
        """What the operations of the plan count in an engine's eyes, which shares out time."""
        return self.flops * self.waiting

    @property
    def items(self) -> int:
        return self.batch * self.heads // self.head_block * self.query_tiles * self.splits

    def locate(self, item: int) -> tuple[int, int, int, int]:
        """(batch, first head, query tile, split) of a work item."""
        rest, split = divmod(item, self.splits)
        rest, query_tile = divmod(rest, self.query_tiles)
        batch, block = divmod(rest, self.heads // self.head_block)
        return batch, block * self.head_block, query_tile, split
