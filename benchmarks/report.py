"""The results against their targets: one table for the terminal, two CSV files for the docs."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cases import SCALING_TARGET
from .driver import BASE, CaseResult, Measurement

OWN = "flashtile"
MEASUREMENT_COLUMNS = (
    "case",
    "dtype",
    "shape",
    "causal",
    "window",
    "peer",
    "threads",
    "status",
    "why",
    "largest_error",
    "allowed_error",
    "first_seconds",
    "median_seconds",
    "spread",
    "samples",
    "rate",
    "rate_unit",
    "limit",
    "limit_unit",
    "percent_of_limit",
)
VERDICT_COLUMNS = ("subject", "measure", "value", "sense", "target", "met", "note")


@dataclass(frozen=True)
class Verdict:
    """One number held to a target. `at_most` turns the comparison round: times and memory are to stay below."""

    subject: str
    measure: str
    value: float | None
    target: float | None
    note: str = ""
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """None where there is no target, or nothing could be measured to hold against it."""
        if self.value is None or self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    @property
    def sense(self) -> str:
        return "<=" if self.at_most else ">="

    @property
    def met_text(self) -> str:
        return {True: "met", False: "NOT MET", None: "-"}[self.met]


def best_peer(result: CaseResult, threads: int) -> Measurement | None:
    """The fastest other package among those whose result was right; or the case's rival, or flashtile in its base."""
    case = result.case
    if case.base or case.rival:
        return result.of(BASE if case.base else case.rival, threads)
    others = [
        m for m in result.measurements if m.status == "timed" and m.threads == threads and not m.peer.startswith(OWN)
    ]
    return min(others, key=lambda m: m.median, default=None)


def judge(result: CaseResult, threads: int) -> list[Verdict]:
    """Ratio to the best peer, share of the limit, and scaling from one thread: what could be measured of them."""
    case, verdicts = result.case, []
    own, single = result.of(OWN, threads), result.of(OWN, 1)
    best = best_peer(result, threads)
    value = None
    if own and best:  # of a base, rates: it may see other keys
        value = own.rate / best.rate if case.base else best.median / own.median
    kind = f"rate in {case.base}" if case.base else case.rival or "best peer"
    note = f"best: {best.peer}" if best else "no peer was timed"
    note = f"against {case.base or case.rival}" if best and (case.base or case.rival) else note
    if own and best and own.run != best.run:
        note += f", which ran {best.run}"
    verdicts.append(Verdict(case.name, f"times the {kind}", value, case.ratio, note if own else own_failure(result)))
    # arithmetic is held to one core's peak by one thread, reading to what all threads together can read
    subject = own if case.reads else single
    value = 100 * subject.rate / result.limit if subject and result.limit else None
    note = f"of {result.limit:.4g} {unit_of(case.reads)}" if result.limit else f"no {case.unit} limit on this processor"
    measure = f"% of {case.unit} {'bandwidth' if case.reads else 'peak'}"
    verdicts.append(Verdict(case.name, measure, value, case.percent, note if subject else own_failure(result)))
    if not case.reads and threads > 1 and own and single:
        target = SCALING_TARGET if case.direction == "forward" else case.scaling
        target = target if threads == 2 else None
        verdicts.append(Verdict(case.name, f"{threads} threads over 1", single.median / own.median, target))
    return verdicts


def own_failure(result: CaseResult) -> str:
    reasons = [f"{m.status}: {m.why}" for m in result.measurements if m.peer == OWN and m.status != "timed"]
    return reasons[0] if reasons else f"{OWN} was not run"


def unit_of(reads: bool) -> str:
    return "GB/s" if reads else "GFLOP/s"


def column(peer: str) -> int:
    return max(10, len(peer) + 2)


def table_header(peers: Sequence[str], threads: int) -> str:
    names = "".join(f"{peer:>{column(peer)}}" for peer in peers)
    title = f"{'case':17}{'shape':>20}  {names}   {'ratio':>6} {'target':>6} {'':7}"
    title += f"{'% limit':>8} {'target':>6} {'':7}{'x thr':>6}  best peer"
    return f"Rates in GFLOP/s (decode: GB/s), {threads} threads; % of limit with 1 thread (decode: {threads})\n{title}"


