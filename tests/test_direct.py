"""The direct engine: every item once, failures travel, Ctrl-C, forks, many callers, progress."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from processes import PATIENCE, run, searched

import flashtile
from flashtile.engines import direct
from flashtile.errors import KernelError
from flashtile.kernels import Stage
from flashtile.plan import Plan

pytestmark = pytest.mark.core

BIG = 10**12  # FLOPs that are worth sharing


def plan_of(items: int, flops: int = BIG) -> Plan:
    return Plan(batch=1, heads=1, query_tiles=items, splits=1, tile_q=1, tile_k=1, flops=flops)


class Counting:
    """A kernel that counts how often each item runs, and may sleep or fail."""

    scratch_bytes = 100
    merge_stage: Stage | None = None

    def __init__(self, items: int, seconds: float = 0.0, fail: Callable[[int], int] | None = None) -> None:
        self.counts = np.zeros(items, np.int64)
        self.seconds, self.fail = seconds, fail
        self.threads: set[int] = set()
        self.addresses: set[int] = set()
        self.calls: list[tuple[int, int]] = []

    def pack(self, *addresses: int) -> Any:
        return addresses

    def run(self, params: Any, begin: int, end: int, scratch: int) -> int:
        self.threads.add(threading.get_ident())
        self.addresses.add(scratch)
        self.calls.append((begin, end))
        for item in range(begin, end):
            if self.seconds:
                time.sleep(self.seconds)  # releases the GIL, as native code does
            if self.fail is not None and (status := self.fail(item)):
                return status
            self.counts[item] += 1
        return 0


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [1, 2, 7, 1000])
def test_every_item_runs_once(threads: Callable[[int], None], n: int, items: int) -> None:
    threads(n)
    kernel = Counting(items)
    direct.prepare(plan_of(items), kernel)(None)
    assert (kernel.counts == 1).all()
    assert all(address % 64 == 0 for address in kernel.addresses)


def test_large_work_is_shared_and_small_work_is_not(threads: Callable[[int], None]) -> None:
    threads(3)
    shared = Counting(60, seconds=0.002)
    direct.prepare(plan_of(60), shared)(None)
    assert len(shared.threads) == 3 and len(shared.calls) >= 12
    assert len(shared.addresses) == 3, "threads must not share scratch"
    alone = Counting(60)
    direct.prepare(plan_of(60, flops=direct.SMALL_FLOPS), alone)(None)
    assert alone.threads == {threading.get_ident()} and alone.calls == [(0, 60)]


@pytest.mark.parametrize(
    ("heads", "rows", "storage", "waiting"),
    [(8, 1, "float32", 4), (8, 1, "float64", 8), (8, 1, "float16", 2), (16, 1, "float32", 2), (8, 4, "float32", 1)],
)
def test_reading_counts_where_few_rows_share_what_is_read(heads: int, rows: int, storage: str, waiting: int) -> None:
    """A decoder's step does few operations in the time that it reads keys."""
    plan = flashtile.explain((1, heads, rows, 64), (1, 8, 1500, 64), dtype=storage, kernel="cpu").plan
    assert plan.waiting == waiting and plan.work == waiting * plan.flops


def test_what_is_computed_at_once_is_one_call_on_the_calling_thread(threads: Callable[[int], None]) -> None:
    threads(3)
    reports: list[tuple[int, int]] = []
    for report in (None, lambda done, total: reports.append((done, total))):
        kernel, merging = Counting(60), Counting(40)
        kernel.merge_stage = Stage(40, merging.run, BIG, 1)
        direct.prepare(replace(plan_of(60), at_once=True), kernel)(None, report)
        assert kernel.threads == merging.threads == {threading.get_ident()}
        assert kernel.calls == [(0, 60)] and merging.calls == [(0, 40)]
    assert reports == [(60, 60)]


def test_no_item_is_no_call() -> None:
    kernel = Counting(0)
    reports: list[tuple[int, int]] = []
    run = direct.prepare(plan_of(0), kernel)
    run(None)
    run(None, lambda done, total: reports.append((done, total)))
    assert not kernel.calls and reports == [(0, 0)]


def test_ranges_take_about_the_time_they_should(threads: Callable[[int], None]) -> None:
    threads(2)
    kernel = Counting(4000, seconds=0.0002)
    direct.prepare(plan_of(4000), kernel)(None)
    longest = max(end - begin for begin, end in kernel.calls)
    assert longest * 0.0002 <= direct.RANGE_SECONDS * 1.5
    assert len(kernel.calls) < 1000, "a range must be worth its call"


