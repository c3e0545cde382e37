"""The functions of torch and NumPy, and the methods of their arrays, that work on traced values, by name.

One table serves ``torch.where(...)``, ``numpy.where(...)`` and ``x.clamp(...)``. What is not a node kind
itself is spelled in node kinds here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .expr import Expr, promote
from .operations import apply, cast, const, is_const
from .symbol import FUNCTIONS, Symbol, lift, refuse


def _plain(name: str) -> Callable[..., Symbol]:
    """A node kind as it stands."""
    return lambda *args: Symbol(apply(name, *map(lift, args)))


def _swapped(name: str) -> Callable[[Any, Any], Symbol]:
    return lambda x, y: Symbol(apply(name, lift(y), lift(x)))


def _scaled(x: Any, y: Any, alpha: Any) -> tuple[Any, Any]:
    return x, y if alpha == 1 else multiply(y, alpha)


multiply = _plain("mul")


def add(x: Any, y: Any, *, alpha: Any = 1) -> Symbol:
    return _plain("add")(*_scaled(x, y, alpha))


def subtract(x: Any, y: Any, *, alpha: Any = 1) -> Symbol:
    return _plain("sub")(*_scaled(x, y, alpha))


def divide(x: Any, y: Any, *, rounding_mode: str | None = None) -> Symbol:
    if rounding_mode == "floor":
        return _plain("floordiv")(x, y)
    quotient = _plain("div")(x, y)
    if rounding_mode is None:
        return quotient
    a, b = lift(x), lift(y)
    if promote(a.type, b.type) == "float":
        return trunc(quotient)
    magnitude = apply("floordiv", apply("abs", a), apply("abs", b))
    opposite = apply("xor", apply("lt", a, const(0)), apply("lt", b, const(0)))
    return Symbol(apply("where", opposite, apply("neg", magnitude), magnitude))


def _checked_bits(name: str) -> Callable[..., Symbol]:
    def bits(*args: Any) -> Symbol:
        operands = [lift(a) for a in args]
        if any(x.type == "float" for x in operands):
            refuse(f"{name} of a float", "& | ^ ~ take bools or integers: compare first, or cast to int32")
        return Symbol(apply(name, *operands))

    return bits


def _logical(name: str) -> Callable[..., Symbol]:
    return lambda *args: Symbol(apply(name, *(cast(lift(a), "bool") for a in args)))


def where(condition: Any, x: Any, y: Any) -> Symbol:
    c = lift(condition)
    if c.type != "bool":
        refuse(f"where with a condition of type {c.type}", "compare it: the condition is a bool")
    return Symbol(apply("where", c, lift(x), lift(y)))


def clamp(x: Any, min: Any = None, max: Any = None, **bounds: Any) -> Symbol:
    """torch.clamp(x, min, max), numpy.clip(x, a_min, a_max)."""
    low, high = bounds.pop("a_min", min), bounds.pop("a_max", max)
    value = lift(x)
    if low is not None:
        value = apply("maximum", value, lift(low))
    if high is not None:
        value = apply("minimum", value, lift(high))
    return Symbol(value)


def power(x: Any, y: Any) -> Symbol:
    """x ** y: whole exponents by multiplication, 0.5 as a root, a positive literal base by exp2."""
    base, exponent = lift(x), lift(y)
    if is_const(exponent) and float(exponent.data).is_integer() and 0 <= exponent.data <= 64:
        start = const(1.0) if "float" in (base.type, exponent.type) else const(1)
        return Symbol(_whole_power(cast(base, promote(base.type, exponent.type)), int(exponent.data), start))
    if is_const(exponent, 0.5):
        return Symbol(apply("sqrt", base))
    if is_const(exponent) and exponent.data < 0 and float(exponent.data).is_integer():
        return Symbol(apply("div", const(1.0), lift(power(cast_to(x, "float"), -exponent.data))))
    if is_const(base) and base.data > 0:
        return Symbol(apply("exp2", apply("mul", exponent, const(math.log2(base.data)))))
    refuse("**", "take a whole number or 0.5 as a literal exponent, or a positive literal base; else use exp and log")


def _whole_power(base: Expr, exponent: int, result: Expr) -> Expr:
    while exponent:
        result = apply("mul", result, base) if exponent & 1 else result
        base, exponent = apply("mul", base, base), exponent >> 1
    return result


def ceil(x: Any) -> Symbol:
    return Symbol(apply("neg", apply("floor", apply("neg", lift(x)))))


def trunc(x: Any) -> Symbol:
    value = lift(x)
    return Symbol(apply("where", apply("lt", value, const(0.0)), lift(ceil(x)), apply("floor", value)))


def sign(x: Any) -> Symbol:
    value = lift(x)
    one, zero, less = (const(n) if value.type == "int" else const(float(n)) for n in (1, 0, -1))
    below = apply("where", apply("lt", value, zero), less, zero)
    return Symbol(apply("where", apply("lt", zero, value), one, below))


def reciprocal(x: Any) -> Symbol:
    return Symbol(apply("div", const(1.0), lift(x)))


def rsqrt(x: Any) -> Symbol:
    return reciprocal(_plain("sqrt")(x))


def isinf(x: Any) -> Symbol:
    return Symbol(apply("eq", apply("abs", lift(x)), const(math.inf)))


def isnan(x: Any) -> Symbol:
    return Symbol(apply("ne", lift(x), lift(x)))


def cast_to(x: Any, dtype: Any) -> Symbol:
    """To the language's type of a torch, NumPy or Python dtype; int32 and int64 are both its int32."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    name = name.rpartition(".")[2]  # torch.int32
    if name in ("bool", "bool_"):
        return Symbol(cast(lift(x), "bool"))
    if name in ("int", "long", "int32", "int64"):
        return Symbol(cast(lift(x), "int"))
    if name in ("float", "double", "half", "float16", "float32", "float64", "bfloat16"):
        return Symbol(cast(lift(x), "float"))
    refuse(f"cast to {name}", "the language has bool, int32 and one float type")


