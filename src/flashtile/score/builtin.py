"""Programs of built-in options alone: traced once a structure, then only given the values of each call.

What a built-in option does to a score is known from the kind of its arrays, so a call need not run it on symbols
again.  A user's function is another matter: anything that it closes over may have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

from .capture import ArrayCapture, ScalarCapture
from .code import Code
from .expr import Expr, check_int32, postorder
from .softcap import check_cap, is_off
from .window import sides

Captured = ArrayCapture | ScalarCapture


class Traced(Protocol):
    """What tracing makes: a `Program`."""

    @property
    def code(self) -> Code: ...

    @property
    def captures(self) -> tuple[Captured, ...]: ...

    @property
    def roots(self) -> list[Expr]: ...


T = TypeVar("T", bound=Traced)


class Template(NamedTuple):
    """A traced program: its code, and for each slot the name of the value that fills it."""

    code: Code
    names: tuple[str, ...]


_ENTRIES = 256  # a program uses a few
_templates: dict[Hashable, Template] = {}


def builtin(
    shape: tuple[int, int, int, int],
    given: dict[str, Any],
    captured: Mapping[str, ArrayCapture],
    make: Callable[[Code, tuple[Captured, ...]], T],
    trace: Callable[[], T],
) -> T:
    """The program of options whose arrays, `captured`, are known to fit the shape, by `make`; `trace` makes it the slow
    way.

    Loads of built-in options stay inside arrays that fit, whatever the shape, so neither the shape nor a value is a
    part of the structure.
    """
    key, values = _parts(given, captured)
    template = _templates.get(key)
    if template is not None:
        return make(template.code, tuple(values[name] for name in template.names))
    program = trace()
    loads = [x for x in postorder(program.roots) if x.operation.name == "load"]
    if 0 not in shape and not any(any(x.data.clamp) for x in loads) and len(_templates) < _ENTRIES:
        names = tuple(option_name(c.name) for c in program.captures)
        if set(names) <= values.keys():
            _templates[key] = Template(program.code, names)
    return program


def _parts(given: dict[str, Any], captured: Mapping[str, ArrayCapture]) -> tuple[Hashable, dict[str, Captured]]:
    """What the structure depends on, and the values by the names that tracing gives them."""
    values: dict[str, Captured] = {}
    low, high = (None, None) if given["window"] is None else sides(*given["window"])
    key: list[Hashable] = [bool(given["causal"]), low is None, high is None]
    if is_off(given["softcap"]):
        key.append(None)
    else:
        cap = check_cap(given["softcap"])
        key.append("softcap")
        values["cap"], values["inverse"] = ScalarCapture(cap, "float"), ScalarCapture(1.0 / cap, "float")
    for name in ("alibi_slopes", "bias", "mask"):
        if given[name] is None:
            key.append(None)
            continue
        values[name] = found = captured[name]
        key.append((found.element, len(found.array.shape) if name == "alibi_slopes" else _pattern(found)))
    for name, side in (("low", low), ("high", high)):
        if side is not None:
            values[name] = ScalarCapture(check_int32(side, "window"), "int")
    if given["causal"] or low is not None or high is not None or given["alibi_slopes"] is not None:
        anchors = captured.get("offset")
        values["offset"] = anchors or ScalarCapture(check_int32(int(given["offset"]), "align"), "int")
        key.append(anchors.element if anchors else "int")
    return tuple(key), values


def _pattern(found: ArrayCapture) -> tuple[bool, ...]:
    """Which axes broadcast."""
    return tuple(n == 1 for n in found.array.shape)


def option_name(traced: str) -> str:
    """The value behind a capture that tracing called "option: variable": a built-in rule's array is the option."""
    option, _, variable = traced.partition(": ")
    return option if variable in _ITSELF else variable


def argument_of(traced: str) -> str:
    """What an error calls a capture: a built-in rule's array is the option, whether it was traced or remembered."""
    option, _, variable = traced.partition(": ")
    return option if variable in _ITSELF else traced


_ITSELF = "", "array", "slopes"  # what built-in rules call the array of an option
