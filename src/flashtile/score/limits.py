"""Limits: what a mask says of positions by comparing them alone, ``j < lengths[b]`` or ``j - i <= 3``.

A row that such rules alone decide sees one stretch of keys, whatever the values are; so code that is written before
they are known can find it (kernels/cpu/passes/reach.py).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from .affine import Affine, affine
from .expr import Expr


class Limit(NamedTuple):
    """left <= right, or left < right where it is `strict`, of sums in int32, which wrap. Left less right has i and j at
    most once."""

    left: Affine
    right: Affine
    strict: bool

    @property
    def i(self) -> int:
        """How often left less right has i: -1, 0 or 1."""
        return self.left.i - self.right.i

    @property
    def j(self) -> int:
        """The same of j."""
        return self.left.j - self.right.j


class Limits(NamedTuple):
    """A mask as limits and other rules, all of which must hold."""

    limits: tuple[Limit, ...]
    others: tuple[Expr, ...]


@functools.lru_cache(maxsize=64)
def limits_of(mask: Expr) -> Limits:
    """The limits among the rules that a mask joins by &."""
    limits, others, stack = [], [], [mask]
    while stack:
        x = stack.pop()
        if x.operation.name == "and" and x.type == "bool":
            stack += reversed(x.args)
        elif (found := _limit(x)) is not None:
            limits.append(found)
        else:
            others.append(x)
    return Limits(tuple(limits), tuple(others))


def _limit(x: Expr) -> Limit | None:
    if x.operation.name not in ("lt", "le"):
        return None
    left, right = (affine(a) for a in x.args)
    if left is None or right is None or {left.rest.type, right.rest.type} != {"int"}:
        return None
    found = Limit(left, right, x.operation.name == "lt")
    return found if {found.i, found.j} <= {-1, 0, 1} and (found.i or found.j) else None
