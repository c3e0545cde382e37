"""XLA's foreign functions on CPUs without a compiler: buffers of a call as NumPy arrays, errors as XLA's.

XLA calls a C function with one argument, a frame that holds arguments, results and attributes. The structs below are
those of `xla/ffi/api/c_api.h`, which JAX ships; a test holds every field against that header. XLA asks a handler for
the version that it was made for before it calls it, and refuses one that it cannot serve.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from flashtile.arrays import view
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


class Api(ctypes.Structure):
    """Its beginning: functions of XLA by their addresses."""

    _fields_ = [*_HEAD, ("api_version", Api_Version), ("internal_api", Pointer), ("XLA_FFI_Error_Create", Pointer)]


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


Work = Callable[[str, list[np.ndarray], list[np.ndarray]], None]
Handler = ctypes.CFUNCTYPE(Pointer, Pointer)
_create_error = ctypes.CFUNCTYPE(Pointer, ctypes.POINTER(Error_Create_Args))


def handler(work: Work) -> Any:
    """A C function that XLA can call, and that must live as long as XLA may: work(text, arguments, results) is given
    the call's one attribute, a string, and views of its buffers. What it raises becomes XLA's error."""

    def handle(address: int) -> int | None:
        frame = CallFrame.from_address(address)
        if frame.extension_start:
            extension = Extension_Base.from_address(frame.extension_start)
            if extension.type == EXTENSION_METADATA:
                _say_version(frame.extension_start)
                return None
        if frame.stage != STAGE_EXECUTE:
            return None
        try:
            results = [_array(frame.rets.rets[n], writable=True) for n in range(frame.rets.size)]
            work(_text(frame.attrs), [_array(frame.args.args[n]) for n in range(frame.args.size)], results)
        except BaseException as e:  # nothing may travel through XLA's own frames
            return _error(frame.api, e)
        return None

    return Handler(handle)


def _say_version(extension: int) -> None:
    metadata = Metadata.from_address(Metadata_Extension.from_address(extension).metadata)
    metadata.api_version.major_version, metadata.api_version.minor_version = API_VERSION


def _array(address: int, writable: bool = False) -> np.ndarray:
    """A buffer, row-major as XLA lays it out for a handler; bfloat16 as ml_dtypes has it, which comes with JAX."""
    buffer = Buffer.from_address(address)
    dtype = ELEMENTS[buffer.dtype]
    shape = tuple(buffer.dims[: buffer.rank])
    strides, step = [], dtype.itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= n
    found = view(buffer.data or 0, shape, tuple(reversed(strides)), dtype, writable=writable)
    if buffer.dtype != BF16:
        return found
    import ml_dtypes

    return found.view(ml_dtypes.bfloat16)


def _text(attrs: Attrs) -> str:
    assert attrs.size == 1 and attrs.types[0] == ATTRIBUTE_STRING
    span = ByteSpan.from_address(attrs.attrs[0])
    return ctypes.string_at(span.ptr, span.len).decode()


def _error(api: int, error: BaseException) -> int | None:
    """XLA's object for an error; a bug of ours is told by its type, too."""
    kinds = {SpecError: INVALID_ARGUMENT, UnavailableError: UNIMPLEMENTED}
    code = next((code for kind, code in kinds.items() if isinstance(error, kind)), INTERNAL)
    message = str(error) if code != INTERNAL else f"{type(error).__name__}: {error}"
    args = Error_Create_Args(ctypes.sizeof(Error_Create_Args), None, message.encode(), code)
    return _create_error(Api.from_address(api).XLA_FFI_Error_Create)(ctypes.byref(args))
