"""A job: tasks that are waited for, and fail, together. Batches of them are submitted in one C call."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from flashtile.engines.starpu import runtime
from flashtile.engines.starpu.codelets import Codelet, labels_of
from flashtile.errors import KernelError, UnavailableError, wrong
from flashtile.progress import Report

BUFFERS, VALUES, SIZES = 12, 6, 12  # of shim.h
POLL_MILLISECONDS = 50  # between looks at Ctrl-C and at the progress

# ft_task of shim.h
TASK = np.dtype(
    [
        ("program", np.uint64),
        ("begin", np.int64),
        ("end", np.int64),
        ("step", np.int64),
        ("rows", np.int64, BUFFERS),
        ("bytes", np.int64, BUFFERS),
        ("values", np.int64, VALUES),
        ("sizes", np.int64, SIZES),
        ("tile", np.int64, 4),
        ("flops", np.float64),
        ("footprint", np.uint32),
        ("priority", np.int32),
        ("heads", np.int32),
        ("turned", np.uint32),
    ],
    align=True,
)


def named(labels: tuple[str, ...], tile: Any) -> str:
    """The numbers of a task's tile in words."""
    return ", ".join(f"{label} {number}" for label, number in zip(labels, tile, strict=False))


class Job:
    """Tasks whose first error is kept: those that follow it are skipped, and `wait` raises it."""

    def __init__(self) -> None:
        self.runtime = runtime.current()
        self._lib = self.runtime.lib
        assert self.runtime.ffi.sizeof("ft_task") == TASK.itemsize
        self._job = self.runtime.ffi.gc(self._lib.ft_job_new(), self._lib.ft_job_free)
        self._keep: list[Any] = []  # what tasks point to
        self.runtime.jobs.add(self)

    def submit(self, codelet: Codelet, handles: np.ndarray, modes: np.ndarray, tasks: np.ndarray, *keep: Any) -> None:
        """Submit a batch; returns before it runs.

        Shapes:  handles (n, buffers) uint64; modes (n, buffers) int32; tasks (n,) of TASK.
        keep:    objects that must live until the tasks are done.
        Raises:  SpecError if a tile is held by the program, or is read and was never written; UnavailableError if no
                 worker can run the codelet: then tasks of the job that have not begun are skipped.
        """
        runtime.current()
        if self.runtime.held and not self.runtime.held.isdisjoint(handles.ravel().tolist()):
            raise wrong("submit", "a tile that is acquired", "tiles released before tasks use them")
        written = self._written(handles, modes)
        recorder = self.runtime.recorder
        batch = None if recorder is None else recorder.record(self, codelet, handles, modes, tasks)
        self._keep += [codelet, batch, *keep]
        ffi = self.runtime.ffi
        done = ffi.new("int64_t *")
        handles, modes = np.ascontiguousarray(handles, np.uint64), np.ascontiguousarray(modes, np.int32)
        status = self._lib.ft_submit(
            self._job,
            codelet.pointer,
            len(tasks),
            handles.shape[1],
            ffi.from_buffer("uint64_t[]", handles),
            ffi.from_buffer("int32_t[]", modes),
            ffi.cast("ft_task *", ffi.from_buffer(tasks)),
            ffi.NULL if batch is None else ffi.cast("ft_event *", ffi.from_buffer(batch.events)),
            done,
        )
        if status:
            if batch is not None:
                batch.submitted = int(done[0])
            self.drain()
            places = " or ".join(codelet.where)
            raise UnavailableError(
                f"starpu: task {done[0]} of {len(tasks)} of codelet {codelet.name} was refused with status {status} "
                f"({os.strerror(-status)}), expected a worker that can run it on {places}"
            )
        self.runtime.unwritten -= written

    def _written(self, handles: np.ndarray, modes: np.ndarray) -> set[int]:
        """Of handles without contents, those that tasks in this order write. Raises: SpecError if one reads first."""
        empty = self.runtime.unwritten
        if not empty:
            return set()
        every = handles.ravel()
        found = np.flatnonzero(np.isin(every, np.fromiter(empty, np.uint64, len(empty))))
        first = found[np.unique(every[found], return_index=True)[1]]  # where each is met for the first time
        reads = first[modes.ravel()[first] & self.runtime.constant("R") != 0]
        if reads.size:
            handle = int(every[reads.min()])
            tensor = self.runtime.handles[handle]
            index = tuple(int(n) for n in np.argwhere(tensor.handles == handle)[0])
            got = f"tile {index} of a tensor of shape {tensor.shape}, which was never written"
            raise wrong("submit", got, 'tiles that a task, or acquire(..., "W"), has written')
        return set(every[first].tolist())

    def hold(self, *objects: Any) -> None:
        """Let these live until the tasks submitted so far are done."""
        self._keep += objects

    def wait(self, report: Report | None = None, total: int = 0) -> None:
        """Return when every task submitted so far is done. Ctrl-C skips what has not begun.

        Raises: KernelError naming the codelet and the tile that failed first; the results of the job are undefined.
        """
        try:
            while self._lib.ft_job_wait(self._job, POLL_MILLISECONDS):
                if report is not None:
                    report(max(0, total - self._report().pending), total)
        except BaseException:
            self.drain()
            raise
        failure = self._report()
        self._finish()
        if failure.status:
            raise KernelError(self._describe(failure))
        if report is not None:
            report(total, total)

    def settle(self) -> None:
        """Return when every task submitted so far is done. Its error, if any, stays for `wait`."""
        with self.runtime.working():
            while self._lib.ft_job_wait(self._job, POLL_MILLISECONDS):
                pass

    def drain(self) -> None:
        """Skip what has not begun, wait for what has, and forget any error."""
        self._lib.ft_job_stop(self._job)
        while True:
            try:
                while self._lib.ft_job_wait(self._job, POLL_MILLISECONDS):
                    pass
                break
            except KeyboardInterrupt:  # a second one; the first is on its way up already
                continue
        self._finish()

    @property
    def pending(self) -> int:
        """Tasks that are not done."""
        return int(self._report().pending)

    def _finish(self) -> None:
        self._lib.ft_job_clear(self._job)
        self._keep.clear()

    def _report(self) -> Any:
        report = self.runtime.ffi.new("ft_report *")
        self._lib.ft_job_report(self._job, report)
        return report

    def _describe(self, failure: Any) -> str:
        name = self.runtime.ffi.string(failure.codelet).decode()
        tile = named(labels_of(name), failure.tile)
        worker = self.runtime.worker_name(failure.worker)
        detail = self.runtime.ffi.string(failure.detail).decode(errors="replace")
        return f"codelet {name} failed on {tile} with status {failure.status}, on {worker}" + (detail and f": {detail}")
