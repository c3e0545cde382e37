"""From a Python function to an expression: run it once on symbols.

The function is rebuilt with stand-ins (`proxies`) for the arrays and numbers in its closure cells, in the
globals that it names, in its defaults, in partial arguments and in ``self``; so are the functions that it
calls. The caller's function and its data are not touched.
"""

from __future__ import annotations

import enum
import functools
import inspect
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import SpecError, described
from . import functions  # noqa: F401  # what symbols answer to
from .capture import is_array
from .expr import Expr
from .operations import cast, variable
from .proxies import ArrayProxy, replace_array, runtime
from .symbol import Symbol, lift, source

# Packages whose functions and modules are used as they are: symbols answer to torch and NumPy by protocol.
_LIBRARIES = frozenset(("torch", "numpy", "jax", "jaxlib", "scipy", "ml_dtypes", "flashtile")) | sys.stdlib_module_names


def trace_mask(function: Callable[..., Any], argument: str = "mask") -> Expr:
    """The bool expression of a ``mask_mod(b, h, i, j)``: true where key j is visible to row i.

    Raises: SpecError if it does not take four arguments, does not return a bool, or leaves the language.
    """
    result = _trace(function, "bhij", argument)
    if type(result) is bool and not _is_library(getattr(function, "__module__", None)):
        _warn_of_constant(function, argument, result)
    result = lift(result)
    if result.type != "bool":
        kind = "a float" if result.type == "float" else "an integer"
        raise SpecError(
            f"{argument}: got a function that returns {kind}, expected a bool (True: attend); "
            "a function that changes scores is a score_mod"
        )
    return result


def trace_score(function: Callable[..., Any], argument: str = "score_mod") -> Expr:
    """The float expression of a ``score_mod(s, b, h, i, j)``.

    Raises: SpecError if it does not take five arguments, returns a bool, or leaves the language.
    """
    result = lift(_trace(function, "sbhij", argument))
    if result.type == "bool":
        raise SpecError(f"{argument}: got a function that returns a bool, expected the new score; a mask goes to mask=")
    return cast(result, "float")


def _trace(function: Callable[..., Any], names: str, argument: str) -> Any:
    """What the function returns for symbols: one value, of the language or a number."""
    if not callable(function):
        raise SpecError(f"{argument}: got {described(function)}, expected a function of ({', '.join(names)})")
    check_arity(function, names, argument)
    rebuilt = _Rebuild(argument).value(function, _name_of(function))
    result = rebuilt(*(Symbol(variable(name)) for name in names))
    if isinstance(result, (Symbol, bool, int, float, np.generic)) or getattr(result, "shape", None) == ():
        return result
    file, line = _line_of(function)
    place = f"{source(file, line)} ({file}:{line})" if file else ""
    got, remedy = f"a {type(result).__name__}", ""
    if getattr(result, "shape", ()):
        got = "a whole captured array" if isinstance(result, ArrayProxy) else f"an array of shape {tuple(result.shape)}"
        remedy = ": index it with traced values, as in table[h, j]"
    elif hasattr(result, "expression"):
        got, remedy = repr(result), ": masks are composed outside of functions, as in score.causal() & function"
    raise SpecError(f"{argument}: got a function that returns {got}{place}, expected one traced value{remedy}")


def _line_of(function: Any) -> tuple[str, int]:
    """Where a function begins; ("", 0) where nothing says so."""
    while isinstance(function, functools.partial):
        function = function.func
    methods = (vars(kind).get(name) for kind in type(function).__mro__ for name in ("forward", "__call__"))
    for found in (function, getattr(function, "__func__", None), *methods):
        code = getattr(found, "__code__", None)
        if code is not None:
            return code.co_filename, code.co_firstlineno
    return "", 0


def _warn_of_constant(function: Any, argument: str, result: bool) -> None:
    """A mask that is the same for every pair is hardly meant: `i is j`, or `not`, `and` and `or` of other constants."""
    file, line = _line_of(function)
    effect = "every key is visible" if result else "every key is hidden"
    text = f"{argument}: the function returned Python's {result}, not a traced value: {effect}; `is`, `and`, `or` and "
    registry = getattr(function, "__globals__", {}).setdefault("__warningregistry__", {})
    warnings.warn_explicit(text + "`not` are not traced, == & | ~ are", UserWarning, file, line, registry=registry)


def check_arity(function: Callable[..., Any], names: str, argument: str) -> None:
    """Raise SpecError for a function that cannot be called with the arguments named, a letter each."""
    if type(function) is types.FunctionType and not vars(function):
        code = function.__code__
        if code.co_argcount == len(names) and not code.co_kwonlyargcount:  # as most are; a signature takes long to make
            return
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a callable without a signature: its own TypeError will tell
    try:
        signature.bind(*names)
    except TypeError:
        kinds = ", ".join(f"{n}" for n in names)
        raise SpecError(
            f"{argument}: got {_name_of(function)}{signature}, expected a function of {len(names)} arguments ({kinds})"
        ) from None


