"""A score program as functions that Triton kernels call."""

from __future__ import annotations

import functools
import hashlib
import linecache
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from flashtile.kernels.triton import functions, language
from flashtile.score.operations import is_const
from flashtile.score.triton_source import function_source, place_source

if TYPE_CHECKING:
    from flashtile.score.code import Code
    from flashtile.score.expr import Expr


@functools.cache
def score_function(code: Code) -> Any:
    """The function (s, b, h, i, j, captures, ACC) -> score in ACC; None where scores stay as they are."""
    return None if code.score is None else function_of("score", code.score, code.slots)


@functools.cache
def mask_function(code: Code) -> Any:
    """The function (s, b, h, i, j, captures, ACC) -> bool; None where every key is visible. s is not read."""
    return None if code.mask is None else function_of("mask", code.mask, code.slots)


@functools.cache
def slope_function(code: Code) -> Any:
    """The function (s, b, h, i, j, captures, ACC) -> d score / d s in ACC; None where that is 1 everywhere."""
    slope = code.score_derivative
    return None if slope is None or is_const(slope, 1.0) else function_of("slope", slope, code.slots)


@functools.cache
def gradient_functions(code: Code, number: int) -> tuple[Any, Any]:
    """Of one of the code's gradients of arrays: the function that gives d score / d load in ACC, and the one that gives
    the number of the element in a row-major array, or box of it."""
    gradient = code.array_gradients[number]
    gives = function_of("gives", gradient.value, code.slots)
    return gives, _compiled("place", place_source("place", gradient.slot, gradient.index, code.slots))


def function_of(name: str, root: Expr, slots: Any) -> Any:
    """An expression as a Triton function."""
    return _compiled(name, function_source(name, root, slots))


def _compiled(name: str, source: str) -> Any:
    """Source as a Triton function.

    Triton reads a function's source anew from its file. The file of this one exists in `linecache` alone, which is
    where Python itself keeps the text of tracebacks and of the interactive prompt.
    """
    file = f"<flashtile {name} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {**_callable_names(), "tl": tl, "__name__": f"{__name__}.{name}"}
    exec(compile(source, file, "exec"), scope)
    return triton.jit(scope[name])


@functools.cache
def _callable_names() -> dict[str, Any]:
    """What the source may call: functions.py, and how it takes numbers."""
    calls = {name: value for name, value in vars(functions).items() if hasattr(value, "fn")}
    return {**calls, "number": language.number, "spread": language.spread}
