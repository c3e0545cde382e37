"""Calls of XLA that stay in machine code: a handler for buffers of certain shapes, which needs Python for others.

The handler copies the parameters of a prepared call (kernels.Template), stores the addresses of XLA's buffers in them,
and runs its kernels on the thread that called. Whatever it was not made for it hands on to the handler in Python:
buffers of other shapes, as vmap makes them, another stage, and errors, which the second run then tells of.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flashtile import xla
from flashtile.engines import Alone
from flashtile.kernels import Inside, Template
from flashtile.llvm import jit
from flashtile.llvm import machines as isas

MOST_BYTES = 32 << 20  # of memory that a call may take for itself
_LINE = 64  # to which its memory and its scratch are aligned
# What a handler knows, words that end with tables: of each buffer its rank and lengths; (offset, buffer or -1, within
# it or the memory) of what is stored; (buffer, bytes) of what begins at 0; (function, offset of parameters, items).
_WORDS = (
    *("other", "arguments", "results", "memory", "bytes", "zeros", "scratch", "allocate", "release"),
    *("shapes", "places", "place_count", "clears", "clear_count", "steps", "step_count"),
)


class Buffers(NamedTuple):
    """The buffers of a call: their shapes in XLA's order of the axes, arguments first; of those that a kernel knows
    by a name, or by the number of a score program's slot, which they are (an operand that is none of them is null); and
    bytes of those that must begin at 0."""

    arguments: Sequence[tuple[int, ...]]
    results: Sequence[tuple[int, ...]]
    numbers: Mapping[str | int, int]
    cleared: Mapping[str, int]


def handler(alone: Alone | None, template: Template | None, buffers: Buffers, other: Any) -> Any:
    """A C function for XLA for calls on these buffers, which hands others on to `other`; None where the call is no
    native one with little memory. Keep it as long as XLA may call it."""
    if alone is None or template is None:
        return None
    size = -(-len(template.memory) // _LINE) * _LINE
    if size + template.zeros + alone.scratch_bytes > MOST_BYTES:
        return None
    shapes = [n for shape in (*buffers.arguments, *buffers.results) for n in (len(shape), *shape)]
    stored = [(at, x) for at, x in template.places if isinstance(x, Inside) or x in buffers.numbers]
    places = [n for at, what in stored for n in (at, *_target(what, buffers.numbers))]
    clears = [n for name, nbytes in buffers.cleared.items() for n in (buffers.numbers[name], nbytes)]
    steps = [n for x in template.steps for n in (_address(x.function), x.offset, x.items)]
    memory = ctypes.create_string_buffer(template.memory.ljust(size, b"\0"), size)
    tables = [struct.pack(f"={len(x)}q", *x) for x in (shapes, places, clears, steps)]
    kept = [memory, *(ctypes.create_string_buffer(x, max(len(x), 1)) for x in tables)]
    at = [ctypes.addressof(x) for x in kept]
    process = ctypes.CDLL(None)
    words = {
        "other": _address(other),
        "arguments": len(buffers.arguments),
        "results": len(buffers.results),
        "memory": at[0],
        "bytes": size,
        "zeros": template.zeros,
        "scratch": alone.scratch_bytes,
        "allocate": _address(process.malloc),
        "release": _address(process.free),
        "shapes": at[1],
        "places": at[2],
        "place_count": len(stored),
        "clears": at[3],
        "clear_count": len(buffers.cleared),
        "steps": at[4],
        "step_count": len(template.steps),
    }
    text = _text()
    library = jit.load(lambda: text, f"xla handler {text}", isas.current(), ("handle", "context"))
    packed = struct.pack(f"={len(_WORDS)}q", *(words[name] for name in _WORDS))
    ctypes.memmove(library.address("context"), packed, len(packed))
    function = xla.Handler(library.address("handle"))
    function.keep = library, kept, template, other  # type: ignore[attr-defined]
    return function


def _target(what: str | int | Inside, numbers: Mapping[str | int, int]) -> tuple[int, int]:
    return (-1, what.offset) if isinstance(what, Inside) else (numbers[what], 0)


def _address(function: Any) -> int:
    found = ctypes.cast(function, ctypes.c_void_p).value
    assert found is not None
    return found


def bytes_of(shape: tuple[int, ...], itemsize: int) -> int:
    return itemsize * math.prod(shape)


def _offset(struct_type: Any, path: str) -> int:
    place = 0
    for step in path.split("."):
        place += getattr(struct_type, step).offset
        struct_type = dict(struct_type._fields_)[step]
    return place


class _Lines:
    """LLVM IR as text, in blocks."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._serial = 0

    def put(self, *lines: str) -> None:
        self.lines += lines

    def name(self) -> str:
        self._serial += 1
        return f"%t{self._serial}"

    def value(self, text: str) -> str:
        found = self.name()
        self.put(f"  {found} = {text}")
        return found

    def load(self, type_: str, base: str, offset: int | str = 0) -> str:
        return self.value(f"load {type_}, ptr {self.at(base, offset)}, align 4")

    def at(self, base: str, offset: int | str) -> str:
        return self.value(f"getelementptr i8, ptr {base}, i64 {offset}")

    def pointer(self, word: str) -> str:
        return self.value(f"inttoptr i64 {word} to ptr")

    def expect(self, type_: str, value: str, wanted: str, label: str, otherwise: str = "python") -> None:
        same = self.value(f"icmp eq {type_} {value}, {wanted}")
        self.put(f"  br i1 {same}, label %{label}, label %{otherwise}", f"{label}:")

    def count(self, label: str, start: str, count: str, cell: str) -> str:
        """The head of a loop over `count`, by a number in memory; ended by `again`."""
        self.put(f"  store i64 {start}, ptr {cell}", f"  br label %{label}", f"{label}:")
        number = self.value(f"load i64, ptr {cell}")
        more = self.value(f"icmp slt i64 {number}, {count}")
        self.put(f"  br i1 {more}, label %{label}.each, label %{label}.done", f"{label}.each:")
        return number

    def again(self, label: str, number: str, cell: str) -> None:
        following = self.value(f"add i64 {number}, 1")
        self.put(f"  store i64 {following}, ptr {cell}", f"  br label %{label}", f"{label}.done:")


