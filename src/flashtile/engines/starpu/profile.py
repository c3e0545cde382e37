"""What tasks did: when and where each ran, what it waited for. Nothing is recorded outside of a `with` block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from flashtile.engines.starpu import pictures, runtime, trace
from flashtile.engines.starpu.codelets import Codelet
from flashtile.engines.starpu.graph import Graph, Modes
from flashtile.engines.starpu.jobs import Job, named
from flashtile.engines.starpu.records import TaskRecord
from flashtile.errors import UnavailableError, wrong

# ft_event of shim.h
EVENT = np.dtype(
    [
        ("submit", np.float64),
        ("start", np.float64),
        ("end", np.float64),
        ("worker", np.int32),
        ("ran", np.int32),
        ("status", np.int32),
    ],
    align=True,
)
KEPT = ["tile", "flops", "footprint", "priority"]  # of a task as submitted


class Batch:
    """Tasks that were submitted together."""

    def __init__(self, codelet: Codelet, handles: np.ndarray, modes: np.ndarray, tasks: np.ndarray) -> None:
        self.codelet, self.handles, self.modes = codelet.name, handles, modes
        self.labels = codelet.labels
        self.tasks = tasks[KEPT].copy()  # a flow submits the same array again
        self.events = np.zeros(len(tasks), EVENT)  # filled in by shim.c
        self.submitted = len(tasks)


class Profile:
    """A record of the tasks that flashtile submits while its `with` block lasts; see `flashtile.starpu.profile`."""

    def __init__(self) -> None:
        self.workers: tuple[str, ...] = ()  # their names
        self._runtime: runtime.Runtime | None = None
        self._ended = False
        self._jobs: set[Job] = set()
        self._steps: list[Batch | np.ndarray] = []  # batches, and handles that were unregistered between them
        self._records: tuple[TaskRecord, ...] | None = None

    def __enter__(self) -> Profile:
        now = runtime.current()
        if now.recorder is not None:
            raise wrong("profile", "a block inside of another", "the other one to end first")
        if self._runtime is not None:
            raise wrong("profile", "a second `with` on the same object", "a new profile() for each block")
        self._runtime = now
        self.workers = tuple(now.worker_name(n) for n in range(now.workers()))
        self._before = now.lib.ft_profiling(1)
        now.recorder = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        now = self._runtime
        assert now is not None
        now.recorder = None
        if now.pid != os.getpid():
            return
        self._ended = True
        if now.over:  # shut down: its tasks are done
            return
        try:
            for job in self._jobs:
                job.settle()
        finally:
            self._jobs.clear()
            now.lib.ft_profiling(self._before)

    def record(self, job: Job, codelet: Codelet, handles: np.ndarray, modes: np.ndarray, tasks: np.ndarray) -> Batch:
        """Note tasks that are about to be submitted."""
        batch = Batch(codelet, handles, modes, tasks)
        self._jobs.add(job)
        self._steps.append(batch)
        return batch

    def forget(self, handles: np.ndarray) -> None:
        """Note that tiles are being unregistered."""
        self._steps.append(handles.copy())

    @property
    def tasks(self) -> tuple[TaskRecord, ...]:
        """Every task of the block, in the order of submission. Raises: SpecError before the block has ended."""
        self._check()
        if self._records is None:
            self._records = tuple(self._all())
        return self._records

    @property
    def dependencies(self) -> list[tuple[int, int]]:
        """(earlier, later): numbers of tasks of which the one had to wait for the other, in order.

        By the rule of a sequential task flow, from the tiles that tasks use; the program's own tasks are not known.
        Raises: SpecError before the block has ended.
        """
        self._check()
        assert self._runtime is not None
        graph = Graph(Modes(*(self._runtime.constant(name) for name in ("W", "SCRATCH", "COMMUTE"))))
        for step in self._steps:
            if isinstance(step, Batch):
                for handles, modes in zip(step.handles[: step.submitted].tolist(), step.modes.tolist(), strict=False):
                    graph.add(handles, modes)
            else:
                graph.forget(step.ravel().tolist())
        return sorted(graph.edges)

    def chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the tasks as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

        A thread for each worker, a slice for each task with its tile, FLOPs and rate, an arrow for each dependency.
        Units:   microseconds, as the trace event format has them.
        Raises:  SpecError before the block has ended; OSError.
        """
        trace.write(self, Path(path))

    def gantt(self, path: str | os.PathLike[str]) -> None:
        """Draw the tasks as a PNG: a row for each worker, a bar for each task, a colour for each codelet.

        Raises: SpecError before the block has ended, without a task, or for a path that does not end in .png;
                UnavailableError without matplotlib; OSError.
        """
        pictures.gantt(self, Path(path))

    def dot(self, path: str | os.PathLike[str]) -> None:
        """Write the task graph in Graphviz' language: a node for each task, an edge for each dependency.

        Raises: SpecError before the block has ended; OSError.
        """
        Path(path).write_text(pictures.dot(self))

    def _check(self) -> None:
        if self._runtime is not None and self._runtime.pid != os.getpid():
            raise UnavailableError("profile: got a fork of the process that it records, expected that process")
        if not self._ended:
            raise wrong("profile", "a block that has not ended", "the profile to be read after its `with` block")

    def _all(self) -> Iterator[TaskRecord]:
        batches = [step for step in self._steps if isinstance(step, Batch) and step.submitted]
        origin = min((float(b.events["submit"][: b.submitted].min()) for b in batches), default=0.0)
        number = 0
        for batch in batches:
            for task, event in zip(batch.tasks[: batch.submitted].tolist(), batch.events.tolist(), strict=False):
                tile, flops, footprint, priority = task
                submit, start, end, worker, ran, status = event
                outcome = "skipped" if not ran else "failed" if status else "done"
                submit, start, end = ((t - origin) / 1e6 for t in (submit, start, end))
                yield TaskRecord(
                    number,
                    batch.codelet,
                    named(batch.labels, tile),
                    worker,
                    submit,
                    start,
                    end,
                    outcome,
                    flops,
                    footprint,
                    priority,
                )
                number += 1
