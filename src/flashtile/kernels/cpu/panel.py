"""One panel of queries against one key block: score tiles, softmax, output tiles."""

from __future__ import annotations

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.ir import Function, Module, Value
from flashtile.kernels.cpu.params import Scratch
from flashtile.kernels.cpu.scores import emit_scores
from flashtile.kernels.cpu.softmax import emit_softmax
from flashtile.kernels.cpu.values import emit_values

# Keys are counted from the block's start: [some_from, some_to) are seen by some row of the panel, [all_from,
# all_to) by every row.  Query lane i sees key r iff  i + above >= r  and  i + below <= r.
PANEL_ARGUMENTS = {
    "scratch": "ptr", "q": "ptr", "o": "ptr", "state": "ptr", "k": "ptr", "k_stride": "i64", "v": "ptr",
    "v_stride": "i64", "words": "i64", "columns": "i64", "some_from": "i64", "some_to": "i64", "all_from": "i64",
    "all_to": "i64", "above": "i32", "below": "i32", "bad": "i64", "raw": "ptr", "raw_stride": "i64",
    "raw_step": "i64", "size": "i64", "extra": "ptr", "rows": "i64", "dense": "i64", "c_high": "acc", "c_low": "acc",
}  # fmt: skip


def emit_panel(module: Module, c: Config, vectors: int, collect: str, add: str, dense: list[str]) -> str:
    """A function that adds one key block to a panel of up to ``vectors`` registers of queries; its name.

    ``collect`` and ``add`` are the functions of NaN containment (containment.py), ``dense`` those that lay out
    the tiles of dense loads (dense.py).
    """
    full = emit_scores(module, c, vectors, edge=False)
    skips = 1 if c.masked else vectors  # only a band tells which registers of queries see nothing of a tile
    edges = [emit_scores(module, c, vectors, edge=True, first=first) for first in range(skips)]
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
    _score_tiles(f, c, a, full, edges)
    tiles = (keys + (c.rows - 1)) // c.rows
    bad = a["bad"].ne(0)
    with f.when(bad):
        f.call(collect, "void", [s, a["raw"] + a["some_from"] * a["raw_stride"], a["raw_stride"], a["raw_step"], keys,
                                 a["size"], a["columns"], a["extra"]])  # fmt: skip
    f.call(softmax, "void", [a["state"], top, alpha, s, tiles * c.rows, a["c_high"], a["c_low"]])
    v = a["v"] + a["some_from"] // c.per_word * a["v_stride"]
    words = (keys + (c.per_word - 1)) // c.per_word
    with f.range(0, a["columns"], c.rows) as column:
        f.call(values, "void", [a["o"] + column * c.line, alpha, v + column * c.size, a["v_stride"], s, words])
    with f.when(bad):
        f.call(add, "void", [a["o"], a["extra"], a["columns"]])
    f.ret()
    return f.name


def _score_tiles(f: Function, c: Config, a: dict[str, Value], full: str, edges: list[str]) -> None:
    """Edge tiles up to the first that every row sees whole, full tiles, edge tiles to the end."""
    some_from, some_to = a["some_from"], a["some_to"]
    whole = some_from + (a["all_from"] - some_from + (c.rows - 1)) // c.rows * c.rows
    whole = f.minimum(whole, some_to)
    until = f.maximum(whole + f.maximum(a["all_to"] - whole, 0) // c.rows * c.rows, whole)

    def common(key: Value) -> list[Value]:
        here = a["k"] + key * a["k_stride"]
        return [a["scratch"], a["q"], here, a["k_stride"], a["words"], key, key - some_from]

    def edge_tile(key: Value) -> None:
        near = f.cast("trunc", key, "i32")
        above, below = a["above"] - near, a["below"] - near
        args = [*common(key), some_to - key - 1, above, below]

        def skip(first: int) -> None:
            """The variant that leaves out every vector none of whose queries sees even the tile's first key."""
            if first == 0:
                f.call(edges[0], "void", args)
            else:
                hidden = above < -(first * c.lanes - 1)
                f.either(hidden, lambda: f.call(edges[first], "void", args), lambda: skip(first - 1))

        skip(len(edges) - 1)

    with f.range(some_from, whole, c.rows) as key:
        edge_tile(key)
    with f.range(whole, until, c.rows) as key:
        f.call(full, "void", common(key))
    with f.range(until, some_to, c.rows) as key:
        edge_tile(key)


