"""Memory that a call needs beyond its arrays, as the operating system counts it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROCESS = Path("/proc/self")


@dataclass
class Growth:
    """How far resident memory rose above its level at the start; None where the system does not tell."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_growth() -> Iterator[Growth]:
    """Measure the peak of resident memory within a block, above what was resident when it began.

    Linux only: elsewhere a process knows its all-time peak at most, which says nothing of one call. Where the
    kernel does not let the peak be reset, what came before counts in and the result is too large. Linux counts pages
    in batches of each thread, which makes a fraction of a megabyte either way.
    """
    growth = Growth()
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")  # forget the peak so far
    before = _resident("VmRSS")
    yield growth
    peak = _resident("VmHWM")
    if before is not None and peak is not None:
        growth.bytes = max(peak - before, 0)


def _resident(field: str) -> int | None:
    """A field of /proc/self/status in bytes."""
    with contextlib.suppress(OSError):
        for line in (_PROCESS / "status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    return None


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine if hasattr(os, "uname") else "unknown"
