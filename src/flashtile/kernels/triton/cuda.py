"""A GPU of CUDA or ROCm as a `device.Device`: launches and memory of the call in progress (flashtile/current.py)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flashtile import current
from flashtile.kernels.triton import driver, kept
from flashtile.kernels.triton.compiler import compiled
from flashtile.kernels.triton.device import SCRATCH_ALIGNMENT, Bound, Placed, Pointer
from flashtile.kernels.triton.parameters import Template
from flashtile.kernels.triton.specialisation import ELEMENTS, Specialisation

# Bytes of an element, by Triton's names.
SIZES = {"fp64": 8, "i64": 8, "u64": 8, "fp32": 4, "i32": 4, "u32": 4, "fp16": 2, "bf16": 2, "i16": 2, "u16": 2}
NAMES = {element: dtype for dtype, element in ELEMENTS.items()}


class Gpu:
    """The device that the call in progress runs on: its stream, its library's memory. Nothing waits."""

    def empty(self, count: int, element: str) -> Pointer:
        here = current.here()
        memory = here.empty((max(count, 1) * SIZES.get(element, 1),), "uint8", "workspace")
        return Pointer(here.owner.address(memory), element, memory)

    def array(self, shape: tuple[int, ...], element: str) -> Pointer:
        here = current.here()
        memory = here.empty(shape, NAMES[element], "a gradient")
        return Pointer(here.owner.address(memory), element, memory)

    def place(self, array: np.ndarray, element: str) -> Placed:
        """A copy on the device, which has what repeats along an axis of stride 0 once."""
        here = current.here()
        once = array
        if not array.flags.c_contiguous:
            once = np.ascontiguousarray(array[tuple(slice(0, 1) if n == 0 else slice(None) for n in array.strides)])
        if not once.size:
            return Placed(self.empty(1, element), (0,) * array.ndim)
        memory = here.upload(once, "an array of the host")
        given = zip(array.strides, once.strides, strict=True)
        strides = tuple(0 if own == 0 else step // once.itemsize for own, step in given)
        return Placed(Pointer(here.owner.address(memory), element, memory), strides)

    def keep(self, array: np.ndarray, element: str) -> Pointer:
        return kept.find(current.here(), array, element)

    def processors(self) -> int:
        return driver.device(current.here().number).processors

    def cache_bytes(self) -> int:
        return driver.device(current.here().number).cache

    def bind(self, specialisation: Specialisation, fixed: Mapping[str, Any]) -> Bound:
        return Ready(specialisation, fixed)


class Ready:
    """A `device.Bound`: compiled and loaded at its first launch on a device; later ones fill in what differs."""

    def __init__(self, specialisation: Specialisation, fixed: Mapping[str, Any]) -> None:
        self.specialisation, self._fixed = specialisation, fixed
        self._template = Template(specialisation, fixed)
        self._loaded: dict[int, Loaded] = {}

    def __call__(self, grid: int, values: Mapping[str, Any]) -> None:
        here = current.here()
        loaded = self._at(here.number)
        at, scratch = 0, None
        if loaded.scratch:
            at = values.get("scratch", 0)
            if not at:
                scratch = here.empty((grid * loaded.scratch,), "uint8", "workspace")
                at = here.owner.address(scratch)
        if loaded.function is None:
            kernel = loaded.kernel
            arguments = _as_triton_takes_them(kernel, {**self._fixed, **values})
            kernel[(grid, 1, 1)](*arguments, stream=here.stream)
            return
        driver.launch(loaded.function, grid, here.stream, self._template.fill(values, at))

    def scratch_bytes(self, grid: int) -> int:
        count = grid * self._at(current.here().number).scratch
        return -(-count // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT

    def _at(self, number: int) -> Loaded:
        found = self._loaded.get(number)
        if found is None:
            found = self._loaded[number] = _loaded(number, self.specialisation)
        return found


class Loaded(NamedTuple):
    """A kernel on a device: its function, none where Triton's own launcher takes it, and the bytes of scratch memory
    that a program wants."""

    function: driver.Function | None
    kernel: Any
    scratch: int


@functools.cache
def _loaded(number: int, specialisation: Specialisation) -> Loaded:
    """The kernel on a device, compiled."""
    kernel = compiled(specialisation, driver.device(number).arch)
    meta = kernel.metadata
    if meta.target.backend != "cuda":
        return Loaded(None, kernel, meta.global_scratch_size)
    threads = meta.warp_size * meta.num_warps
    function = driver.load(number, kernel.asm["cubin"], meta.name, threads, meta.shared)
    return Loaded(function, kernel, meta.global_scratch_size)


def _as_triton_takes_them(kernel: Any, values: Mapping[str, Any]) -> list[Any]:
    """Arguments for Triton's own launcher, which AMD's kernels go through: one a parameter, None for constants."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple) and not isinstance(value, Pointer):
            return tuple(map(plain, value))
        return value.address if isinstance(value, Pointer) else value

    return [None if kind == "constexpr" else plain(values[name]) for name, kind in kernel.src.signature.items()]
