"""One peer in one process: reads commands as JSON lines, answers each with one line. Started by driver.py.

{"do": "versions"}                                            -> {"versions": {...}}
{"do": "prepare", "case": {...}, "folder": "...", "rows": []} -> {"first": s, "once": s}, and sample.npy in the
                                                                 folder; or {"refused": why}
{"do": "time", "repeat": n}                                   -> {"seconds": of one call}
{"do": "peak", "unit": "...", "threads": n}                   -> {"value": ...}
anything that raises                                          -> {"error": "..."}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Worker:
    def __init__(self, peer: str, threads: int) -> None:
        from .peers import load

        self.peer = load(peer)
        self.threads = threads
        self.run: Callable[[], Any] | None = None

    def versions(self) -> dict[str, Any]:
        return {"versions": self.peer.versions()}

    def prepare(self, case: dict[str, Any], folder: str, rows: list[list[list[int]]]) -> dict[str, Any]:
        """Two calls: the first compiles and its output is sampled for the check, the second tells how many to time."""
        import numpy as np

        from .cases import Case
        from .data import load_inputs, sampled

        self.run = None  # frees the arrays of the case before
        parsed = Case(**case)
        if why := self.peer.refuses(parsed):
            return {"refused": why}
        forward = parsed.direction == "forward"
        prepare = getattr(self.peer, "prepare" if forward else "prepare_backward", None)
        if prepare is None:
            return {"refused": "computes no gradients"}
        run, to_numpy = prepare(parsed, *load_inputs(Path(folder), parsed), self.threads)
        start = time.perf_counter()
        out = run()
        first = time.perf_counter() - start
        outputs = (to_numpy(out),) if forward else to_numpy(out)
        np.save(Path(folder) / "sample.npy", sampled(outputs, np.array(rows)))
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
        self.run = run
        return {"first": first, "once": once}

    def time(self, repeat: int) -> dict[str, Any]:
        assert self.run is not None, "prepare comes first"
        start = time.perf_counter()
        for _ in range(repeat):
            self.run()
        return {"seconds": (time.perf_counter() - start) / repeat}

    def peak(self, unit: str, threads: int) -> dict[str, Any]:
        from .peak import measure

        return {"value": measure(unit, threads)}


def main(peer: str, threads: int, cpus: list[int]) -> None:
    os.sched_setaffinity(0, cpus)  # before any import: thread pools count the CPUs they find
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a peer that prints must not break the protocol
    worker: Worker | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            worker = worker or Worker(peer, threads)
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:  # whatever a peer raises is reported, never hidden
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(cpu) for cpu in sys.argv[3].split(",")])
