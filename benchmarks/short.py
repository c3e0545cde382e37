"""Never slower than NumPy's unfused form: sequences of 1 to 128, the two side by side."""

from __future__ import annotations

from collections.abc import Sequence

from .cases import Case
from .driver import CaseResult, Settings, run_cases
from .report import OWN, Verdict, own_failure

SHOWN = 10  # of the worst ratios
WORST = "short sequences"  # the subject of the verdict on all of them


def measure(cases: Sequence[Case], threads: int, settings: Settings) -> list[CaseResult]:
    return list(run_cases(cases, [(OWN, threads), ("numpy", threads)], settings))


def label(case: Case) -> str:
    return f"{case.name} {case.shape}"


def ratios(results: Sequence[CaseResult], threads: int) -> dict[str, float]:
    """NumPy's time over flashtile's, where both have one."""
    timed = ((r.case, r.of(OWN, threads), r.of("numpy", threads)) for r in results)
    return {label(case): unfused.median / own.median for case, own, unfused in timed if own and unfused}


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