def table_row(result: CaseResult, peers: Sequence[str], threads: int) -> str:
    cells = []
    for peer in peers:
        m = result.of(peer, threads)
        status = next((x.status for x in result.measurements if (x.peer, x.threads) == (peer, threads)), "-")
        cells.append(f"{f'{m.rate:.1f}' if m else '-' if status == 'refused' else status:>{column(peer)}}")
    verdicts = {v.measure.split()[0]: v for v in judge(result, threads)}
    ratio, percent, scaling = verdicts.get("times"), verdicts.get("%"), verdicts.get(str(threads))

    def cell(verdict: Verdict | None, width: int) -> str:
        if verdict is None:
            return f"{'-':>{width}} {'-':>6} {'-':7}"
        value = "-" if verdict.value is None else f"{verdict.value:.2f}"
        target = "-" if verdict.target is None else f"{verdict.target:g}"
        return f"{value:>{width}} {target:>6} {verdict.met_text:7}"

    thread_ratio = f"{scaling.value:6.2f}" if scaling and scaling.value else f"{'-':>6}"
    row = f"{result.case.name:17}{result.case.shape:>20}  {''.join(cells)}   {cell(ratio, 6)}{cell(percent, 8)}"
    return f"{row}{thread_ratio}  {ratio.note if ratio else ''}".rstrip()


def refusals(results: Iterable[CaseResult]) -> list[str]:
    """Every participant that was not timed, with its reason: a dash in the table hides nothing."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        for m in result.measurements:
            if m.status != "timed":
                found.setdefault((m.status, m.peer, m.why), []).append(m.case.name)
    return [
        f"{status}: {peer}: {why} ({', '.join(dict.fromkeys(names))})" for (status, peer, why), names in found.items()
    ]


def measurement_row(result: CaseResult, m: Measurement) -> dict[str, object]:
    case, timed = m.case, m.status == "timed"
    percent = 100 * m.rate / result.limit if timed and result.limit and (case.reads or m.threads == 1) else None
    return {
        "case": result.case.name,  # flashtile_base has this one's base before it, which its shape and dtype tell
        "dtype": case.dtype,
        "shape": case.shape,
        "causal": int(case.causal),
        "window": case.window,
        "peer": m.peer,
        "threads": m.threads,
        "status": m.status,
        "why": m.why,
        "largest_error": m.error,
        "allowed_error": m.allowed,
        "first_seconds": m.first_seconds,
        "median_seconds": m.median if timed else None,
        "spread": m.spread if timed else None,
        "samples": len(m.seconds),
        "rate": m.rate if timed else None,
        "rate_unit": unit_of(case.reads),
        "limit": result.limit,
        "limit_unit": case.unit,
        "percent_of_limit": percent,
    }


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[dict[str, object]], heading: Sequence[str]) -> None:
    with path.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in heading)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()})


def write_measurements(path: Path, results: Iterable[CaseResult], heading: Sequence[str]) -> None:
    """CSV with one row a participant and case; lines that start with # name machine, date and versions."""
    rows = (measurement_row(result, m) for result in results for m in result.measurements)
    write_rows(path, MEASUREMENT_COLUMNS, rows, heading)


def verdict_row(verdict: Verdict) -> dict[str, object]:
    other = {"met": verdict.met_text}
    return {name: other.get(name, getattr(verdict, name)) for name in VERDICT_COLUMNS}


def verdict_lines(verdicts: Iterable[Verdict]) -> list[str]:
    lines = []
    for v in verdicts:
        value = "-" if v.value is None else f"{v.value:.4g}"
        target = "" if v.target is None else f"{v.sense} {v.target:g}"
        lines.append(f"{v.subject:34} {v.measure:34} {value:>9} {target:>9}  {v.met_text:8}{v.note}".rstrip())
    return lines


def counts(verdicts: Iterable[Verdict]) -> str:
    states = [v.met for v in verdicts]
    met, missed, unknown = (states.count(state) for state in (True, False, None))
    return f"{met} targets met, {missed} not met, {unknown} without a target or not measured"