@pytest.mark.parametrize("flops", [0, BIG])
def test_a_status_becomes_an_error_that_names_the_place(threads: Callable[[int], None], flops: int) -> None:
    threads(2)
    kernel = Counting(50, fail=lambda item: 7 if item == 33 else 0)
    run = direct.prepare(plan_of(50, flops), kernel)
    where = r"work items \[\d+, \d+\) of 50, from batch 0, head 0, query tile \d+: status 7"
    with pytest.raises(KernelError, match=where):
        run(None)
    kernel.fail = None
    kernel.counts[:] = 0
    run(None)
    assert (kernel.counts == 1).all(), "the engine stays usable"


@pytest.mark.parametrize("flops", [0, BIG])
def test_an_exception_is_chained(threads: Callable[[int], None], flops: int) -> None:
    threads(2)

    def explode(item: int) -> int:
        raise MemoryError("no room")

    with pytest.raises(KernelError, match="no room") as caught:
        direct.prepare(plan_of(50, flops), Counting(50, fail=explode))(None)
    assert isinstance(caught.value.__cause__, MemoryError)


def test_a_failure_stops_the_rest(threads: Callable[[int], None]) -> None:
    threads(2)
    kernel = Counting(1000, seconds=0.002, fail=lambda item: int(item == 0))
    with pytest.raises(KernelError):
        direct.prepare(plan_of(1000), kernel)(None)
    after = kernel.counts.sum()
    assert after < 999
    time.sleep(0.05)
    assert kernel.counts.sum() == after, "nothing may run once the call has returned"


class Clock:
    """Stands in for the module `time`: it goes on only where a kernel says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_progress_comes_often_on_the_calling_thread_and_ends_complete(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(1)
    clock = Clock()
    monkeypatch.setattr(direct, "time", clock)
    seen: list[tuple[float, int, int, int]] = []

    def report(done: int, total: int) -> None:
        seen.append((clock.now, done, total, threading.get_ident()))

    def work(item: int) -> int:
        clock.now += 0.005
        return 0

    began = clock.now
    direct.prepare(plan_of(300), Counting(300, fail=work))(None, report)
    times = [began, *(row[0] for row in seen)]
    # At the end of the first range after a tenth of a second; a range takes a fiftieth.
    assert max(np.diff(times)) < direct.REPORT_SECONDS + direct.RANGE_SECONDS + 0.005
    done = [row[1] for row in seen]
    assert done == sorted(done) and done[-1] == 300 and done.count(300) == 1 and len(done) >= 12
    assert {row[2:] for row in seen} == {(300, threading.get_ident())}


def test_the_wait_for_workers_reports_too(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker ends its range only when progress has told of the same state three times: the caller has no other."""
    threads(2)
    monkeypatch.setattr(direct, "REPORT_SECONDS", 0.001)
    caller, reports, came, free = threading.get_ident(), list[int](), threading.Event(), threading.Event()

    def wait(item: int) -> int:
        if threading.get_ident() == caller:
            return 0 if came.wait(PATIENCE) else 1
        came.set()
        return 0 if free.wait(PATIENCE) else 1

    def report(done: int, total: int) -> None:
        reports.append(done)
        if reports.count(done) == 3:
            free.set()

    direct.prepare(plan_of(50), Counting(50, fail=wait))(None, report)
    assert reports == sorted(reports) and reports[-1] == 50


def test_an_exception_in_the_callback_cancels(threads: Callable[[int], None]) -> None:
    threads(2)
    kernel = Counting(1000, seconds=0.005)

    def stop(done: int, total: int) -> None:
        raise StopIteration("enough")

    with pytest.raises(StopIteration, match="enough"):
        direct.prepare(plan_of(1000), kernel)(None, stop)
    after = kernel.counts.sum()
    assert after < 1000
    time.sleep(0.05)
    assert kernel.counts.sum() == after


def test_a_callback_may_call_attention(threads: Callable[[int], None]) -> None:
    threads(2)
    inner = Counting(40, seconds=0.001)
    outer = Counting(60, seconds=0.005)
    nested = direct.prepare(plan_of(40), inner)
    direct.prepare(plan_of(60), outer)(None, lambda done, total: nested(None))
    assert (outer.counts == 1).all() and inner.counts.min() == inner.counts.max() >= 1


