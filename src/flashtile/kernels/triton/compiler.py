"""Machine code for a specialisation, for the GPU at hand or for one that is not here."""

from __future__ import annotations

import functools
import re
from typing import Any

from flashtile.errors import UnavailableError, wrong
from flashtile.kernels.triton import interpreting
from flashtile.kernels.triton.specialisation import Specialisation

TENSOR_MEMORY = 512  # columns that a Blackwell processor has
ARCHITECTURES = "sm_80, sm_90, sm_100 and so on, or gfx942 and so on"


def target_of(arch: str) -> Any:
    """Triton's target of an architecture by its vendor's name. Raises: SpecError."""
    from triton.backends.compiler import GPUTarget

    if match := re.fullmatch(r"sm_(\d{2,3})", arch):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx9[0-9a-f]+", arch):
        return GPUTarget("hip", arch, 64)
    raise wrong("arch", repr(arch), ARCHITECTURES)


@functools.cache
def compiled(specialisation: Specialisation, arch: str) -> Any:
    """The kernel as `triton.compile` gives it: machine code in `.asm`, how to launch it in `.metadata`.

    Triton keeps it on disk, in its own cache. Raises: UnavailableError with Triton's error as its cause.
    """
    if interpreting():
        raise UnavailableError("TRITON_INTERPRET=1: got an interpreter, expected a compiler: unset it")
    import triton

    from flashtile.kernels.triton.jit import source_of

    # Whether multiply-adds fuse is said outright: Triton's default is about to change.
    options = {
        "num_warps": specialisation.num_warps,
        "num_stages": specialisation.num_stages,
        "enable_fp_fusion": specialisation.fuses,
    }
    if specialisation.registers is not None:
        options["maxnreg"] = specialisation.registers
    target, what = target_of(arch), f"kernel {specialisation.kernel} for {arch}"
    try:
        kernel = triton.compile(source_of(specialisation), target=target, options=options)
    except Exception as cause:
        problem = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise UnavailableError(f"{what}: Triton cannot compile it: {problem}") from cause
    columns = getattr(kernel.metadata, "tmem_size", 0) or 0
    if columns > TENSOR_MEMORY:  # the assembler makes a trap of such a kernel, and says nothing
        raise UnavailableError(f"{what}: got {columns} columns of tensor memory, expected {TENSOR_MEMORY} at most")
    return kernel
