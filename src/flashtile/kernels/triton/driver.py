"""NVIDIA's driver through ctypes: what a device is, and the launch of a kernel, without a compiler and without Triton.

Whether there is a device at all is asked of the file system: initialising CUDA in a process keeps its forked children
from using it, and a survey must not do that to a program that never comes near a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtile.errors import KernelError

LIBRARY = "libcuda.so.1"
# Device files of the kernel drivers: NVIDIA's, NVIDIA's under WSL, AMD's.
NVIDIA_FILES, AMD_FILE = ("nvidia[0-9]*", "dxg"), "kfd"
NO_GPU = "no GPU of NVIDIA or AMD in this machine"

# From cuda.h: CUdevice_attribute, CUfunction_attribute, and what the extra options of a launch are told apart by.
_MAJOR, _MINOR, _SHARED, _PROCESSORS, _CACHE = 75, 76, 97, 16, 38
_DYNAMIC_SHARED = 8
_BUFFER_POINTER, _BUFFER_SIZE, _END = 1, 2, 0
_OUT_OF_MEMORY = 2

MOST_PARAMETERS = 32764  # bytes of a block, of the newest devices; 4096 of others

PLAIN_SHARED = 48 << 10  # bytes of shared memory that a kernel may have without asking


@dataclass(frozen=True)
class Device:
    """A GPU: its name, its architecture ("sm_90"), the most shared memory of a program in bytes, its processors, the
    bytes of its cache."""

    name: str
    arch: str
    shared: int
    processors: int
    cache: int = 0


@dataclass(frozen=True)
class Function:
    """A kernel in the memory of a device, ready to be launched."""

    device: int
    handle: int
    module: int  # stays loaded: kernels are few, and launches of them may be under way
    threads: int  # of a program
    shared: int  # dynamic shared memory of a program, bytes
    context: int  # of the device's: what must be current at a launch


def missing() -> str | None:
    """Why no GPU can be used here, None if one can."""
    folder = Path("/dev")
    if Path(folder, AMD_FILE).exists():
        return None
    if not any(found for pattern in NVIDIA_FILES for found in folder.glob(pattern)):
        return NO_GPU
    try:
        library()
    except OSError as e:
        return f"NVIDIA's driver cannot be loaded: {e}"
    return None


@functools.cache
def library() -> Any:
    """NVIDIA's driver. Raises: OSError if it is not installed."""
    driver = ctypes.CDLL(LIBRARY)
    driver.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.c_void_p]
    number, pointer = ctypes.c_uint, ctypes.c_void_p
    driver.cuLaunchKernel.argtypes = [pointer, *[number] * 6, number, pointer, pointer, pointer]
    return driver


def check(status: int, what: str) -> None:
    """Raise KernelError if a call of the driver failed; MemoryError is its cause where the device is full."""
    if not status:
        return
    text = ctypes.c_char_p()
    library().cuGetErrorString(status, ctypes.byref(text))
    error = KernelError(f"{what}: NVIDIA's driver: error {status}: {(text.value or b'unknown').decode()}")
    raise error from (MemoryError("the device is out of memory") if status == _OUT_OF_MEMORY else None)


@functools.cache
def device(number: int) -> Device:
    """The device that CUDA counts as `number`. Raises: KernelError if the driver says no."""
    try:
        driver = library()
    except OSError:
        return _amd_device()
    handle = _handle(number)
    name = ctypes.create_string_buffer(256)
    check(driver.cuDeviceGetName(name, len(name), handle), "name of the device")

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        check(driver.cuDeviceGetAttribute(ctypes.byref(value), which, handle), f"attribute {which} of the device")
        return value.value

    arch = f"sm_{10 * attribute(_MAJOR) + attribute(_MINOR)}"
    return Device(name.value.decode(), arch, attribute(_SHARED), attribute(_PROCESSORS), attribute(_CACHE))


def _handle(number: int) -> ctypes.c_int:
    check(library().cuInit(0), "start")
    handle = ctypes.c_int()
    check(library().cuDeviceGet(ctypes.byref(handle), number), f"device {number}")
    return handle


def _amd_device() -> Device:
    """What Triton knows of AMD's current device."""
    from triton.runtime.driver import driver

    properties = driver.active.utils.get_device_properties(driver.active.get_current_device())
    arch = str(driver.active.get_current_target().arch)
    return Device(arch, arch, properties["max_shared_mem"], properties["multiprocessor_count"])


@functools.cache
def _primary_context(number: int) -> ctypes.c_void_p:
    """The context that CUDA's own runtime, and so every library here, uses on a device."""
    context = ctypes.c_void_p()
    check(library().cuDevicePrimaryCtxRetain(ctypes.byref(context), _handle(number)), f"context of device {number}")
    return context


@contextlib.contextmanager
def _on(number: int) -> Iterator[Any]:
    driver = library()
    check(driver.cuCtxPushCurrent_v2(_primary_context(number)), f"device {number}")
    try:
        yield driver
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def load(number: int, machine_code: bytes, name: str, threads: int, shared: int) -> Function:
    """Bring machine code to a device.

    Raises: KernelError, also for a kernel that needs more shared memory than the device has.
    """
    most = device(number).shared
    if shared > most:
        raise KernelError(f"kernel {name}: got {shared} bytes of shared memory, expected {most} at most on this device")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with _on(number) as driver:
        check(driver.cuModuleLoadData(ctypes.byref(module), machine_code), f"load of kernel {name}")
        status = driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
        check(status, f"kernel {name}")
        if shared > PLAIN_SHARED:
            status = driver.cuFuncSetAttribute(function, _DYNAMIC_SHARED, shared)
            check(status, f"{shared} bytes of shared memory for kernel {name}")
    if function.value is None or module.value is None:
        raise KernelError(f"load of kernel {name}: NVIDIA's driver gave no function")
    return Function(number, function.value, module.value, threads, shared, _primary_context(number).value or 0)


def launch(function: Function, grid: int, stream: int, parameters: bytes | bytearray) -> None:
    """Put a kernel into a stream: `grid` programs with one block of parameters, which is copied. Does not wait.

    Raises: KernelError.
    """
    if len(parameters) > MOST_PARAMETERS:
        raise KernelError(f"launch: got {len(parameters)} bytes of parameters, expected {MOST_PARAMETERS} at most")
    driver = library()
    try:
        frame = _frames.pop()
    except IndexError:
        frame = Frame()
    frame.block[: len(parameters)] = parameters
    frame.size.value = len(parameters)
    arguments = function.handle, grid, 1, 1, function.threads, 1, 1, function.shared, stream, None, frame.extra
    if driver.cuCtxGetCurrent(frame.current) == 0 and frame.context.value == function.context:
        status = driver.cuLaunchKernel(*arguments)
    else:  # this thread has not met the device yet, or met it in a context of its own
        with _on(function.device):
            status = driver.cuLaunchKernel(*arguments)
    _frames.append(frame)
    if status:
        check(status, "launch")


class Frame:
    """What the driver reads during a launch: the block of parameters and where it lies."""

    def __init__(self) -> None:
        self.size, self.context = ctypes.c_size_t(), ctypes.c_void_p()
        self.current = ctypes.byref(self.context)
        self._memory = ctypes.create_string_buffer(MOST_PARAMETERS)
        self.block = memoryview(self._memory).cast("B")
        self.extra = (ctypes.c_void_p * 5)(
            _BUFFER_POINTER, ctypes.addressof(self._memory), _BUFFER_SIZE, ctypes.addressof(self.size), _END
        )


# Frames that no launch uses: one for each thread, or signal handler, that ever launched at the same time as others.
_frames: list[Frame] = []