def to(x: Any, *args: Any, **keywords: Any) -> Symbol:
    """torch's Tensor.to(dtype), .to(device), .to(other): only the type has a meaning here."""
    for target in (*args, keywords.get("dtype"), keywords.get("other")):
        if isinstance(target, Symbol):
            return Symbol(cast(lift(x), target.expr.type))
        if target is not None and not isinstance(target, bool) and _is_dtype(target):
            return cast_to(x, target)
    return Symbol(lift(x))


def _is_dtype(target: Any) -> bool:
    return isinstance(target, (type, np.dtype)) or type(target).__name__ == "dtype"


def _filled(number: float) -> Callable[..., Symbol]:
    """zeros_like, new_ones, ...: x gives the type unless dtype does."""

    def make(x: Any, size: Any = (), *args: Any, **keywords: Any) -> Symbol:
        return full(x, size, number, **keywords)

    return make


def full(x: Any, size: Any, fill_value: Any, *, dtype: Any = None, **ignored: Any) -> Symbol:
    if tuple(size) != ():
        refuse(f"making an array of shape {tuple(size)}", "a traced function computes one element: make shape ()")
    value = Symbol(lift(fill_value))
    return to(value, dtype) if dtype is not None else Symbol(cast(value.expr, lift(x).type))


def full_like(x: Any, fill_value: Any, *, dtype: Any = None, **ignored: Any) -> Symbol:
    return full(x, (), fill_value, dtype=dtype)


def new_tensor(x: Any, data: Any, *, dtype: Any = None, **ignored: Any) -> Symbol:
    return to(Symbol(lift(data)), dtype)


def _itself(x: Any, *ignored: Any, **also: Any) -> Any:
    return x


def _cast_method(name: str) -> Callable[..., Symbol]:
    return lambda x: cast_to(x, name)


_KINDS = {  # node kind -> names
    "floordiv": ("floor_divide", "floordiv"),
    "mod": ("remainder", "mod"),
    "neg": ("neg", "negative"),
    "abs": ("abs", "absolute", "fabs"),
    "minimum": ("minimum", "min"),
    "maximum": ("maximum", "max"),
    "exp": ("exp",),
    "exp2": ("exp2",),
    "log": ("log",),
    "log2": ("log2",),
    "sqrt": ("sqrt",),
    "tanh": ("tanh",),
    "sigmoid": ("sigmoid", "expit"),
    "floor": ("floor",),
    "lt": ("lt", "less"),
    "le": ("le", "less_equal"),
    "eq": ("eq", "equal"),
    "ne": ("ne", "not_equal"),
}

FUNCTIONS.update(
    {
        **{name: _plain(kind) for kind, names in _KINDS.items() for name in names},
        **dict.fromkeys(("add",), add),
        **dict.fromkeys(("sub", "subtract"), subtract),
        **dict.fromkeys(("mul", "multiply"), multiply),
        **dict.fromkeys(("div", "divide", "true_divide"), divide),
        "rsub": lambda x, y: subtract(y, x),
        "radd": lambda x, y: add(y, x),
        "rmul": lambda x, y: multiply(y, x),
        "rdiv": lambda x, y: divide(y, x),
        "rtruediv": lambda x, y: divide(y, x),
        **dict.fromkeys(("gt", "greater"), _swapped("lt")),
        **dict.fromkeys(("ge", "greater_equal"), _swapped("le")),
        **dict.fromkeys(("and", "bitwise_and"), _checked_bits("and")),
        **dict.fromkeys(("or", "bitwise_or"), _checked_bits("or")),
        **dict.fromkeys(("xor", "bitwise_xor"), _checked_bits("xor")),
        **dict.fromkeys(("invert", "bitwise_not"), _checked_bits("invert")),
        **dict.fromkeys(("left_shift", "bitwise_left_shift", "lshift"), _checked_bits("shl")),
        **dict.fromkeys(("right_shift", "bitwise_right_shift", "rshift"), _checked_bits("shr")),
        "logical_and": _logical("and"),
        "logical_or": _logical("or"),
        "logical_xor": _logical("xor"),
        "logical_not": _logical("invert"),
        "where": where,
        **dict.fromkeys(("clamp", "clip"), clamp),
        "clamp_min": lambda x, min: clamp(x, min),
        "clamp_max": lambda x, max: clamp(x, None, max),
        **dict.fromkeys(("pow", "power", "float_power"), power),
        "square": lambda x: multiply(x, x),
        "ceil": ceil,
        **dict.fromkeys(("trunc", "fix"), trunc),
        "sign": sign,
        "sgn": sign,
        "reciprocal": reciprocal,
        "rsqrt": rsqrt,
        "relu": lambda x, inplace=False: clamp(x, 0),
        "isinf": isinf,
        "isnan": isnan,
        "to": to,
        "type": to,
        "astype": to,
        "type_as": to,
        **{name: _cast_method(name) for name in ("bool", "int", "long", "float", "double", "half")},
        **{name: _filled(0) for name in ("zeros_like", "new_zeros")},
        **{name: _filled(1) for name in ("ones_like", "new_ones")},
        "full_like": full_like,
        "new_full": full,
        "new_tensor": new_tensor,
        **dict.fromkeys(("item", "clone", "detach", "contiguous", "copy", "cpu"), _itself),
    }
)
