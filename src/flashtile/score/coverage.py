"""Coverage: which tiles of the score matrix a program's mask leaves out, leaves whole, or cuts.

This is the map that kernels walk, for any mask.  (plan/coverage.py counts the tiles of a causal or window band,
which need no map: there a formula says where they are.)

Interval analysis of the mask over the tile grid, coarse to fine: what is EMPTY or FULL in a large tile is so in
the small ones, so only the cut regions are looked at more closely. The result is runs of key tiles for each
query tile, in NumPy arrays: no Python object a tile.  A mask stored with an element for each (i, j) is not looked
through, which would take as long as using it: its tiles are PARTIAL.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from ..errors import described, wrong
from .bounds import Bounds
from .code import is_dense
from .expr import Expr
from .interval import Interval
from .program import Program

EMPTY, PARTIAL, FULL = 0, 1, 2  # what a tile needs: nothing, mask code, no mask code
_REFINE = 8  # side of a coarse tile in finer ones
_AT_ONCE = 1 << 11  # tiles that are looked at sooner than a coarser map of them
_BATCH = 1 << 17  # tiles looked at together, to bound memory


@dataclass(frozen=True, eq=False)
class Coverage:
    """Runs of key tiles for each query tile.

    tile_q, tile_k
        tile sizes; the last tile of an axis may be ragged
    shape
        (batches, heads, query tiles, key tiles) of the map; batches and heads are 1 where the mask does not depend on
        them
    indptr
        (batches * heads * query tiles + 1,): the runs of row r are indptr[r] : indptr[r + 1]
    start, stop
        keys [start, stop) of each run, multiples of tile_k (stop ends at S_kv), ascending
    kind
        PARTIAL or FULL; EMPTY is absent
    """

    tile_q: int
    tile_k: int
    shape: tuple[int, int, int, int]
    indptr: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    kind: np.ndarray

    def row(self, b: int, h: int, tile: int) -> int:
        """Where in indptr the query tile of batch b and head h stands."""
        batches, heads, tiles, _ = self.shape
        return ((b if batches > 1 else 0) * heads + (h if heads > 1 else 0)) * tiles + tile

    def runs(self, b: int, h: int, tile: int) -> list[tuple[int, int, int]]:
        """(start, stop, kind) of one query tile."""
        r = self.row(b, h, tile)
        part = slice(self.indptr[r], self.indptr[r + 1])
        return list(zip(*(a[part].tolist() for a in (self.start, self.stop, self.kind)), strict=True))

    def tiles(self) -> np.ndarray:
        """The map itself: kinds, uint8, of `shape`."""
        batches, heads, rows, columns = self.shape
        steps = np.zeros((batches * heads * rows, columns + 1), np.int8)
        row = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        np.add.at(steps, (row, self.start // self.tile_k), self.kind.astype(np.int8))
        np.add.at(steps, (row, -(-self.stop // self.tile_k)), -self.kind.astype(np.int8))
        return np.cumsum(steps, 1)[:, :-1].astype(np.uint8).reshape(self.shape)

    def count(self) -> dict[int, int]:
        """Tiles of each kind in the map."""
        width = -(-self.stop // self.tile_k) - self.start // self.tile_k
        found = {kind: int(width[self.kind == kind].sum()) for kind in (PARTIAL, FULL)}
        return {EMPTY: int(np.prod(self.shape)) - sum(found.values()), **found}


def coverage(program: Program, tile_q: int, tile_k: int, float_type: object = np.float32) -> Coverage:
    """The coverage of a program's mask by tiles of tile_q rows and tile_k keys.

    float_type is the accumulator's type, in which the kernel evaluates the mask.
    A tile that is called PARTIAL may be whole or hidden (intervals are cautious); EMPTY and FULL are certain.
    """
    if not isinstance(program, Program):
        raise wrong("program", described(program), "a flashtile.score.Program")
    s_q, s_kv = program.shape[2:]
    used = program.mask.variables if program.mask is not None else frozenset()
    shape = _shape(program.shape, used, tile_q, tile_k)
    if program.mask is None or 0 in shape:
        kinds = np.full(shape, FULL, np.uint8)
    elif is_stored(program.mask):
        kinds = np.full(shape, PARTIAL, np.uint8)
    else:  # along an axis that the mask does not depend on all tiles are alike
        sides = tile_q if "i" in used else s_q, tile_k if "j" in used else s_kv
        kinds = np.broadcast_to(_kinds(program, shape[:2], sides, float_type), shape)
    return _runs(kinds, tile_q, tile_k, s_kv)


def unseen(shape: tuple[int, int, int, int], used: frozenset[str], tile_q: int, tile_k: int) -> Coverage:
    """The coverage of a mask that was not looked at, of which these variables are known to be used: all is PARTIAL."""
    return _runs(np.full(_shape(shape, used, tile_q, tile_k), PARTIAL, np.uint8), tile_q, tile_k, shape[3])


def _shape(
    shape: tuple[int, int, int, int], used: frozenset[str], tile_q: int, tile_k: int
) -> tuple[int, int, int, int]:
    batch, heads, s_q, s_kv = shape
    batches, maps = (n if v in used else min(n, 1) for v, n in (("b", batch), ("h", heads)))
    return batches, maps, -(-s_q // tile_q), -(-s_kv // tile_k)


@functools.lru_cache(maxsize=64)
def is_stored(mask: Expr) -> bool:
    """Whether nothing but arrays with an element for each (i, j) decides: these are not looked through."""
    stack, seen = [mask], set()
    while stack:
        x = stack.pop()
        if x.operation.name == "var":
            return False
        if x not in seen and not is_dense(x):
            seen.add(x)
            stack += x.args
    return True


def _kinds(program: Program, maps: tuple[int, int], sides: tuple[int, int], float_type: object) -> np.ndarray:
    """The map of tiles of these sides, coarse to fine."""
    s_q, s_kv = program.shape[2:]

    def grid(factor: int) -> tuple[int, int, int, int]:
        return (*maps, -(-s_q // (sides[0] * factor)), -(-s_kv // (sides[1] * factor)))

    factor = 1
    while max(grid(factor)[2:]) > _REFINE and math.prod(grid(factor)) > _AT_ONCE:
        factor *= _REFINE
    kinds = np.full(grid(factor), PARTIAL, np.uint8)
    while True:
        _classify(program, kinds, sides[0] * factor, sides[1] * factor, float_type)
        if factor == 1:
            return kinds
        factor //= _REFINE
        finer = kinds.repeat(_REFINE, 2).repeat(_REFINE, 3)
        rows, columns = grid(factor)[2:]
        kinds = finer[:, :, :rows, :columns].copy()


def _classify(program: Program, kinds: np.ndarray, tile_q: int, tile_k: int, float_type: object) -> None:
    """Decide the PARTIAL tiles of a map, in place."""
    _, _, s_q, s_kv = program.shape
    undecided = np.flatnonzero(kinds == PARTIAL)
    for at in range(0, undecided.size, _BATCH):
        chosen = undecided[at : at + _BATCH]
        b, h, q, k = np.unravel_index(chosen, kinds.shape)
        i, j = q.astype(np.int64) * tile_q, k.astype(np.int64) * tile_k
        box = {
            "b": Interval(b, b),
            "h": Interval(h, h),
            "i": Interval(i, np.minimum(i + tile_q, s_q) - 1),
            "j": Interval(j, np.minimum(j + tile_k, s_kv) - 1),
        }
        certain, possible, _ = Bounds(box, program.capture, float_type).run([program.mask])[0]  # type: ignore[list-item]  # it has one
        kinds.ravel()[chosen] = np.where(certain == 1, FULL, np.where(possible == 0, EMPTY, PARTIAL))


def _runs(kinds: np.ndarray, tile_q: int, tile_k: int, s_kv: int) -> Coverage:
    """Neighbouring tiles of one kind joined."""
    rows = kinds.reshape(int(np.prod(kinds.shape[:3])), kinds.shape[3])
    first = np.ones(rows.shape, bool)
    first[:, 1:] = rows[:, 1:] != rows[:, :-1]
    row, column = np.nonzero(first)
    stop = np.append(column[1:], 0)
    stop[np.append(row[1:] != row[:-1], True) if row.size else []] = kinds.shape[3]
    kind = rows[row, column]
    present = kind != EMPTY
    indptr = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.bincount(row[present], minlength=len(rows)), out=indptr[1:])
    ends = np.minimum(stop[present] * tile_k, s_kv)
    return Coverage(tile_q, tile_k, kinds.shape, indptr, column[present] * tile_k, ends, kind[present])
