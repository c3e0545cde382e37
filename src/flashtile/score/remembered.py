"""Programs of functions that were traced before, with the values that their closures hold now.

Tracing runs a function on symbols. What comes out follows from its code, from the numbers and strings that it reads,
and, of arrays that it does nothing with but index them, from their kind and shape. Where that is all that a function
can see, a repeated call need not run it again: `Reading.of` says what it read. Anything else that it names (objects,
lists, arrays that it computes with, calls that may answer otherwise next time) is looked at anew at every call.

Rules of this package are known better: they index arrays that fit the call at positions alone, and decide nothing by
an offset, a distance or a length. A program of such rules, put together as they may be, serves other lengths and
offsets, too: a decoder's step finds that of the step before.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import types
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np

from .capture import UNNAMED, Access, ArrayCapture, ScalarCapture, capture, is_array
from .code import Code
from .expr import Expr, check_int32, postorder
from .frozen import FrozenMask, FrozenScore, arrays_of
from .functions import FUNCTIONS
from .mask import Composed, Mask, Score
from .symbol import Symbol

_MODULES = frozenset(("numpy", "torch"))
_BUILTINS = frozenset(("abs", "bool", "float", "int", "len", "max", "min", "pow", "range", "sum"))
_CONSTANTS = frozenset(("e", "inf", "nan", "pi", "bool_", "float32", "float64", "int32", "int64"))
_ENTRIES, _DEPTH = 256, 4  # programs that are kept; functions that call functions
_OWN = f"{__package__}."
_PLACED = frozenset(("offset", "low", "high", "length"))  # numbers that no rule of this package decides by
_NONE = type(None)

Captured = ArrayCapture | ScalarCapture
Rules = Iterable[tuple[str, Any]]


class Unsettled(Exception):
    """A function may see what another call of it would not."""


class _Foreign(Exception):
    """A function is not of this package, or a number of its rules cannot be told from another."""


class Entry(NamedTuple):
    """A program's code, and for each slot a number of the traced call, or the place of a value among those read."""

    code: Code
    slots: tuple[ScalarCapture | int, ...]


_entries: dict[Hashable, Entry] = {}


class Reading:
    """What rules read: a key of all but the values that fill slots, and these as they are now.

    at_any_length  whether they are all of this package: the key has no shape and no offset then
    """

    def __init__(self, key: Hashable, values: tuple[Captured, ...], at_any_length: bool) -> None:
        self.key, self.values, self.at_any_length = key, values, at_any_length

    @classmethod
    def of(cls, offset: Any, rest: tuple[Any, ...], band: Rules, rules: Rules) -> Reading | None:
        """What these rules read: masks, scores or functions, each with what its captures are named by, or None; `rest`:
        what else there is of a call, its shape first, and softcap, if any, last; `band`: the rules of causal and window
        among it. None if it cannot be told.

        Raises: SpecError for an array that the language does not read, as tracing does.
        """
        own = 0 not in rest[0] and rest[-1] is None and all(isinstance(x, (Mask, Score, _NONE)) for _, x in rules)
        try:
            if own:
                with contextlib.suppress(_Foreign):
                    reader = _Reader(offset, True)
                    key = tuple(reader.rule(*x) for x in (*band, *rules))
                    return cls(key, tuple(reader.values), True)
            reader = _Reader(offset, False)
            key = tuple(reader.rule(*x) for x in rules)
            return cls((*rest, *key), tuple(reader.values), False)
        except Unsettled:
            return None

    def find(self) -> tuple[Code, tuple[Captured, ...]] | None:
        """The code and captures of a program that read the same before."""
        found = _entries.get(self.key)
        if found is None:
            return None
        return found.code, tuple(self.values[x] if type(x) is int else x for x in found.slots)  # type: ignore[misc]  # of two

    def keep(self, code: Code, captures: tuple[Captured, ...]) -> None:
        """Remember a traced program, unless values of arrays had a part in it: what it reads of them is no element, or
        where it reads follows from elements."""
        loads = (x for root in (code.score, code.mask) if root is not None for x in postorder([root]))
        for load in loads:
            if isinstance(load.data, Access) and (any(load.data.clamp) or not all(map(self._is_settled, load.args))):
                return
        place = {_identity(x): n for n, x in enumerate(self.values)}
        slots: list[ScalarCapture | int] = []
        for x in captures:
            if _identity(x) in place:
                slots.append(place[_identity(x)])
            elif isinstance(x, ScalarCapture) and not (self.at_any_length and x.name == UNNAMED):
                slots.append(x)
            else:  # made of an array while it was traced, or of numbers that will be others
                return
        if len(_entries) >= _ENTRIES:
            _entries.clear()
        _entries[self.key] = Entry(code, tuple(slots))

    def _is_settled(self, index: Expr) -> bool:
        """Whether no element decides where a load reads, and no length."""
        if self.at_any_length:
            return index.operation.name in ("var", "const")
        return not any(x.operation.name == "load" for x in postorder([index]))


