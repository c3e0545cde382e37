"""Never slower than NumPy's unfused form: sequences of 1 to 128, the two side by side."""

from __future__ import annotations

from collections.abc import Sequence

from .cases import Case
from .driver import CaseResult, Settings, run_cases
from .report import OWN, Verdict, own_failure

SHOWN = 10  # of the worst ratios


def compare(cases: Sequence[Case], threads: int, settings: Settings) -> tuple[list[CaseResult], list[Verdict]]:
    """All results, and one verdict on the worst ratio; each case that lost has one more of its own. The worst ratios
    are printed, lost or not."""
    results = list(run_cases(cases, [(OWN, threads), ("numpy", threads)], settings))
    ratios: dict[str, float] = {}
    lost = []
    for result in results:
        own, unfused = result.of(OWN, threads), result.of("numpy", threads)
        name = f"{result.case.name} {result.case.shape}"
        if own and unfused:
            ratios[name] = unfused.median / own.median
            if ratios[name] < 1:
                lost.append(Verdict(name, "times NumPy unfused", ratios[name], 1.0))
        elif not own:
            lost.append(Verdict(name, "times NumPy unfused", None, 1.0, own_failure(result)))
    ascending = sorted(ratios, key=lambda name: ratios[name])
    print(
        "\nTimes NumPy's unfused form, the worst first",
        *(f"{ratios[x]:6.3f}  {x}" for x in ascending[:SHOWN]),
        sep="\n",
    )
    note = f"worst of {len(ratios)} cases: {ascending[0]}" if ratios else "nothing was timed"
    value = ratios[ascending[0]] if ratios else None
    return results, [Verdict("short sequences", "times NumPy unfused", value, 1.0, note), *lost]
