"""Stand-ins for captured values inside a traced function.

NumPy and torch refuse a symbolic index, so arrays are replaced by `ArrayProxy`, whose indexing makes a load.
Numbers become `RuntimeInt` and `RuntimeFloat`: numbers in every respect, whose arithmetic with other numbers is
Python's own, and which enter an expression as run-time parameters, so that another value does not recompile.
Where such a number decides something while tracing (an ``if``, a ``range``), the decision is part of the program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import SpecError
from .capture import UNNAMED, ScalarCapture, capture, is_array
from .expr import Expr, check_int32
from .operations import apply, const, load, scalar
from .symbol import Symbol, lift, located, refuse


class RuntimeInt(int):
    """A captured integer."""

    name: str

    def __flashtile_expr__(self) -> Expr:
        return _as_parameter(self, "int")


class RuntimeFloat(float):
    """A captured float."""

    name: str

    def __flashtile_expr__(self) -> Expr:
        return _as_parameter(self, "float")


def _as_parameter(number: Any, type_: str) -> Expr:
    """One parameter an object, however often it is used."""
    if "expr" not in number.__dict__:
        value = (int if type_ == "int" else float)(number)
        number.expr = scalar(ScalarCapture(value, type_, number.__dict__.get("name", UNNAMED)))
    return number.expr


def runtime(number: Any, name: str | None = None) -> Any:
    """A number as a run-time number; a bool stays what it is, since it only ever decides."""
    if isinstance(number, (bool, np.bool_)):
        return bool(number)
    if isinstance(number, (RuntimeInt, RuntimeFloat)):
        return number
    result = RuntimeInt(number) if isinstance(number, (int, np.integer)) else RuntimeFloat(number)
    if name is not None:
        result.name = name
    return result


def _arithmetic(name: str, base: type) -> Callable[..., Any]:
    plain = getattr(base, name)

    def method(self: Any, *others: Any) -> Any:
        if any(isinstance(o, Symbol) for o in others):
            return NotImplemented  # the symbol's own reflected operator takes it
        result = plain(self, *others)
        return runtime(result) if isinstance(result, (int, float)) and not isinstance(result, bool) else result

    return method


for _base, _class in ((int, RuntimeInt), (float, RuntimeFloat)):
    for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        setattr(_class, f"__{_name}__", _arithmetic(f"__{_name}__", _base))
        setattr(_class, f"__r{_name}__", _arithmetic(f"__r{_name}__", _base))
    for _name in ("neg", "pos", "abs"):
        setattr(_class, f"__{_name}__", _arithmetic(f"__{_name}__", _base))
for _name in ("and", "or", "xor", "lshift", "rshift"):
    setattr(RuntimeInt, f"__{_name}__", _arithmetic(f"__{_name}__", int))
    setattr(RuntimeInt, f"__r{_name}__", _arithmetic(f"__r{_name}__", int))


class ArrayProxy:
    """A captured array: indexed with symbols or integers, one by one or all at once, it gives loads, which belong to
    this very array; otherwise it is the array, or what integers have left of it."""

    def __init__(self, array: Any, name: str):
        self._array, self._name = array, name
        self._capture = capture(array, name)
        self._index: tuple[Expr | None, ...] = (None,) * self._capture.rank  # None: an axis not indexed yet
        self._symbolic = False  # a symbol is among the indices

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        free = [axis for axis, at in enumerate(self._index) if at is None]
        symbolic = self._symbolic or any(isinstance(p, Symbol) for p in parts)
        rest = self._array
        if not symbolic:
            try:
                rest = self._array[index]
            except IndexError as e:
                within = f"one within its shape {tuple(self._array.shape)}"
                raise SpecError(f"{self._name}: got index {index!r}{located()}, expected {within}") from e
            if not all(_is_position(p) for p in parts):  # a slice, a mask, numbers of elements: another array
                return replace_array(rest, self._name)
        bound = list(self._index)
        for axis, part in zip(free, self._spread(parts, len(free)), strict=False):
            if not (isinstance(part, slice) and part == slice(None)):
                bound[axis] = self._position(part, self._capture.array.shape[axis])
        if None not in bound:
            return Symbol(load(self._capture, tuple(bound)))  # type: ignore[arg-type]  # no None
        partial = object.__new__(ArrayProxy)
        partial.__dict__.update(self.__dict__, _array=rest, _index=tuple(bound), _symbolic=symbolic)
        return partial

    def _spread(self, parts: tuple[Any, ...], free: int) -> list[Any]:
        """The index with an Ellipsis written out."""
        if len(parts) - any(p is Ellipsis for p in parts) > free:
            refuse(f"{self._name}: indexing {free} axes with {len(parts)} indices", "give at most one index an axis")
        spread: list[Any] = []
        for part in parts:
            spread += [slice(None)] * (free - len(parts) + 1) if part is Ellipsis else [part]
        return spread

    def _position(self, part: Any, size: int) -> Expr:
        if isinstance(part, RuntimeInt):  # from the end, as in NumPy; which end is a part of the program
            return lift(part) if part >= 0 else apply("add", lift(part), const(size))
        if isinstance(part, Symbol):
            if part.expr.type == "int":
                return part.expr
            refuse(f"{self._name}: indexing with a {part.expr.type}", "an index is an integer: cast it, or use //")
        try:
            if isinstance(part, (bool, np.bool_)):
                raise TypeError("NumPy takes a bool for a mask")
            at = operator.index(part)
        except TypeError:
            refuse(f"{self._name}[{type(part).__name__}]", "an index is an integer, traced or not, or ':'")
        if not -size <= at < size:
            raise SpecError(f"{self._name}: got index {at}{located()}, expected one within an axis of {size}")
        return const(check_int32(at % size, self._name))

    @property
    def shape(self) -> tuple[int, ...]:
        open_axes = (n for n, at in zip(self._capture.array.shape, self._index, strict=True) if at is None)
        return tuple(RuntimeInt(n) for n in open_axes)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return (self[n] for n in range(len(self)))

    def __setitem__(self, index: Any, value: Any) -> None:
        refuse(f"{self._name}: assignment", "a traced function returns one score: choose by torch.where / numpy.where")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self._array.dtype

    def __getattr__(self, name: str) -> Any:
        """What the array itself has: device, max(), ..."""
        if name.startswith("__"):
            raise AttributeError(name)
        attribute = getattr(self.whole(f".{name}"), name)
        if callable(attribute):
            return lambda *args, **keywords: self._plainly(attribute, args, keywords)
        return replace_array(attribute, self._name)

    def _plainly(self, function: Callable[..., Any], args: Any, keywords: dict[str, Any]) -> Any:
        """A function of whole arrays and numbers, run on the arrays."""
        if any(isinstance(a, Symbol) for a in (*args, *keywords.values())):
            refuse(f"{self._name}: {getattr(function, '__name__', function)} of a whole array", "index the array first")
        name = getattr(function, "__name__", str(function))
        plain = {k: unwrap(v, name) for k, v in keywords.items()}
        return replace_array(function(*(unwrap(a, name) for a in args), **plain), self._name)

    def whole(self, operation: str) -> Any:
        """The array, none of whose axes has a symbol for an index: NumPy would compute with what that leaves of it."""
        if self._symbolic:
            refuse(
                f"{self._name}: {operation} of an array that is indexed in part",
                "index all axes at once, as in table[h, i, j], or compute with the whole array first",
            )
        return self._array

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), keywords: Any = None) -> Any:
        first = next(a for a in _flat(args) if isinstance(a, ArrayProxy))
        return first._plainly(function, args, keywords or {})

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **keywords: Any) -> Any:
        return self._plainly(getattr(ufunc, method), inputs, keywords)

    def __array_function__(self, function: Any, types: Any, args: Any, keywords: Any) -> Any:
        return self._plainly(function, args, keywords)

    def __array__(self, *args: Any, **keywords: Any) -> np.ndarray:
        return np.asarray(self.whole("conversion"), *args)


def _is_position(part: Any) -> bool:
    """Whether an index is an integer, or leaves its axes whole."""
    if part is Ellipsis or (isinstance(part, slice) and part == slice(None)):
        return True
    return isinstance(part, (int, np.integer)) and not isinstance(part, bool)


def _flat(args: Any) -> Any:
    for a in args:
        yield from _flat(a) if isinstance(a, (list, tuple)) else (a,)


def unwrap(value: Any, operation: str) -> Any:
    """The arrays behind stand-ins that a function of whole arrays is given."""
    if isinstance(value, ArrayProxy):
        return value.whole(operation)
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(unwrap(x, operation) for x in value)
    return value


def replace_array(value: Any, name: str) -> Any:
    """A stand-in for an array, or for the number that is left of one."""
    if isinstance(value, np.generic):
        return runtime(value.item()) if value.dtype.kind in "biuf" else value
    if not is_array(value):
        return value
    if value.ndim == 0:
        return Symbol(load(capture(value, name), ()))
    return ArrayProxy(value, name)


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(operator, f"__{name}__", None) or getattr(operator, name)
    return lambda self, *others: self._plainly(function, (self, *others), {})


def _reflected(name: str) -> Callable[..., Any]:
    function = getattr(operator, f"__{name}__")
    return lambda self, other: self._plainly(lambda a, b: function(b, a), (self, other), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(ArrayProxy, f"__{_name}__", _operator(_name))
    setattr(ArrayProxy, f"__r{_name}__", _reflected(_name))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "invert", "abs"):
    setattr(ArrayProxy, f"__{_name}__", _operator(_name))
ArrayProxy.__hash__ = None  # type: ignore[assignment]  # as arrays have none
