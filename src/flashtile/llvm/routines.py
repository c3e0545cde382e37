"""Emitted functions with named and typed parameters, checked where they are called.

LLVM sees pointers and integers; its verifier cannot tell a swapped pair of them. Here a parameter has a kind: an LLVM
type for a number, or an `Operand` (rows in memory, lines of registers, ...) that travels as several LLVM values and
arrives as one Python value. A call names its arguments, and a wrong one raises while the text is generated.

>>> from flashtile.llvm.ir import Module
>>> module = Module()
>>> f = Routine(module, "double_it", "i64", n="i64")
>>> f.ret(f.parameters[0] * 2)
>>> main = Routine(module, "main", "i64", exported=True, n="i64")
>>> main.ret(f(main, n=main.parameters[0]))
>>> f(main, m=main.parameters[0])
Traceback (most recent call last):
TypeError: double_it: got m, expected n
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, cast

from flashtile.llvm.ir import Function, Module, Value


@dataclass(frozen=True)
class Operand:
    """A parameter of several LLVM values. A subclass names them in WORDS, field by field; what else it has (the
    geometry of a line, say) is known while the text is generated, and is a part of its kind."""

    WORDS: ClassVar[dict[str, str]] = {}

    @classmethod
    def kind(cls, words: dict[str, str] | None = None, **known: Any) -> Kind:
        """What a parameter of this class is declared as."""
        return Kind(cls, tuple((words or cls.WORDS).items()), tuple(known.items()))

    @property
    def function(self) -> Function:
        """The function under construction that its values belong to."""
        value: Value = getattr(self, next(iter(self.WORDS)))
        return cast(Function, value.function)

    @property
    def own_kind(self) -> Kind:
        words = {name: getattr(self, name).type for name in self.WORDS}
        return self.kind(words, **{name: x for name, x in vars(self).items() if name not in words})


@dataclass(frozen=True)
class Kind:
    """The kind of an operand: its class, its LLVM values and what is known of it beforehand."""

    of: type[Operand]
    words: tuple[tuple[str, str], ...]
    known: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return " ".join([self.of.__name__, *(f"{name}={x}" for name, x in self.known)])


Parameter: TypeAlias = "str | Kind"


class Routine(Function):
    """A function under construction whose parameters have names and kinds; calling it emits a call from another one."""

    def __init__(
        self, module: Module, name: str, returns: str = "void", *, exported: bool = False, **kinds: Parameter
    ) -> None:
        labels, types = [], []
        for label, kind in kinds.items():
            words = ((None, kind),) if isinstance(kind, str) else kind.words
            labels += [label if word is None else f"{label}.{word}" for word, _ in words]
            types += [type_ for _, type_ in words]
        super().__init__(module, name, returns, types, names=labels, internal=not exported)
        self.kinds = kinds

    @property
    def parameters(self) -> tuple[Any, ...]:
        """The arguments as the function's body sees them, in the order of their declaration."""
        values = iter(self.args)
        found: list[Any] = []
        for kind in self.kinds.values():
            if isinstance(kind, str):
                found.append(next(values))
            else:
                found.append(kind.of(**{word: next(values) for word, _ in kind.words}, **dict(kind.known)))
        return tuple(found)

    def __call__(self, caller: Function, /, **arguments: Any) -> Value:
        """Emit a call. Raises: TypeError for an argument that is missing, unknown or of another kind."""
        if arguments.keys() != self.kinds.keys():
            raise TypeError(f"{self.name}: got {', '.join(arguments)}, expected {', '.join(self.kinds)}")
        values: list[Value] = []
        for name, kind in self.kinds.items():
            values += self._flat(name, kind, arguments[name])
        return caller.call(self.name, self.returns, values)

    def _flat(self, name: str, kind: Parameter, argument: Any) -> list[Value]:
        got = argument.type if isinstance(argument, Value) else getattr(argument, "own_kind", type(argument).__name__)
        if got != kind:
            raise TypeError(f"{self.name}: {name}: got {got}, expected {kind}")
        if isinstance(argument, Value):
            return [argument]
        return [getattr(argument, word) for word, _ in kind.words]  # type: ignore[union-attr]  # no name of a type


def entry(module: Module, name: str) -> Routine:
    """An exported function i32 (ptr params, i64 begin, i64 end, ptr scratch): work items [begin, end), 0 on success."""
    return Routine(module, name, "i32", exported=True, params="ptr", begin="i64", end="i64", scratch="ptr")
