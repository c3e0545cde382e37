"""The code of a program: what a kernel is compiled for, without the values that the program captured."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .capture import Access, ArrayCapture, ScalarCapture, Slot
from .derivative import ArrayGradient, array_gradients, derivative
from .expr import Expr, node, postorder, rewrite
from .operations import variable
from .texts import parse


@dataclass(frozen=True)
class Code:
    """A program's expressions over slots; two are equal, and share a kernel, when their structure is.

    structure  text of both expressions, the same in every process
    score      float expression over (s, b, h, i, j), or None: scores stay as they are
    mask       bool expression over (b, h, i, j), or None: every key is visible
    slots      the captured values that the expressions read, in order
    """

    structure: str
    score: Expr | None = field(compare=False, repr=False)
    mask: Expr | None = field(compare=False, repr=False)
    slots: tuple[Slot, ...] = field(compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """By its text, from which another process reads the very expressions."""
        return code_of, (self.structure, self.slots)

    @cached_property
    def dense_loads(self) -> tuple[Expr, ...]:
        """Loads at the element itself, all indices in bounds: one is i, one is j, the others depend on batch and head
        alone.

        Kernels read them by tiles.
        """
        roots = [root for root in (self.score, self.mask) if root is not None]
        return tuple(x for x in postorder(roots) if is_dense(x) and not any(x.data.clamp))

    @cached_property
    def key_loads(self) -> tuple[Expr, ...]:
        """Loads along j: one index is j, in bounds, and the others do not depend on it.

        Kernels whose lanes run over keys read them as they lie.
        """
        roots = [root for root in (self.score, self.mask) if root is not None]
        return tuple(x for x in postorder(roots) if is_along_keys(x))

    @cached_property
    def score_derivative(self) -> Expr | None:
        """d score / d s as an expression; None where the score is s itself."""
        return None if self.score is None else derivative(self.score, variable("s"))

    @cached_property
    def array_gradients(self) -> tuple[ArrayGradient, ...]:
        """d score / d captured float arrays, one a distinct load."""
        return () if self.score is None else array_gradients(self.score)

    @cached_property
    def mask_slots(self) -> frozenset[int]:
        """Numbers of the captured values that the mask reads."""
        read = (x.data for x in postorder([self.mask] if self.mask is not None else []))
        slots = (data.source if isinstance(data, Access) else data for data in read)
        return frozenset(slot.number for slot in slots if isinstance(slot, Slot))


def code_of(structure: str, slots: tuple[Slot, ...]) -> Code:
    """The code of this structure, as `Code.structure` has it. Raises: SpecError for another text."""
    roots: dict[str, Expr] = {}
    for part in filter(None, structure.split(" | ")):
        kind, root, _ = parse(part)
        roots[kind] = root
    return Code(structure, roots.get("score"), roots.get("mask"), slots)


def is_dense(x: Expr) -> bool:
    """Whether this is a load of an array with an element for each (i, j), at that element."""
    if x.operation.name != "load":
        return False
    i, j = variable("i"), variable("j")
    rest = [index for index in x.args if index is not i and index is not j]
    return x.args.count(i) == 1 and x.args.count(j) == 1 and all(index.variables <= {"b", "h"} for index in rest)


def is_along_keys(x: Expr) -> bool:
    """Whether this is a load of the element at j, and an index that j does not change on every other axis."""
    if x.operation.name != "load":
        return False
    j = variable("j")
    rest = [index for index in x.args if index is not j]
    once = len(rest) == len(x.args) - 1
    return once and not x.data.clamp[x.args.index(j)] and all(index.variables <= {"b", "h", "i"} for index in rest)


def number_captures(roots: list[Expr]) -> tuple[list[Expr], tuple[Any, ...], tuple[Slot, ...]]:
    """Captured values replaced by slots, numbered in order of first use."""
    captures: dict[Any, Slot] = {}

    def slot(source: Any) -> Slot:
        if source not in captures:
            kind = (source.element, source.rank) if isinstance(source, ArrayCapture) else (source.type, -1)
            captures[source] = Slot(len(captures), *kind)
        return captures[source]

    def replace(x: Expr) -> Expr | None:
        if isinstance(x.data, ScalarCapture):
            return node(x.operation, (), x.type, slot(x.data))
        if isinstance(x.data, Access):
            return node(x.operation, x.args, x.type, Access(slot(x.data.source), x.data.clamp))
        return None

    return rewrite(roots, replace), tuple(captures), tuple(captures.values())
