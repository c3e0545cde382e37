"""Never slower than NumPy's unfused form: sequences of 1 to 128, the two side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .cases import Case
from .driver import CaseResult, Settings, run_cases
from .report import OWN, Verdict, own_failure

SHOWN = 10  # of the worst ratios
WORST = "short sequences"  # the subject of the verdict on all of them


def measure(cases: Sequence[Case], threads: int, settings: Settings) -> list[CaseResult]:
    """A case that lost is measured twice more, in new processes, and the middle one of its three results stands.

    A process that shares its core with a neighbour of the virtual machine takes 1.5 times as long throughout.
    """

    def once(some: Sequence[Case]) -> list[CaseResult]:
        return list(run_cases(some, [(OWN, threads), ("numpy", threads)], settings))

    results = once(cases)
    lost = [n for n, result in enumerate(results) if ratio(result, threads) < 1]
    again = [once([cases[n] for n in lost]) for _ in range(2)] if lost else []
    for at, n in enumerate(lost):
        three = [results[n], *(more[at] for more in again)]
        results[n] = sorted(three, key=lambda result: max(0.0, ratio(result, threads)))[1]
    return results


def label(case: Case) -> str:
    return f"{case.name} {case.shape}"


def ratio(result: CaseResult, threads: int) -> float:
    """NumPy's time over flashtile's; NaN where one has none."""
    own, unfused = result.of(OWN, threads), result.of("numpy", threads)
    return unfused.median / own.median if own and unfused else math.nan


def ratios(results: Sequence[CaseResult], threads: int) -> dict[str, float]:
    found = {label(result.case): ratio(result, threads) for result in results}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def worst_lines(found: dict[str, float]) -> list[str]:
    """The worst ratios, lost or not."""
    ascending = sorted(found, key=lambda name: found[name])
    return ["Times NumPy's unfused form, the worst first", *(f"{found[x]:6.3f}  {x}" for x in ascending[:SHOWN])]


def judge(results: Sequence[CaseResult], threads: int) -> list[Verdict]:
    """One verdict on the worst ratio; each case that lost has one more of its own."""
    measure, found = "times NumPy unfused", ratios(results, threads)
    lost = [Verdict(name, measure, ratio, 1.0) for name, ratio in found.items() if ratio < 1]
    failed = [result for result in results if result.of(OWN, threads) is None]
    lost += [Verdict(label(result.case), measure, None, 1.0, own_failure(result)) for result in failed]
    worst = min(found, key=lambda name: found[name], default=None)
    note = "nothing was timed" if worst is None else f"worst of {len(found)} cases: {worst}"
    return [Verdict(WORST, measure, None if worst is None else found[worst], 1.0, note), *lost]
