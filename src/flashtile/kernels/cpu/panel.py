"""One panel of queries against one key block: score tiles, softmax, output tiles."""

from __future__ import annotations

import math
from collections.abc import Callable

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.params import Scratch
from flashtile.kernels.cpu.rescore import emit_rescore
from flashtile.kernels.cpu.scores import emit_scores
from flashtile.kernels.cpu.softmax import emit_softmax
from flashtile.kernels.cpu.values import emit_values
from flashtile.llvm.ir import Function, Module, Value

# Keys are counted from the block's start: [some_from, some_to) are seen by some row of the panel, [all_from,
# all_to) by every row.  Query lane i sees key r iff  i + above >= r  and  i + below <= r.
PANEL_ARGUMENTS = {
    "scratch": "ptr", "q": "ptr", "o": "ptr", "state": "ptr", "k": "ptr", "k_stride": "i64", "v": "ptr",
    "v_stride": "i64", "words": "i64", "columns": "i64", "some_from": "i64", "some_to": "i64", "all_from": "i64",
    "all_to": "i64", "above": "i32", "below": "i32", "bad": "i64", "raw": "ptr", "raw_stride": "i64",
    "raw_step": "i64", "size": "i64", "extra": "ptr", "rows": "i64", "dense": "i64", "c_high": "acc", "c_low": "acc",
}  # fmt: skip


_Tile = Callable[[Function, dict[str, Value], Value, list[Value]], None]


def emit_panel(module: Module, c: Config, vectors: int, collect: str, add: str, dense: list[str]) -> str:
    """A function that adds one key block to a panel of up to ``vectors`` registers of queries; its name.

    ``collect`` and ``add`` are the functions of NaN containment (containment.py), ``dense`` those that lay out
    the tiles of dense loads (dense.py).
    """
    tiles = _Tiles(module, c, vectors)
    softmax, values = emit_softmax(module, c, vectors), emit_values(module, c, vectors)
    types = [c.acc if t == "acc" else t for t in PANEL_ARGUMENTS.values()]
    f = Function(module, f"panel_{vectors}", "void", types, names=list(PANEL_ARGUMENTS), internal=True)
    a = dict(zip(PANEL_ARGUMENTS, f.args, strict=True))
    at = Scratch(c)
    top, alpha, s = (a["scratch"] + x for x in (at.block_max, at.alpha, at.scores))

    keys = a["some_to"] - a["some_from"]
    for n, stage in enumerate(dense):
        tile = a["scratch"] + (a["dense"] + n * at.dense)
        f.call(stage, "void", [a["scratch"] + at.frame, a["some_from"], keys, a["rows"], tile])
    tiles.call(f, a)
    whole = (keys + (c.rows - 1)) // c.rows * c.rows
    # Keys that a band shows to the first register of queries; a program's mask may show any.
    reach = keys if c.masked else f.cast("sext", a["above"], "i64") + c.lanes - a["some_from"]
    bad = a["bad"].ne(0)
    with f.when(bad):
        f.call(collect, "void", [s, a["raw"] + a["some_from"] * a["raw_stride"], a["raw_stride"], a["raw_step"], keys,
                                 a["size"], a["columns"], a["extra"]])  # fmt: skip
    f.call(softmax, "void", [a["state"], top, alpha, s, whole, reach, a["c_high"], a["c_low"]])
    v = a["v"] + a["some_from"] // c.per_word * a["v_stride"]
    with f.range(0, a["columns"], c.rows) as column:
        f.call(values, "void", [a["o"] + column * c.line, alpha, v + column * c.size, a["v_stride"], s, keys, reach])
    with f.when(bad):
        f.call(add, "void", [a["o"], a["extra"], a["columns"]])
    f.ret()
    return f.name


class _Tiles:
    """The functions that fill the scores of a block: edge tiles, which are masked, and full ones, which are not.

    Without a score program a band is applied in the edge tiles themselves.  A program comes after the products
    (rescore.py): its mask to edge tiles alone, its score, if it has one, to all.
    """

    def __init__(self, module: Module, c: Config, vectors: int):
        self.c = c
        if not c.scored:
            self.full = emit_scores(module, c, vectors)
        if c.code is None:
            self.edges = [emit_scores(module, c, vectors, edge=True, first=first) for first in range(vectors)]
        else:
            self.raw = emit_scores(module, c, vectors, top=False)
            self.rescore = {e: emit_rescore(module, c, vectors, edge=e) for e in (False, True) if e or c.scored}

    def call(self, f: Function, a: dict[str, Value]) -> None:
        """Edge keys up to the first tile that every row sees whole, full tiles, edge keys to the end."""
        rows, some_from, some_to = self.c.rows, a["some_from"], a["some_to"]
        whole = f.minimum(some_from + (a["all_from"] - some_from + (rows - 1)) // rows * rows, some_to)
        until = f.maximum(whole + f.maximum(a["all_to"] - whole, 0) // rows * rows, whole)
        edge = self._edge_tile if self.c.code is None else self._raw_tile
        full = self._raw_tile if self.c.scored else self._full_tile
        self._tiles(f, a, some_from, whole, edge)
        self._tiles(f, a, whole, until, full)
        self._tiles(f, a, until, some_to, edge)
        if self.c.code:
            self._rescore(f, a, some_from, whole, edge=True)
            if self.c.scored:
                self._rescore(f, a, whole, until, edge=False)
            self._rescore(f, a, until, some_to, edge=True)
            self._hide_rest(f, a)

    def _tiles(self, f: Function, a: dict[str, Value], first: Value, last: Value, tile: _Tile) -> None:
        with f.range(first, last, self.c.rows) as key:
            k = a["k"] + key * a["k_stride"]
            tile(f, a, key, [a["scratch"], a["q"], k, a["k_stride"], a["words"], key - a["some_from"]])

    def _full_tile(self, f: Function, a: dict[str, Value], key: Value, args: list[Value]) -> None:
        f.call(self.full, "void", args)

    def _raw_tile(self, f: Function, a: dict[str, Value], key: Value, args: list[Value]) -> None:
        f.call(self.raw, "void", args)

    def _edge_tile(self, f: Function, a: dict[str, Value], key: Value, args: list[Value]) -> None:
        """The variant that leaves out every vector none of whose queries sees even the tile's first key."""
        near = f.cast("trunc", key, "i32")
        above, below = a["above"] - near, a["below"] - near
        args = [*args, a["some_to"] - key - 1, above, below]

        def skip(first: int) -> None:
            if first == 0:
                f.call(self.edges[0], "void", args)
            else:
                hidden = above < -(first * self.c.lanes - 1)
                f.either(hidden, lambda: f.call(self.edges[first], "void", args), lambda: skip(first - 1))

        skip(len(self.edges) - 1)

    def _rescore(self, f: Function, a: dict[str, Value], first: Value, last: Value, *, edge: bool) -> None:
        with f.when(first < last):
            args = [a["scratch"], first, last, a["some_from"], a["above"], a["below"]]
            f.call(self.rescore[edge], "void", args)

    def _hide_rest(self, f: Function, a: dict[str, Value]) -> None:
        """-inf for the lines of the last tile that stand for no key."""
        c = self.c
        keys = a["some_to"] - a["some_from"]
        end = (keys + (c.rows - 1)) // c.rows * c.rows
        s = a["scratch"] + Scratch(c).scores
        with f.range(keys * c.line, end * c.line, c.register) as at:
            f.store(f.const(c.vector, -math.inf), s + at, align=c.register)
