"""The GPU's driver, asked without importing Triton: is there one here, and what is the device that an array lies on.

Whether there is a device is asked of the file system: initialising CUDA in a process keeps its forked children from
using it, and a survey must not do that to a program that never comes near a GPU.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

from flashtile.errors import UnavailableError

LIBRARY = "libcuda.so.1"
# Device files of the kernel drivers: NVIDIA's, NVIDIA's under WSL, AMD's.
NVIDIA_FILES, AMD_FILE = ("nvidia[0-9]*", "dxg"), "kfd"

# CUdevice_attribute, of cuda.h.
_MAJOR, _MINOR, _SHARED, _PROCESSORS = 75, 76, 97, 16


@dataclass(frozen=True)
class Device:
    """A GPU: its name, its architecture ("sm_90"), and the most shared memory of a program, bytes."""

    name: str
    arch: str
    shared: int
    processors: int


def missing() -> str | None:
    """Why no GPU can be used here, None if one can."""
    folder = Path("/dev")
    if Path(folder, AMD_FILE).exists():
        return None
    if not any(found for pattern in NVIDIA_FILES for found in folder.glob(pattern)):
        return "no GPU of NVIDIA or AMD in this machine, and TRITON_INTERPRET=1 is not set"
    try:
        library()
    except OSError as e:
        return f"NVIDIA's driver cannot be loaded: {e}"
    return None


def library() -> ctypes.CDLL:
    """NVIDIA's driver. Raises: OSError if it is not installed."""
    return ctypes.CDLL(LIBRARY)


@functools.cache
def device(number: int) -> Device:
    """The device that CUDA counts as `number`, which a library has brought up already, as arrays lie on it.

    Raises: UnavailableError if the driver says no.
    """
    try:
        driver = library()
    except OSError:
        return _amd_device()
    name, handle = ctypes.create_string_buffer(256), ctypes.c_int()
    _check(driver, driver.cuInit(0))
    _check(driver, driver.cuDeviceGet(ctypes.byref(handle), number))
    _check(driver, driver.cuDeviceGetName(name, len(name), handle))

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _check(driver, driver.cuDeviceGetAttribute(ctypes.byref(value), number, handle))
        return value.value

    arch = f"sm_{10 * attribute(_MAJOR) + attribute(_MINOR)}"
    return Device(name.value.decode(), arch, attribute(_SHARED), attribute(_PROCESSORS))


def _amd_device() -> Device:
    """What Triton knows of AMD's current device."""
    from triton.runtime.driver import driver

    properties = driver.active.utils.get_device_properties(driver.active.get_current_device())
    arch = str(driver.active.get_current_target().arch)
    return Device(arch, arch, properties["max_shared_mem"], properties["multiprocessor_count"])


def _check(driver: ctypes.CDLL, status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise UnavailableError(f"NVIDIA's driver: error {status}: {(text.value or b'unknown').decode()}")
