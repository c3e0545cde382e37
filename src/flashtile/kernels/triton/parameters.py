"""The block of parameters of a launch: the run-time arguments in order, as C lays out a struct of them.

Triton appends two pointers of its own, to scratch memory that a kernel may have asked for.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from typing import Any

from flashtile.kernels.triton.device import Pointer
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


def block(specialisation: Specialisation, values: Mapping[str, Any], scratch: int) -> bytes:
    """The parameters of a launch. scratch is the address of what the kernel asked for, 0 if it asked for nothing."""
    flat = (v.address if isinstance(v, Pointer) else v for v in specialisation.flat_values(values))
    return layout_of(specialisation).pack(*flat, scratch, 0)


def _letter(type_: str) -> str:
    return POINTER if type_[0] == "*" else LETTERS[type_]
