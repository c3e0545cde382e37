"""XLA's foreign functions on CPUs without a compiler: buffers of a call as NumPy arrays, errors as XLA's.

XLA calls a C function with one argument, a frame that holds arguments, results and attributes. The structs below are
those of `xla/ffi/api/c_api.h`, which JAX ships; a test holds every field against that header. XLA asks a handler for
the version that it was made for before it calls it, and refuses one that it cannot serve.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flashtile.errors import SpecError, UnavailableError

Pointer, Size, Long, Enum = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int

API_VERSION = 0, 1  # major, and the oldest minor that has all of these fields
EXTENSION_METADATA, STAGE_EXECUTE, ATTRIBUTE_STRING = 1, 3, 4
INVALID_ARGUMENT, UNIMPLEMENTED, INTERNAL = 3, 12, 13  # absl's codes
BF16 = 16

# XLA's element types -> how NumPy stores them; bfloat16 as its bits.
ELEMENTS = {
    1: np.dtype(np.bool_),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.uint8),
    7: np.dtype(np.uint16),
    8: np.dtype(np.uint32),
    9: np.dtype(np.uint64),
    10: np.dtype(np.float16),
    11: np.dtype(np.float32),
    12: np.dtype(np.float64),
    BF16: np.dtype(np.uint16),
}

# All structs but the smallest begin so; the first field says how many bytes of it the caller knows.
_HEAD: list[Any] = [("struct_size", Size), ("extension_start", Pointer)]


class Extension_Base(ctypes.Structure):
    _fields_ = [("struct_size", Size), ("type", Enum), ("next", Pointer)]


class Api_Version(ctypes.Structure):
    _fields_ = [*_HEAD, ("major_version", Enum), ("minor_version", Enum)]


class TypeId(ctypes.Structure):
    _fields_ = [("type_id", Long)]


class Metadata(ctypes.Structure):
    _fields_ = [
        ("struct_size", Size),
        ("api_version", Api_Version),
        ("traits", ctypes.c_uint32),
        ("state_type_id", TypeId),
    ]


class Metadata_Extension(ctypes.Structure):
    _fields_ = [("extension_base", Extension_Base), ("metadata", Pointer)]


class Error_Create_Args(ctypes.Structure):
    _fields_ = [*_HEAD, ("message", ctypes.c_char_p), ("errc", Enum)]


class Error_Destroy_Args(ctypes.Structure):
    _fields_ = [*_HEAD, ("error", Pointer)]


class ThreadPool_Schedule_Args(ctypes.Structure):
    _fields_ = [*_HEAD, ("ctx", Pointer), ("task", Pointer), ("data", Pointer)]


_FUNCTIONS = (
    *("Error_Create", "Error_GetMessage", "Error_Destroy", "Handler_Register", "Stream_Get", "Type_Register"),
    *("ExecutionContext_Get", "State_Set", "State_Get", "DeviceMemory_Allocate", "DeviceMemory_Free"),
    "ThreadPool_Schedule",
)


class Api(ctypes.Structure):
    """Its beginning: functions of XLA by their addresses."""

    _fields_ = [
        *_HEAD,
        ("api_version", Api_Version),
        ("internal_api", Pointer),
        *((f"XLA_FFI_{name}", Pointer) for name in _FUNCTIONS),
    ]


class Buffer(ctypes.Structure):
    _fields_ = [*_HEAD, ("dtype", Enum), ("data", Pointer), ("rank", Long), ("dims", ctypes.POINTER(Long))]


class ByteSpan(ctypes.Structure):
    _fields_ = [("ptr", Pointer), ("len", Size)]


class Args(ctypes.Structure):
    _fields_ = [*_HEAD, ("size", Long), ("types", Pointer), ("args", ctypes.POINTER(Pointer))]


class Rets(ctypes.Structure):
    _fields_ = [*_HEAD, ("size", Long), ("types", Pointer), ("rets", ctypes.POINTER(Pointer))]


class Attrs(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("size", Long),
        ("types", ctypes.POINTER(Enum)),
        ("names", ctypes.POINTER(Pointer)),
        ("attrs", ctypes.POINTER(Pointer)),
    ]


class CallFrame(ctypes.Structure):
    _fields_ = [
        *_HEAD,
        ("api", Pointer),
        ("ctx", Pointer),
        ("stage", Enum),
        ("args", Args),
        ("rets", Rets),
        ("attrs", Attrs),
        ("future", Pointer),
    ]


class Argument(NamedTuple):
    """A buffer of a call, row-major as XLA lays it out for a handler."""

    element: int
    address: int
    shape: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Its memory as an array, writable; bfloat16 as ml_dtypes has it, which comes with JAX."""
        found = self.storage()
        if self.element != BF16:
            return found
        import ml_dtypes

        return found.view(ml_dtypes.bfloat16)

    def storage(self) -> np.ndarray:
        """The same, bfloat16 as its bits."""
        dtype = ELEMENTS[self.element]
        memory: Any = (ctypes.c_char * (dtype.itemsize * math.prod(self.shape))).from_address(self.address)
        return np.ndarray(self.shape, dtype, memory)


