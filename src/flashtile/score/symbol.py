"""Symbols: the values that a traced function computes with. Operators and torch / NumPy functions build expressions."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from ..errors import SpecError
from .expr import Expr, check_int32
from .operations import apply, const

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_NO_SUCH = 'the score language has no such operation; the documentation lists them under "The score language"'
_LIBRARIES = tuple(f"{os.sep}site-packages{os.sep}{name}{os.sep}" for name in ("torch", "numpy"))

FUNCTIONS: dict[str, Callable[..., Any]] = {}  # by the names of NumPy, torch and operator; functions.py fills it


def refuse(operation: str, remedy: str) -> NoReturn:
    """Raise the one error of an operation outside the language: what, where in the user's source, and the remedy."""
    file, line = _users_line()
    raise SpecError(f"{file}:{line}: {operation} on a traced value{source(file, line)}: {remedy}")


def located() -> str:
    """The line of the traced function that runs now, for an error that begins with an argument."""
    file, line = _users_line()
    return f"{source(file, line)} ({file}:{line})"


def source(file: str, line: int) -> str:
    text = linecache.getline(file, line).strip()
    return f" in `{text}`" if text else ""


def _users_line() -> tuple[str, int]:
    """The innermost line that is not ours."""
    frame = sys._getframe(2)
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _is_ours(file: str) -> bool:
    """Whether the code is not the user's: this folder, torch, NumPy (whose older dispatchers have no file)."""
    return file.startswith((_HERE, "<__array_function__")) or any(part in file for part in _LIBRARIES)


class Symbol:
    """A value of the score language inside a traced function: an element, with no shape of its own."""

    __slots__ = ("expr",)
    shape = ()
    ndim = 0

    def __init__(self, expr: Expr):
        self.expr = expr

    def __repr__(self) -> str:
        return f"Symbol({self.expr!r})"

    # -- operators, filled in below ------------------------------------------------------------------

    def __hash__(self) -> int:
        refuse("hashing (a set, a dict key, lru_cache)", "it has no value yet; index a captured array instead")

    def __bool__(self) -> bool:
        refuse(
            "bool() (if, while, and, or, not, min, max, a chained comparison, in)",
            "use torch.where / numpy.where, & | ~, minimum / maximum",
        )

    def __float__(self) -> float:
        refuse("float() (math.* calls it)", "use torch.* or numpy.* functions, or .to(torch.float32)")

    def __int__(self) -> int:
        refuse("int()", "use .to(torch.int32), .astype(numpy.int32) or //")

    def __round__(self, digits: int | None = None) -> int:
        refuse("round()", "use numpy.floor(x + 0.5)")

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __index__(self) -> int:
        refuse("use as an index or in range()", "capture the list as a NumPy array or torch tensor and index that")

    def __iter__(self) -> Any:
        refuse("iteration", "a traced value is one element: write the formula of one score")

    def __len__(self) -> int:
        refuse("len()", "a traced value is one element: it has no length")

    def __pos__(self) -> Symbol:
        return self

    def __array__(self, *args: Any, **keywords: Any) -> Any:
        refuse("conversion to an array", "use NumPy functions on the value itself; index captured arrays with it")

    def __getitem__(self, index: Any) -> Symbol:
        if index in ((), Ellipsis):
            return self
        refuse("indexing", "a traced value is one element: it has no axes")

    # -- protocols of torch and NumPy, and methods ----------------------------------------------------

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), keywords: Any = None) -> Any:
        return call(function.__name__, args, keywords or {}, "torch")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **keywords: Any) -> Any:
        if method != "__call__":
            refuse(f"numpy.{ufunc.__name__}.{method}", "a traced value is one element: there is nothing to reduce")
        return call(ufunc.__name__, inputs, keywords, "numpy")

    def __array_function__(self, function: Any, types: Any, args: Any, keywords: Any) -> Any:
        return call(function.__name__, args, keywords, "numpy")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in FUNCTIONS:
            refuse(f".{name}", _NO_SUCH)
        return lambda *args, **keywords: call(name, (self, *args), keywords, "method")

    @property
    def dtype(self) -> Any:
        """bool, int32 or float32, torch's where torch is loaded (a traced float is the accumulator's type)."""
        name = {"bool": "bool", "int": "int32", "float": "float32"}[self.expr.type]
        return getattr(sys.modules["torch"], name) if "torch" in sys.modules else np.dtype(name)

    @property
    def device(self) -> Any:
        return sys.modules["torch"].device("cpu") if "torch" in sys.modules else "cpu"


def call(name: str, args: Any, keywords: dict[str, Any], origin: str) -> Any:
    """Run the language's form of a torch or NumPy function of this name."""
    found = FUNCTIONS.get(name.strip("_")) or FUNCTIONS.get(name)
    if found is None:
        label = f".{name}" if origin == "method" else f"{origin}.{name}"
        refuse(label, _NO_SUCH)
    try:
        return found(*args, **keywords)
    except TypeError as e:
        refuse(f"{origin}.{name}", str(e))


def lift(value: Any) -> Expr:
    """The expression of anything that can stand in a formula."""
    if isinstance(value, Symbol):
        return value.expr
    if hasattr(value, "__flashtile_expr__"):
        return value.__flashtile_expr__()
    if isinstance(value, (bool, np.bool_)):
        return const(bool(value))
    if isinstance(value, (int, np.integer)):
        return const(check_int32(int(value), "integer in a traced function"))
    if isinstance(value, (float, np.floating)):
        return const(float(value))
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # one number, made inside the function
        return lift(value.item())
    if getattr(value, "shape", ()):
        remedy = "index it with traced values, as in table[h, j]: one element enters the formula of one score"
        refuse(f"combination with a whole array of shape {tuple(map(int, value.shape))}", remedy)
    refuse(f"combination with {type(value).__name__}", "operands are numbers, traced values and elements of arrays")


def _unary(name: str) -> Callable[[Symbol], Symbol]:
    return lambda self: Symbol(apply(name, self.expr))


def _binary(name: str, reflected: bool = False) -> Callable[[Symbol, Any], Any]:
    def operator(self: Symbol, other: Any) -> Any:
        if other is None and name in ("eq", "ne"):
            return NotImplemented
        return FUNCTIONS[name](other, self) if reflected else FUNCTIONS[name](self, other)

    return operator


for _dunder, _function in {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "truediv": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "pow": "pow",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "lshift": "left_shift",
    "rshift": "right_shift",
}.items():
    setattr(Symbol, f"__{_dunder}__", _binary(_function))
    setattr(Symbol, f"__r{_dunder}__", _binary(_function, reflected=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Symbol, f"__{_name}__", _binary(_name))
for _dunder, _function in {"neg": "neg", "abs": "abs", "invert": "invert"}.items():
    setattr(Symbol, f"__{_dunder}__", _unary(_function))
