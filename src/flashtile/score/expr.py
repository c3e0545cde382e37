"""Expressions of the score language: frozen, typed, shared.

An expression is a directed graph of `Expr` nodes over five variables, s (the score), b, h, i, j (batch,
query head, query row, key).  Equal nodes are one object (hash-consing), so equality is identity, a common
subexpression is stored once, and walking visits it once.

Types: ``bool``, ``int`` (int32, wraps) and ``float`` (the accumulator's type: fp32, or fp64 for fp64 inputs).
Promotion: arithmetic takes bool to int, and int to float where any operand is float; ``/`` and the functions
of calculus always give float; comparisons and logic give bool; ``& | ^ ~`` are logic on two bools and act on
bits otherwise.
"""

from __future__ import annotations

import struct
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, ClassVar, Protocol

from ..errors import SpecError

INT_MIN, INT_MAX = -(1 << 31), (1 << 31) - 1
FARTHEST = 1 << 29  # positions and offsets up to here have sums and differences in int32
TYPES = ("bool", "int", "float")  # in order of promotion
VARIABLES = {"s": "float", "b": "int", "h": "int", "i": "int", "j": "int"}

_nodes: weakref.WeakValueDictionary[Hashable, Expr] = weakref.WeakValueDictionary()
_lock = threading.Lock()


class Kind(Protocol):
    """What a node does, as whoever walks the graph asks it to; operations/base.py says what the forms are."""

    name: ClassVar[str]
    triton: ClassVar[str | None]

    def evaluate(self, x: Expr, at: Any, args: list[Any]) -> Any: ...

    def bound(self, x: Expr, at: Any, args: list[Any]) -> Any: ...

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None: ...

    def emit(self, x: Expr, at: Any, args: list[Any]) -> Any: ...

    def write(self, x: Expr, at: Any, args: list[str]) -> str: ...


class Expr:
    """One node: an operation, its arguments, what else sets its meaning (`data`), and its type.

    Made by `node` and the constructors in `build`, never directly: two equal nodes are the same object.
    """

    __slots__ = ("__weakref__", "args", "data", "operation", "type", "variables")

    operation: Kind
    args: tuple[Expr, ...]
    data: Any
    type: str
    variables: frozenset[str]  # the variables that the value depends on

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("an Expr is frozen")

    def __repr__(self) -> str:
        return f"<{self.type} expression {text([self])}>"


def node(operation: Kind, args: tuple[Expr, ...], type_: str, data: Hashable = None) -> Expr:
    """The one node with these parts."""
    key = (operation.name, args, type_, _data_key(data))
    with _lock:
        found = _nodes.get(key)
        if found is None:
            found = object.__new__(Expr)
            reach = frozenset((data,)) if operation.name == "var" else frozenset().union(*(a.variables for a in args))
            for name, value in (
                ("operation", operation),
                ("args", args),
                ("type", type_),
                ("data", data),
                ("variables", reach),
            ):
                object.__setattr__(found, name, value)
            _nodes[key] = found
        return found


def _data_key(data: Hashable) -> Hashable:
    """Numbers by their bits: 0.0 and -0.0, 1 and True, are different constants; NaN equals itself."""
    if isinstance(data, float):
        return ("float", struct.pack("<d", data))
    return (type(data).__name__, data)


def postorder(roots: Iterable[Expr]) -> Iterator[Expr]:
    """Every node once, arguments before the nodes that use them, in an order set by the graph alone."""
    seen: set[Expr] = set()
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        expr, ready = stack.pop()
        if ready:
            yield expr
        elif expr not in seen:
            seen.add(expr)
            stack.append((expr, True))
            stack.extend((arg, False) for arg in reversed(expr.args) if arg not in seen)


def rewrite(roots: Iterable[Expr], replace: Callable[[Expr], Expr | None]) -> list[Expr]:
    """The roots with each node n (its arguments already rewritten) replaced by replace(n) where that is not None."""
    roots = list(roots)
    new: dict[Expr, Expr] = {}
    for expr in postorder(roots):
        args = tuple(new[a] for a in expr.args)
        same = expr if args == expr.args else node(expr.operation, args, expr.type, expr.data)
        new[expr] = replace(same) or same
    return [new[root] for root in roots]


def substitute(root: Expr, old: Expr, new: Expr) -> Expr:
    """The root with one of its nodes replaced by another expression."""
    return rewrite([root], lambda x: new if x is old else None)[0]


def text(roots: Iterable[Expr]) -> str:
    """The expressions as assignments, one a node: the same for equal graphs in every process."""
    roots = list(roots)
    names: dict[Expr, str] = {}
    lines: list[str] = []
    for expr in postorder(roots):
        operands = " ".join(names[a] for a in expr.args)
        if not expr.args and expr.operation.name in ("var", "const"):
            names[expr] = str(expr.data) if expr.operation.name == "var" else f"{expr.type}({expr.data!r})"
            continue
        names[expr] = f"%{len(lines)}"
        data = "" if expr.data is None else f"[{expr.data}]"
        lines.append(f"{names[expr]}:{expr.type} = {expr.operation.name}{data} {operands}".rstrip())
    return "; ".join([*lines, "return " + " ".join(names[root] for root in roots)])


def promote(*types: str) -> str:
    """The arithmetic type of operands: float if any is, else int (bool counts as int)."""
    return "float" if "float" in types else "int"


def check_int32(number: int, what: str) -> int:
    if not INT_MIN <= number <= INT_MAX:
        raise SpecError(f"{what}: got {number}, expected an integer that fits in int32")
    return number