def test_many_python_threads_at_once(threads: Callable[[int], None]) -> None:
    threads(3)
    kernels = [Counting(200, seconds=0.0002) for _ in range(8)]
    runs = [direct.prepare(plan_of(200), kernel) for kernel in kernels]
    callers = [threading.Thread(target=run, args=(None,)) for run in runs]
    for caller in callers:
        caller.start()
    for n in (1, 5, 2, 3):  # while they run: the pool is replaced under them
        flashtile.set_num_threads(n)
        time.sleep(0.01)
    for caller in callers:
        caller.join(PATIENCE)
    assert all((kernel.counts == 1).all() for kernel in kernels)


def printed_by(code: str) -> str:
    """What a program prints that can import this module."""
    environment = os.environ | {"PYTHONPATH": searched(os.path.dirname(__file__))}
    return run([sys.executable, "-c", code], check=True, env=environment).stdout


INTERRUPTED = """
import os, signal, threading, time
import flashtile
from test_direct import Counting, direct, plan_of
flashtile.set_num_threads({threads})
kernel = Counting(100_000, seconds=0.001)
def interrupt():
    while not kernel.counts.any():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    direct.prepare(plan_of(100_000), kernel)(None)
except KeyboardInterrupt:
    after = kernel.counts.sum()
    time.sleep(0.1)
    assert kernel.counts.sum() == after, "still running"
    small = Counting(50)
    direct.prepare(plan_of(50), small)(None)
    assert (small.counts == 1).all()
    print(after)
"""


@pytest.mark.parametrize("n", [1, 3])
def test_ctrl_c_is_answered_long_before_the_end(n: int) -> None:
    """After the range that runs, that is: the whole takes over half a minute, and with one thread nearly two."""
    assert 0 < int(printed_by(INTERRUPTED.format(threads=n))) < 100_000


def _attend_in_child(results: Any) -> None:
    kernel = Counting(100, seconds=0.001)
    direct.prepare(plan_of(100), kernel)(None)
    results.put((int(kernel.counts.min()), int(kernel.counts.max()), len(kernel.threads)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_makes_its_own_pool(threads: Callable[[int], None]) -> None:
    threads(2)
    direct.prepare(plan_of(100), Counting(100, seconds=0.001))(None)  # the parent's pool exists
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_attend_in_child, args=(results,))
    child.start()
    assert results.get(timeout=PATIENCE) == (1, 1, 2)
    child.join(PATIENCE)
    assert child.exitcode == 0


def test_scratch_is_reused_and_bounded(threads: Callable[[int], None]) -> None:
    threads(1)
    kernel = Counting(1)
    for _ in range(3):
        direct.prepare(plan_of(1), kernel)(None)
    assert len(kernel.addresses) == 1
    kernel.scratch_bytes = direct.KEPT_SCRATCH_BYTES + 1
    direct.prepare(plan_of(1), kernel)(None)
    assert direct._kept.scratch.nbytes <= direct.KEPT_SCRATCH_BYTES


def test_scratch_is_as_long_as_was_asked_for() -> None:
    scratch = direct._Scratch(1000)
    start = scratch.buffer.ctypes.data
    assert start <= scratch.address and scratch.address + 1000 <= start + scratch.buffer.nbytes


def test_the_interpreter_exits_while_the_pool_lives() -> None:
    code = "import flashtile, numpy as np; q = np.ones((1, 8, 256, 64)); flashtile.attention(q, q, q, kernel='vanilla')"
    run([sys.executable, "-c", code], check=True)


def test_a_second_ctrl_c_does_not_leave_workers_behind() -> None:
    """They write to the caller's arrays, so the wait for their ranges is not cut short."""
    code = """
import os, signal, threading, time
import flashtile
from test_direct import Counting, direct, plan_of
flashtile.set_num_threads(2)
kernel = Counting(100, seconds=0.6)  # a worker is in its range when both signals come
def interrupt_twice():
    for _ in range(2):
        time.sleep(0.15)
        os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt_twice).start()
try:
    direct.prepare(plan_of(100), kernel)(None)
except KeyboardInterrupt:
    after = kernel.counts.sum()
    time.sleep(0.8)
    print(kernel.counts.sum() - after, len(kernel.threads))
"""
    assert printed_by(code).split() == ["0", "2"]