def _text() -> str:
    """The handler: checks, then the kernels of a call (kernels.Step)."""
    f = _Lines()
    w = {name: f.load("i64", "@context", 8 * n) for n, name in enumerate(_WORDS)}
    f.put("  %cell = alloca i64", "  %axis = alloca i64", "  %shape = alloca ptr")
    total = f.value(f"add i64 {w['arguments']}, {w['results']}")
    f.put(f"  %data = alloca i64, i64 {total}")
    for n, (path, type_, wanted) in enumerate(
        (
            ("extension_start", "ptr", "null"),
            ("stage", "i32", str(xla.STAGE_EXECUTE)),
            ("args.size", "i64", w["arguments"]),
            ("rets.size", "i64", w["results"]),
        )
    ):
        f.expect(type_, f.load(type_, "%frame", _offset(xla.CallFrame, path)), wanted, f"frame{n}")
    _check_buffers(f, w, total)
    need = f.value(f"add i64 {w['bytes']}, {w['zeros']}")
    need = f.value(f"add i64 {need}, {2 * _LINE - 1}")
    need = f.value(f"add i64 {need}, {w['scratch']}")
    release = f.pointer(w["release"])
    block = f.value(f"call ptr {f.pointer(w['allocate'])}(i64 {need})")
    absent = f.value(f"icmp eq ptr {block}, null")
    f.put(f"  br i1 {absent}, label %python, label %fill", "fill:")
    memory = _aligned(f, block)
    f.put(f"  call void @llvm.memcpy.p0.p0.i64(ptr {memory}, ptr {f.pointer(w['memory'])}, i64 {w['bytes']}, i1 false)")
    zeros = f.at(memory, w["bytes"])
    f.put(f"  call void @llvm.memset.p0.i64(ptr {zeros}, i8 0, i64 {w['zeros']}, i1 false)")
    scratch = _aligned(f, f.at(zeros, w["zeros"]))
    _store_places(f, w, memory)
    _run_steps(f, w, memory, scratch)
    f.put(
        f"  call void {release}(ptr {block})",
        "  ret ptr null",
        "failed:",
        f"  call void {release}(ptr {block})",
        "  br label %python",
        "python:",
        "  %handler = inttoptr i64 " + w["other"] + " to ptr",
        "  %error = call ptr %handler(ptr %frame)",
        "  ret ptr %error",
    )
    body = "\n".join(f.lines)
    return f"""
@context = global [{len(_WORDS)} x i64] zeroinitializer
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)

define ptr @handle(ptr %frame) {{
{body}
}}
"""


