"""The block of parameters of a launch: the run-time arguments in order, as C lays out a struct of them.

Triton appends two pointers of its own, to scratch memory that a kernel may have asked for.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Callable, Mapping
from typing import Any

from flashtile.kernels.triton.specialisation import Specialisation

# A type's letter in `struct`; its size is also its alignment.
LETTERS = {"i32": "i", "i64": "q"}
POINTER = "Q"


def size_of(type_: str) -> int:
    """Bytes of an argument of a Triton type."""
    return struct.calcsize(_letter(type_))


def flat_names(specialisation: Specialisation) -> list[tuple[str, str]]:
    """(name, type) of what is really passed: the elements of a tuple `x` are x[0], x[1], ..."""
    rows: list[tuple[str, str]] = []
    for name, types in specialisation.signature:
        if isinstance(types, str):
            rows.append((name, types))
        else:
            rows += [(f"{name}[{n}]", type_) for n, type_ in enumerate(types)]
    return rows


@functools.cache
def layout_of(specialisation: Specialisation) -> struct.Struct:
    """The block: arguments, then the two scratch pointers."""
    letters = (_letter(type_) for type_ in specialisation.flat_types())
    return struct.Struct("@" + "".join(letters) + 2 * POINTER)


class Template:
    """The block of a kernel whose launches have some arguments alike: those are written once."""

    def __init__(self, specialisation: Specialisation, fixed: Mapping[str, Any]) -> None:
        self._start = bytearray(layout_of(specialisation).size)
        self._scratch = len(self._start) - 2 * struct.calcsize(POINTER)
        letters = "@"
        holes: list[
            tuple[int, str, list[tuple[str, int]]]
        ] = []  # (offset, letters, elements) of what follows without gap
        for name, types in specialisation.signature:
            for n, type_ in enumerate((types,) if isinstance(types, str) else types):
                place = name, -1 if isinstance(types, str) else n
                letters += _letter(type_)
                end = struct.calcsize(letters)
                offset = end - size_of(type_)
                if name in fixed:
                    struct.pack_into("@" + letters[-1], self._start, offset, *_reader([place])(fixed))
                elif holes and offset == holes[-1][0] + struct.calcsize("=" + holes[-1][1]):
                    holes[-1] = holes[-1][0], holes[-1][1] + letters[-1], [*holes[-1][2], place]
                else:
                    holes.append((offset, letters[-1], [place]))
        self._holes = tuple((at, struct.Struct("=" + form).pack_into, _reader(which)) for at, form, which in holes)

    def fill(self, values: Mapping[str, Any], scratch: int = 0) -> bytearray:
        """The block of a launch. scratch is the address of what the kernel asked for, 0 if it asked for nothing."""
        block = self._start.copy()
        for offset, pack_into, read in self._holes:
            pack_into(block, offset, *read(values))
        if scratch:
            struct.pack_into(POINTER, block, self._scratch, scratch)
        return block


def _reader(places: list[tuple[str, int]]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """Of arguments by name, those at these places: whole ones, or of a tuple its element n."""
    names = [name for name, n in places if n < 0]
    if len(names) < len(places):
        return lambda values: tuple(values[name] if n < 0 else values[name][n] for name, n in places)
    if len(names) == 1:
        return lambda values: (values[names[0]],)
    return operator.itemgetter(*names)


def block(specialisation: Specialisation, values: Mapping[str, Any], scratch: int) -> bytes:
    """The parameters of a launch of a kernel that has no other. scratch: see Template.fill."""
    return bytes(Template(specialisation, {}).fill(values, scratch))


def _letter(type_: str) -> str:
    return POINTER if type_[0] == "*" else LETTERS[type_]
