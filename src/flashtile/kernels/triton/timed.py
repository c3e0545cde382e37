"""A short timed choice at the first use on a device: it may overrule the order of the table.

The tables were chosen by what kernels use, not by their speed. Where they have several rows, forward for arrays that
tensor descriptors can cut, and backward, those that passed their self-test are timed on a problem that fills the
device, in turn; the fastest is kept on disk for that device, Triton and version of the kernels.
`FLASHTILE_GPU_TIMING=0` leaves the choice to the tables.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence

from flashtile.errors import FlashtileError, wrong
from flashtile.kernels.triton.selftest import Row, sources_digest
from flashtile.llvm import cache

VARIABLE = "FLASHTILE_GPU_TIMING"
ROUNDS = 5  # of every row in turn; the least counts
WORTH = 0.97  # of the first row's seconds: what is not clearly faster overrules nothing

Stopwatch = Callable[[Row], float]  # seconds of a row's kernel on the device

_lock = threading.RLock()
_known: dict[str, dict[str, dict[str, float]]] = {}  # by device, then by what is computed: seconds by row


def enabled() -> bool:
    """Whether rows may be timed. Raises: SpecError for a value of the variable that means nothing."""
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise wrong(VARIABLE, repr(value), "0 or 1")
    return value == "1"


def fastest(where: str, version: str, rows: Sequence[Row], stopwatch: Stopwatch | None = None) -> Row:
    """The row to take of several in order of preference, on the device named `where`: the first, unless another was
    faster there.

    stopwatch: how to find out where no seconds are known yet; None: do not. Whatever it raises, the first is taken, and
    another call may try again.
    """
    if len(rows) < 2 or not enabled():
        return rows[0]
    key = f"seconds on {where}, triton {version}, {sources_digest()}"
    name = " or ".join(map(str, rows))
    with _lock:
        if key not in _known:
            _known[key] = json.loads(cache.peek(key) or b"{}")
        if name not in _known[key]:
            if stopwatch is None:
                return rows[0]
            try:
                found = _times(rows, stopwatch)
            except (FlashtileError, RuntimeError, MemoryError):  # no room for the problem, say: the call itself may run
                return rows[0]
            known = _known[key] = {**json.loads(cache.peek(key) or b"{}"), **_known[key], name: found}
            cache.rebuild(key, lambda: json.dumps(known).encode())
        seconds = _known[key][name]
    best = min(rows, key=lambda row: seconds[str(row)])
    return best if seconds[str(best)] < WORTH * seconds[str(rows[0])] else rows[0]


def _times(rows: Sequence[Row], stopwatch: Stopwatch) -> dict[str, float]:
    """The least seconds of each row, timed in turn."""
    found = {str(row): float("inf") for row in rows}
    for _ in range(ROUNDS):
        for row in rows:
            found[str(row)] = min(found[str(row)], stopwatch(row))
    return found


def known(where: str, version: str) -> list[str]:
    """A line for each choice that was timed on a device."""
    key = f"seconds on {where}, triton {version}, {sources_digest()}"
    with _lock:
        found = _known.get(key) or json.loads(cache.peek(key) or b"{}")
    return ["; ".join(f"{row}: {1e3 * s:.3g} ms" for row, s in times.items()) for times in found.values()]
