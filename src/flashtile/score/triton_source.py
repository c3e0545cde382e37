"""The Triton form: a program's expressions as the source of a function of (s, b, h, i, j) and the captured values.

The source is plain text and needs no Triton to be made. Scalars and tiles broadcast in Triton by themselves, so one
line a node is all: what depends on the row alone stays a column, what depends on the head alone stays a scalar. The
names that the lines use are `tl`, and functions of kernels/triton: functions.py, and of language.py number and spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .capture import Access, Slot
from .expr import Expr, postorder

# Arguments of the function: the variables, a tuple of captured values (`Arguments`), and the type of its floats.
SIGNATURE = "s, b, h, i, j, captures, ACC: tl.constexpr"


def function_source(name: str, root: Expr, slots: Sequence[Slot]) -> str:
    """The source of a function that gives the expression's value: bool, int32 or ACC, as its type says."""
    writer = Writer(slots)
    result = writer.write(root)
    return "\n".join([f"def {name}({SIGNATURE}):", *("    " + line for line in writer.lines), f"    return {result}\n"])


def place_source(name: str, slot: Slot, indices: Sequence[Expr], slots: Sequence[Slot]) -> str:
    """The source of a function that gives the number of an array's element at some indices, int64, rows first;
    the nearest, where an index is out of bounds. `box`: None, or what `counted` takes."""
    writer = Writer(slots)
    place = "tl.full((), 0, tl.int64)"
    for axis, index in enumerate(indices):
        length = writer.arguments.length(slot, axis)
        place = writer.line(f"counted({place}, nearest({writer.write(index)}, {length}), {length}, box, {axis})")
    signature = SIGNATURE.replace("captures", "captures, box")
    return "\n".join([f"def {name}({signature}):", *("    " + line for line in writer.lines), f"    return {place}\n"])


class Arguments:
    """Where a program's captured values stand in the tuple that kernels pass on.

    A number is one element: an int32, or the bits of a double. An array is its address, then for each axis its length
    and its stride in elements.
    """

    def __init__(self, slots: Sequence[Slot]):
        self._first: list[int] = []
        self.count = 0
        for slot in slots:
            self._first.append(self.count)
            self.count += 1 if slot.rank < 0 else 1 + 2 * slot.rank

    def first(self, slot: Slot) -> str:
        """A number, or the address of an array."""
        return f"captures[{self._first[slot.number]}]"

    def length(self, slot: Slot, axis: int) -> str:
        return f"captures[{self._first[slot.number] + 1 + 2 * axis}]"

    def stride(self, slot: Slot, axis: int) -> str:
        return f"captures[{self._first[slot.number] + 2 + 2 * axis}]"


class Writer:
    """Lines of a function, one a node; `write` gives the name that holds a node's value."""

    def __init__(self, slots: Sequence[Slot]):
        self.arguments = Arguments(slots)
        self.lines: list[str] = []
        self._names: dict[Expr, str] = {}

    def write(self, root: Expr) -> str:
        for x in postorder([root]):
            text = x.operation.write(x, self, [self._names[a] for a in x.args])
            self._names[x] = text if not x.args and x.operation.name == "var" else self.line(text)
        return self._names[root]

    def line(self, text: str) -> str:
        """A new name for the value of some text."""
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name

    # -- what leaves call ----------------------------------------------------------------------------

    def const(self, x: Expr) -> str:
        if x.type != "float":
            return f"tl.full((), {x.data!r}, {'tl.int1' if x.type == 'bool' else 'tl.int32'})"
        literal = repr(x.data) if math.isfinite(x.data) else f'float("{x.data}")'
        return f"tl.full((), {literal}, ACC)"

    def scalar_capture(self, x: Expr) -> str:
        value = self.arguments.first(x.data)
        return f"spread({value}.to(tl.int32))" if x.type == "int" else f"spread(number({value}, ACC))"

    def load(self, x: Expr, index: list[str]) -> str:
        """The element at the indices, clamped where the access says so. Only there can the array be empty."""
        access: Access = x.data
        slot = access.source
        assert isinstance(slot, Slot)
        place, room = self.arguments.first(slot), ""
        for axis, i in enumerate(index):
            length = self.arguments.length(slot, axis)
            if access.clamp[axis]:
                i = self.line(f"nearest({i}, {length})")
            # Elements from here to the end. Of every axis, so that the guard has the shape of what it guards.
            here = f"({length} - {i})"
            room = f"tl.minimum({room}, {here})" if room else here
            place += f" + {i}.to(tl.int64) * {self.arguments.stride(slot, axis)}"
        guard = f", mask={room} > 0, other=0" if any(access.clamp) else ""
        element = f"tl.load({place}{guard})"
        raw = self.line(element if index else f"spread({element})")
        return f"({raw} != 0)" if slot.type == "bool" else f"{raw}.to({'ACC' if slot.type == 'float' else 'tl.int32'})"

    def inside(self, x: Expr, index: list[str]) -> str:
        access: Access = x.data
        assert isinstance(access.source, Slot)
        tests = []
        for axis, i in enumerate(index):
            tests += [f"({i} >= 0)", f"({i} < {self.arguments.length(access.source, axis)})"]
        return " & ".join(tests) or "tl.full((), True, tl.int1)"

    def cast(self, x: str, source: str, target: str) -> str:
        if target == "bool":
            return f"({x} != 0)"
        if target == "float":
            return f"{x}.to(ACC)"
        return f"to_int({x})" if source == "float" else f"{x}.to(tl.int32)"
