"""The LLVM form: expressions emitted into a kernel, as scalars where they can be and vectors where they must.

Lanes run over the queries: i is a vector, or s; b, h, j and what depends on them alone stay scalars until they
meet a vector. An `Emission` knows which variables have values at its place in the code and remembers what it
has emitted; `inner` opens a place further inside, with more variables, so that what does not depend on the
inner loop can be emitted outside it (`prepare`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from . import emit_math as functions
from .captures import Block
from .emit_integer import Integers
from .expr import INT_MAX, INT_MIN, Expr, postorder

if TYPE_CHECKING:
    from ..llvm.ir import Function, Value
    from ..llvm.machines import ISA


class Emission:
    """A place in a function under construction where expressions can be emitted.

    accumulator  "float" or "double": the type of the language's floats
    lanes        lanes of the vectors; i32 variables and the accumulator's vectors have the same number
    variables    values by name: i32 for b, h, i, j and the accumulator's type for s, scalars or vectors of `lanes`
    captures     pointer to the program's capture block (`captures.Block`)
    given        values for expressions that the caller computes itself (a tile of a dense load, say)
    """

    def __init__(
        self,
        f: Function,
        isa: ISA,
        accumulator: str,
        lanes: int,
        block: Block,
        captures: Value,
        variables: Mapping[str, Value],
        given: Mapping[Expr, Value] | None = None,
        outer: Emission | None = None,
    ):
        self.f, self.isa, self.accumulator, self.lanes = f, isa, accumulator, lanes
        self.block, self.captures, self.outer = block, captures, outer
        self._variables = dict(variables)
        self._known: dict[Expr, Value] = dict(given or {})
        self._splats: dict[str, Value] = {}
        self.integers = Integers(f)

    # -- what a kernel calls ---------------------------------------------------------------------------

    def inner(self, variables: Mapping[str, Value], given: Mapping[Expr, Value] | None = None) -> Emission:
        """A place inside this one (a loop's body, say), where more variables have values."""
        place = (self.f, self.isa, self.accumulator, self.lanes, self.block, self.captures)
        return Emission(*place, variables, given, self)

    def prepare(self, *roots: Expr | None) -> None:
        """Emit here every part of the roots that depends on variables known here only."""
        ready = self.variables
        for x in postorder(r for r in roots if r is not None):
            for a in x.args if x.variables - ready else ():
                if a.variables <= ready:
                    self.value(a)
        for root in roots:
            if root is not None and root.variables <= ready:
                self.value(root)

    def value(self, root: Expr) -> Value:
        """The expression's value: a scalar if no vector enters it. Types: i1, i32, or the accumulator."""
        for x in postorder([root]) if self._find(root) is None else ():
            if self._find(x) is None:
                args = [self._find(a) for a in x.args]
                self._known[x] = x.operation.emit(x, self, args)
        return self._find(root)  # type: ignore[return-value]  # it is known by now

    def vector(self, root: Expr) -> Value:
        """The expression's value in every lane."""
        return self.widen(self.value(root))

    @property
    def variables(self) -> frozenset[str]:
        """Variables that have a value here."""
        return frozenset(self._variables) | (self.outer.variables if self.outer else frozenset())

    @property
    def known(self) -> Mapping[Expr, Value]:
        """What has been emitted at this place itself, for another place that can see it (``given``)."""
        return self._known

    # -- what node kinds call ----------------------------------------------------------------------------

    def _find(self, x: Expr) -> Value | None:
        found = self._known.get(x)
        return found if found is not None or self.outer is None else self.outer._find(x)

    def variable(self, name: str) -> Value:
        if name in self._variables:
            return self._variables[name]
        if self.outer is None:
            raise KeyError(f"the score program needs {name}, which has no value here")
        return self.outer.variable(name)

    def scalar(self, type_: str) -> str:
        """The LLVM type of a type of the language."""
        return {"bool": "i1", "int": "i32", "float": self.accumulator}[type_]

    def like(self, x: Value, element: str) -> str:
        """The type with x's lanes and another element."""
        return f"<{self.lanes} x {element}>" if x.type[0] == "<" else element

    def widen(self, x: Value) -> Value:
        """x in every lane; once a place."""
        if x.type[0] == "<":
            return x
        key = str(x)
        if (found := self._splat_of(key)) is None:
            found = self._splats[key] = self.f.splat(x, self.lanes)
        return found

    def _splat_of(self, key: str) -> Value | None:
        found = self._splats.get(key)
        return found if found is not None or self.outer is None else self.outer._splat_of(key)

    def together(self, args: Iterable[Value]) -> list[Value]:
        """All scalars, or all vectors."""
        args = list(args)
        return [self.widen(a) for a in args] if any(a.type[0] == "<" for a in args) else args

    def const(self, x: Expr) -> Value:
        if x.type != "float":
            return self.f.const(self.scalar(x.type), int(x.data))
        with np.errstate(over="ignore"):
            real = np.float32 if self.accumulator == "float" else np.float64
            return self.f.const(self.accumulator, float(real(x.data)))

    def scalar_capture(self, x: Expr) -> Value:
        at = self.captures + self.block.word(x.data) * 8
        if x.type == "int":
            return self.f.load("i32", at, align=8)
        wide = self.f.load("double", at)
        return wide if self.accumulator == "double" else self.f.cast("fptrunc", wide, "float")

    def load(self, x: Expr, index: list[Value]) -> Value:
        return self.block.load(self, x.data, index)

    def inside(self, x: Expr, index: list[Value]) -> Value:
        return self.block.inside(self, x.data, index)

    def cast(self, x: Value, source: str, target: str) -> Value:
        f = self.f
        if target == "bool":
            return x.ne(0)
        wide = self.like(x, self.scalar(target))
        if target == "float":
            return f.cast("uitofp" if source == "bool" else "sitofp", x, wide)
        return f.cast("zext", x, wide) if source == "bool" else self._truncate(x, wide)

    def _truncate(self, x: Value, type_: str) -> Value:
        """Float to i32: towards 0, saturated, NaN to 0; the hardware's own conversion only sees what fits."""
        f, top = self.f, float(INT_MAX + 1)
        fits = (x < top) & (x >= float(INT_MIN))
        whole = f.cast("fptosi", f.select(fits, x, 0.0), type_)
        least, most = f.const(type_, INT_MIN), f.const(type_, INT_MAX)
        return f.select(x >= top, most, f.select(x < float(INT_MIN), least, whole))

    def absolute(self, x: Value) -> Value:
        return functions.absolute(self.f, x) if x.is_float else self.f.select(x < 0, 0 - x, x)

    def floor(self, x: Value) -> Value:
        return functions.floor(self.f, x)

    def sqrt(self, x: Value) -> Value:
        return functions.sqrt(self.f, x)

    def exp(self, x: Value) -> Value:
        return functions.exp(self.f, self.isa, x)

    def exp2(self, x: Value) -> Value:
        return functions.exp2(self.f, self.isa, x)

    def log(self, x: Value) -> Value:
        return functions.log(self.f, self.isa, x)

    def log2(self, x: Value) -> Value:
        return functions.log(self.f, self.isa, x, base2=True)

    def tanh(self, x: Value) -> Value:
        return functions.tanh(self.f, self.isa, x)
