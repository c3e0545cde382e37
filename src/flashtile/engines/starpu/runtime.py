"""StarPU's state in this process, checked before every C call: its own assertions abort, and a fork would hang."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from flashtile.checks import integer
from flashtile.engines.starpu import build
from flashtile.errors import UnavailableError, wrong
from flashtile.threads import get_num_threads

if TYPE_CHECKING:
    from flashtile.engines.starpu.manifest import Kernels

ARCHITECTURES = ("cpu", "cuda")
# Reaching a limit on memory, StarPU 1.3 without a disk to write to waits for ever.
MEMORY_LIMITS = ("STARPU_LIMIT_CPU_MEM", "STARPU_LIMIT_CPU_NUMA_MEM")
DISK = "STARPU_DISK_SWAP"
KERNELS_VARIABLE = "FLASHTILE_STARPU_KERNELS"  # names the folder of kernels for CUDA workers

T = TypeVar("T")


class Drained(Protocol):
    """Tasks that are under way: a jobs.Job."""

    def drain(self) -> None:
        """Skip what has not begun, and wait for what has."""
        ...


class Batch(Protocol):
    """Tasks that are being recorded. shim.c fills in their events."""

    events: np.ndarray
    submitted: int


class Recorder(Protocol):
    """Who notes what is submitted: a profile.Profile."""

    def record(self, job: Any, codelet: Any, handles: np.ndarray, modes: np.ndarray, tasks: np.ndarray) -> Batch:
        """Note tasks that are about to be submitted."""
        ...

    def forget(self, handles: np.ndarray) -> None:
        """Note that tiles are being unregistered."""
        ...


class Runtime:
    """A running StarPU. `owned` is whether we started it; `implicit`, whether for attention(engine="starpu")."""

    def __init__(self, module: Any, owned: bool, implicit: bool, kernels: Kernels | None) -> None:
        self.lib, self.ffi, self.kernels = module.lib, module.ffi, kernels
        self.lib.ft_driver_forget()  # contexts of an earlier start have ended
        self.owned, self.implicit, self.pauses = owned, implicit, owned and implicit
        self.pid = os.getpid()
        self.jobs: weakref.WeakSet[Drained] = weakref.WeakSet()
        self.recorder: Recorder | None = None
        self.stopping: list[Callable[[], None]] = []  # what is called before StarPU's shutdown
        self.stopped: list[Callable[[], None]] = []  # and after it
        self.unwritten: set[int] = set()  # handles without contents: StarPU ends the process of who reads one
        self.handles: dict[int, Any] = {}  # registered: what must live until they are not; see tiles.py
        self.held: set[int] = set()  # acquired by the program
        self.active = 0
        self._made: dict[Any, Any] = {}
        self._constants: dict[str, int] = {}
        self._scratch: dict[int, np.ndarray] = {}
        if self.pauses:
            self.lib.ft_pause()

    @property
    def over(self) -> bool:
        """Whether this start of StarPU has ended."""
        return _runtime is not self

    def once(self, make: Callable[[Runtime], T]) -> T:
        """What `make` makes of this start of StarPU, at first use; as long as it runs, the same."""
        with _lock:
            if make not in self._made:
                self._made[make] = make(self)
            made: T = self._made[make]
            return made

    def constant(self, name: str) -> int:
        """A number of StarPU's header: an access mode, an architecture, a limit."""
        if name not in self._constants:
            self._constants[name] = int(self.lib.ft_constant(name.encode()))
        return self._constants[name]

    def scratch(self, nbytes: int) -> int:
        """A handle for mode SCRATCH: memory that each worker has for itself, kept until shutdown. Sizes go up in powers
        of two, so there are few."""
        nbytes = 1 << (nbytes - 1).bit_length()
        with _lock:
            if nbytes not in self._scratch:
                self._scratch[nbytes] = self.register([0], [nbytes])
            return int(self._scratch[nbytes][0])

    def register(self, addresses: Any, nbytes: Any) -> np.ndarray:
        """Handles (n,) of the variable interface; address 0: StarPU owns the memory."""
        where, sizes = (np.ascontiguousarray(x, np.uint64) for x in (addresses, nbytes))
        handles = np.empty(where.size, np.uint64)
        at = [self.ffi.from_buffer("uint64_t[]", x) for x in (where, sizes, handles)]
        self.lib.ft_register_variables(where.size, *at)
        return handles

    def release(self, *held: int) -> None:
        """End the program's hold of tiles; of those that are not held, nothing."""
        for handle in held:
            if handle in self.held:
                self.held.discard(handle)
                self.lib.ft_release(handle)

    def unregister(self, handles: np.ndarray, how: int) -> None:
        """See ft_unregister."""
        if self.recorder is not None:
            self.recorder.forget(handles)
        self.lib.ft_unregister(handles.size, self.ffi.from_buffer("uint64_t[]", np.ascontiguousarray(handles)), how)

    def workers(self, architecture: str | None = None) -> int:
        return int(self.lib.ft_workers(-1 if architecture is None else self.constant(architecture.upper())))

    def worker_name(self, worker: int) -> str:
        name = self.ffi.new("char[64]")
        return self.ffi.string(name).decode() if self.lib.ft_worker_name(worker, name, 64) else f"worker {worker}"

    def stay_awake(self) -> None:
        """Pause no more: workers poll until shutdown, since tasks may come at any time."""
        with _lock:
            if self.pauses:
                self.pauses = False
                if not self.active:
                    self.lib.ft_resume()

    @contextmanager
    def working(self) -> Iterator[None]:
        """While tasks are there. Idle workers poll, so outside of it a runtime of our own is paused."""
        if self.pauses:
            with _lock:
                self.active += 1
                if self.active == 1:
                    self.lib.ft_resume()
        try:
            yield
        finally:
            if self.pauses:
                with _lock:
                    self.active -= 1
                    if not self.active:
                        self.lib.ft_pause()


