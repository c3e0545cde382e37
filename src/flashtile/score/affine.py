"""Indices as functions of the position: ``i + u``, ``j + u``, ``i - j + u``, where u is the same all over a head."""

from __future__ import annotations

from typing import NamedTuple

from .expr import Expr
from .operations import apply, const


class Affine(NamedTuple):
    """The integer expression i * row + j * key + rest, in int32; rest depends on b and h alone."""

    i: int
    j: int
    rest: Expr


def affine(x: Expr) -> Affine | None:
    """An index in this form; None if it has not got it."""
    if x.variables <= {"b", "h"}:
        return Affine(0, 0, x)
    if x.operation.name == "var":
        return Affine(int(x.data == "i"), int(x.data == "j"), const(0)) if x.data in ("i", "j") else None
    if x.operation.name not in ("add", "sub", "neg"):
        return None
    parts = [affine(a) for a in x.args]
    if x.operation.name == "neg":
        parts.insert(0, Affine(0, 0, const(0)))
    first, second = parts
    if first is None or second is None:
        return None
    sign, name = (1, "add") if x.operation.name == "add" else (-1, "sub")
    return Affine(first.i + sign * second.i, first.j + sign * second.j, apply(name, first.rest, second.rest))
