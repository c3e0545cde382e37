"""Typed values over LLVM IR text, and a function under construction as a straight line of instructions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from flashtile.llvm.types import COMPARE, FLOATS, SIZES, element, lanes, like, literal, mangle, vector

T = TypeVar("T")


class Value:
    """An SSA value (or constant) of a function under construction."""

    __slots__ = ("function", "number", "origin", "ref", "type")

    def __init__(self, function: Emitter, type_: str, ref: str, number: int | None = None) -> None:
        self.function, self.type, self.ref, self.number = function, type_, ref, number
        self.origin: tuple[Value, int] | None = None  # of a pointer: another one, so many bytes before

    def __str__(self) -> str:
        return f"{self.type} {self.ref}"

    @property
    def is_float(self) -> bool:
        return element(self.type) in FLOATS

    def _lift(self, other: Value | float) -> Value:
        return other if isinstance(other, Value) else self.function.const(self.type, other)

    def _binary(self, op: str, other: Value | float, swap: bool = False) -> Value:
        left, right = (self._lift(other), self) if swap else (self, self._lift(other))
        if left.number is not None and right.number is not None and (fold := _FOLD.get(op)):
            return self.function.const(self.type, fold(left.number, right.number))
        if op == "add" and right.number == 0 or op == "mul" and right.number == 1:
            return left
        if op == "add" and left.number == 0 or op == "mul" and left.number == 1:
            return right
        return self.function.emit(left.type, f"{op} {left.type} {left.ref}, {right.ref}")

    def __add__(self, other: Value | float) -> Value:
        if self.type == "ptr":  # pointers move by bytes
            return self.function.offset(self, other)
        return self._binary("fadd" if self.is_float else "add", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._binary("fsub" if self.is_float else "sub", other)

    def __mul__(self, other: Value | float) -> Value:
        return self._binary("fmul" if self.is_float else "mul", other)

    def __radd__(self, other: float) -> Value:
        return self._binary("fadd" if self.is_float else "add", other, swap=True)

    def __rsub__(self, other: float) -> Value:
        return self._binary("fsub" if self.is_float else "sub", other, swap=True)

    __rmul__ = __mul__

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary("fdiv", other)

    def __rtruediv__(self, other: float) -> Value:
        return self._binary("fdiv", other, swap=True)

    def __floordiv__(self, other: Value | int) -> Value:
        """Signed division of non-negative integers (LLVM truncates; callers keep both signs positive)."""
        return self._binary("sdiv", other)

    def __mod__(self, other: Value | int) -> Value:
        return self._binary("srem", other)

    def __and__(self, other: Value | int) -> Value:
        return self._binary("and", other)

    def __or__(self, other: Value | int) -> Value:
        return self._binary("or", other)

    def __xor__(self, other: Value | int) -> Value:
        return self._binary("xor", other)

    def __lshift__(self, other: Value | int) -> Value:
        return self._binary("shl", other)

    def __rshift__(self, other: Value | int) -> Value:
        """Logical shift right: zeros come in.  ``ashr`` keeps the sign."""
        return self._binary("lshr", other)

    def ashr(self, other: Value | int) -> Value:
        return self._binary("ashr", other)

    def _compare(self, how: str, other: Value | float) -> Value:
        right = self._lift(other)
        op = f"fcmp {COMPARE[how][1]}" if self.is_float else f"icmp {COMPARE[how][0]}"
        return self.function.emit(like(self.type, "i1"), f"{op} {self.type} {self.ref}, {right.ref}")

    def __lt__(self, other: Value | float) -> Value:
        return self._compare("lt", other)

    def __le__(self, other: Value | float) -> Value:
        return self._compare("le", other)

    def __gt__(self, other: Value | float) -> Value:
        return self._compare("gt", other)

    def __ge__(self, other: Value | float) -> Value:
        return self._compare("ge", other)

    def eq(self, other: Value | float) -> Value:
        return self._compare("eq", other)

    def ne(self, other: Value | float) -> Value:
        """Not equal; true of NaN."""
        return self._compare("ne", other)

    def ult(self, other: Value | int) -> Value:
        """Unsigned less-than of integers."""
        return self._compare("ult", other)

    def uge(self, other: Value | int) -> Value:
        """Unsigned greater-or-equal of integers."""
        return self._compare("uge", other)

    def isnan(self) -> Value:
        return self.function.emit(like(self.type, "i1"), f"fcmp uno {self.type} {self.ref}, {self.ref}")


_FOLD: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}


class Module:
    """LLVM functions and the external declarations that they need."""

    def __init__(self) -> None:
        self.functions: list[Emitter] = []
        self.declarations: dict[str, str] = {}

    def text(self) -> str:
        return "\n".join([*self.declarations.values(), *(f.text() for f in self.functions)])


class Emitter:
    """One LLVM function under construction, instruction by instruction; ir.Function adds what branches.

    ``internal`` functions are called by others of the module only; they are kept out of line, since each micro-kernel
    wants the register file to itself.
    """

    def __init__(
        self,
        module: Module,
        name: str,
        returns: str,
        args: Sequence[str],
        *,
        names: Sequence[str] | None = None,
        internal: bool = False,
    ):
        labels = list(names) if names else [f"a{i}" for i in range(len(args))]
        self.module, self.name, self.returns = module, name, returns
        self.args = [Value(self, type_, f"%{label}") for type_, label in zip(args, labels, strict=True)]
        signature = ", ".join(str(arg) for arg in self.args)
        linkage, attributes = ("internal ", "noinline nounwind") if internal else ("", "nounwind")
        self._head = f"define {linkage}{returns} @{name}({signature}) {attributes} {{"
        self._lines = ["entry:"]
        self._block = "entry"
        self._count = 0
        module.functions.append(self)

    def text(self) -> str:
        return "\n".join([self._head, *self._lines, "}"])

    # -- one instruction each ------------------------------------------------------------------------

    def put(self, line: str) -> None:
        self._lines.append("  " + line)

    def emit(self, type_: str, instruction: str) -> Value:
        self._count += 1
        ref = f"%v{self._count}"
        self.put(f"{ref} = {instruction}")
        return Value(self, type_, ref)

    def const(self, type_: str, number: float) -> Value:
        exact = int(number) if element(type_) not in FLOATS and type_[0] != "<" else None
        return Value(self, type_, literal(type_, number), exact)

    def iota(self, type_: str, start: int = 0) -> Value:
        """The constant vector start, start + 1, ... of an integer vector type."""
        return self.integers(type_, range(start, start + lanes(type_)))

    def integers(self, type_: str, numbers: Iterable[int]) -> Value:
        """A constant vector of an integer vector type, lane by lane."""
        scalar = element(type_)
        return Value(self, type_, "<" + ", ".join(f"{scalar} {n}" for n in numbers) + ">")

    def cast(self, op: str, value: Value, type_: str) -> Value:
        """Any LLVM cast: bitcast, zext, sext, trunc, sitofp, fptosi, fpext, fptrunc, ptrtoint, inttoptr."""
        return value if value.type == type_ else self.emit(type_, f"{op} {value} to {type_}")

    def bitcast(self, value: Value, element_: str) -> Value:
        """The same bits as lanes of another element of equal size."""
        return self.cast("bitcast", value, like(value.type, element_))

    def select(self, condition: Value, yes: Value | float, no: Value | float) -> Value:
        type_ = yes.type if isinstance(yes, Value) else no.type  # type: ignore[union-attr]  # one side is a Value
        yes, no = (x if isinstance(x, Value) else self.const(type_, x) for x in (yes, no))
        return self.emit(type_, f"select {condition}, {yes}, {no}")

    def maximum(self, a: Value, b: Value | float) -> Value:
        """The larger; b where either is NaN (one instruction on x86, hence the choice of operands)."""
        return self.select(a > b, a, b)

    def minimum(self, a: Value, b: Value | float) -> Value:
        """The smaller; b where either is NaN."""
        return self.select(a < b, a, b)

    def clamp(self, x: Value, low: Value | float, high: Value | float) -> Value:
        return self.minimum(self.maximum(x, low), high)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c with one rounding.  Only for targets that have the instruction."""
        return self.intrinsic(f"llvm.fma.{mangle(a.type)}", a.type, [a, b, c])

    def intrinsic(self, name: str, returns: str, args: Sequence[Value]) -> Value:
        """Call of a function outside the module, declared on first use."""
        self.module.declarations[name] = f"declare {returns} @{name}({', '.join(a.type for a in args)})"
        return self.call(name, returns, args)

    def call(self, name: str, returns: str, args: Sequence[Value]) -> Value:
        text = f"call {returns} @{name}({', '.join(map(str, args))})"
        if returns == "void":
            self.put(text)
            return self.const("i32", 0)
        return self.emit(returns, text)

    # -- memory, by byte offsets ---------------------------------------------------------------------

    def offset(self, pointer: Value, nbytes: Value | float) -> Value:
        count = nbytes if isinstance(nbytes, Value) else self.const("i64", nbytes)
        if count.number == 0:
            return pointer
        origin = None
        if count.number is not None:
            base, before = pointer.origin or (pointer, 0)
            origin = base, before + count.number
            pointer, count = base, self.const("i64", origin[1])
        moved = self.emit("ptr", f"getelementptr i8, ptr {pointer.ref}, i64 {count.ref}")
        moved.origin = origin
        return moved

    def load(self, type_: str, pointer: Value, align: int | None = None) -> Value:
        return self.emit(type_, f"load {type_}, ptr {pointer.ref}, align {align or SIZES[element(type_)]}")

    def store(self, value: Value, pointer: Value, align: int | None = None) -> None:
        self.put(f"store {value}, ptr {pointer.ref}, align {align or SIZES[element(value.type)]}")

    def load_some(self, type_: str, pointer: Value, live: Value) -> Value:
        """A vector of which the first ``live`` lanes are read, of which there may be none; 0 in the others."""
        arguments = [pointer, self.const("i32", SIZES[element(type_)]), self._first(type_, live), self.const(type_, 0)]
        return self.intrinsic(f"llvm.masked.load.{mangle(type_)}.p0", type_, arguments)

    def store_some(self, value: Value, pointer: Value, live: Value) -> None:
        """The first ``live`` lanes of a vector."""
        arguments = [value, pointer, self.const("i32", SIZES[element(value.type)]), self._first(value.type, live)]
        self.intrinsic(f"llvm.masked.store.{mangle(value.type)}.p0", "void", arguments)

    def _first(self, type_: str, live: Value) -> Value:
        count = lanes(type_)
        return self.iota(vector(count, "i32")) < self.splat(self.cast("trunc", live, "i32"), count)

    def abreast(self, count: int, emit: Callable[[int], T]) -> list[T]:
        """[emit(0), ..., emit(count - 1)], their instructions taken in turns.

        For long chains that do not depend on each other: a machine looks some 60 instructions ahead, which one after
        the other is two chains of them.  Nothing emitted may branch.
        """
        start, results, parts = len(self._lines), [], []
        for n in range(count):
            results.append(emit(n))
            parts.append(self._lines[start:])
            del self._lines[start:]
        for lines in itertools.zip_longest(*parts):
            self._lines += [line for line in lines if line is not None]
        return results

    # -- lanes ---------------------------------------------------------------------------------------

    def splat(self, scalar: Value, count: int) -> Value:
        """The scalar in every lane."""
        type_ = vector(count, scalar.type)
        if scalar.number is not None:
            return self.const(type_, scalar.number)
        first = self.emit(type_, f"insertelement {type_} poison, {scalar}, i64 0")
        return self.emit(type_, f"shufflevector {first}, {type_} poison, <{count} x i32> zeroinitializer")

    def extract(self, value: Value, lane: int) -> Value:
        return self.emit(element(value.type), f"extractelement {value}, i64 {lane}")

    def insert(self, value: Value, scalar: Value, lane: int) -> Value:
        return self.emit(value.type, f"insertelement {value}, {scalar}, i64 {lane}")

    def shuffle(self, a: Value, b: Value, order: Sequence[int]) -> Value:
        """Lanes picked from a, then b: index i < lanes(a) takes a[i], else b[i - lanes(a)]."""
        type_ = vector(len(order), element(a.type))
        picks = ", ".join(f"i32 {i}" for i in order)
        return self.emit(type_, f"shufflevector {a}, {b}, <{len(order)} x i32> <{picks}>")

    def join(self, a: Value, b: Value) -> Value:
        """The lanes of a, then those of b."""
        return self.shuffle(a, b, range(2 * lanes(a.type)))

    def interleave(self, a: Value, b: Value) -> tuple[Value, Value]:
        """a0 b0 a1 b1 ... as two vectors: the lower half of both, the upper half of both."""
        n = lanes(a.type)
        pairs = [lane for t in range(n) for lane in (t, n + t)]
        return self.shuffle(a, b, pairs[:n]), self.shuffle(a, b, pairs[n:])

    def transpose(self, rows: Sequence[Value]) -> list[Value]:
        """Square transpose of n vectors of n lanes: log2(n) rounds of interleaving."""
        n, step = len(rows), len(rows)
        rows = list(rows)
        while step > 1:
            rows = [half for i in range(n // 2) for half in self.interleave(rows[i], rows[i + n // 2])]
            step //= 2
        return rows