Work = Callable[[str, list[Argument], list[Argument]], None]
Handler = ctypes.CFUNCTYPE(Pointer, Pointer)
_create_error = ctypes.CFUNCTYPE(Pointer, ctypes.POINTER(Error_Create_Args))


def handler(work: Work) -> Any:
    """A C function that XLA can call, and that must live as long as XLA may: work(text, arguments, results) is given
    the call's one attribute, a string, and its buffers. What it raises becomes XLA's error."""

    def handle(address: int) -> int | None:
        extension, api, stage, *places = _frame(address)
        if extension and Extension_Base.from_address(extension).type == EXTENSION_METADATA:
            _say_version(extension)
        elif stage == STAGE_EXECUTE:
            try:
                arguments, results, attribute = places[:2], places[2:4], places[4:]
                work(_text(*attribute), _buffers(*arguments), _buffers(*results))
            except BaseException as e:  # nothing may travel through XLA's own frames
                return _error(api, e)
        return None

    return Handler(handle)


class _Reader:
    """Fields of a struct at an address, all at once: ctypes takes a microsecond for each."""

    def __init__(self, struct_type: Any, *fields: str) -> None:
        parts, at = ["="], 0
        for name in fields:
            place, kind = 0, struct_type
            for step in name.split("."):
                field = getattr(kind, step)
                place += field.offset
                kind = dict(kind._fields_)[step]
            size = ctypes.sizeof(kind)
            parts.append(f"{place - at}x{'iq'[size == 8]}")
            at = place + size
        self.layout, self.size = struct.Struct("".join(parts)), ctypes.sizeof(struct_type)

    def __call__(self, address: int) -> tuple[int, ...]:
        return self.layout.unpack_from(ctypes.string_at(address, self.size))


_frame = _Reader(
    CallFrame,
    *("extension_start", "api", "stage", "args.size", "args.args", "rets.size", "rets.rets", "attrs.size"),
    *("attrs.types", "attrs.attrs"),
)
_buffer = _Reader(Buffer, "dtype", "data", "rank", "dims")


def _numbers(address: int, count: int) -> tuple[int, ...]:
    """Pointers or lengths that stand one after the other."""
    return struct.unpack(f"={count}q", ctypes.string_at(address, 8 * count)) if count else ()


def _buffers(count: int, addresses: int) -> list[Argument]:
    found = []
    for address in _numbers(addresses, count):
        element, data, rank, dims = _buffer(address)
        found.append(Argument(element, data, _numbers(dims, rank)))
    return found


def _say_version(extension: int) -> None:
    metadata = Metadata.from_address(Metadata_Extension.from_address(extension).metadata)
    metadata.api_version.major_version, metadata.api_version.minor_version = API_VERSION


def _text(count: int, types: int, attributes: int) -> str:
    assert count == 1 and Enum.from_address(types).value == ATTRIBUTE_STRING
    address, length = _numbers(_numbers(attributes, 1)[0], 2)  # a ByteSpan
    return ctypes.string_at(address, length).decode()


def _error(api: int, error: BaseException) -> int | None:
    """XLA's object for an error; a bug of ours is told by its type, too."""
    kinds = {SpecError: INVALID_ARGUMENT, UnavailableError: UNIMPLEMENTED}
    code = next((code for kind, code in kinds.items() if isinstance(error, kind)), INTERNAL)
    message = str(error) if code != INTERNAL else f"{type(error).__name__}: {error}"
    args = Error_Create_Args(ctypes.sizeof(Error_Create_Args), None, message.encode(), code)
    return _create_error(Api.from_address(api).XLA_FFI_Error_Create)(ctypes.byref(args))
