"""Tiles of dense arrays: what a program loads at (i, j) is laid out like the scores, a query a lane.

Lanes run over queries, so a bias or mask stored row-major would be read with a stride.  As the queries
themselves, its tile is transposed through registers, once a panel and key block.
"""

from __future__ import annotations

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.rescore import frame_field
from flashtile.llvm.ir import Function, Module, Value
from flashtile.score.captures import STORAGE, Block, widened
from flashtile.score.emit import Emission
from flashtile.score.expr import Expr
from flashtile.score.operations import variable


def emit_dense(module: Module, c: Config, number: int) -> str:
    """A function that lays out one dense load; its name.

    Arguments: frame, first key counted from the block, keys, rows of the panel, out.  Elements become
    accumulators; integers and bools keep their value as integers of that size.
    """
    assert c.code is not None
    load = c.code.dense_loads[number]
    f = Function(module, f"dense_{number}", "void", ["ptr", "i64", "i64", "i64", "ptr"], internal=True,
                 names=["frame", "first", "keys", "rows", "out"])  # fmt: skip
    frame, first, keys, rows, out = f.args
    batch, head = (f.cast("trunc", frame_field(f, frame, name), "i32") for name in "bh")
    captures = frame_field(f, frame, "captures", "ptr")
    place = Emission(f, c.isa, c.acc, c.lanes, Block(c.code.slots), captures, {"b": batch, "h": head})
    source, step_i, step_j = _tile_of(f, c, load, place, frame, first)
    memory = STORAGE[load.data.source.element][0]
    n, size = c.lanes, f.const("i64", _bytes(memory))
    whole_rows = rows // n * n
    whole_keys = f.select(step_j.eq(size), keys // n * n, f.const("i64", 0))
    with f.range(0, whole_rows, n) as lane, f.range(0, whole_keys, n) as key:
        corner = source + lane * step_i + key * step_j
        lines = [_accumulator(f, c, place, load, f.load(f"<{n} x {memory}>", corner + step_i * r, align=1))
                 for r in range(n)]  # fmt: skip
        for t, line in enumerate(f.transpose(lines)):
            f.store(line, out + ((key + t) * c.line + lane * c.size), align=c.register)

    def one_by_one(lane: Value, from_key: Value | int) -> None:
        row = source + f.minimum(lane, rows - 1) * step_i
        with f.range(from_key, keys) as key:
            value = _accumulator(f, c, place, load, f.load(memory, row + key * step_j, align=1))
            f.store(value, out + (key * c.line + lane * c.size))

    with f.range(0, whole_rows) as lane:
        one_by_one(lane, whole_keys)
    with f.range(whole_rows, (rows + (n - 1)) // n * n) as lane:
        one_by_one(lane, 0)
    f.ret()
    return f.name


def _bytes(memory: str) -> int:
    return {"i8": 1, "i16": 2, "i32": 4, "float": 4, "i64": 8, "double": 8}[memory]


def _tile_of(
    f: Function, c: Config, load: Expr, place: Emission, frame: Value, first: Value
) -> tuple[Value, Value, Value]:
    """Address of the tile's first element, and bytes from a query to the next and from a key to the next."""
    slot = load.data.source
    pointer = place.block.field(place, slot, "ptr", 0)
    steps = {}
    for axis, index in enumerate(load.args):
        stride = place.block.field(place, slot, "i64", 2 + 2 * axis)
        for name, start in (("i", frame_field(f, frame, "row")), ("j", frame_field(f, frame, "block") + first)):
            if index is variable(name):
                steps[name] = stride
                pointer = pointer + start * stride
                break
        else:
            pointer = pointer + f.cast("sext", place.value(index), "i64") * stride
    return pointer, steps["i"], steps["j"]


def _accumulator(f: Function, c: Config, place: Emission, load: Expr, raw: Value) -> Value:
    """A stored element (or a register of them) as it lies in the tile."""
    value = widened(place, raw, load.data.source.element)
    integer = f"i{8 * c.size}"
    wide = f"<{c.lanes} x {integer}>" if value.type[0] == "<" else integer
    if load.type == "float":
        return value
    return f.cast("zext" if load.type == "bool" else "sext", value, wide)
