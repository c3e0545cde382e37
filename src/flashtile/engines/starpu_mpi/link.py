"""StarPU-MPI's state in this process: started once for a start of StarPU, stopped before it; and the transfers."""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

import numpy as np

from flashtile.engines.starpu.runtime import Runtime
from flashtile.engines.starpu_mpi import build
from flashtile.errors import UnavailableError

POLL_SECONDS = 1e-3


class Link:
    """Transfers of tiles between the ranks of a communicator; one for each start of StarPU."""

    def __init__(self, runtime: Runtime) -> None:
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise UnavailableError(
                "starpu_mpi: got an MPI without threads, expected mpi4py's own initialisation (MPI_THREAD_MULTIPLE)"
            )
        module = build.load()
        self.lib, self.ffi = module.lib, module.ffi
        self._world = MPI._addressof(MPI.COMM_WORLD)
        with runtime.working():
            if status := self.lib.ftm_start(self._world):
                raise UnavailableError(f"starpu_mpi: starting it failed with status {status}")
        runtime.stopping.append(self.lib.ftm_stop)
        _end_all_with_an_exception()
        self._tags = 0  # that calls have taken so far: the same on every rank

    def share(self) -> None:
        """Leave CPUs to workers: from now on who waits in MPI sleeps between polls, where that is Open MPI's."""
        self.lib.ftm_share()

    def take_tags(self, count: int) -> np.ndarray:
        """So many tags that no other call has or had. Ranks that make the same calls get the same ones."""
        self._tags += count
        return np.arange(self._tags - count, self._tags)

    def send(self, comm: Any, handles: np.ndarray, ranks: np.ndarray, tags: np.ndarray, *, first: bool = False) -> None:
        """Begin to send tiles; returns at once. Shapes: all (n,). first: before what else waits to be sent."""
        self._begin(self.lib.ftm_send_first if first else self.lib.ftm_send, comm, handles, ranks, tags)

    def receive(self, comm: Any, handles: np.ndarray, ranks: np.ndarray, tags: np.ndarray) -> None:
        """Begin to receive tiles; tasks submitted later that read them wait for them. Shapes: all (n,)."""
        self._begin(self.lib.ftm_receive, comm, handles, ranks, tags)

    def _begin(self, function: Any, comm: Any, handles: np.ndarray, ranks: np.ndarray, tags: np.ndarray) -> None:
        from mpi4py import MPI

        at = self.ffi.from_buffer
        arrays = [np.ascontiguousarray(x, t) for x, t in ((handles, np.uint64), (ranks, np.int32), (tags, np.int64))]
        types = ("uint64_t[]", "int32_t[]", "int64_t[]")
        function(len(handles), *map(at, types, arrays), MPI._addressof(comm))

    def last_event(self) -> float:
        """When a transfer was begun or done last, by time.monotonic()."""
        return float(self.lib.ftm_last_event()) * 1e-9

    def wait(self) -> None:
        """Return when every transfer begun here is done; Ctrl-C comes through."""
        while self.lib.ftm_pending():
            time.sleep(POLL_SECONDS)


@functools.cache
def _end_all_with_an_exception() -> None:
    """From now on an exception that leaves the program on this rank ends all ranks, once it is printed: on its way out
    this rank would otherwise wait, in StarPU-MPI's shutdown, for ranks that wait for it."""
    shown = sys.excepthook

    def hook(*raised: Any) -> None:
        shown(*raised)
        if not hasattr(sys, "ps1"):  # at a prompt the program goes on
            from mpi4py import MPI

            sys.stderr.flush()
            MPI.COMM_WORLD.Abort(1)

    sys.excepthook = hook
