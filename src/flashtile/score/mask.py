"""Mask and score objects: rules that can be named, composed, and anchored at a call's offset."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import SpecError, described
from .broadcast import broadcast_reader, check_broadcast
from .capture import capture, is_array
from .expr import Expr
from .operations import apply
from .trace import trace_mask, trace_score

Shape = tuple[int, int, int, int]


def _any_shape(shape: Shape) -> None:
    """The check of a rule without arrays of its own."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a row may see: a rule over (b, h, i, j), composed with & | ~.

    build(offset) gives the predicate ``f(b, h, i, j)``; `offset` is the call's alignment (an int or an integer
    array (B,)), which anchors positional rules.  Rules that ignore it say so by ``positional=False``.
    fits(shape) raises SpecError where the arrays of a rule are not of a call's (B, H, S_q, S_kv): a longer one would
    be read in part, which is hardly meant.
    """

    build: Callable[[Any], Callable[..., Any]]
    positional: bool = False
    name: str = "mask"
    fits: Callable[[Shape], object] = _any_shape
    __array_ufunc__ = None  # array & mask is this class's &, not an & with every element

    def __repr__(self) -> str:
        return f"<mask {self.name}>"

    def expression(self, offset: Any = 0) -> Expr:
        return trace_mask(self.build(offset), self.name)

    def __and__(self, other: Any) -> Mask:
        return Composed.of("and", self, other)

    def __or__(self, other: Any) -> Mask:
        return Composed.of("or", self, other)

    def __invert__(self) -> Mask:
        return Composed.of("invert", self)

    __rand__, __ror__ = __and__, __or__

    def __bool__(self) -> bool:
        raise SpecError("mask: and, or, not do not compose masks, use & | ~")


@dataclass(frozen=True, eq=False, repr=False)
class Composed(Mask):
    """Masks put together by `operation`: "and", "or" of two, "invert" of one."""

    operation: str = "and"
    parts: tuple[Mask, ...] = ()

    @classmethod
    def of(cls, operation: str, *parts: Any) -> Mask:
        masks = tuple(as_mask(p) for p in parts)
        sign = {"and": " & ", "or": " | ", "invert": "~"}[operation]
        label = sign + masks[0].name if len(masks) == 1 else "(" + sign.join(m.name for m in masks) + ")"

        def fits(shape: Shape) -> None:
            for m in masks:
                m.fits(shape)

        return cls(_unused, any(m.positional for m in masks), label, fits, operation, masks)

    def expression(self, offset: Any = 0) -> Expr:
        return apply(self.operation, *(p.expression(offset) for p in self.parts))


def _unused(offset: Any) -> Callable[..., Any]:
    raise AssertionError("a composed mask is built from its parts")


@dataclass(frozen=True, eq=False)
class Score:
    """What happens to a score: a function (s, b, h, i, j) -> s, anchored and held to a call's shape like a Mask."""

    build: Callable[[Any], Callable[..., Any]]
    positional: bool = False
    name: str = "score_mod"
    fits: Callable[[Shape], object] = _any_shape

    def __repr__(self) -> str:
        return f"<score function {self.name}>"

    def expression(self, offset: Any = 0) -> Expr:
        return trace_score(self.build(offset), self.name)


def _check_called(value: Any, argument: str) -> None:
    """Raise SpecError for one of this package's functions that make rules, given instead of what it makes."""
    if isinstance(value, types.FunctionType) and value.__module__ == f"{__package__}.{value.__name__}":
        name = f"score.{value.__name__}"
        needed = (p.name for p in inspect.signature(value).parameters.values() if p.default is p.empty)
        raise SpecError(f"{argument}: got {name} itself, expected what it returns: {name}({', '.join(needed)})")


def dense(array: Any) -> Mask:
    """Key j is visible to row i iff array[b, h, i, j], under NumPy broadcasting to (B, H, S_q, S_kv).

    Raises: SpecError for a dtype other than bool and for more than four axes.
    """
    found = capture(array, "mask")
    if found.type != "bool":
        raise SpecError(f"mask: got {found.dtype}, expected bool (True: attend); numbers to add to scores are a bias")
    read = broadcast_reader(found.array.shape, "mask")
    return Mask(
        lambda offset: lambda b, h, i, j: read(array, (b, h, i, j)),
        name="mask",
        fits=lambda shape: check_broadcast(array, shape, "mask"),
    )


def as_mask(value: Any) -> Mask:
    """A mask object of whatever mask= takes: a Mask, a function (b, h, i, j), a boolean array."""
    if isinstance(value, Mask):
        return value
    if is_array(value):
        return dense(value)
    _check_called(value, "mask")
    if callable(value):
        return Mask(lambda offset: value, name="mask")
    got = f"the score function {value.name}" if isinstance(value, Score) else described(value)
    raise SpecError(f"mask: got {got}, expected a boolean array, a mask or a function of (b, h, i, j)")


def as_score(value: Any) -> Score:
    """A score object of whatever score_mod= takes: a Score, or a function (s, b, h, i, j)."""
    if isinstance(value, Score):
        return value
    _check_called(value, "score_mod")
    if callable(value):
        return Score(lambda offset: value)
    got = f"the mask {value.name}" if isinstance(value, Mask) else described(value)
    raise SpecError(f"score_mod: got {got}, expected a function of (s, b, h, i, j)")
