"""Which tiles meet: the pairs of query and key tiles of which some element is visible, and how much of them is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from flashtile.dtypes import DTYPES
from flashtile.plan.coverage import key_ranges, visible_pairs
from flashtile.score.coverage import coverage
from flashtile.score.program import Program
from flashtile.spec import AttentionSpec, Band

if TYPE_CHECKING:
    from flashtile.score.options import Scoring

FAR = 1 << 61  # the open side of a band
FINE_KEYS = 32  # keys of the cells in which a program's mask is looked at
COUNTED = 1 << 20  # elements of cut cells that are counted one by one: some 20 ms


class Amount(NamedTuple):
    """What is visible of n tiles: (row, key) pairs, and numbers that are equal where the work is."""

    pairs: np.ndarray  # float64 (n,)
    cases: np.ndarray  # int64 (n, any)


@dataclass
class BandCoverage:
    """Of a positional rule, or of none. offsets: int64 (B,), or (1,) where all batches share one."""

    spec: AttentionSpec
    tile_q: int
    tile_k: int
    offsets: np.ndarray

    def touched(self) -> np.ndarray:
        """bool (B or 1, 1, query tiles, key tiles): whether some row of the one sees some key of the other."""
        spec = self.spec
        first = np.arange(0, spec.q_len, self.tile_q, dtype=np.int64)
        key = np.arange(0, spec.kv_len, self.tile_k, dtype=np.int64)
        stop = np.minimum(first + self.tile_q, spec.q_len)
        maps = []
        for offset in self.offsets.tolist():
            begin, end, _, _ = key_ranges(spec.band, offset, first, stop, spec.kv_len)
            maps.append((key < end[:, None]) & (key + self.tile_k > begin[:, None]) & (end > begin)[:, None])
        return np.stack(maps)[:, None] if maps else np.zeros((0, 1, len(first), len(key)), bool)

    def amount(self, batch: np.ndarray, head: np.ndarray, query_tile: np.ndarray, key_tile: np.ndarray) -> Amount:
        """Exactly; all arguments (n,). Tiles that stand alike towards the band are one case."""
        row, key = query_tile * self.tile_q, key_tile * self.tile_k
        rows = np.minimum(self.tile_q, self.spec.q_len - row)
        keys = np.minimum(self.tile_k, self.spec.kv_len - key)
        shift = row - key + self.offsets[np.minimum(batch, len(self.offsets) - 1)]
        left, right = (self.spec.band.left, self.spec.band.right) if self.spec.band else (None, None)
        # Row r of the tile sees its keys low + r ... high + r; beyond the tile's corners it makes no difference.
        low = np.full_like(shift, -FAR) if left is None else shift - left
        high = np.full_like(shift, FAR) if right is None else shift + right
        cases = np.stack([rows, keys, np.maximum(low, 1 - rows), np.minimum(high, keys - 1)], axis=1)
        kinds, which = np.unique(cases, axis=0, return_inverse=True)
        pairs = np.array([self._pairs(*kind) for kind in kinds.tolist()], np.float64)
        return Amount(pairs[which.reshape(-1)], cases)

    def _pairs(self, rows: int, keys: int, low: int, high: int) -> int:
        tile = replace(self.spec, batch=1, heads=1, kv_heads=1, q_len=rows, kv_len=keys, band=Band(-low, high))
        return visible_pairs(tile, 0)


class ProgramCoverage:
    """Of a score program's mask, found by intervals over cells of a panel by FINE_KEYS keys.

    Kernels compute a cell that the mask cuts whole, so it counts whole where work is told apart. FLOPs count its
    visible elements, as long as a call has at most COUNTED in such cells; beyond (a stored mask, as a rule), all.
    """

    def __init__(self, spec: AttentionSpec, program: Program, panel: int, tile_q: int, tile_k: int) -> None:
        """panel: the query rows that kernels compute at once."""
        self.spec, self.tile_q, self.tile_k = spec, tile_q, tile_k
        fine_q = panel if tile_q % panel == 0 else tile_q
        fine_k = FINE_KEYS if tile_k % FINE_KEYS == 0 else tile_k
        real = DTYPES[DTYPES[spec.dtype].accumulator].numpy.type
        kinds = coverage(program, fine_q, fine_k, real).tiles()
        rows = np.diff(np.append(np.arange(0, spec.q_len, fine_q), spec.q_len))
        keys = np.diff(np.append(np.arange(0, spec.kv_len, fine_k), spec.kv_len))
        computed = (kinds > 0) * (rows[:, None] * keys)
        seen = computed.copy()
        cut = np.nonzero(kinds == 1)
        if len(cut[0]) * fine_q * fine_k <= COUNTED:
            seen[cut] = visible_elements(program, cut, fine_q, fine_k, real)
        sizes = tile_q // fine_q, tile_k // fine_k
        self.computed, self.pairs, self.cut = (self._sum(x, *sizes) for x in (computed, seen, kinds == 1))

    @staticmethod
    def _sum(cells: np.ndarray, q: int, k: int) -> np.ndarray:
        """Over the cells of each tile."""
        if 0 in cells.shape:
            return np.zeros((*cells.shape[:2], -(-cells.shape[2] // q), -(-cells.shape[3] // k)), np.int64)
        rows = np.add.reduceat(cells.astype(np.int64), np.arange(0, cells.shape[2], q), axis=2)
        return np.add.reduceat(rows, np.arange(0, cells.shape[3], k), axis=3)

    def touched(self) -> np.ndarray:
        """As BandCoverage.touched, with a map for each batch and head if the mask depends on them."""
        return self.computed > 0

    def amount(self, batch: np.ndarray, head: np.ndarray, query_tile: np.ndarray, key_tile: np.ndarray) -> Amount:
        """As BandCoverage.amount."""
        batches, heads = self.pairs.shape[:2]
        at = np.minimum(batch, batches - 1), np.minimum(head, heads - 1), query_tile, key_tile
        rows = np.minimum(self.tile_q, self.spec.q_len - query_tile * self.tile_q)
        keys = np.minimum(self.tile_k, self.spec.kv_len - key_tile * self.tile_k)
        cases = np.stack([rows, keys, self.computed[at], self.cut[at]], axis=1)
        return Amount(self.pairs[at].astype(np.float64), cases)


def visible_elements(program: Program, cells: tuple[np.ndarray, ...], rows: int, keys: int, real: type) -> np.ndarray:
    """How many elements of each cell (batch, head, row // rows, key // keys) the program's mask shows: (n,)."""
    batch, head, i, j = (x[:, None, None] for x in cells)
    i, j = i * rows + np.arange(rows)[:, None], j * keys + np.arange(keys)
    q_len, kv_len = program.shape[2:]
    shown = program.visible(batch, head, np.minimum(i, q_len - 1), np.minimum(j, kv_len - 1), real)
    return (shown & (i < q_len) & (j < kv_len)).sum(axis=(1, 2))


def coverage_of(
    spec: AttentionSpec, scoring: Scoring | None, panel: int, tile_q: int, tile_k: int, anchors: np.ndarray
) -> TileCoverage:
    """Of a spec with the values of its program. panel: rows that kernels compute at once; anchors: (B,), or (1,)."""
    if scoring is not None and scoring.program is not None and scoring.program.mask is not None:
        return ProgramCoverage(spec, scoring.program, panel, tile_q, tile_k)
    return BandCoverage(spec, tile_q, tile_k, anchors)


class TileCoverage(Protocol):
    """Either of the two."""

    tile_q: int
    tile_k: int

    def touched(self) -> np.ndarray: ...

    def amount(self, batch: np.ndarray, head: np.ndarray, query_tile: np.ndarray, key_tile: np.ndarray) -> Amount: ...
