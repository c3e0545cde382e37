"""A GPU of CUDA or ROCm as a `device.Device`: launches and memory of the call in progress (flashtile/current.py)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from flashtile import current
from flashtile.kernels.triton import driver
from flashtile.kernels.triton.compiler import compiled
from flashtile.kernels.triton.device import Placed, Pointer
from flashtile.kernels.triton.parameters import block
from flashtile.kernels.triton.specialisation import Specialisation

# Bytes of an element, by Triton's names.
SIZES = {"fp64": 8, "i64": 8, "u64": 8, "fp32": 4, "i32": 4, "u32": 4, "fp16": 2, "bf16": 2, "i16": 2, "u16": 2}


class Gpu:
    """The device that the call in progress runs on: its stream, its library's memory. Nothing waits."""

    def empty(self, count: int, element: str) -> Pointer:
        here = current.here()
        memory = here.empty((max(count, 1) * SIZES.get(element, 1),), "uint8", "workspace")
        return Pointer(here.owner.address(memory), element, memory)

    def place(self, array: np.ndarray, element: str) -> Placed:
        """A copy on the device, which has what repeats along an axis of stride 0 once."""
        here = current.here()
        once = np.ascontiguousarray(array[tuple(slice(0, 1) if n == 0 else slice(None) for n in array.strides)])
        if not once.size:
            return Placed(self.empty(1, element), (0,) * array.ndim)
        memory = here.upload(once, "an array of the host")
        given = zip(array.strides, once.strides, strict=True)
        strides = tuple(0 if own == 0 else step // once.itemsize for own, step in given)
        return Placed(Pointer(here.owner.address(memory), element, memory), strides)

    def launch(self, specialisation: Specialisation, grid: int, values: Mapping[str, Any]) -> None:
        here = current.here()
        kernel = compiled(specialisation, driver.device(here.number).arch)
        scratch = None
        if size := kernel.metadata.global_scratch_size:
            scratch = here.empty((grid * size,), "uint8", "workspace")
        if kernel.metadata.target.backend != "cuda":
            kernel[(grid, 1, 1)](*_as_triton_takes_them(kernel, values), stream=here.stream)
            return
        at = 0 if scratch is None else here.owner.address(scratch)
        driver.launch(_loaded(here.number, specialisation), grid, here.stream, block(specialisation, values, at))


@functools.cache
def _loaded(number: int, specialisation: Specialisation) -> driver.Function:
    """The kernel on a device: compiled and loaded at its first launch there."""
    kernel = compiled(specialisation, driver.device(number).arch)
    meta = kernel.metadata
    return driver.load(number, kernel.asm["cubin"], meta.name, meta.warp_size * meta.num_warps, meta.shared)


def _as_triton_takes_them(kernel: Any, values: Mapping[str, Any]) -> list[Any]:
    """Arguments for Triton's own launcher, which AMD's kernels go through: one a parameter, None for constants."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple) and not isinstance(value, Pointer):
            return tuple(map(plain, value))
        return value.address if isinstance(value, Pointer) else value

    return [None if kind == "constexpr" else plain(values[name]) for name, kind in kernel.src.signature.items()]
