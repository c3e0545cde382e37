"""What the machine code of a call of XLA reads: the context that it was made with, and the call's frame and buffers.

A call may have more axes than were expected, in front, which vmap puts there; it is one element of these at a time.
"""

from __future__ import annotations

from typing import Any

from flashtile import xla
from flashtile.llvm.blocks import WORD, Block, integers, pointers
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.routines import Routine

# Tables, as words. shapes: of each buffer its rank, bytes and lengths; results: the first of a result. places: (offset,
# buffer or -1, within it or the memory) of what is stored. steps: (function, offset of its parameters, items). areas:
# of each item of the kernel as many (buffer or -1, within it or memory, rows, bytes, stride).
CONTEXT = Block(
    pointers("other memory threads allocate release init_lock init_signal lock unlock wait wake end_lock end_signal"),
    pointers("shapes shape_of_result places steps areas"),
    # bytes: of memory; room: what follows it; most: threads of a call.
    integers("arguments buffers bytes room scratch most place_count step_count area_count kernel at_states at_memory"),
)


def context(f: Function, *names: str) -> list[Value]:
    base = Value(f, "ptr", "@context")
    return [CONTEXT.read(f, base, name) for name in names]


def field(f: Function, base: Value, struct_type: Any, path: str, type_: str) -> Value:
    return f.load(type_, base + _offset(struct_type, path))


def _offset(struct_type: Any, path: str) -> int:
    place = 0
    for step in path.split("."):
        place += getattr(struct_type, step).offset
        struct_type = dict(struct_type._fields_)[step]
    return place


def _buffer(f: Function, frame: Value, number: Value) -> Value:
    (arguments,) = context(f, "arguments")
    given = number < arguments
    lists = [field(f, frame, xla.CallFrame, name, "ptr") for name in ("args.args", "rets.rets")]
    index = f.select(given, number, number - arguments)
    return f.load("ptr", f.select(given, *lists) + index * WORD)


def _mapped(f: Function, frame: Value) -> tuple[Value, Value]:
    """How many axes stand in front of those that were expected, and their lengths, by the first result."""
    arguments, shape = context(f, "arguments", "shape_of_result")
    result = _buffer(f, frame, arguments)
    extra = field(f, result, xla.Buffer, "rank", "i64") - f.load("i64", shape)
    return extra, field(f, result, xla.Buffer, "dims", "ptr")


def element_count(module: Module) -> Routine:
    """The number of elements of the axes in front, 1 if there are none; -1 for buffers that do not fit."""
    f = Routine(module, "count", "i64", frame="ptr")
    (frame,) = f.parameters
    buffers, shapes = context(f, "buffers", "shapes")
    extra, lengths = _mapped(f, frame)
    zero = f.const("i64", 0)

    def fits(number: Value, carry: list[Value]) -> list[Value]:
        good, shape = carry
        buffer = _buffer(f, frame, number)
        rank, dims = (field(f, buffer, xla.Buffer, *x) for x in (("rank", "i64"), ("dims", "ptr")))
        expected = f.load("i64", shape)
        good = good & rank.eq(expected + extra)
        behind, own = dims + extra * WORD, shape + 2 * WORD

        def same(axis: Value, found: list[Value]) -> list[Value]:
            return [found[0] & f.load("i64", behind + axis * WORD).eq(f.load("i64", own + axis * WORD))]

        def spread(axis: Value, found: list[Value]) -> list[Value]:
            n = f.load("i64", dims + axis * WORD)
            return [found[0] & (n.eq(1) | n.eq(f.load("i64", lengths + axis * WORD)))]

        (good,) = f.fold(0, f.select(good, expected, zero), 1, [good], same)
        (good,) = f.fold(0, f.select(good, extra, zero), 1, [good], spread)
        return [good, own + expected * WORD]

    good, _ = f.fold(0, buffers, 1, [extra >= 0, shapes], fits)
    axes = f.select(good, extra, zero)
    (count,) = f.fold(0, axes, 1, [f.const("i64", 1)], lambda n, c: [c[0] * f.load("i64", lengths + n * WORD)])
    f.ret(f.select(good, count, f.const("i64", -1)))
    return f


def buffer_addresses(module: Module) -> Routine:
    """Where the buffers of an element of the axes in front begin: those of length 1 have one for all."""
    f = Routine(module, "gather", frame="ptr", element="i64", data="ptr")
    frame, element, data = f.parameters
    buffers, shapes = context(f, "buffers", "shapes")
    extra, lengths = _mapped(f, frame)

    def store(number: Value, carry: list[Value]) -> list[Value]:
        (shape,) = carry
        buffer = _buffer(f, frame, number)
        dims = field(f, buffer, xla.Buffer, "dims", "ptr")

        def step(n: Value, carry: list[Value]) -> list[Value]:
            left, stride, offset = carry
            axis = (extra - 1 - n) * WORD
            own, length = f.load("i64", dims + axis), f.load("i64", lengths + axis)
            moved = offset + left % length * stride
            return [left // length, stride * own, f.select(own > 1, moved, offset)]

        size = f.load("i64", shape + WORD)
        _, _, offset = f.fold(0, extra, 1, [element, size, f.const("i64", 0)], step)
        f.store(field(f, buffer, xla.Buffer, "data", "i64") + offset, data + number * WORD)
        return [shape + (f.load("i64", shape) + 2) * WORD]

    f.fold(0, buffers, 1, [shapes], store)
    f.ret()
    return f
