"""Calls of XLA that stay in machine code: a handler for buffers of certain shapes, which needs Python for others.

The handler copies the parameters of a prepared call (kernels.Template), stores the addresses of XLA's buffers in them,
and runs its steps on the thread that called and on XLA's other threads (xla_call.py). Whatever it was not made for it
hands on to the handler in Python: buffers of other shapes, another stage, and errors, which the second run then tells
of.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flashtile import threads, xla, xla_call, xla_frame
from flashtile.engines import Native
from flashtile.kernels import Area, Inside, Template
from flashtile.llvm import jit
from flashtile.llvm import machines as isas

MOST_BYTES = 32 << 20  # of memory that a call, or one of its threads, may take for itself
_LINE = 64  # to which its memory and its scratch are aligned
# What threads of a call meet by.
_MEETING = {
    "init_lock": "pthread_mutex_init",
    "init_signal": "pthread_cond_init",
    "lock": "pthread_mutex_lock",
    "unlock": "pthread_mutex_unlock",
    "wait": "pthread_cond_wait",
    "wake": "pthread_cond_broadcast",
    "end_lock": "pthread_mutex_destroy",
    "end_signal": "pthread_cond_destroy",
    "allocate": "malloc",
    "release": "free",
}


class Buffers(NamedTuple):
    """The buffers of a call: their shapes in XLA's order of the axes and bytes of an element, arguments first; and of
    those that a kernel knows by a name, or by the number of a score program's slot, which they are (an operand that is
    none of them is null)."""

    arguments: Sequence[tuple[tuple[int, ...], int]]
    results: Sequence[tuple[tuple[int, ...], int]]
    numbers: Mapping[str | int, int]


def handler(native: Native | None, template: Template | None, buffers: Buffers, other: Any) -> Any:
    """A C function for XLA for calls on these buffers, which hands others on to `other`; None where the call is no
    native one with little memory. Keep it as long as XLA may call it."""
    if native is None or template is None:
        return None
    size = -(-len(template.memory) // _LINE) * _LINE
    if size + template.room > MOST_BYTES or native.scratch_bytes > MOST_BYTES:
        return None
    every = [*buffers.arguments, *buffers.results]
    nbytes = [itemsize * math.prod(shape) for shape, itemsize in every]
    rows = [(len(shape), n, *shape) for (shape, _), n in zip(every, nbytes, strict=True)]
    stored = [(at, x) for at, x in template.places if isinstance(x, Inside) or x in buffers.numbers]
    most_areas = max(map(len, template.fresh), default=0)
    areas = [x for own in template.fresh for x in _areas(own, most_areas, buffers.numbers)]
    at_states = xla_call.DATA + 8 * len(every)
    at_memory = -(-(at_states + xla_call.STATE * len(template.steps)) // _LINE) * _LINE
    text = xla_call.text(isas.current().arch)
    library = jit.load(lambda: text, f"xla handler {text}", isas.current(), xla_call.EXPORTS)
    steps = [(_address(x.function), x.offset, x.items) for x in template.steps]
    tables = {
        "memory": template.memory.ljust(size, b"\0"),
        "shapes": _table(rows),
        "places": _table((at, *_target(what, buffers.numbers)) for at, what in stored),
        "areas": _table(areas),
        "steps": _table(steps),
    }
    kept = {name: ctypes.create_string_buffer(x, max(len(x), 1)) for name, x in tables.items()}
    process = ctypes.CDLL(None)
    words = {name: _address(getattr(process, theirs)) for name, theirs in _MEETING.items()}
    words |= {name: ctypes.addressof(x) for name, x in kept.items()}
    words |= {
        "other": _address(other),
        "threads": threads.address_of_number(),
        "shape_of_result": words["shapes"] + 8 * sum(map(len, rows[: len(buffers.arguments)])),
        "arguments": len(buffers.arguments),
        "buffers": len(every),
        "bytes": size,
        "room": template.room,
        "scratch": native.scratch_bytes,
        "most": max(1, *(items for _, _, items in steps)) if native.shared else 1,
        "place_count": len(stored),
        "area_count": most_areas,
        "kernel": template.kernel,
        "step_count": len(steps),
        "at_states": at_states,
        "at_memory": at_memory,
    }
    packed = xla_frame.CONTEXT.pack(words)
    ctypes.memmove(library.address("context"), packed, len(packed))
    function = xla.Handler(library.address("handle"))
    function.keep = library, kept, template, other  # type: ignore[attr-defined]  # ctypes keeps attributes
    return function


def _areas(found: Sequence[Area], count: int, numbers: Mapping[str | int, int]) -> Iterable[tuple[int, ...]]:
    """As many rows of a table; none of an operand that is null."""
    for x in found:
        absent = not isinstance(x.of, Inside) and x.of not in numbers
        number, within = (0, 0) if absent else _target(x.of, numbers)
        yield number, within + x.offset, 0 if absent else x.rows, x.size, x.stride
    yield from [(0, 0, 0, 0, 0)] * (count - len(found))


def _table(rows: Iterable[Sequence[int]]) -> bytes:
    words = [n for row in rows for n in row]
    return struct.pack(f"={len(words)}q", *words)


def _target(what: str | int | Inside, numbers: Mapping[str | int, int]) -> tuple[int, int]:
    return (-1, what.offset) if isinstance(what, Inside) else (numbers[what], 0)


def _address(function: Any) -> int:
    found = ctypes.cast(function, ctypes.c_void_p).value
    assert found is not None
    return found
