"""Programs of functions that were traced before, with the values that their closures hold now.

Tracing runs a function on symbols. What comes out follows from its code, from the numbers and strings that it reads,
and, of arrays that it does nothing with but index them, from their kind and shape. Where that is all that a function
can see, a repeated call need not run it again: `Reading.of` says what it read. Anything else that it names (objects,
lists, arrays that it computes with, calls that may answer otherwise next time) is looked at anew at every call.
"""

from __future__ import annotations

import functools
import struct
import types
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from .capture import Access, ArrayCapture, ScalarCapture, capture, is_array
from .code import Code
from .expr import postorder
from .functions import FUNCTIONS
from .symbol import Symbol

_MODULES = frozenset(("numpy", "torch"))
_BUILTINS = frozenset(("abs", "bool", "float", "int", "len", "max", "min", "pow", "range", "sum"))
_CONSTANTS = frozenset(("e", "inf", "nan", "pi", "bool_", "float32", "float64", "int32", "int64"))
_ENTRIES, _DEPTH = 256, 4  # programs that are kept; functions that call functions

Captured = ArrayCapture | ScalarCapture


class Unsettled(Exception):
    """A function may see what another call of it would not."""


class Entry(NamedTuple):
    """A program's code, and for each slot a number of the traced call, or the place of an array among those read."""

    code: Code
    slots: tuple[ScalarCapture | int, ...]


_entries: dict[Hashable, Entry] = {}


class Reading:
    """What functions read: a key of all but the elements of arrays, and these arrays as they are now."""

    def __init__(self, key: Hashable, arrays: tuple[ArrayCapture, ...]) -> None:
        self.key, self.arrays = key, arrays

    @classmethod
    def of(cls, rest: tuple[Hashable, ...], *functions: tuple[str, Any]) -> Reading | None:
        """What these functions read, each with what its captures are named by, None among them; rest: of the key. None
        if it cannot be told.

        Raises: SpecError for an array that the language does not read, as tracing does.
        """
        arrays: list[ArrayCapture] = []
        try:
            key = rest + tuple(None if f is None else (n, _Reader(n, arrays).function(f, 0)) for n, f in functions)
        except Unsettled:
            return None
        return cls(key, tuple(arrays))

    def find(self) -> tuple[Code, tuple[Captured, ...]] | None:
        """The code and captures of a program that read the same before."""
        found = _entries.get(self.key)
        if found is None:
            return None
        return found.code, tuple(self.arrays[x] if type(x) is int else x for x in found.slots)  # type: ignore[misc]

    def keep(self, code: Code, captures: tuple[Captured, ...]) -> None:
        """Remember a traced program, unless values of arrays had a part in it: what it reads of them is no element, or
        where it reads follows from elements."""
        loads = (x for root in (code.score, code.mask) if root is not None for x in postorder([root]))
        for load in loads:
            if isinstance(load.data, Access) and (
                any(load.data.clamp) or not all(a.operation.name in ("var", "const") for a in load.args)
            ):
                return
        place = {(id(x.source), x.name): n for n, x in enumerate(self.arrays)}
        slots: list[ScalarCapture | int] = []
        for x in captures:
            if isinstance(x, ScalarCapture):
                slots.append(x)
            elif (id(x.source), x.name) in place:
                slots.append(place[id(x.source), x.name])
            else:  # made of an array while it was traced
                return
        if len(_entries) >= _ENTRIES:
            _entries.clear()
        _entries[self.key] = Entry(code, tuple(slots))


class _Reader:
    """What one function reads."""

    def __init__(self, argument: str, arrays: list[ArrayCapture]) -> None:
        self._argument, self._arrays = argument, arrays
        self._known: dict[int, int] = {}  # of its own arrays: one object is one capture
        self._calls = False  # whether it names any function: it might compute with a whole array

    def function(self, function: Any, depth: int) -> Hashable:
        if type(function) is not types.FunctionType or function.__dict__ or depth == _DEPTH:
            raise Unsettled
        code, scope = function.__code__, function.__globals__
        key: list[Hashable] = [code]
        for name in _names_of(code):
            if name in scope:
                key.append((name, self._value(scope[name], name, depth)))
            elif name in _BUILTINS or name in FUNCTIONS or name in _CONSTANTS or hasattr(Symbol, name):
                self._calls = True
            else:
                raise Unsettled
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # it is empty
                raise Unsettled from None
            key.append(self._value(held, name, depth))
        key += [self._value(x, "default", depth) for x in function.__defaults__ or ()]
        key += [(name, self._value(x, name, depth)) for name, x in (function.__kwdefaults__ or {}).items()]
        if self._calls and self._known:
            raise Unsettled
        return tuple(key)

    def _value(self, value: Any, name: str, depth: int) -> Hashable:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return kind, value
        if kind is float:
            return kind, struct.pack("<d", value)
        if isinstance(value, np.generic) and value.dtype.kind in "biuf":
            return kind, value.tobytes()
        if kind is types.ModuleType and value.__name__ in _MODULES:
            return value.__name__
        if kind is types.FunctionType:
            return self.function(value, depth + 1)
        if is_array(value) and kind.__module__ in ("numpy", "torch"):
            return self._array(value, name)
        raise Unsettled

    def _array(self, value: Any, name: str) -> Hashable:
        place = self._known.get(id(value))
        if place is None:
            place = self._known[id(value)] = len(self._arrays)
            self._arrays.append(capture(value, f"{self._argument}: {name}"))
        found = self._arrays[place]
        if not found.rank:
            raise Unsettled
        return "array", place, found.element, found.array.shape, found.place is None


@functools.lru_cache(maxsize=_ENTRIES)
def _names_of(code: types.CodeType) -> tuple[str, ...]:
    """Names that the code, and that of functions inside, looks up: globals and attributes."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return tuple(sorted(set(code.co_names).union(*(_names_of(c) for c in inner))))
