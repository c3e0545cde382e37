"""Steps that fail softly: each a process within its own time and the whole budget, with a log and a line of summary."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

OUT_OF_TIME = "out of time"
TAIL = 12  # lines of a step's output that the summary keeps
GRACE = 6.0  # seconds in which a step that is out of time may write down what it has found


@dataclass(frozen=True)
class Step:
    """A part of the run. `seconds` is the most that it may take; `command` follows the interpreter."""

    name: str
    seconds: float
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    beside: bool = False  # started, and not waited for until the end


class Run:
    """Runs steps in order; keeps log.txt and summary.txt in the folder of results."""

    def __init__(self, folder: Path, budget: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self._clock = folder, clock
        self._ends = clock() + budget
        self._beside: list[tuple[Step, subprocess.Popen[str]]] = []
        self.failed: list[str] = []
        self.late: list[str] = []  # out of time, by no fault of what was looked at
        for name in ("log.txt", "summary.txt"):
            (folder / name).write_text("")

    def say(self, line: str) -> None:
        """Print a line, and keep it in the summary."""
        print(line, flush=True)
        with (self.folder / "summary.txt").open("a") as file:
            file.write(line + "\n")

    def step(self, step: Step) -> None:
        """Run one step to its end, or to the end of its time. What goes wrong is said, and remembered."""
        most = min(step.seconds, self._ends - self._clock())
        if most < 1:
            self.say(f"== {step.name}: no time left")
            self.late.append(step.name)
            return
        environment = {**os.environ, **step.environment, "UNTIL": str(time.time() + 0.85 * most)}
        command = [sys.executable, *step.command]
        if step.beside:
            self._beside.append((step, _start(command, environment)))
            return
        began = self._clock()
        process = _start(command, environment)
        try:
            output, _ = process.communicate(timeout=max(most - GRACE, most / 2))
            code = str(process.returncode)
        except subprocess.TimeoutExpired:
            code, output = OUT_OF_TIME, _stop(process, GRACE)
        except BaseException:  # Ctrl-C reaches no other group
            _stop(process)
            raise
        self._keep(step, code, output, self._clock() - began, most)

    def end(self) -> None:
        """Stop what still runs beside, and keep what it said."""
        for step, process in self._beside:
            output = _stop(process)
            with (self.folder / "log.txt").open("a") as file:
                file.write(f"==== {step.name}\n{output}\n")
        self._beside.clear()

    def _keep(self, step: Step, code: str, output: str, seconds: float, most: float) -> None:
        with (self.folder / "log.txt").open("a") as file:
            file.write(f"==== {step.name}: {code}\n{output}\n")
        self.say(f"== {step.name}: {'ok' if code == '0' else code}, {seconds:.0f} s of {most:.0f}")
        for line in output.splitlines()[-TAIL:]:
            self.say("   " + line[:220])
        if code == OUT_OF_TIME:
            self.late.append(step.name)
        elif code != "0":
            self.failed.append(step.name)


def out_of_time() -> bool:
    """Inside a step: whether what has not begun should be left."""
    return time.time() > float(os.environ.get("UNTIL", "inf"))


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """A process at the head of a group of its own, to which those that it starts belong."""
    out, err = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(command, env=environment, text=True, stdout=out, stderr=err, start_new_session=True)


def _stop(process: subprocess.Popen[str], grace: float = 0) -> str:
    """End a process, by Ctrl-C if it has some seconds' grace, and those that it started, which would keep the device
    busy, and hold what it writes to open: then no one could read it to the end. Returns what it said."""
    if grace:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=grace)
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]
