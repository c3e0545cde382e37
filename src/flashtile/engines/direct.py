"""The embedded engine: a pool of threads over calls that release the GIL.

Threads take ranges of work items from one counter, so that a slow core takes fewer. The calling thread takes
part, which makes a call safe from any number of threads at once (nobody waits for a worker that never comes),
reports progress between its ranges, and notices Ctrl-C there. A problem too small to share runs on the calling
thread as one native call, and so does one that a device computes at once, with threads of its own. Where another
library offers its threads (`threads.team`), all but a long call goes to those: they need not be woken, and while they
wait for more they would share the processors with ours.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flashtile.engines import Bound, BoundBackward, Engine, Native, Run
from flashtile.errors import KernelError
from flashtile.kernels import (
    ArrayShapes,
    BackwardLayout,
    CompiledKernel,
    Family,
    Keys,
    Layout,
    NativeRun,
    Runnable,
    Stage,
    stacked,
)
from flashtile.plan import Plan, cut_of, flops_of_pair, make_plan, visible_pairs, waiting_of
from flashtile.progress import Report
from flashtile.spec import AttentionSpec
from flashtile.threads import Team, get_num_threads, team

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

# Waking a thread and waiting for it cost some 100 us, half of the time in which one core does this much.
SMALL_FLOPS = 16_000_000
# A team that is awake is asked in some 10 us: soon enough for calls that are as long because they wait for memory, too.
SMALL_FOR_TEAM = 4_000_000
# Threads that wait for more work take some 4 ms from ours: nothing in a call as long as this.
LONG_FLOPS = 100_000_000_000
# A team gets a call in rounds, between which Ctrl-C is noticed: the first takes some 0.1 s of a slow core, the others
# so many seconds.
ROUND_FLOPS = 4_000_000_000
ROUND_SECONDS = 0.1
RANGE_SECONDS = 0.02  # long beside the cost of a call (1 us), short beside a person's patience
RANGES_PER_THREAD = 4  # at least, so that threads end together
REPORT_SECONDS = 0.1
KEPT_SCRATCH_BYTES = 16 << 20  # a thread keeps its scratch for the next call up to this size
CACHE_LINE = 64
_Native = ctypes.CFUNCTYPE(None).__mro__[1]  # any function of ctypes


def unavailable() -> str | None:
    """Why this engine cannot run here: it always can."""
    return None


def bind(spec: AttentionSpec, layout: Layout, family: Family) -> Bound:
    """Plan a call, compile its kernel, and bind the two."""
    spec, layout = stacked(spec, layout, family)
    return _Binding(spec, layout, family).bind(spec, layout)


class _Binding:
    """A call, on any number of keys: planned, compiled and bound once for each way of sharing out its work."""

    def __init__(self, spec: AttentionSpec, layout: Layout, family: Family) -> None:
        self._spec, self._layout, self._family, self._able = spec, layout, family, family.capabilities(spec)
        self._flops, self._waiting = flops_of_pair(spec) * spec.batch, waiting_of(spec)
        self._bound: dict[tuple[int, ...], tuple[CompiledKernel, Run, bool]] = {}

    def bind(self, spec: AttentionSpec, layout: Layout) -> Bound:
        plan = make_plan(spec, self._able)
        kernel = self._family.compile(spec, plan, layout)
        run, small = prepare(plan, kernel), _is_small(plan)
        self._bound[_shared(plan.tile_q, plan.splits, plan.flops, plan.waiting)] = kernel, run, small
        return Bound(kernel.pack, run, _native(small, kernel), self.at if self._family.at else None)

    def at(self, keys: Keys) -> Bound | None:
        """See Bound.at."""
        assert self._family.at is not None
        tile_q, splits, split_keys = cut_of(self._spec, self._able, keys.kv_len)
        flops = self._flops * visible_pairs(self._spec, keys.offset, keys.kv_len)
        found = self._bound.get(_shared(tile_q, splits, flops, self._waiting))
        if found is None:
            spec = self._spec.changed(kv_len=keys.kv_len, offset=keys.offset)
            alike = self._family.capabilities(spec) is self._able  # families keep theirs
            return self.bind(spec, replace(self._layout, k=keys.k, v=keys.v)) if alike else None
        kernel, run, small = found
        other = self._family.at(kernel, keys, split_keys)
        return None if other is None else Bound(other.pack, run, _native(small, other), self.at)


def _shared(tile_q: int, splits: int, flops: int, waiting: int) -> tuple[int, ...]:
    """All that `prepare` goes by, of a call on any number of keys; a first round may be twice as long as it should."""
    work = flops * waiting
    rounds = LONG_FLOPS if work > LONG_FLOPS else work // ROUND_FLOPS
    return tile_q, splits, work > SMALL_FOR_TEAM, flops > SMALL_FLOPS, rounds.bit_length()


def bind_backward(spec: AttentionSpec, layout: BackwardLayout, family: Family, arrays: ArrayShapes) -> BoundBackward:
    """The same for a backward call, which the kernel itself plans."""
    assert family.compile_backward is not None  # callers look before they bind
    kernel = family.compile_backward(spec, layout, arrays)
    run, native = prepare(kernel.plan, kernel), _native(_is_small(kernel.plan), kernel)
    return BoundBackward(kernel.pack, run, kernel.totals, native)


ENGINE = Engine("direct", unavailable, bind, bind_backward)


def _native(small: bool, kernel: Runnable) -> Native | None:
    template = getattr(kernel, "template", None)
    return None if template is None else Native(template, kernel.scratch_bytes, not small)


def _is_small(plan: Plan) -> bool:
    """Whether the calling thread computes it, as one native call."""
    return plan.at_once or plan.flops <= SMALL_FLOPS or plan.items == 1


def prepare(plan: Plan, kernel: Runnable) -> Run:
    """Bind a compiled kernel to its plan. The result may be called from any thread, many times at once."""
    merge, scratch_bytes = kernel.merge_stage, kernel.scratch_bytes
    items = _run_of(plan, Stage(plan.items, kernel.run, plan.work, 0), scratch_bytes, _is_small(plan))
    if merge is None:
        return items
    merged = _run_of(plan, merge, scratch_bytes, plan.at_once or merge.work <= SMALL_FLOPS)

    def run(params: Any, report: Report | None = None) -> None:
        items(params, report)
        merged(params)

    return run


def _run_of(plan: Plan, stage: Stage, scratch_bytes: int, small: bool) -> Run:
    """A stage of a plan, on this thread if it is small, on another library's where there are some, or on the pool's."""
    items, run_items = stage.items, stage.run
    function, block = (run_items.function, run_items.block) if isinstance(run_items, NativeRun) else (run_items, None)
    native = isinstance(function, _Native) and items > 1 and not plan.at_once
    shared = native and SMALL_FOR_TEAM < stage.work <= LONG_FLOPS

    def run(params: Any, report: Report | None = None) -> None:
        if shared and report is None and (lent := team()) is not None and (threads := get_num_threads()) > 1:
            given = params if block is None else params[block]
            _give_away(lent, plan, stage, function, scratch_bytes, given, min(threads, items))
        elif small and report is None:
            if items:
                scratch = _scratch(scratch_bytes)
                try:
                    status = run_items(params, 0, items, scratch.address)
                except Exception as cause:
                    raise _failure(plan, stage, 0, items, str(cause)) from cause
                if status:
                    raise _failure(plan, stage, 0, items, f"status {status}")
        else:
            _Job(plan, stage, scratch_bytes, params).run(1 if small else get_num_threads(), report)

    return run


def _give_away(
    lent: Team, plan: Plan, stage: Stage, function: Any, scratch_bytes: int, params: bytes | int, members: int
) -> None:
    """All items of a native stage on the threads of another library, in rounds."""
    step = -(-scratch_bytes // CACHE_LINE) * CACHE_LINE
    scratch = _scratch(step * members)
    begin, count = 0, max(members, stage.items * ROUND_FLOPS // stage.work)
    while begin < stage.items:
        end = stage.items if begin + 2 * count > stage.items else begin + count
        share = max(1, (end - begin) // (RANGES_PER_THREAD * members))
        began = time.perf_counter()
        failed, status = lent(function, params, begin, end, share, scratch.address, step, members)
        if status:
            raise _failure(plan, stage, failed, min(failed + share, end), f"status {status}")
        seconds = time.perf_counter() - began
        begin, count = end, max(members, int((end - begin) * ROUND_SECONDS / max(seconds, ROUND_SECONDS / 100)))


class _Job:
    """One stage of a call while it runs. The lock guards every field that changes."""

    def __init__(self, plan: Plan, stage: Stage, scratch_bytes: int, params: Any) -> None:
        self.plan, self.stage, self.scratch_bytes, self.params = plan, stage, scratch_bytes, params
        self.items = stage.items
        self.next = 0  # first item not handed out
        self.done = 0
        self.seconds = 0.0  # spent by all threads on the done items
        self.threads = 1
        self.workers_busy = 0  # ranges that run on pool threads: memory is in use until it is 0
        self.error: KernelError | None = None
        # Entered in C: Ctrl-C cannot come between taking it and the block it guards. A Condition's own entry is Python.
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)

    def run(self, threads: int, report: Report | None) -> None:
        """Compute every item, or stop handing out ranges, wait for those that run, and raise."""
        self.threads = max(1, min(threads, self.items))
        try:
            _submit(self, self.threads - 1)
            self._take_part(report)
        finally:
            self._stop()
        if self.error is not None:
            raise self.error
        if report is not None:
            report(self.items, self.items)

    def work(self) -> None:
        """What a pool thread does. Signals reach the main thread only, so nothing interrupts this."""
        scratch = _scratch(self.scratch_bytes)
        while (taken := self._take(worker=True)) is not None:
            began = time.perf_counter()
            error = None
            try:
                error = self._attempt(*taken, scratch.address)
            finally:
                with self.lock:
                    self._account(*taken, time.perf_counter() - began, error)
                    self.workers_busy -= 1
                    self.changed.notify()

    def _take_part(self, report: Report | None) -> None:
        """Run ranges on the calling thread, then wait for the workers; report in between."""
        scratch = _scratch(self.scratch_bytes)
        due = time.perf_counter() + REPORT_SECONDS
        while True:
            taken = self._take(worker=False)
            now = began = time.perf_counter()
            if taken is not None:
                error = self._attempt(*taken, scratch.address)
                now = time.perf_counter()
                with self.lock:
                    self._account(*taken, now - began, error)
            else:
                with self.lock:
                    if not self.workers_busy:
                        return
                    self.changed.wait(REPORT_SECONDS)
            if report is not None and now >= due and self.done < self.items:
                report(self.done, self.items)
                due = time.perf_counter() + REPORT_SECONDS

    def _take(self, worker: bool) -> tuple[int, int] | None:
        """The next range: about RANGE_SECONDS by the pace so far, and a share of what is left at most."""
        with self.lock:
            left = self.items - self.next
            if left <= 0:
                return None
            by_pace = int(RANGE_SECONDS * self.done / self.seconds) if self.seconds > 0 else 1
            begin = self.next
            share = max(1, min(by_pace, left // (RANGES_PER_THREAD * self.threads)))
            self.next += left if self.plan.at_once else share
            self.workers_busy += worker
            return begin, self.next

    def _attempt(self, begin: int, end: int, scratch: int) -> KernelError | None:
        try:
            status = self.stage.run(self.params, begin, end, scratch)
        except Exception as cause:
            error = _failure(self.plan, self.stage, begin, end, str(cause))
            error.__cause__ = cause
            return error
        return _failure(self.plan, self.stage, begin, end, f"status {status}") if status else None

    def _account(self, begin: int, end: int, seconds: float, error: KernelError | None) -> None:
        self.done += end - begin
        self.seconds += seconds
        if error is not None:
            self.error = self.error or error
            self.next = self.items  # no more ranges

    def _stop(self) -> None:
        """Hand out nothing more and wait for the ranges that run: they write to the caller's arrays."""
        while True:
            try:
                with self.lock:
                    self.next = self.items
                    if not self.workers_busy:
                        return
                    self.changed.wait(REPORT_SECONDS)
            except KeyboardInterrupt:  # a second Ctrl-C; the first is on its way up already
                continue


