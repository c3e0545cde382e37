"""A profile as JSON in the trace event format: what Perfetto and chrome://tracing show.

Source: "Trace Event Format", the document of the Chromium project: complete events "X", metadata "M",
flows "s" and "f".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashtile.engines.starpu.records import Records, TaskRecord


def write(profile: Records, path: Path) -> None:
    """See Profile.chrome_trace."""
    path.write_text(json.dumps({"traceEvents": list(events(profile)), "displayTimeUnit": "ms"}))


def events(profile: Records) -> Iterator[dict[str, Any]]:
    """Every event of the trace; timestamps start at 0."""
    process = {"pid": os.getpid()}
    yield {"ph": "M", "name": "process_name", **process, "args": {"name": "StarPU"}}
    for worker, name in enumerate(profile.workers):
        yield {"ph": "M", "name": "thread_name", **process, "tid": worker, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", **process, "tid": worker, "args": {"sort_index": worker}}
    tasks = profile.tasks
    for task in tasks:
        yield {**_slice(task), **process}
    for number, (earlier, later) in enumerate(profile.dependencies):
        first, second = tasks[earlier], tasks[later]
        arrow = {"cat": "dependency", "name": "waits for", "id": number, **process}
        # An arrow belongs to the slice that is open at its time, so it begins halfway through the one that is over.
        yield {"ph": "s", **arrow, "tid": first.worker, "ts": _microseconds((first.start + first.end) / 2)}
        yield {"ph": "f", "bp": "e", **arrow, "tid": second.worker, "ts": _microseconds(second.start)}


def _slice(task: TaskRecord) -> dict[str, Any]:
    seconds = task.end - task.start
    about: dict[str, Any] = {"tile": task.tile, "number": task.number, "outcome": task.outcome}
    about["waited_us"] = _microseconds(task.start - task.submitted)
    if task.flops and seconds > 0 and task.outcome == "done":
        about |= {"GFLOP": task.flops / 1e9, "GFLOP/s": round(task.flops / seconds / 1e9, 3)}
    about |= {"footprint": f"{task.footprint:08x}", "priority": task.priority}
    start, end = _microseconds(task.start), _microseconds(task.end)
    return {
        "ph": "X",
        "name": task.codelet,
        "cat": "task",
        "tid": task.worker,
        "ts": start,
        "dur": round(end - start, 3),
        "args": about,
    }


def _microseconds(seconds: float) -> float:
    """To the nanosecond, which is what the clock gives."""
    return round(seconds * 1e6, 3)