_runtime: Runtime | None = None
_lock = threading.RLock()


def running() -> bool:
    """Whether StarPU was started, or taken over from the program, by init or by a call with engine="starpu"."""
    return _runtime is not None


def current() -> Runtime:
    """The runtime. Raises: UnavailableError before init, and in a forked child, whose workers stayed behind."""
    if _runtime is None:
        raise UnavailableError("starpu: got a call before it runs, expected flashtile.starpu.init() first")
    if _runtime.pid != os.getpid():
        raise UnavailableError(
            f"starpu: got a call in process {os.getpid()}, a fork of process {_runtime.pid} where StarPU runs, "
            'expected that process, or one started afresh (multiprocessing\'s "spawn")'
        )
    return _runtime


def init(
    workers: int | None = None,
    *,
    cuda: int | None = None,
    scheduler: str | None = None,
    calibrate: bool | None = None,
    models: str | os.PathLike[str] | None = None,
    cuda_kernels: str | os.PathLike[str] | None = None,
) -> Runtime:
    """Start StarPU; see flashtile.starpu.init."""
    global _runtime
    with _lock:
        if _runtime is not None:
            now = current()  # in a child the error is another
            if not (now.implicit and now.owned):
                raise wrong("init", "a second call", "shutdown() before another init()")
            if now.active or now.handles:
                got = 'a call while a StarPU that attention(engine="starpu") started has tasks or tiles'
                raise wrong("init", got, "shutdown() before it")
            shutdown()  # what is asked for here replaces the defaults of that start
        kernels = _kernels(cuda_kernels)
        module = build.load()
        if module.lib.ft_is_initialized():
            _runtime = Runtime(module, owned=False, implicit=False, kernels=kernels)
        else:
            _start(module, workers, cuda, scheduler, calibrate, models)
            _runtime = Runtime(module, owned=True, implicit=False, kernels=kernels)
        return _runtime


def ensure() -> Runtime:
    """The runtime, started with defaults if there is none: what attention(engine="starpu") uses."""
    global _runtime
    with _lock:
        if _runtime is None:
            kernels = _kernels(None)
            module = build.load()
            owned = not module.lib.ft_is_initialized()
            if owned:
                _start(module, None if "STARPU_NCPU" in os.environ else _threads(module), None, None, None, None)
            _runtime = Runtime(module, owned, implicit=True, kernels=kernels)
        return current()


