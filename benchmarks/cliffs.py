"""Speed cliffs: shapes along one axis at a time, each held to its neighbours.

A shape may take as long as a neighbour with more work, or longer than one with less in proportion to the work; what
takes 1.5 times that is printed. Work is what no kernel gets around: multiply-adds over whole vectors, or, for few
queries, the bytes that are read. So fixed costs, odd sizes within a vector and steps to the next one are no cliffs.
Nothing is held to a target: this reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashtile.llvm import machines

from .cases import ITEM_BYTES, Case
from .driver import CaseResult, Settings, run_cases
from .layouts import LAYOUTS
from .report import OWN, own_failure

ABOVE = 1.5  # times what a neighbour makes expect
LIMIT = 600.0  # seconds for all shapes
REPEATS = 10  # of what looks like a cliff: a neighbour of a virtual machine slows one core for seconds on end
SETTINGS = Settings(rounds=3, sample_seconds=0.008)
BALANCE = 8  # FLOPs in the time of reading a byte: 2 cores of some 100 GFLOP/s beside 25 GB/s

QUERIES = range(1, 41)
HEADS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 71, 96)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64)
HEAD_SIZES = (
    *(1, 2, 3, 4, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 40, 47, 48, 63, 64, 65, 72, 80, 96, 100, 127, 128, 129),
    *(160, 192, 255, 256, 257, 320, 384, 511, 512),
)
LENGTHS = (
    *(1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 192, 255, 256, 257),
    *(384, 511, 512, 513, 700, 1000, 1023, 1024, 1025, 1500, 2047, 2048, 2049, 3000, 4000, 4095, 4096, 4097, 5000),
)
SQUARES = tuple(n for n in LENGTHS if n <= 1025)
OPTIONS = ("", "padding", "mask", "mask transposed", "bias", "bias transposed", "alibi", "softcap", "sinks")
DTYPES = tuple(ITEM_BYTES)


@dataclass(frozen=True)
class Line:
    """Cases that differ along one axis. Neighbours are the ones before and after, or, of an axis that has no order,
    the first one."""

    axis: str
    cases: tuple[Case, ...]
    ordered: bool = True

    def neighbours(self, index: int) -> tuple[Case, ...]:
        at = (index - 1, index + 1) if self.ordered else (0,) * (index > 0)
        return tuple(self.cases[n] for n in at if 0 <= n < len(self.cases))


@dataclass(frozen=True)
class Cliff:
    """A case that takes `times` what its neighbour `beside` makes expect."""

    axis: str
    case: Case
    beside: Case
    times: float
    seconds: float


def work(case: Case, vector_bytes: int) -> float:
    """FLOPs of fp32 (one of fp64 takes two) over whole vectors of queries and of columns; of few queries what is read,
    in the FLOPs of that time."""
    size = max(4, ITEM_BYTES[case.dtype])  # 16-bit types are computed as fp32
    lanes = vector_bytes // size

    def whole(n: int) -> int:
        return -(-n // lanes) * lanes

    columns = whole(case.head_size) / case.head_size
    read = BALANCE * case.bytes * columns
    if case.queries * case.heads // case.kv_heads <= lanes:
        return read
    return max(read, case.flops * size / 4 * columns * whole(case.queries) / case.queries)


def cliffs(lines: Iterable[Line], seconds: dict[str, float], vector_bytes: int) -> list[Cliff]:
    """Every case above ABOVE times what a neighbour makes expect, the worst first; once, of the axis where it is worst.

    seconds: by the case's name; a case without is nobody's neighbour.
    """
    worst: dict[str, Cliff] = {}
    for line in lines:
        for index, case in enumerate(line.cases):
            for beside in line.neighbours(index):
                if case.name not in seconds or beside.name not in seconds:
                    continue
                more = max(1.0, work(case, vector_bytes) / work(beside, vector_bytes))
                times = seconds[case.name] / (seconds[beside.name] * more)
                if times > max(ABOVE, worst[case.name].times if case.name in worst else 0):
                    worst[case.name] = Cliff(line.axis, case, beside, times, seconds[case.name])
    return sorted(worst.values(), key=lambda cliff: -cliff.times)


def _case(dtype: str = "f32", heads: int = 8, **sizes: int | str) -> Case:
    """One with a name that says all of it."""
    whole: dict[str, Any] = {"batch": 1, "kv_heads": heads, "queries": 1, "keys": 1024, "head_size": 64, **sizes}
    case = Case("", dtype, heads=heads, **whole)
    parts = [dtype, f"h{heads}", f"kv{case.kv_heads}", f"q{case.queries}", f"k{case.keys}", f"d{case.head_size}"]
    return replace(case, name="-".join(["cliff", *parts, *filter(None, (case.option.replace(" ", "_"), case.layout))]))


def lines() -> list[Line]:
    """All of them. Work per shape is small: what is looked for shows in 10 us to 10 ms."""
    return [Line(axis, tuple(cases), axis not in UNORDERED) for axis, make in AXES.items() for cases in make()]


def _queries() -> Iterator[Iterable[Case]]:
    yield (_case(queries=n) for n in QUERIES)
    yield (_case("bf16", queries=n, head_size=128) for n in QUERIES)
    yield (_grouped(32, 8, n) for n in QUERIES)


def _grouped(heads: int, kv_heads: int, queries: int, keys: int = 1024, size: int = 128) -> Case:
    return _case(heads=heads, kv_heads=kv_heads, queries=queries, keys=keys, head_size=size)


def _heads() -> Iterator[Iterable[Case]]:
    for queries in (1, 2, 64):
        yield (_case(heads=n, queries=queries) for n in HEADS)
    yield (_case("bf16", heads=n) for n in HEADS)


def _groups() -> Iterator[Iterable[Case]]:
    for queries in (1, 2, 16):
        yield (_grouped(n, 1, queries, 2048, 64) for n in GROUPS)


def _head_sizes() -> Iterator[Iterable[Case]]:
    for dtype in DTYPES:
        yield (_case(dtype, queries=64, keys=256, head_size=n) for n in HEAD_SIZES)
        yield (_case(dtype, head_size=n) for n in HEAD_SIZES)


def _lengths() -> Iterator[Iterable[Case]]:
    for dtype in ("f32", "bf16"):
        yield (_case(dtype, keys=n) for n in LENGTHS)
        yield (_case(dtype, queries=64, keys=n) for n in LENGTHS)
    yield (_case(queries=n, keys=n) for n in SQUARES)


def _either(**other: str) -> Iterator[dict[str, int | str]]:
    """Many queries, and one."""
    for sizes in ({"queries": 384, "keys": 384}, {"queries": 1, "keys": 2048}):
        yield {**sizes, **other}


def _options() -> Iterator[Iterable[Case]]:
    for dtype in ("f32", "bf16"):
        for sizes in _either():
            yield (_case(dtype, **sizes, option=name) for name in OPTIONS)


def _layouts() -> Iterator[Iterable[Case]]:
    for dtype in DTYPES:
        for sizes in _either():
            yield (_case(dtype, **sizes, layout=name) for name in LAYOUTS)


def _dtypes() -> Iterator[Iterable[Case]]:
    for sizes in (*_either(), {"queries": 8, "keys": 8}, {"queries": 64, "keys": 64}):
        yield (_case(dtype, **sizes) for dtype in ("f32", "f64", "f16", "bf16"))


AXES: dict[str, Callable[[], Iterator[Iterable[Case]]]] = {
    "queries": _queries,
    "heads": _heads,
    "groups": _groups,
    "head sizes": _head_sizes,
    "lengths": _lengths,
    "options": _options,
    "layouts": _layouts,
    "dtypes": _dtypes,
}
UNORDERED = ("options", "layouts", "dtypes")


def measure(along: Sequence[Line], threads: int, limit: float = LIMIT) -> list[CaseResult]:
    """Every shape's result, as long as there is time: what is left after `limit` seconds is not run.

    Cliffs and the neighbours they stand beside are run again, since a machine has other things to do: the faster
    result counts.
    """
    end = time.monotonic() + limit
    found: dict[str, CaseResult] = {}
    cases = cases_of(along)
    for _ in range(REPEATS):
        for result in run_cases(cases, [(OWN, threads)], SETTINGS):
            before = found.get(result.case.name, result)
            found[result.case.name] = min(before, result, key=lambda r: _seconds(r, threads))
            if time.monotonic() >= end:
                return list(found.values())
        suspects = _cliffs_of(along, found.values(), threads)
        cases = list(dict.fromkeys(case for cliff in suspects for case in (cliff.case, cliff.beside)))
        if not cases:
            break
    return list(found.values())


def _seconds(result: CaseResult, threads: int) -> float:
    own = result.of(OWN, threads)
    return own.median if own else 0.0  # a failure is never forgotten


def _cliffs_of(along: Iterable[Line], results: Iterable[CaseResult], threads: int) -> list[Cliff]:
    timed = {result.case.name: seconds for result in results if (seconds := _seconds(result, threads))}
    return cliffs(along, timed, machines.current().vector_bytes)


def cases_of(along: Iterable[Line]) -> list[Case]:
    """Each once, though it may stand on several lines."""
    return list({case.name: case for line in along for case in line.cases}.values())


def report_lines(along: Sequence[Line], results: Sequence[CaseResult], threads: int) -> list[str]:
    """Every shape above its neighbours, every one that failed, and how many there were."""
    found = _cliffs_of(along, results, threads)
    failed = [f"{r.case.name}: {own_failure(r)}" for r in results if not _seconds(r, threads)]
    every = cases_of(along)
    missing = [f"not measured: {len(every) - len(results)} of {len(every)} shapes"] * (len(results) < len(every))
    return [
        f"Above {ABOVE:g} times a neighbour: {len(found)} of {len(results) - len(failed)} shapes, the worst first",
        *(f"{c.times:6.2f}  {c.axis:10}  {c.case.name} ({1e6 * c.seconds:.0f} us) {c.beside.name}" for c in found),
        *failed,
        *missing,
    ]