def _check_buffers(f: _Lines, w: Mapping[str, str], total: str) -> None:
    """Ranks and lengths as expected, and where the elements of each are."""
    listed = {name: f.load("ptr", "%frame", _offset(xla.CallFrame, name)) for name in ("args.args", "rets.rets")}
    f.put(f"  store ptr {f.pointer(w['shapes'])}, ptr %shape")
    number = f.count("buffers", "0", total, "%cell")
    given = f.value(f"icmp slt i64 {number}, {w['arguments']}")
    of_results = f.value(f"sub i64 {number}, {w['arguments']}")
    base = f.value(f"select i1 {given}, ptr {listed['args.args']}, ptr {listed['rets.rets']}")
    index = f.value(f"select i1 {given}, i64 {number}, i64 {of_results}")
    buffer = f.load("ptr", f.value(f"getelementptr ptr, ptr {base}, i64 {index}"))
    expected = f.value("load ptr, ptr %shape")
    rank = f.load("i64", buffer, xla.Buffer.rank.offset)
    f.expect("i64", rank, f.load("i64", expected), "ranks")
    dims = f.load("ptr", buffer, xla.Buffer.dims.offset)
    lengths = f.at(expected, 8)
    axis = f.count("axes", "0", rank, "%axis")
    here, wanted = (f.load("i64", f.value(f"getelementptr i64, ptr {x}, i64 {axis}")) for x in (dims, lengths))
    f.expect("i64", here, wanted, "lengths")
    f.again("axes", axis, "%axis")
    f.put(f"  store ptr {f.value(f'getelementptr i64, ptr {lengths}, i64 {rank}')}, ptr %shape")
    address = f.load("i64", buffer, xla.Buffer.data.offset)
    f.put(f"  store i64 {address}, ptr {f.value(f'getelementptr i64, ptr %data, i64 {number}')}")
    f.again("buffers", number, "%cell")


def _aligned(f: _Lines, pointer: str) -> str:
    word = f.value(f"ptrtoint ptr {pointer} to i64")
    above = f.value(f"add i64 {word}, {_LINE - 1}")
    return f.pointer(f.value(f"and i64 {above}, {-_LINE}"))


def _data(f: _Lines, number: str) -> str:
    return f.load("i64", f.value(f"getelementptr i64, ptr %data, i64 {number}"))


def _row(f: _Lines, table: str, number: str, words: int) -> list[str]:
    row = f.value(f"getelementptr [{words} x i64], ptr {f.pointer(table)}, i64 {number}")
    return [f.load("i64", row, 8 * n) for n in range(words)]


def _store_places(f: _Lines, w: Mapping[str, str], memory: str) -> None:
    """Addresses into the parameters, and zeros into results that kernels add to."""
    own = f.value(f"ptrtoint ptr {memory} to i64")
    number = f.count("places", "0", w["place_count"], "%cell")
    offset, buffer, within = _row(f, w["places"], number, 3)
    inside = f.value(f"icmp slt i64 {buffer}, 0")
    base = f.value(f"select i1 {inside}, i64 0, i64 {buffer}")
    start = f.value(f"select i1 {inside}, i64 {own}, i64 {_data(f, base)}")
    f.put(f"  store i64 {f.value(f'add i64 {start}, {within}')}, ptr {f.at(memory, offset)}")
    f.again("places", number, "%cell")
    number = f.count("clears", "0", w["clear_count"], "%cell")
    buffer, size = _row(f, w["clears"], number, 2)
    f.put(f"  call void @llvm.memset.p0.i64(ptr {f.pointer(_data(f, buffer))}, i8 0, i64 {size}, i1 false)")
    f.again("clears", number, "%cell")


def _run_steps(f: _Lines, w: Mapping[str, str], memory: str, scratch: str) -> None:
    number = f.count("steps", "0", w["step_count"], "%cell")
    function, offset, items = _row(f, w["steps"], number, 3)
    parameters = f.at(memory, offset)
    status = f.value(f"call i32 {f.pointer(function)}(ptr {parameters}, i64 0, i64 {items}, ptr {scratch})")
    f.expect("i32", status, "0", "good", "failed")
    f.again("steps", number, "%cell")