def shutdown() -> None:
    """Wait for every task, unregister what is registered, save the models and stop. Without a runtime: nothing."""
    global _runtime
    with _lock:
        runtime = _runtime
        if runtime is None or runtime.pid != os.getpid():
            return
        if runtime.held:
            raise wrong("shutdown", f"{len(runtime.held)} tiles still acquired", "every tile released")
        with runtime.working():
            for job in list(runtime.jobs):
                job.drain()
            for keep in {id(keep): keep for keep in runtime.handles.values()}.values():
                keep.unregister()
            for scratch in runtime._scratch.values():
                runtime.unregister(scratch, 1)
            for end in runtime.stopping:
                end()
        if runtime.owned:
            if runtime.pauses:
                runtime.lib.ft_resume()  # a paused worker cannot be told to end
            runtime.lib.ft_shutdown()
            for end in runtime.stopped:
                end()
        _runtime = None


def schedulers(module: Any = None) -> list[str]:
    """The scheduling policies that StarPU knows."""
    module = module or build.load()
    names: list[str] = []
    text = module.ffi.new("char[64]")
    while module.lib.ft_scheduler_name(len(names), text, 64):
        names.append(module.ffi.string(text).decode())
    return names


def _kernels(folder: str | os.PathLike[str] | None) -> Kernels | None:
    """Those in a folder, or in the one that the environment names."""
    from flashtile.engines.starpu.manifest import Kernels

    folder = folder or os.environ.get(KERNELS_VARIABLE)
    return Kernels(folder) if folder else None


def _threads(module: Any) -> int:
    return min(get_num_threads(), int(module.lib.ft_constant(b"MAXCPUS")))


def _start(module: Any, workers: Any, cuda: Any, scheduler: Any, calibrate: Any, models: Any) -> None:
    """Validate, then initialise."""
    lib = module.lib
    most = int(lib.ft_constant(b"MAXCPUS"))
    if workers is not None and not 1 <= (integer(workers) or 0) <= most:
        raise wrong("workers", repr(workers), f"an integer from 1 to {most}, this StarPU's limit")
    if cuda is not None and (integer(cuda) is None or cuda < 0 or (cuda and not lib.ft_constant(b"USE_CUDA"))):
        able = "at least 0" if lib.ft_constant(b"USE_CUDA") else "0: this StarPU was built without CUDA"
        raise wrong("cuda", repr(cuda), able)
    if calibrate is not None and not isinstance(calibrate, bool):
        raise wrong("calibrate", repr(calibrate), "True, False or None")
    known = schedulers(module)
    for argument, name in (("scheduler", scheduler), ("STARPU_SCHED", os.environ.get("STARPU_SCHED"))):
        if name is not None and name not in known:
            raise wrong(argument, repr(name), "one of " + ", ".join(known))
    _check_memory_limits()
    if models is not None:
        os.makedirs(models, exist_ok=True)
        os.environ["STARPU_PERF_MODEL_DIR"] = os.fspath(models)
    numbers = [-1 if x is None else int(x) for x in (workers, cuda, calibrate)]
    os.environ.setdefault("STARPU_WORKERS_GETBIND", "1")  # workers stay on the CPUs that this process may use
    status = lib.ft_init(*numbers[:2], (scheduler or "").encode(), numbers[2])
    if status:
        raise UnavailableError(
            f"starpu: starting it failed with status {status} ({os.strerror(-status)}), expected at least one worker; "
            "see STARPU_NCPU, STARPU_NCUDA"
        )


def _check_memory_limits() -> None:
    limited = [name for name in os.environ if name.startswith(MEMORY_LIMITS)]
    if limited and DISK not in os.environ:
        got = f"{os.environ[limited[0]]} without {DISK}"
        raise wrong(limited[0], got, f"also {DISK}=<folder>: a full memory would wait for ever")


def _forget_lock() -> None:
    """In a forked child another thread of the parent may have held it."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_forget_lock)


@atexit.register
def _stop_at_exit() -> None:
    if _runtime is not None and _runtime.pid == os.getpid():
        _runtime.release(*_runtime.held)
        shutdown()
