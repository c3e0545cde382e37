"""A small vocabulary over textual LLVM IR: typed values, functions, loops.

A kernel generator calls Python methods; each call appends one line of LLVM IR in static single assignment form. Values
carry their LLVM type as text, overload the arithmetic operators, and lift Python numbers to constants of their own
type, so generator code reads like the arithmetic it emits. Text: llvmlite's objects cannot name vector intrinsics.

>>> module = Module()
>>> f = Function(module, "axpy", "void", ["ptr", "ptr", "i64"], names=["x", "y", "n"])
>>> x, y, n = f.args
>>> with f.range(0, n) as i:
...     at = i * 4
...     f.store(f.fma(f.const("float", 2.0), f.load("float", x + at), f.load("float", y + at)), y + at)
>>> f.ret()
>>> "llvm.fma.f32" in module.text()
True
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from flashtile.llvm.values import Emitter, Module, Value

__all__ = ["Function", "Module", "Value"]


class Function(Emitter):
    """A function under construction: loops and branches, as Python's own where that reads well."""

    def _label(self, name: str) -> None:
        self._lines.append(f"{name}:")
        self._block = name

    def fold(
        self,
        start: Value | int,
        stop: Value | int,
        step: int,
        carry: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """for i in range(start, stop, step): carry = body(i, carry); returns the last carry."""
        loop = _Loop(self, [self._index(start), *carry])
        loop.enter(loop.phis[0] < self._index(stop))
        following = body(loop.phis[0], loop.phis[1:])
        loop.close([loop.phis[0] + step, *following])
        return loop.phis[1:]

    def _index(self, number: Value | int) -> Value:
        return number if isinstance(number, Value) else self.const("i64", number)

    @contextlib.contextmanager
    def range(self, start: Value | int, stop: Value | int, step: Value | int = 1) -> Iterator[Value]:
        """``with f.range(0, n) as i:`` a loop that carries nothing but its index."""
        loop = _Loop(self, [self._index(start)])
        loop.enter(loop.phis[0] < self._index(stop))
        yield loop.phis[0]
        loop.close([loop.phis[0] + step])

    def repeat(
        self,
        carry: Sequence[Value],
        condition: Callable[[list[Value]], Value],
        body: Callable[[list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """while condition(carry): carry = body(carry); returns the last carry."""
        loop = _Loop(self, carry)
        loop.enter(condition(loop.phis))
        loop.close(body(loop.phis))
        return loop.phis

    @contextlib.contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """``with f.when(c):`` the block runs only if c."""
        self._count += 1
        tag = self._count
        self.put(f"br i1 {condition.ref}, label %then{tag}, label %join{tag}")
        self._label(f"then{tag}")
        yield
        self.put(f"br label %join{tag}")
        self._label(f"join{tag}")

    def value_when(self, condition: Value, compute: Callable[[], Value], otherwise: Value) -> Value:
        """compute() if condition, else the value that is there already."""
        self._count += 1
        tag, before = self._count, self._block
        self.put(f"br i1 {condition.ref}, label %then{tag}, label %join{tag}")
        self._label(f"then{tag}")
        computed = compute()
        last = self._block
        self.put(f"br label %join{tag}")
        self._label(f"join{tag}")
        type_ = otherwise.type
        return self.emit(type_, f"phi {type_} [{computed.ref}, %{last}], [{otherwise.ref}, %{before}]")

    def is_null(self, pointer: Value) -> Value:
        return self.cast("ptrtoint", pointer, "i64").eq(0)

    def either(self, condition: Value, yes: Callable[[], object], no: Callable[[], object]) -> None:
        """yes() if condition else no()."""
        self._count += 1
        tag = self._count
        self.put(f"br i1 {condition.ref}, label %then{tag}, label %else{tag}")
        self._label(f"then{tag}")
        yes()
        self.put(f"br label %join{tag}")
        self._label(f"else{tag}")
        no()
        self.put(f"br label %join{tag}")
        self._label(f"join{tag}")

    def ret(self, value: Value | None = None) -> None:
        self.put(f"ret {value}" if value else "ret void")


class _Loop:
    """An open loop: the head is emitted at once, its phis completed when the loop is closed."""

    def __init__(self, f: Function, initial: Sequence[Value]):
        f._count += 1
        self.f, self.initial, self.tag, self.before = f, initial, f._count, f._block
        self.phis = [Value(f, c.type, f"%c{self.tag}.{n}") for n, c in enumerate(initial)]
        f.put(f"br label %head{self.tag}")
        f._label(f"head{self.tag}")
        self.phis_at = len(f._lines)
        f._lines += [""] * len(self.initial)

    def enter(self, condition: Value) -> None:
        """The body follows, run while the condition holds."""
        self.f.put(f"br i1 {condition.ref}, label %body{self.tag}, label %done{self.tag}")
        self.f._label(f"body{self.tag}")

    def close(self, following: Sequence[Value]) -> None:
        """The body ends; these values come round."""
        f = self.f
        f.put(f"br label %head{self.tag}")
        for n, (phi, old, new) in enumerate(zip(self.phis, self.initial, following, strict=True)):
            line = f"{phi.ref} = phi {phi.type} [{old.ref}, %{self.before}], [{new.ref}, %{f._block}]"
            f._lines[self.phis_at + n] = "  " + line
        f._label(f"done{self.tag}")