def _identity(x: Captured) -> Hashable:
    """What tells captured values of one reading apart: a number has its name alone."""
    return x.name if isinstance(x, ScalarCapture) else (id(x.source), x.name)


class _Reader:
    """What the rules of one call read. `own`: all of them are of this package, or reading ends."""

    def __init__(self, offset: Any, own: bool) -> None:
        self.values: list[Captured] = []
        self._offset, self._own = offset, own
        self._places: dict[Hashable, int] = {}  # of the values, by what tells them apart

    def rule(self, name: str, rule: Any) -> Hashable:
        """The key of one."""
        if rule is None:
            return None
        if isinstance(rule, Composed):
            return (rule.operation, *(self.rule(part.name, part) for part in rule.parts))
        if isinstance(rule, (FrozenMask, FrozenScore)):
            if self._own:
                raise _Foreign
            part = _Function(self, "score_mod" if isinstance(rule, Score) else "mask")
            arrays = tuple(part.array(x, slot) for slot, x in arrays_of(rule))
            return rule.text, arrays, struct.pack(f"<{len(rule.numbers)}d", *rule.numbers)
        if isinstance(rule, (Mask, Score)):
            if type(rule) not in (Mask, Score):
                raise Unsettled
            name, rule = rule.name, rule.build(self._offset)  # made anew for this call, it is read as a user's is
        return _Function(self, name).key(rule, 0)

    def place(self, value: Captured) -> int:
        """Of a value. The same array under one name is one, in all rules: which are the same is a part of the key."""
        place = self._places.setdefault(_identity(value), len(self.values))
        if place == len(self.values):
            self.values.append(value)
        return place

    def number(self, value: int, name: str) -> Hashable:
        """Of this package's: by its place where no rule decides by it."""
        if not self._own or name.partition(": ")[2] not in _PLACED:
            return int, value
        if name in self._places and not name.endswith(": offset"):  # that of the call, for all its rules
            raise _Foreign  # two numbers of one name could not be told apart
        return "number", self.place(ScalarCapture(check_int32(value, name), "int", name))


class _Function:
    """What one function reads."""

    def __init__(self, reader: _Reader, argument: str) -> None:
        self._reader, self._argument = reader, argument
        self._known: dict[int, ArrayCapture] = {}  # its own arrays: one object is one capture
        self._calls = False  # whether it names any function: it might compute with a whole array

    def key(self, function: Any, depth: int) -> Hashable:
        if type(function) is not types.FunctionType or function.__dict__ or depth == _DEPTH:
            raise Unsettled
        own = (function.__module__ or "").startswith(_OWN)  # what exec made may have no module
        if self._reader._own and not own:
            raise _Foreign
        code, scope = function.__code__, function.__globals__
        key: list[Hashable] = [code]
        for name in _names_of(code):
            if name in scope:
                key.append((name, self._value(scope[name], name, depth, own)))
            elif own:
                continue
            elif name in _BUILTINS or name in FUNCTIONS or name in _CONSTANTS or hasattr(Symbol, name):
                self._calls = True
            else:
                raise Unsettled
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # it is empty
                raise Unsettled from None
            key.append(self._value(held, name, depth, own))
        key += [self._value(x, "default", depth, own) for x in function.__defaults__ or ()]
        key += [(name, self._value(x, name, depth, own)) for name, x in (function.__kwdefaults__ or {}).items()]
        if self._calls and self._known:
            raise Unsettled
        return tuple(key)

    def _value(self, value: Any, name: str, depth: int, own: bool) -> Hashable:
        kind = type(value)
        if kind is int and own:
            return self._reader.number(value, f"{self._argument}: {name}")
        if value is None or kind in (bool, int, str):
            return kind, value
        if kind is float:
            return kind, struct.pack("<d", value)
        if isinstance(value, np.generic) and value.dtype.kind in "biuf":
            return kind, value.tobytes()
        if kind is types.ModuleType and value.__name__ in _MODULES:
            return value.__name__
        if kind is types.FunctionType:
            return self.key(value, depth + 1)
        if is_array(value) and kind.__module__ in ("numpy", "torch"):
            return self.array(value, name)
        if own and isinstance(value, tuple):
            if self._reader._own and name == "shape":  # of an array that broadcasts: this is what is asked
                return tuple(n == 1 for n in value)
            return kind, *(self._value(x, f"{name}[{n}]", depth, own) for n, x in enumerate(value))
        raise Unsettled

    def array(self, value: Any, name: str) -> Hashable:
        found = self._known.get(id(value))
        if found is None:
            found = self._known[id(value)] = capture(value, f"{self._argument}: {name}")
        if not found.rank:
            raise Unsettled
        shape = found.rank if self._reader._own else found.array.shape
        return "array", self._reader.place(found), found.element, shape, found.place is None


@functools.lru_cache(maxsize=_ENTRIES)
def _names_of(code: types.CodeType) -> tuple[str, ...]:
    """Names that the code, and that of functions inside, looks up: globals and attributes."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return tuple(sorted(set(code.co_names).union(*(_names_of(c) for c in inner))))
