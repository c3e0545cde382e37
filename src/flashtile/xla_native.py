"""Calls of XLA that stay in machine code: a handler for one shape, which needs Python for every other.

The handler fills the parameters of a prepared call with the addresses of XLA's buffers and runs its kernel on the
thread that called, with scratch memory on its stack. Whatever it was not made for it hands on to the handler in Python:
buffers of other shapes, as vmap makes them, another stage, and errors, which the second run then tells of.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

from flashtile import xla
from flashtile.calls import Call
from flashtile.llvm import jit
from flashtile.llvm import machines as isas

MOST_SCRATCH = 256 << 10  # bytes of a stack that XLA made
_RANK, _OPERANDS = 4, 4  # q, k, v, o; lse has no other shape than they say
_WORDS = ("other", "kernel", "items", "bytes", "block", "scratch")


def handler(call: Call, shapes: list[tuple[int, ...]], other: Any) -> Any:
    """A C function for XLA for calls of q, k, v and o of these shapes, which hands others on to `other`; None where
    the call is no single native one with little scratch. Keep it as long as XLA may call it."""
    alone = call.alone
    if alone is None or alone.scratch_bytes > MOST_SCRATCH:
        return None
    text = _text()
    library = jit.load(lambda: text, f"xla handler {text}", isas.current(), ("handle", "context"))
    block = ctypes.create_string_buffer(call.pack(0, 0, 0, 0, 0, 0))
    kernel, fallback = (ctypes.cast(x, ctypes.c_void_p).value for x in (alone.function, other))
    numbers = fallback, kernel, alone.items, len(block) - 1, ctypes.addressof(block), alone.scratch_bytes
    dims = [n for shape in shapes for n in shape]
    packed = struct.pack(f"={len(_WORDS) + len(dims)}q", *numbers, *dims)
    ctypes.memmove(library.address("context"), packed, len(packed))
    function = xla.Handler(library.address("handle"))
    function.keep = library, block, alone.function, other  # type: ignore[attr-defined]
    return function


def _offset(struct_type: Any, path: str) -> int:
    place = 0
    for step in path.split("."):
        place += getattr(struct_type, step).offset
        struct_type = dict(struct_type._fields_)[step]
    return place


def _text() -> str:
    """The handler as LLVM IR: checks, then one call of a kernel (kernels.CompiledKernel.run)."""
    lines: list[str] = []

    def load(name: str, type_: str, base: str, offset: int) -> str:
        lines.append(f"  %{name}.at = getelementptr i8, ptr {base}, i64 {offset}")
        lines.append(f"  %{name} = load {type_}, ptr %{name}.at")
        return f"%{name}"

    def expect(name: str, type_: str, value: str, wanted: str) -> None:
        lines.append(f"  %{name}.ok = icmp eq {type_} {value}, {wanted}")
        lines.append(f"  br i1 %{name}.ok, label %{name}.next, label %python")
        lines.append(f"{name}.next:")

    context = {name: load(name, "i64", "@context", 8 * n) for n, name in enumerate(_WORDS)}
    for name, path, type_, wanted in (
        ("extension", "extension_start", "ptr", "null"),
        ("stage", "stage", "i32", str(xla.STAGE_EXECUTE)),
        ("given", "args.size", "i64", "3"),
        ("made", "rets.size", "i64", "2"),
    ):
        expect(name, type_, load(name, type_, "%frame", _offset(xla.CallFrame, path)), wanted)
    arguments = load("arguments", "ptr", "%frame", _offset(xla.CallFrame, "args.args"))
    results = load("results", "ptr", "%frame", _offset(xla.CallFrame, "rets.rets"))
    places = [("q", arguments, 0), ("k", arguments, 1), ("v", arguments, 2), ("o", results, 0), ("lse", results, 1)]
    for n, (name, listed, number) in enumerate(places):
        buffer = load(f"{name}.buffer", "ptr", listed, 8 * number)
        if n < _OPERANDS:
            rank = load(f"{name}.rank", "i64", buffer, xla.Buffer.rank.offset)
            expect(f"{name}.rank", "i64", rank, str(_RANK))
            dims = load(f"{name}.dims", "ptr", buffer, xla.Buffer.dims.offset)
            for axis in range(_RANK):
                at = 8 * (len(_WORDS) + n * _RANK + axis)
                wanted = load(f"{name}.wanted{axis}", "i64", "@context", at)
                expect(f"{name}.dim{axis}", "i64", load(f"{name}.dim{axis}", "i64", dims, 8 * axis), wanted)
        load(f"{name}.data", "i64", buffer, xla.Buffer.data.offset)
    lines.append(f"  %params = alloca i8, i64 {context['bytes']}, align 16")
    lines.append(f"  %template = inttoptr i64 {context['block']} to ptr")
    lines.append(f"  call void @llvm.memcpy.p0.p0.i64(ptr %params, ptr %template, i64 {context['bytes']}, i1 false)")
    for n, (name, _, _) in enumerate(places):
        lines.append(f"  %{name}.param = getelementptr i8, ptr %params, i64 {8 * n}")
        lines.append(f"  store i64 %{name}.data, ptr %{name}.param")
    body = "\n".join(lines)
    size = len(_WORDS) + _OPERANDS * _RANK
    return f"""
@context = global [{size} x i64] zeroinitializer
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define ptr @handle(ptr %frame) {{
{body}
  %memory = alloca i8, i64 {context["scratch"]}, align 64
  %function = inttoptr i64 {context["kernel"]} to ptr
  %status = call i32 %function(ptr %params, i64 0, i64 {context["items"]}, ptr %memory)
  %failed = icmp ne i32 %status, 0
  br i1 %failed, label %python, label %done
done:
  ret ptr null
python:
  %handler = inttoptr i64 {context["other"]} to ptr
  %error = call ptr %handler(ptr %frame)
  ret ptr %error
}}
"""
