"""Tiles of dense arrays: what a program loads at (i, j) is laid out like the scores, lines by lanes.

A bias or mask stored row-major would be read with a stride. As what stands in lanes, its tile is transposed through
registers, once a panel and block; one stored the other way is read as it lies.
"""

from __future__ import annotations

from typing import Any

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.frame import Frame
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.lines import Lines
from flashtile.llvm.routines import Routine
from flashtile.llvm.types import SIZES, vector
from flashtile.score.captures import STORAGE, widened
from flashtile.score.emit import Emission
from flashtile.score.expr import Expr
from flashtile.score.operations import variable


def emit_dense(module: Module, c: Config, number: int) -> Routine:
    """One dense load: ``count`` lines from a row of the block on, of so many lanes. Elements become accumulators;
    integers and bools keep their value as integers of that size."""
    assert c.code is not None
    load = c.code.dense_loads[number]
    kinds: dict[str, Any] = dict.fromkeys(("first", "count", "lanes"), "i64")
    f = Routine(module, f"dense_{number}", frame=Frame.kind(), **kinds, out=Lines.of(c.line))
    frame, first, count, lanes, out = f.parameters
    place = frame.program(f, c)
    source, step_i, step_j = _tile_of(f, load, place, frame, first)
    memory = STORAGE[load.data.source.element][0]
    n, size = c.lanes, f.const("i64", SIZES[memory])
    whole_lanes, none = lanes // n * n, f.const("i64", 0)
    along_lanes = f.select(step_i.eq(size), count, none)
    squares = f.select(step_i.eq(size), none, f.select(step_j.eq(size), count // n * n, none))

    def register(at: Value) -> Value:
        return _accumulator(f, c, place, load, f.load(vector(n, memory), at, align=1))

    with f.range(0, whole_lanes, n) as lane:
        with f.range(0, along_lanes) as line:
            out.store(register(source + lane * step_i + line * step_j), line, at=lane * c.size)
        with f.range(0, squares, n) as line:
            corner = source + lane * step_i + line * step_j
            for t, value in enumerate(f.transpose([register(corner + step_i * r) for r in range(n)])):
                out.store(value, line + t, at=lane * c.size)

    def one_by_one(lane: Value, from_line: Value | int) -> None:
        row = source + f.minimum(lane, lanes - 1) * step_i
        with f.range(from_line, count) as line:
            value = _accumulator(f, c, place, load, f.load(memory, row + line * step_j, align=1))
            f.store(value, out.place(line, at=lane * c.size))

    with f.range(0, whole_lanes) as lane:
        one_by_one(lane, along_lanes + squares)
    with f.range(whole_lanes, (lanes + (n - 1)) // n * n) as lane:
        one_by_one(lane, 0)
    f.ret()
    return f


def _tile_of(f: Function, load: Expr, place: Emission, frame: Frame, first: Value) -> tuple[Value, Value, Value]:
    """Address of the tile's first element, and bytes from a lane to the next and from a line to the next."""
    slot = load.data.source
    pointer = place.block.field(place, slot, "ptr", 0)
    steps = {}
    for axis, index in enumerate(load.args):
        stride = place.block.field(place, slot, "i64", 2 + 2 * axis)
        for name, start in (("i", frame.read("row")), ("j", frame.read("block") + first)):
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
