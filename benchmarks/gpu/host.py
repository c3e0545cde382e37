"""What a call on a GPU costs on the host: all up to and with its launches, taken by a driver that does nothing.

No GPU is needed: tests/gpu/fake_cuda.c stands for NVIDIA's driver, and tensors in CPU memory for those on a device.
What torch's allocator on a device and the real cuLaunchKernel cost is not in the numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import machine

ARCH = "90"
OPTIONS = ("plain", "causal", "softcap", "parts", "mask function")


def measure(option: str, rounds: int = 60, repeats: int = 30) -> dict[str, float]:
    """Least microseconds of a repeated call; of tracing alone, where there is a function; of a tiny call of torch's."""
    import torch

    import flashtile.torch
    from flashtile.score.program import Program

    pretend()
    q, few, k = (torch.randn(shape).bfloat16() for shape in ((1, 8, 512, 64), (1, 8, 1, 64), (1, 2, 8192, 64)))

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (j > 5)

    attend = functools.partial(flashtile.torch.attention, kernel="triton")
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: attend(q, q, q),
        "causal": lambda: attend(q, q, q, causal=True),
        "softcap": lambda: attend(q, q, q, causal=True, softcap=20.0),
        "parts": lambda: attend(few, k, k),
        "mask function": lambda: attend(q, q, q, mask=mask),
    }
    if launches(calls[option]) < 2:
        raise RuntimeError(f"{option}: launched no kernels: what is measured is something else")
    tiny = q[:, :1, :16].contiguous()
    found = {
        "microseconds": least(calls[option], rounds, repeats),
        "torch": least(lambda: torch.nn.functional.scaled_dot_product_attention(tiny, tiny, tiny), rounds, repeats),
    }
    if option == "mask function":
        found["trace"] = least(lambda: Program.of((1, 8, 512, 512), mask=mask), rounds, repeats)
    return found


def least(call: Callable[[], Any], rounds: int, repeats: int) -> float:
    """Microseconds: the least of many, as others use this machine, too."""
    call()
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - began) / repeats)
    return best * 1e6


def pretend() -> None:
    """From now on this process has a GPU that takes every launch, and CPU tensors count as tensors on it."""
    import torch
    import triton

    from flashtile import devices, owners
    from flashtile.arrays import view_of
    from flashtile.kernels import triton as family
    from flashtile.kernels.triton import driver
    from flashtile.torch import attend as door
    from flashtile.torch.tensors import ON_GPU, OTHER

    class OnHost(owners.Torch):
        def view(self, x: Any) -> Any:
            return view_of(x)._replace(device="cuda:0")

        def current(self, x: Any) -> Any:
            return contextlib.nullcontext()

        def stream(self, x: Any) -> int:
            return 0

        def upload(self, array: np.ndarray, like: Any) -> Any:
            return torch.from_numpy(array.reshape(-1).view(np.uint8)).clone()

        def number(self, x: Any) -> int:
            return 0

        def capturing(self) -> bool:
            return False

        def out_of_memory(self) -> tuple[type[Exception], ...]:
            return (MemoryError,)

    folder = machine.folder_until_exit("driver")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source, library = machine.ROOT / "tests" / "gpu" / "fake_cuda.c", folder / "libcuda.so.1"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-I", include, "-o", library, source], check=True)
    os.environ.update(FAKE_CUDA_ARCH=ARCH, FAKE_CUDA_BOUND="1")
    os.environ.pop("FAKE_CUDA_LOG", None)
    owner = OnHost()
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (driver, "LIBRARY", str(library)),
        (driver, "missing", lambda: None),
        # The self-test wants a GPU that computes.
        (family, "FAMILY", dataclasses.replace(family.FAMILY, refuses=lambda spec: None)),
        (devices, "owner_of", lambda library: owner),
        (door, "kind_of", lambda *tensors: OTHER),
        (door, "kind_of_others", lambda **tensors: ON_GPU),
    )
    for module, name, value in replaced:
        getattr(module, name)  # what no one reads any more would not be replaced
        setattr(module, name, value)


def launches(call: Callable[[], Any]) -> int:
    """How many kernels a call launches."""
    from flashtile.kernels.triton import driver

    seen, launch = [], driver.launch
    try:
        driver.launch = lambda *arguments: (seen.append(1), launch(*arguments))[1]
        call()
    finally:
        driver.launch = launch
    return len(seen)
