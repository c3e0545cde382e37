"""Runs the cases: a process a peer, idle ones stopped, taking turns, so that a drift of the machine hits all alike."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import check, machine
from .cases import ALL_CASES, Case
from .data import make_inputs, save_inputs

ANSWER_SECONDS = 300.0  # a peer that is silent for longer counts as failed
SLOW_SECONDS = 2.0  # a peer that took this long in a case stops after MIN_SAMPLES: it is not the one to beat
MIN_SAMPLES = 2


@dataclasses.dataclass
class Settings:
    rounds: int = 7
    sample_seconds: float = 0.12  # a sample repeats the call for about this long


@dataclasses.dataclass
class Measurement:
    """One participant in one case. `status`: timed, refused (cannot do the case), failed (an error, a wrong result)."""

    case: Case
    peer: str
    threads: int
    status: str = "timed"
    why: str = ""
    error: float | None = None
    allowed: float | None = None
    first_seconds: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    run: str = ""  # of one that was read from a file: when it was measured

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median

    @property
    def rate(self) -> float:
        """GFLOP/s; GB/s where the case is bound by reading."""
        return (self.case.bytes if self.case.reads else self.case.flops) / self.median / 1e9


class Participant:
    """A peer's process with a number of threads. It is stopped whenever it has nothing to answer."""

    def __init__(self, peer: str, threads: int) -> None:
        self.peer, self.threads = peer, threads
        cpus = ",".join(map(str, machine.pick_cpus(threads)))
        command = [sys.executable, "-m", "benchmarks.worker", peer, str(threads), cpus]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=machine.child_environment(threads),
            text=True,
        )
        self.process.send_signal(signal.SIGSTOP)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        if self.process.poll() is not None:
            return {"error": f"its process ended with status {self.process.returncode}"}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], ANSWER_SECONDS)[0]:
                self.process.kill()
                return {"error": f"no answer in {ANSWER_SECONDS:.0f} s"}
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"its process ended with status {self.process.wait()}"}
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()  # also ends a stopped process
        self.process.communicate()


@contextmanager
def participants(wanted: Sequence[tuple[str, int]]) -> Iterator[list[Participant]]:
    with ExitStack() as stack:
        started = []
        for peer, threads in wanted:
            started.append(Participant(peer, threads))
            stack.callback(started[-1].close)
        yield started


@dataclasses.dataclass
class CaseResult:
    case: Case
    measurements: list[Measurement]
    limits: list[float]  # the case's `unit` as measured in the same rounds: GFLOP/s of one core, or GB/s

    @property
    def limit(self) -> float | None:
        return statistics.median(self.limits) if self.limits else None

    def of(self, peer: str, threads: int) -> Measurement | None:
        for m in self.measurements:
            if (m.peer, m.threads, m.status) == (peer, threads, "timed"):
                return m
        return None


def prepare(
    case: Case, who: Participant, folder: Path, rows: np.ndarray, reference: np.ndarray, allowed: np.ndarray
) -> Measurement:
    """Set the case up in one process and check the result; only a measurement left at "timed" may be timed."""
    found = Measurement(case, who.peer, who.threads)
    sample = folder / "sample.npy"
    sample.unlink(missing_ok=True)
    answer = who.ask("prepare", case=dataclasses.asdict(case), folder=str(folder), rows=rows.tolist())
    if "refused" in answer:
        found.status, found.why = "refused", answer["refused"]
    elif "error" in answer:
        found.status, found.why = "failed", answer["error"]
    else:
        found.error, found.allowed = check.worst(np.load(sample), reference, allowed)
        found.first_seconds = answer["first"]
        found.seconds = [answer["once"]]  # tells how often to repeat; dropped by the first round
        if why := check.complaint(found.error, found.allowed):
            found.status, found.why, found.seconds = "failed", why, []
    return found


def take_turns(
    live: list[tuple[Participant, Measurement]], limit: Participant | None, settings: Settings
) -> list[float]:
    """The timed rounds; returns what the limit's process measured between them."""
    limits: list[float] = []
    repeats = {id(m): max(1, int(settings.sample_seconds / max(m.seconds.pop(), 1e-7))) for _, m in live}
    for _ in range(settings.rounds):
        if limit is not None and live:
            case = live[0][1].case
            answer = limit.ask("peak", unit=case.unit, threads=limit.threads if case.unit == "read" else 1)
            limits += [answer["value"]] if answer.get("value") else []
        for who, m in live:
            slow = sum(m.seconds) * repeats[id(m)] > SLOW_SECONDS and len(m.seconds) >= MIN_SAMPLES
            if m.status != "timed" or slow:
                continue
            answer = who.ask("time", repeat=repeats[id(m)])
            if "error" in answer:
                m.status, m.why, m.seconds = "failed", answer["error"], []
            else:
                m.seconds.append(answer["seconds"])
    return limits


BASE = "flashtile_base"


def task_of(case: Case, peer: str) -> Case | str:
    """What a peer does in a case: the case itself or its base, or why it takes no part."""
    if peer == BASE:
        return next((other for other in ALL_CASES if other.name == case.base), "held to other packages")
    return "held to flashtile itself" if case.base and not peer.startswith("flashtile") else case


class _Expected:
    """The sampled rows of each task on one set of inputs, and how far off a peer may be."""

    def __init__(self, arrays: tuple[np.ndarray, ...], rows: np.ndarray):
        self.arrays, self.rows = arrays, rows
        self.known: dict[Case, tuple[np.ndarray, np.ndarray]] = {}

    def of(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        if case not in self.known:
            reference, rounded = (check.expected_rows(case, self.arrays, self.rows, rounded=r) for r in (False, True))
            self.known[case] = reference, check.allowed_error(case, reference, rounded)
        return self.known[case]


def run_case(case: Case, peers: list[Participant], limit: Participant | None, settings: Settings) -> CaseResult:
    """Check every participant, then time those that passed."""
    with tempfile.TemporaryDirectory(prefix="flashtile-bench-") as name:
        folder = Path(name)
        arrays = make_inputs(case)
        save_inputs(folder, case, arrays)
        rows = check.sample_rows(case)
        expected, measured = _Expected(arrays, rows), []
        for who in peers:
            task = task_of(case, who.peer)
            if isinstance(task, str):
                measured.append(Measurement(case, who.peer, who.threads, "refused", task))
            else:
                measured.append(prepare(task, who, folder, rows, *expected.of(task)))
        del arrays, expected
    live = [(who, m) for who, m in zip(peers, measured, strict=True) if m.status == "timed"]
    return CaseResult(case, measured, take_turns(live, limit, settings))


def run_cases(
    cases: Sequence[Case], wanted: Sequence[tuple[str, int]], settings: Settings, limit_threads: int | None = None
) -> Iterator[CaseResult]:
    """Results case by case. With `limit_threads`, one more process measures peak and bandwidth in the same rounds."""
    limits = [("numpy", limit_threads)] if limit_threads else []  # any worker can: NumPy's starts fastest
    with participants([*wanted, *limits]) as started:
        peers = started[: len(wanted)]
        limit = started[-1] if limits else None
        for case in cases:
            yield run_case(case, peers, limit, settings)


def versions(peers: Sequence[str]) -> dict[str, str]:
    """Package versions as the peers' own processes report them; a peer that does not load is told apart."""
    found: dict[str, str] = {"python": sys.version.split()[0]}
    with participants([(peer, 1) for peer in dict.fromkeys(peers)]) as started:
        for who in started:
            answer = who.ask("versions")
            found.update(answer.get("versions") or {who.peer: "not available"})
    return found


def cpu_count() -> int:
    return len(os.sched_getaffinity(0))
