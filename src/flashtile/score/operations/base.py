"""What a node kind is: its value, interval, derivative, LLVM form and Triton form, side by side in one class.

To add a node kind, subclass `Operation` in one of this folder's files; the class registers itself and every
part of flashtile (oracle, coverage, gradients, kernels) can run it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..expr import Expr, node, promote

if TYPE_CHECKING:
    from ...llvm.ir import Value
    from ..emit import Emission
    from ..interval import Interval
    from ..triton_source import Writer

OPERATIONS: dict[str, Operation] = {}


class Operation:
    """A node kind. Each method is one of its forms; `x`, `y`, ... are the forms of the arguments.

    value      NumPy: arrays of bool_, int32 or the float type asked for, already of the types that `types` gives
    interval   bounds over many tiles at once, `Interval`
    tangent    forward derivative: d holds the argument's tangents, None where the tangent is zero, and so is the result
    llvm       emitted code: `ir.Value`s of one lane count (all scalars, or all vectors)
    triton     the expression as Triton source with {0}, {1}, ... for the arguments, which are names; the functions it
               may call are those of kernels/triton/functions.py

    Each takes as many arguments as the kind has operands (`Any` is what lets a type checker accept that).
    Kinds that depend on more than their arguments (leaves, casts) override `evaluate`, `bound`, `emit` and `write`.
    """

    name: ClassVar[str]
    triton: ClassVar[str | None] = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" in cls.__dict__:
            OPERATIONS[cls.name] = cls()

    def types(self, *args: str) -> tuple[tuple[str, ...], str]:
        """(types that the operands are promoted to, type of the result), from the operands' types."""
        common = promote(*args)
        return (common,) * len(args), common

    def simplify(self, *args: Any, **none: Any) -> Expr | None:
        """An equal, smaller expression, or None."""
        return None

    def value(self, *args: Any, **none: Any) -> Any:
        raise NotImplementedError(self.name)

    def interval(self, *args: Any, **none: Any) -> Interval:
        raise NotImplementedError(self.name)

    def tangent(self, x: Expr, d: tuple[Expr | None, ...]) -> Expr | None:
        """The tangent of node x; ints and bools have none."""
        return None

    def llvm(self, *args: Any, **none: Any) -> Value:
        raise NotImplementedError(self.name)

    def evaluate(self, x: Expr, at: Any, args: list[Any]) -> Any:
        return self.value(*args)

    def bound(self, x: Expr, at: Any, args: list[Interval]) -> Interval:
        return self.interval(*args)

    def emit(self, x: Expr, at: Emission, args: list[Value]) -> Value:
        return self.llvm(at, *at.together(args))

    def write(self, x: Expr, at: Writer, args: list[str]) -> str:
        if self.triton is None:
            raise NotImplementedError(self.name)
        return self.triton.format(*args)


def const(number: bool | int | float, type_: str | None = None) -> Expr:
    """A literal. Its type is that of the Python number unless given."""
    type_ = type_ or {bool: "bool", int: "int", float: "float"}[type(number)]
    return node(OPERATIONS["const"], (), type_, {"bool": bool, "int": int, "float": float}[type_](number))


def is_const(x: Expr, number: float | None = None) -> bool:
    """Whether x is a literal (of this value)."""
    return x.operation.name == "const" and (number is None or x.data == number)


def cast(x: Expr, type_: str) -> Expr:
    """x in another type: bool and int widen; float to int truncates, saturates, and takes NaN to 0; to bool is != 0."""
    if x.type == type_:
        return x
    return _fold(node(OPERATIONS["cast"], (x,), type_))


def apply(name: str, *args: Expr) -> Expr:
    """The operation on these operands: operands promoted, literals folded, trivial cases simplified."""
    operation = OPERATIONS[name]
    wanted, result = operation.types(*(a.type for a in args))
    args = tuple(cast(a, type_) for a, type_ in zip(args, wanted, strict=True))
    simple = operation.simplify(*args)
    return simple if simple is not None else _fold(node(operation, args, result))


def _fold(x: Expr) -> Expr:
    """A node whose arguments are all literals is a literal."""
    if not x.args or not all(is_const(a) for a in x.args):
        return x
    with np.errstate(all="ignore"):
        dtypes = {"bool": np.dtype(bool), "int": np.dtype(np.int32), "float": np.dtype(np.float64)}
        values = [np.asarray(a.data, dtypes[a.type]) for a in x.args]
        return const(np.asarray(x.operation.evaluate(x, _FOLDING, values)).item(), x.type)


class _Folding:
    float_type = np.dtype(np.float64)


_FOLDING = _Folding()
