"""Rules written out: a mask or score function as a line of text, and the values that it captured beside it.

The text is an expression of the score language over slots, the same in every process, and reads back into the very
expression; so a rule can pass through what takes no Python functions, such as the graph of a compiler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import SpecError, wrong
from .capture import Access, ArrayCapture, ScalarCapture, Slot, capture, in_graph
from .code import number_captures
from .expr import Expr, node, rewrite, text
from .mask import Mask, Score, as_mask, as_score
from .operations import apply
from .texts import parse

Captured = ArrayCapture | ScalarCapture


@dataclass(frozen=True, eq=False, repr=False)
class FrozenMask(Mask):
    """A mask whose function has been traced: `text` over slots, the `arrays` and `numbers` that fill them in order."""

    text: str = ""
    arrays: tuple[Any, ...] = ()
    numbers: tuple[float, ...] = ()

    def expression(self, offset: Any = 0) -> Expr:
        return _bound(self)


@dataclass(frozen=True, eq=False, repr=False)
class FrozenScore(Score):
    """A score function that has been traced; as FrozenMask."""

    text: str = ""
    arrays: tuple[Any, ...] = ()
    numbers: tuple[float, ...] = ()

    def expression(self, offset: Any = 0) -> Expr:
        return _bound(self)


def freeze(rule: Any, align: Any = 0) -> FrozenMask | FrozenScore:
    """Trace a mask or score function once: what `torch.compile` takes for mask= and score_mod=, and every call.

    Shapes:  rule a function (b, h, i, j) or (s, b, h, i, j), or a mask or score of `flashtile.score`.
    Options: align  the offset, an integer or integers (B,), of a rule that a call's alignment anchors.
    Returns: a mask or score with its `text`, and what the text's slots are filled with, in their order: `arrays`, as
             they were captured (their values are read at every call), and `numbers`, as they are now.
             `thaw(text, arrays, numbers)` is the rule again, in any process.
    Raises:  SpecError for what is neither, and as the rule itself.

    >>> freeze(lambda b, h, i, j: j <= i).text
    'mask: %0:bool = le j i; return %0'
    """
    if isinstance(rule, (FrozenMask, FrozenScore)):
        return rule
    if in_graph():
        raise wrong("freeze", "a call in a compiled function", "one outside of it; within, the rule itself is followed")
    found = as_score(rule) if isinstance(rule, Score) or _takes(rule) == 5 else as_mask(rule)
    kind = "score" if isinstance(found, Score) else "mask"
    (root,), captures, _ = number_captures([found.expression(align)])
    arrays = tuple(x.source for x in captures if isinstance(x, ArrayCapture))
    numbers = tuple(float(x.value) for x in captures if isinstance(x, ScalarCapture))
    return _frozen(kind, found.name, found.fits, f"{kind}: {text([root])}", arrays, numbers)


def thaw(text: str, arrays: tuple[Any, ...] = (), numbers: tuple[float, ...] = ()) -> FrozenMask | FrozenScore:
    """The rule of a text that `freeze` wrote, with these values. Raises: SpecError for another text, or number of
    values."""
    kind, expression, slots = parse(text)
    scalars = sum(s.rank < 0 for s in slots)
    if (len(arrays), len(numbers)) != (len(slots) - scalars, scalars):
        got = f"{len(arrays)} arrays and {len(numbers)} numbers"
        raise SpecError(f"arrays, numbers: got {got}, expected {len(slots) - scalars} and {scalars} as in the text")
    return _frozen(kind, kind, lambda shape: None, text, tuple(arrays), tuple(numbers))


def join(operation: str, *texts: str) -> str:
    """The text of masks put together as `Composed` is: the slots of each follow those of the one before it."""
    roots: list[Expr] = []
    before = 0

    def move(x: Expr) -> Expr | None:
        if isinstance(x.data, Slot):
            return node(x.operation, (), x.type, x.data.after(before))
        if isinstance(x.data, Access):
            source = x.data.source.after(before)  # type: ignore[union-attr]  # of code: a slot
            return node(x.operation, x.args, x.type, Access(source, x.data.clamp))
        return None

    for part in texts:
        _, root, slots = parse(part)
        roots += rewrite([root], move)
        before += len(slots)
    return f"mask: {text([apply(operation, *roots)])}"


def arrays_of(rule: FrozenMask | FrozenScore) -> list[tuple[str, Any]]:
    """The arrays of a frozen rule, each with what its capture is named by."""
    slots = (s for s in parse(rule.text)[2] if s.rank >= 0)
    return [(f"captured array {slot.number}", array) for slot, array in zip(slots, rule.arrays, strict=True)]


def _frozen(kind: str, name: str, fits: Any, *given: Any) -> FrozenMask | FrozenScore:
    if kind == "score":
        return FrozenScore(_unused, False, name, fits, *given)
    return FrozenMask(_unused, False, name, fits, *given)


def _unused(offset: Any) -> Callable[..., Any]:
    raise AssertionError("a frozen rule has its expression")


def _takes(rule: Any) -> int:
    """How many arguments a function has; 0 where that cannot be told."""
    try:
        return len(inspect.signature(rule).parameters) if callable(rule) else 0
    except (TypeError, ValueError):
        return 0


def _bound(rule: Any) -> Expr:
    """The expression over the captured values themselves."""
    _, root, slots = parse(rule.text)
    arrays, numbers = iter(rule.arrays), iter(rule.numbers)
    kind = "score_mod" if isinstance(rule, Score) else "mask"
    values = {slot: _value(slot, arrays, numbers, kind) for slot in slots}

    def replace(x: Expr) -> Expr | None:
        if isinstance(x.data, Slot):
            return node(x.operation, (), x.type, values[x.data])
        if isinstance(x.data, Access):
            source = values[x.data.source]  # type: ignore[index]  # of code: a slot
            assert isinstance(source, ArrayCapture)
            return node(x.operation, x.args, x.type, Access(source, (True,) * len(x.args)))
        return None

    return rewrite([root], replace)[0]


def _value(slot: Slot, arrays: Iterator[Any], numbers: Iterator[float], kind: str) -> Captured:
    if slot.rank >= 0:
        found = capture(next(arrays), f"{kind}: captured array {slot.number}")
        if (found.element, found.rank) != (slot.element, slot.rank):
            got = f"{found.dtype} of {found.rank} axes"
            raise SpecError(f"{found.name}: got {got}, expected what the text says: {slot}")
        return found
    value = next(numbers)
    return ScalarCapture(int(value) if slot.type == "int" else float(value), slot.type)
