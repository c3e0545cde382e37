"""LLVM types as text: "i64", "float", "<16 x float>", and the numbers written in them."""

from __future__ import annotations

import struct

SIZES = {"i1": 1, "i8": 1, "i16": 2, "half": 2, "bfloat": 2, "i32": 4, "float": 4, "i64": 8, "double": 8, "ptr": 8}
_MANGLED = {"float": "f32", "double": "f64", "half": "f16", "bfloat": "bf16", "ptr": "p0"}
FLOATS = frozenset(("float", "double", "half", "bfloat"))
# Comparisons by name, of integers and of floats.
COMPARE = {
    "lt": ("slt", "olt"),
    "le": ("sle", "ole"),
    "gt": ("sgt", "ogt"),
    "ge": ("sge", "oge"),
    "eq": ("eq", "oeq"),
    "ne": ("ne", "une"),
    "ult": ("ult", "ult"),
    "uge": ("uge", "uge"),
    "uno": ("", "uno"),
}


def vector(lanes: int, element: str) -> str:
    """Type of a vector: ``vector(16, "float") == "<16 x float>"``."""
    return f"<{lanes} x {element}>"


def element(type_: str) -> str:
    """Element type of a vector, or the scalar type itself."""
    return type_[1:-1].split(" x ")[1] if type_[0] == "<" else type_


def lanes(type_: str) -> int:
    """Number of lanes of a vector type; 1 for a scalar."""
    return int(type_[1:].split(" x ")[0]) if type_[0] == "<" else 1


def sizeof(type_: str) -> int:
    """Bytes a value of this type takes in memory."""
    return lanes(type_) * SIZES[element(type_)]


def like(type_: str, element_: str) -> str:
    """The type of the same shape (scalar, or so many lanes) with another element."""
    return vector(lanes(type_), element_) if type_[0] == "<" else element_


def mangle(type_: str) -> str:
    """The type as it stands in the name of an overloaded intrinsic: ``v16f32``."""
    name = _MANGLED.get(element(type_), element(type_))
    return f"v{lanes(type_)}{name}" if type_[0] == "<" else name


def literal(type_: str, number: float) -> str:
    """A number as LLVM writes it; floats as the hexadecimal image of a double, so no digit is lost."""
    scalar = element(type_)
    if scalar in FLOATS:
        if scalar == "float":
            number = struct.unpack("f", struct.pack("f", number))[0]
        elif scalar != "double":
            raise ValueError(f"literal of {scalar}: emit it in float and narrow it")
        text = f"0x{struct.unpack('<Q', struct.pack('<d', number))[0]:016X}"
    else:
        text = str(int(number))
    return f"splat ({scalar} {text})" if type_[0] == "<" else text
