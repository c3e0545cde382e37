"""Which tiles stay in memory while which pass, in a backward pass on arrays that are larger than memory.

In memory a query tile meets the key tiles up to its own downwards, then those behind it downwards (backward.py), and a
key tile so meets queries upwards: first those whose own tile is not before it, then the rest. Stages keep both orders:
groups of query tiles ascend while keys descend past them, groups of key tiles descend while queries ascend past them.
Where what passes meets pairs of both kinds, all pairs of the first kind come before those of the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flashtile.engines.starpu.outofcore import Needs


@dataclass(frozen=True)
class Side:
    """The queries of a call, or its keys."""

    names: tuple[str, ...]  # what tasks read of them
    gradients: tuple[str, ...]  # that are wanted
    heads: int  # for one key/value head
    tile: int
    length: int
    read: int  # bytes of a row of names
    sums: int  # of a row of its gradients as they grow
    written: int  # of a row of its gradients as results

    @property
    def tiles(self) -> int:
        return -(-self.length // self.tile)

    @property
    def heights(self) -> np.ndarray:
        """Rows of each tile."""
        return np.minimum(self.tile, self.length - self.tile * np.arange(self.tiles))

    @property
    def memory(self) -> int:
        """Bytes of a tile of a head."""
        return self.tile * (self.read + self.written + (self.sums if self.sums > self.written else 0))

    def moved(self, visits: np.ndarray) -> int:
        """Bytes that are read and written when tiles (heads, tiles) come so often: gradients leave as sums, and come
        back, until their last visit."""
        more = 2 * np.maximum(visits - 1, 0)
        return int(((visits * self.read + more * self.sums + self.written) * self.heights).sum())


class Stage(NamedTuple):
    """Tiles that stay while others pass."""

    heads: range  # of the queries of one key/value head
    tiles: range  # that stay
    behind: bool | None  # which pairs: those whose keys are behind the query tile's own, the others, or all


class Visits(NamedTuple):
    """How often tiles (heads, tiles) are in memory in all."""

    stays: np.ndarray
    passes: np.ndarray


@dataclass(frozen=True)
class Order:
    """A side stays, the other passes."""

    stays: Side
    passes: Side
    needs: Needs
    of_rows: bool  # the queries stay
    own: np.ndarray  # the key tile with which the chain of each query tile begins
    alone: bool  # heads one by one, whatever fits

    @property
    def behind(self) -> np.ndarray:
        """Which pairs (query tiles, key tiles) are behind."""
        keys = self.passes if self.of_rows else self.stays
        found: np.ndarray = np.arange(keys.tiles) > self.own[:, None]
        return found

    def stages(self, touched: np.ndarray, limit: int, workers: int) -> tuple[list[Stage], int]:
        """For the tiles (heads, query tiles, key tiles) that meet, or those of any head: the stages of a key/value
        head, and buffers for what passes."""
        stays, group = self.stays, touched.shape[0]
        room = self.needs.room(limit, stays.heads * stays.tiles, workers)
        parts = max(1, -(-stays.tiles // room.group))
        each = max(1, -(-stays.tiles // parts))  # as equal as can be: a lone tile at the end makes workers wait
        groups = [range(n, min(n + each, stays.tiles)) for n in range(0, stays.tiles, each)]
        heads, single = range(group), [range(n, n + 1) for n in range(group)]
        split = len(groups) > 1 and self._mixed(touched)
        kinds: tuple[bool | None, ...] = (False, True) if split else (None,)
        if not self.of_rows and not split:
            return [Stage(heads, tiles, None) for tiles in reversed(groups)], room.buffers
        if not self.of_rows:
            return [Stage(h, x, kind) for h in single for kind in kinds for x in reversed(groups)], room.buffers
        if room.group >= group * stays.tiles and not self.alone and not self._mixed(touched):
            return [Stage(heads, tiles, None) for tiles in groups], room.buffers
        return [Stage(h, tiles, kind) for h in single for kind in kinds for tiles in groups], room.buffers

    def _mixed(self, touched: np.ndarray) -> bool:
        """Whether a tile that passes, and takes a gradient along, meets pairs of both kinds."""
        if not self.passes.gradients:
            return False
        axis = 1 if self.of_rows else 2
        return bool(((touched & self.behind).any(axis) & (touched & ~self.behind).any(axis)).any())

    def visits(self, stages: list[Stage], touched: np.ndarray) -> tuple[list[Stage], Visits]:
        """Those of the stages that have a pair, and how often tiles come."""
        shape = self.stays.heads, self.stays.tiles
        found = Visits(np.zeros(shape, np.int64), np.zeros((self.passes.heads, self.passes.tiles), np.int64))
        kept = []
        for stage in stages:
            heads, tiles = slice(stage.heads.start, stage.heads.stop), slice(stage.tiles.start, stage.tiles.stop)
            at = (heads, tiles) if self.of_rows else (heads, slice(None), tiles)
            part, behind = touched[at], self.behind[at[1:]]
            if stage.behind is not None:
                part = part & (behind == stage.behind)
            if not part.any():
                continue
            kept.append(stage)
            found.stays[heads if self.of_rows else slice(None), tiles] += 1
            for kind in (behind, ~behind):
                if self.of_rows:
                    found.passes[0] += (part & kind).any((0, 1))
                else:
                    found.passes[heads] += (part & kind).any(2)
        return kept, found

    def moved(self, touched: np.ndarray, limit: int, workers: int) -> int:
        """Bytes that a key/value head reads and writes."""
        visits = self.visits(self.stages(touched, limit, workers)[0], touched)[1]
        return self.stays.moved(visits.stays) + self.passes.moved(visits.passes)

    def least(self, touched: np.ndarray) -> int:
        """The same if everything fitted, and came once."""
        rows, keys = np.asarray(touched.any(2), np.int64), np.asarray(touched.any((0, 1)), np.int64)[None]
        stays, passes = (rows, keys) if self.of_rows else (keys, rows)
        return self.stays.moved(stays) + self.passes.moved(passes)


def chosen(orders: list[Order], touched: np.ndarray, limit: int, workers: int) -> Order:
    """The order that moves fewest bytes, of those that the limit has room for. Raises: SpecError if it has for none."""
    fitting = [x for x in orders if limit >= x.needs.least]
    if not fitting:
        min(orders, key=lambda x: x.needs.least).needs.check(limit)
    return min(fitting, key=lambda x: x.moved(touched, limit, workers))
