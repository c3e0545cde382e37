"""The score program inside a score tile: lanes are queries, a row of the tile is a key.

What depends on the batch and head alone is emitted once a tile, what depends on the query once a register of
queries, what depends on the key once a key; only the rest is computed for every score.
"""

from __future__ import annotations

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.ir import Function, Value, vector
from flashtile.kernels.cpu.params import FRAME, Scratch
from flashtile.score.captures import Block
from flashtile.score.emit import Emission
from flashtile.score.expr import Expr


def frame_field(f: Function, frame: Value, name: str, type_: str = "i64") -> Value:
    """A word of the frame that forward.py filled in."""
    return f.load(type_, frame + 8 * FRAME.index(name), align=8)


class TileProgram:
    """Emits a program's score and mask for the elements of one tile.

    ``key`` is the tile's first key counted from the block, ``line`` its line in the dense tiles.  Rows and keys
    past the end repeat the last: what is loaded for them exists, and they are hidden or not stored.
    """

    def __init__(self, f: Function, c: Config, frame: Value, key: Value, line: Value, *, masked: bool):
        assert c.code is not None
        self.f, self.c = f, c
        self.score_root, self.mask_root = c.code.score, c.code.mask if masked else None
        self.roots = [root for root in (self.score_root, self.mask_root) if root is not None]
        batch, head = (f.cast("trunc", frame_field(f, frame, name), "i32") for name in "bh")
        captures = frame_field(f, frame, "captures", "ptr")
        self.outer = Emission(f, c.isa, c.acc, c.lanes, Block(c.code.slots), captures, {"b": batch, "h": head})
        self.outer.prepare(*self.roots)
        self.row, self.last_row = (frame_field(f, frame, name) for name in ("row", "last_row"))
        self.first_key = frame_field(f, frame, "block") + key
        self.last_key = frame_field(f, frame, "last_key")
        self.scale = f.splat(f.cast("fptrunc", frame_field(f, frame, "scale", "double"), c.acc), c.lanes)
        self.dense = frame_field(f, frame, "dense", "ptr") + line * c.line
        self.columns: dict[int, Emission] = {}
        self.keys: dict[int, Emission] = {}

    def _queries(self, j: int) -> Emission:
        """The place where the queries of register j are known."""
        if j not in self.columns:
            f, n = self.f, self.c.lanes
            first, last = (f.splat(f.cast("trunc", x, "i32"), n) for x in (self.row, self.last_row))
            i = f.minimum(first + f.iota(vector(n, "i32"), j * n), last)
            self.columns[j] = self.outer.inner({"i": i})
            self.columns[j].prepare(*self.roots)
        return self.columns[j]

    def _key(self, r: int) -> Emission:
        """The place where key r of the tile is known."""
        if r not in self.keys:
            key = self.f.minimum(self.first_key + r, self.last_key)
            self.keys[r] = self.outer.inner({"j": self.f.cast("trunc", key, "i32")})
            self.keys[r].prepare(*self.roots)
        return self.keys[r]

    def _dense(self, r: int, j: int) -> dict[Expr, Value]:
        """Loads that dense.py has laid out like the scores."""
        assert self.c.code is not None
        f, c, found = self.f, self.c, {}
        for n, load in enumerate(self.c.code.dense_loads):
            at = self.dense + (n * Scratch(c).dense + r * c.line + j * c.register)
            stored = f.load(c.vector, at, align=c.register)
            if load.type != "float":  # integers and bools were widened to the accumulator's size
                stored = f.bitcast(stored, f"i{8 * c.size}")
                stored = stored.ne(0) if load.type == "bool" else f.cast("trunc", stored, vector(c.lanes, "i32"))
            found[load] = stored
        return found

    def element(self, r: int, j: int, raw: Value) -> tuple[Value, Value | None]:
        """Score of key r for the queries of register j, and which of them see it (None: all), from the raw product."""
        queries, key = self._queries(j), self._key(r)
        scaled = raw * self.scale if self.score_root else raw
        place = key.inner({"i": queries.variable("i"), "s": scaled}, given={**queries.known, **self._dense(r, j)})
        score = place.vector(self.score_root) if self.score_root else raw
        return score, place.vector(self.mask_root) if self.mask_root else None
