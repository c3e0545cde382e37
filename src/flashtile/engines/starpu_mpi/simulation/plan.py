"""The plan of a call over ranks: tasks in the order of flow.py, tiles on the ranks that parts.py gives them.

Heads and batches of a band are alike, so this is of one, and counts are multiplied: the only use of symmetry.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from flashtile.dtypes import DTYPES
from flashtile.engines.starpu.coverage import BandCoverage
from flashtile.engines.starpu.flow import Pairs, pairs_of
from flashtile.engines.starpu_mpi.parts import tiles_of
from flashtile.engines.starpu_mpi.simulation.network import Traffic
from flashtile.spec import AttentionSpec


@dataclass(frozen=True)
class Plan:
    """A spec with a band or none, in tiles of `tile` rows, on `ranks`."""

    spec: AttentionSpec
    ranks: int
    tile: int
    distribution: str

    @cached_property
    def coverage(self) -> BandCoverage:
        one = replace(self.spec, batch=1, heads=1, kv_heads=1)
        return BandCoverage(one, self.tile, self.tile, np.array([self.spec.offset or 0], np.int64))

    @cached_property
    def touched(self) -> np.ndarray:
        """bool (query tiles, key tiles)."""
        return self.coverage.touched()[0, 0]

    @cached_property
    def pairs(self) -> Pairs:
        """The tasks of one head, chain by chain."""
        return pairs_of(self.coverage.spec, self.coverage)

    @cached_property
    def chains(self) -> np.ndarray:
        """int64 (query tiles + 1): where the chain of each query tile begins among the pairs."""
        tiles = len(self.touched)
        return np.searchsorted(self.pairs.query_tile, np.arange(tiles + 1))

    def tiles(self, length: int, rank: int) -> np.ndarray:
        """The numbers of a rank's tiles."""
        return tiles_of(length, rank, self.ranks, self.tile, self.distribution)

    def _owners(self, length: int) -> np.ndarray:
        owner = np.empty(-(-length // self.tile), np.int64)
        for rank in range(self.ranks):
            owner[self.tiles(length, rank)] = rank
        return owner

    @cached_property
    def query_owner(self) -> np.ndarray:
        """int64 (query tiles): the rank that computes each."""
        return self._owners(self.spec.q_len)

    @cached_property
    def key_owner(self) -> np.ndarray:
        """int64 (key tiles): the rank that has each."""
        return self._owners(self.spec.kv_len)

    @cached_property
    def needs(self) -> np.ndarray:
        """bool (ranks, key tiles): which tiles come to a rank."""
        found = np.zeros((self.ranks, len(self.key_owner)), bool)
        for rank in range(self.ranks):
            found[rank] = self.touched[self.tiles(self.spec.q_len, rank)].any(axis=0)
        found[self.key_owner, np.arange(len(self.key_owner))] = False
        return found

    @cached_property
    def heights(self) -> np.ndarray:
        """int64 (key tiles): rows of each."""
        return np.minimum(self.tile, self.spec.kv_len - self.tile * np.arange(len(self.key_owner)))

    @property
    def heads(self) -> int:
        """Query heads of all batches."""
        return self.spec.batch * self.spec.heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads of all batches."""
        return self.spec.batch * self.spec.kv_heads

    @cached_property
    def tasks(self) -> np.ndarray:
        """int64 (ranks): tasks of the forward codelet, and those that cast 16-bit outputs."""
        length = np.diff(self.chains) + (DTYPES[self.spec.dtype].accumulator != self.spec.dtype)
        return self.heads * np.bincount(self.query_owner, length, self.ranks).astype(np.int64)

    @cached_property
    def traffic(self) -> Traffic:
        """Keys and values on their way to the rows that see them."""
        size = DTYPES[self.spec.dtype].itemsize
        row = np.array([self.spec.head_size * size, self.spec.value_size * size])
        return Traffic(self.needs, self.key_owner, self.heights, row, self.kv_heads, self._urgency)

    @property
    def received_bytes(self) -> np.ndarray:
        """int64 (ranks): bytes of keys and values that come to each."""
        return self.traffic.received_bytes

    @property
    def sent_bytes(self) -> np.ndarray:
        """int64 (ranks): and that leave each."""
        return self.traffic.sent_bytes

    @cached_property
    def _urgency(self) -> np.ndarray:
        found = np.full((self.ranks, len(self.key_owner)), np.iinfo(np.int64).max)
        some = self.pairs.key_tile >= 0
        own, key = self.query_owner[self.pairs.query_tile[some]], self.pairs.key_tile[some]
        np.minimum.at(found, (own, key), self.pairs.place[some])
        return found

    def pairs_owners(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """The ranks that have the rows, and the keys, of some pairs."""
        return self.query_owner[pairs.query_tile], self.key_owner[pairs.key_tile]