def _name_of(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


class _Rebuild:
    """One replacement an object, so that shared captures stay shared and recursive functions end."""

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self.memo: dict[int, Any] = {}
        self.kept: list[Any] = []  # keeps the originals alive while their ids serve as keys

    def value(self, value: Any, name: str) -> Any:
        """The stand-in of a captured value (often the value itself)."""
        if value is None or isinstance(value, (str, bytes, type, enum.Enum, Symbol, ArrayProxy)):
            return value
        if isinstance(value, (bool, int, float)) or isinstance(value, np.generic) and value.dtype.kind in "biuf":
            # Never shared: which parameters exist must not depend on their values.
            return runtime(value, f"{self.argument}: {name}")
        if id(value) in self.memo:
            return self.memo[id(value)]
        self.kept.append(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        self.memo[id(value)] = result = self._other(value, name)
        return result

    def _other(self, value: Any, name: str) -> Any:
        if is_array(value):
            return replace_array(value, f"{self.argument}: {name}")
        if isinstance(value, functools.partial):
            keywords = {k: self.value(v, k) for k, v in value.keywords.items()}
            args = (self.value(a, f"argument {n}") for n, a in enumerate(value.args))
            return functools.partial(self.value(value.func, name), *args, **keywords)
        if isinstance(value, types.MethodType):
            return types.MethodType(self.value(value.__func__, name), self.value(value.__self__, "self"))
        if isinstance(value, (list, tuple, dict)):
            return self._container(value, name)
        if isinstance(value, types.ModuleType):
            return value if _is_library(value.__name__) else ObjectProxy(value, self)
        library = _is_library(type(value).__module__) and not hasattr(value, "forward")  # modules hold parameters
        if library or isinstance(value, types.BuiltinFunctionType):
            return value
        return ObjectProxy(value, self)

    def _container(self, value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {k: self.value(v, f"{name}[{k!r}]") for k, v in value.items()}
        items = [self.value(v, f"{name}[{n}]") for n, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def _function(self, function: types.FunctionType) -> Any:
        library = _is_library(function.__module__)
        if library and not function.__closure__:
            return function
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        module = function.__globals__
        names = set() if library else _global_names(function.__code__) & module.keys()
        scope: dict[str, Any] = dict(module)
        rebuilt = types.FunctionType(function.__code__, scope, function.__name__, None, cells)
        rebuilt.__kwdefaults__ = {k: self.value(v, k) for k, v in (function.__kwdefaults__ or {}).items()} or None
        self.memo[id(function)] = rebuilt  # before its contents, which may name the function itself
        scope.update({n: self.value(module[n], n) for n in sorted(names)})
        rebuilt.__defaults__ = tuple(self.value(v, "default") for v in function.__defaults__ or ()) or None
        for cell, old, name in zip(cells, function.__closure__ or (), function.__code__.co_freevars, strict=True):
            try:
                cell.cell_contents = self.value(old.cell_contents, name)
            except ValueError as e:
                if isinstance(e, SpecError):
                    raise  # anything else: the cell is empty, and stays so
        return rebuilt


def _global_names(code: types.CodeType) -> set[str]:
    """Names that the code, and the code of functions defined inside, may look up as globals."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_global_names(c) for c in inner))


class ObjectProxy:
    """A captured object (``self``, a configuration): its attributes and items, with stand-ins for the data."""

    def __init__(self, target: Any, rebuild: _Rebuild):
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_rebuild", rebuild)

    @property  # type: ignore[misc]  # of its own type mypy has no property
    def __class__(self) -> type:
        """So that isinstance in the traced function says what it says of the object."""
        return type(self._target)

    def __getattr__(self, name: str) -> Any:
        return self._rebuild.value(getattr(self._target, name), name)

    def __getitem__(self, key: Any) -> Any:
        return self._rebuild.value(self._target[key], f"item {key!r}")

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        method = type(self._target).__call__
        if _is_library(getattr(method, "__module__", None)):  # torch.nn.Module: run its forward
            method = type(self._target).forward
        return self._rebuild.value(method, "__call__")(self, *args, **keywords)

    def __eq__(self, other: object) -> bool:
        return bool(self._target == (other._target if type(other) is ObjectProxy else other))

    def __hash__(self) -> int:
        return hash(self._target)

    def __contains__(self, item: object) -> bool:
        return item in self._target

    def __len__(self) -> int:
        return len(self._target)

    def __iter__(self) -> Any:
        return (self._rebuild.value(item, "item") for item in self._target)

    def __bool__(self) -> bool:
        return bool(self._target)

    def __setattr__(self, name: str, value: Any) -> None:
        raise SpecError(f"{self._rebuild.argument}: a traced function may not set attributes (.{name})")
