"""Triton's interpreter as a device: kernels run on arrays in CPU memory, where they lie, when TRITON_INTERPRET=1.

It is for tests and for looking at kernels, thousands of times slower than a GPU. Triton decides when it is first
imported whether it interprets; the environment variable must be set by then.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import operator
import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flashtile.kernels.triton import jit
from flashtile.kernels.triton.device import Bound, Placed, Pointer
from flashtile.kernels.triton.specialisation import Specialisation

_TORCH = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
    "u16": torch.uint16,
    "u32": torch.uint32,
    "u64": torch.uint64,
}

PROCESSORS = 3  # few, so that small problems show what a program does that has several work items
CACHE_BYTES = 8192  # little, so that they have heads that do not fit in together

# While a kernel is interpreted, Triton's language is patched for the whole process.
_one_at_a_time = threading.Lock()


def mend_index(runtime: Any) -> None:
    """Let a tensor of one element count as an integer under NumPy 2.4, in `triton.runtime.interpreter`.

    Triton's interpreter asks int() of its array, which NumPy 2.4 refuses unless the array has no axes. Triton 3.6 is
    alone in that; where the interpreter is built otherwise, this changes nothing.
    """
    patch = getattr(runtime, "_patch_lang_tensor", None)
    if patch is None or not _SPELLED.search(inspect.getsource(patch)):
        return

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    runtime._patch_lang_tensor = mended


def mend_calls(runtime: Any) -> None:
    """Patch Triton's language once a launch of ours, not again for each call of one function by another, which takes
    half of the time of everything. Functions of Triton's own see the language by other names."""
    patch = runtime.InterpretedFunction.__call__

    def mended(function: Any, *arguments: Any, **options: Any) -> Any:
        ours = function.fn.__module__.startswith("flashtile.")
        return function.rewrite()(*arguments, **options) if ours else patch(function, *arguments, **options)

    runtime.InterpretedFunction.__call__ = mended


_SPELLED = re.compile(r"int\(self\.handle\.data\)")
mend_index(_runtime := importlib.import_module("triton.runtime.interpreter"))
mend_calls(_runtime)


@dataclass(frozen=True)
class Interpreted:
    """A `device.Bound`."""

    device: Interpreter
    specialisation: Specialisation
    fixed: Mapping[str, Any]

    def __call__(self, grid: int, values: Mapping[str, Any]) -> None:
        self.device.launch(self.specialisation, grid, {**self.fixed, **values})

    def scratch_bytes(self, grid: int) -> int:
        return 0


class Interpreter:
    """A `device.Device` in CPU memory."""

    def empty(self, count: int, element: str) -> Pointer:
        memory = torch.empty(max(count, 1), dtype=_TORCH[element])
        return Pointer(memory.data_ptr(), element, memory)

    def array(self, shape: tuple[int, ...], element: str) -> Pointer:
        result = torch.empty(shape, dtype=_TORCH[element]).numpy()
        return Pointer(result.ctypes.data, element, result)

    def place(self, array: np.ndarray, element: str) -> Placed:
        if any(stride % array.itemsize for stride in array.strides):
            array = array.copy()
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return Placed(Pointer(array.ctypes.data, element, array), strides)

    def keep(self, array: np.ndarray, element: str) -> Pointer:
        return self.place(array, element).pointer

    def processors(self) -> int:
        return PROCESSORS

    def cache_bytes(self) -> int:
        return CACHE_BYTES

    def bind(self, specialisation: Specialisation, fixed: Mapping[str, Any]) -> Bound:
        return Interpreted(self, specialisation, fixed)

    def launch(self, specialisation: Specialisation, grid: int, values: Mapping[str, Any]) -> None:
        arguments = jit.constants(specialisation)
        for name, types in specialisation.signature:
            value = values[name]
            one = _argument(value, types) if isinstance(types, str) else tuple(map(_argument, value, types))
            arguments[name] = one
        # inf and NaN are answers here, and int32 wraps.
        with _one_at_a_time, np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            jit.FUNCTIONS[specialisation.kernel][(grid,)](**arguments)


def _argument(value: int | Pointer, type_: str) -> Any:
    """A pointer as the interpreter takes it: a tensor that begins there. It never looks beyond the address."""
    if type_[0] != "*":
        return value
    address, dtype = operator.index(value), _TORCH[type_[1:]]
    if not address:  # an empty array of no memory
        return torch.empty(1, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)