def _failure(plan: Plan, stage: Stage, begin: int, end: int, what: str) -> KernelError:
    if stage.workspace_bytes:
        return KernelError(f"merging the parts of rows [{begin}, {end}) of {stage.items} failed: {what}")
    batch, head, query_tile, _ = plan.locate(begin)
    where = f"batch {batch}, head {head}, query tile {query_tile}"
    return KernelError(f"a kernel failed in work items [{begin}, {end}) of {plan.items}, from {where}: {what}")


# Scratch: one buffer a thread, kept between calls.


class _Scratch:
    """An aligned buffer; it lives as long as someone holds this object."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.buffer = np.empty(nbytes + CACHE_LINE, np.uint8)
        self.address = -(-self.buffer.ctypes.data // CACHE_LINE) * CACHE_LINE


_kept = threading.local()


def _scratch(nbytes: int) -> _Scratch:
    """This thread's scratch, at least nbytes long. Hold the object while the address is used."""
    try:
        scratch: _Scratch = _kept.scratch
        if scratch.nbytes >= nbytes:
            return scratch
    except AttributeError:
        pass
    scratch = _Scratch(nbytes)
    if nbytes <= KEPT_SCRATCH_BYTES:
        _kept.scratch = scratch
    return scratch


# The pool: one for the process, made at first need and again when the number of threads changes.

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.RLock()  # reentrant: a signal handler may call attention


def _submit(job: _Job, workers: int) -> None:
    """Ask the pool for help. Help that never comes only makes the call slower."""
    global _pool, _pool_size
    if workers < 1:
        return
    size = get_num_threads() - 1
    try:
        with _pool_lock:
            if _pool is None or _pool_size != size:
                from concurrent.futures import ThreadPoolExecutor

                if _pool is not None:
                    _pool.shutdown(wait=False)
                _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="flashtile"), size
            pool = _pool
        for _ in range(workers):
            pool.submit(job.work)
    except RuntimeError:  # the interpreter, or a pool that another thread replaced, is shutting down
        return


def _forget_pool() -> None:
    """In a forked child: the threads stayed in the parent, and a lock may have been held by one of them."""
    global _pool, _pool_size, _pool_lock
    _pool, _pool_size, _pool_lock = None, 0, threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
