"""Expressions read back from the text that `expr.text` writes of them: in another process, or from a file."""

from __future__ import annotations

import functools
import re
from typing import Any

from ..errors import SpecError, described
from .capture import Access, Slot
from .expr import VARIABLES, Expr, node
from .operations import OPERATIONS, variable

_LINE = re.compile(r"(%\d+):(\w+) = (\w+)(?:\[([^]]*)\])?((?: \S+)*)")
_CONST = re.compile(r"(bool|int|float)\((.*)\)")
_SLOT = re.compile(r"#(\d+) (\w+)(?: rank (\d+))?(?: clamp ([ny]*))?")


@functools.lru_cache(maxsize=256)
def parse(text: str) -> tuple[str, Expr, tuple[Slot, ...]]:
    """("score" or "mask", its expression, its slots in order) of a text that `freeze` wrote. Raises: SpecError."""
    if not isinstance(text, str):
        raise _unreadable(text, "")
    kind, colon, body = text.partition(": ")
    *lines, result = body.split("; ")
    if kind not in ("score", "mask") or not colon or not result.startswith("return "):
        raise _unreadable(text, text)
    names: dict[str, Expr] = {}
    slots: dict[int, Slot] = {}

    def operand(word: str) -> Expr:
        if word in names:
            return names[word]
        if word in VARIABLES:
            return variable(word)
        if found := _CONST.fullmatch(word):
            read: Any = {"bool": "True".__eq__, "int": int, "float": float}[found[1]]
            return node(OPERATIONS["const"], (), found[1], read(found[2]))
        raise _unreadable(word, text)

    for line in lines:
        found = _LINE.fullmatch(line)
        if found is None or found[3] not in OPERATIONS:
            raise _unreadable(line, text)
        name, type_, operation, data, operands = found.groups()
        args = tuple(operand(word) for word in operands.split())
        names[name] = node(OPERATIONS[operation], args, type_, None if data is None else _data(data, slots, text))
    return kind, operand(result.removeprefix("return ")), tuple(slots[n] for n in sorted(slots))


def _data(data: str, slots: dict[int, Slot], text: str) -> Slot | Access:
    found = _SLOT.fullmatch(data)
    if found is None:
        raise _unreadable(data, text)
    slot = Slot(int(found[1]), found[2], -1 if found[3] is None else int(found[3]))
    slots[slot.number] = slot
    return slot if found[4] is None else Access(slot, tuple(c == "y" for c in found[4]))


def _unreadable(part: object, text: str) -> SpecError:
    return SpecError(f"text: got {described(part)}, expected a text that flashtile.score.freeze wrote")
