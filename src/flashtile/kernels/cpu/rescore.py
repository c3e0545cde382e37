"""The score program: one pass over the scores of a key block, after the products and before the softmax.

A pass of its own, not the end of each score tile: there the sums fill the register file and the program would
be emitted for every element of the tile; here it is emitted once a register of queries, its constants and
whatever depends on the query stay in registers, and the scores it reads are in the first-level cache.
"""

from __future__ import annotations

import math

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.params import FRAME, Scratch
from flashtile.llvm.ir import Function, Module, Value, vector
from flashtile.score.captures import Block
from flashtile.score.emit import Emission
from flashtile.score.expr import Expr


def frame_field(f: Function, frame: Value, name: str, type_: str = "i64") -> Value:
    """A word of the frame that forward.py filled in."""
    return f.load(type_, frame + 8 * FRAME.index(name), align=8)


def emit_rescore(module: Module, c: Config, vectors: int, *, edge: bool) -> str:
    """A function that puts the keys [first, last) through the program; its name.

    Arguments: scratch memory, first and last key counted from the block, the key that stands on the first line of
    the scores, and the two distances of a band (scores.py), which an ``edge`` pass applies where the program has
    no mask.  It also keeps the running maximum.
    """
    f = Function(module, f"rescore_{vectors}_{'edge' if edge else 'full'}", "void",
                 ["ptr", "i64", "i64", "i64", "i32", "i32"], internal=True,
                 names=["scratch", "first", "last", "origin", "above", "below"])  # fmt: skip
    scratch, first, last, origin, above, below = f.args
    at = Scratch(c)
    program = _Program(f, c, scratch + at.frame, vectors, masked=edge and c.masked)
    hidden = f.const(c.vector, -math.inf)
    tops = [f.load(c.vector, scratch + (at.block_max + j * c.register), align=c.register) for j in range(vectors)]

    def one_key(key: Value, tops: list[Value]) -> list[Value]:
        line = (key - origin) * c.line
        place = program.key(key)

        def one_register(j: int) -> Value:
            here = scratch + at.scores + line + j * c.register
            value, visible = program.element(place, j, f.load(c.vector, here, align=c.register), line)
            if edge:
                if visible is None:
                    visible = _in_band(f, c, j, key, above, below)
                value = f.select(visible, value, hidden)
            f.store(value, here, align=c.register)
            return f.maximum(value, tops[j])

        return f.abreast(vectors, one_register)

    for j, top in enumerate(f.fold(first, last, 1, tops, one_key)):
        f.store(top, scratch + (at.block_max + j * c.register), align=c.register)
    f.ret()
    return f.name


def _in_band(f: Function, c: Config, j: int, key: Value, above: Value, below: Value) -> Value:
    """Lanes of register j whose band holds the key."""
    lane, near = f.iota(vector(c.lanes, "i32"), j * c.lanes), f.cast("trunc", key, "i32")
    low, high = (f.splat(x - near, c.lanes) for x in (below, above))
    return (lane + high >= 0) & (lane + low <= 0)


class _Program:
    """Emits the program's parts where they belong: what depends on the query before the loop over keys, what depends
    on the key once in it, the rest for every register of scores.

    Rows past the end repeat the last: what is loaded for them exists, and they are not stored.
    """

    def __init__(self, f: Function, c: Config, frame: Value, vectors: int, *, masked: bool):
        assert c.code is not None
        self.f, self.c, self.code = f, c, c.code
        self.score, self.mask = c.code.score, c.code.mask if masked else None
        self.roots = [root for root in (self.score, self.mask) if root is not None]
        batch, head = (f.cast("trunc", frame_field(f, frame, name), "i32") for name in "bh")
        captures = frame_field(f, frame, "captures", "ptr")
        self.outer = Emission(f, c.isa, c.acc, c.lanes, Block(c.code.slots), captures, {"b": batch, "h": head})
        self.outer.prepare(*self.roots)
        self.block = frame_field(f, frame, "block")
        self.dense = frame_field(f, frame, "dense", "ptr")
        self.scale = f.splat(f.cast("fptrunc", frame_field(f, frame, "scale", "double"), c.acc), c.lanes)
        ends = (f.cast("trunc", frame_field(f, frame, name), "i32") for name in ("row", "last_row"))
        row, last_row = (f.splat(end, c.lanes) for end in ends)
        self.queries = []
        for j in range(vectors):
            i = f.minimum(row + f.iota(vector(c.lanes, "i32"), j * c.lanes), last_row)
            self.queries.append(self.outer.inner({"i": i}))
            self.queries[j].prepare(*self.roots)

    def key(self, key: Value) -> Emission:
        """The place where a key, counted from the block, is known."""
        place = self.outer.inner({"j": self.f.cast("trunc", self.block + key, "i32")})
        place.prepare(*self.roots)
        return place

    def element(self, key: Emission, j: int, raw: Value, line: Value) -> tuple[Value, Value | None]:
        """A key's scores for the queries of register j, and which of them see it (None: all), from raw products."""
        queries = self.queries[j]
        variables = {"i": queries.variable("i"), "s": raw * self.scale if self.score else raw}
        place = key.inner(variables, given={**queries.known, **self._dense(j, line)})
        score = place.vector(self.score) if self.score else raw
        return score, place.vector(self.mask) if self.mask else None

    def _dense(self, j: int, line: Value) -> dict[Expr, Value]:
        """Loads that dense.py has laid out like the scores."""
        f, c, found = self.f, self.c, {}
        for n, load in enumerate(self.code.dense_loads):
            at = self.dense + line + (n * Scratch(c).dense + j * c.register)
            stored = f.load(c.vector, at, align=c.register)
            if load.type != "float":  # integers and bools were widened to the accumulator's size
                stored = f.bitcast(stored, f"i{8 * c.size}")
                stored = stored.ne(0) if load.type == "bool" else f.cast("trunc", stored, vector(c.lanes, "i32"))
            found[load] = stored
        return found
