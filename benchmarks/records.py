"""The files of a run: what it measured replaces what was there of the same, everything else stays.

Each row of a CSV names the run that measured it (column `run`: when it began), and the first lines of the file say of
each run that has rows left: when, machine, threads, versions. table.txt is these files as text.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import cliffs, peers, report, short
from .cases import Case
from .driver import BASE, CaseResult, Measurement
from .report import MEASUREMENT_COLUMNS, OWN, VERDICT_COLUMNS, Verdict

RUN = "run"
MEASURED_AS = ("case", "peer", "threads")  # what a row of measurements is known by
JUDGED_AS = ("subject", "measure")
SENSES = {">=": False, "<=": True}  # a verdict's `at_most`

Row = dict[str, str]


def read(path: Path) -> tuple[list[str], list[Row]]:
    """Lines about runs, and rows; none of a file that is not there."""
    if not path.exists():
        return [], []
    lines = path.read_text().splitlines()
    about = [line[2:] for line in lines if line.startswith("# ")]
    return about, list(csv.DictReader(line for line in lines if not line.startswith("# ")))


def update(
    path: Path,
    columns: Sequence[str],
    rows: Iterable[dict[str, object]],
    run: str,
    known_by: Sequence[str],
    subjects: Iterable[str] = (),
) -> None:
    """Put rows in place of those that are known by the same; of `subjects` (first of `known_by`) no other row stays.

    run: its line, which begins with what the rows' column `run` is to say and a semicolon.
    """
    about, old = read(path)
    gone = set(subjects)
    fresh = {tuple(str(row[name]) for name in known_by): {**row, RUN: _name_of(run)} for row in rows}
    merged: dict[tuple[str, ...], dict[str, object]] = {}
    for row in old:
        key = tuple(row[name] for name in known_by)
        if key in fresh or row[known_by[0]] not in gone:
            merged[key] = fresh.pop(key, dict(row))
    merged.update(fresh)
    left = {str(row[RUN]) for row in merged.values()}
    lines = [line for line in about if _name_of(line) in left and _name_of(line) != _name_of(run)]
    report.write_rows(path, (*columns, RUN), merged.values(), [*lines, *([run] if _name_of(run) in left else [])])


def _name_of(run: str) -> str:
    return run.split(";")[0]


def update_measurements(path: Path, results: Iterable[CaseResult], run: str) -> None:
    """Each participant's row of each case that was run; rows of other cases, peers and numbers of threads stay."""
    rows = (report.measurement_row(result, m) for result in results for m in result.measurements)
    update(path, MEASUREMENT_COLUMNS, rows, run, MEASURED_AS)


def update_verdicts(path: Path, verdicts: Iterable[Verdict], run: str, subjects: Iterable[str] = ()) -> None:
    """The verdicts of what was measured; `subjects`: what was measured, whether or not there is a verdict on it."""
    update(path, VERDICT_COLUMNS, map(report.verdict_row, verdicts), run, JUDGED_AS, subjects)


def results_in(path: Path, cases: Iterable[Case]) -> list[CaseResult]:
    """The results of these cases, in their order, as far as the file has them: of each participant its median."""
    by_case: dict[str, list[Row]] = {}
    for row in read(path)[1]:
        by_case.setdefault(row["case"], []).append(row)
    known = {case.name: case for case in cases}
    return [_result(case, by_case[name], known) for name, case in known.items() if name in by_case]


def _result(case: Case, rows: list[Row], known: dict[str, Case]) -> CaseResult:
    measurements = []
    for row in rows:
        ran = known.get(case.base, case) if row["peer"] == BASE and row["status"] != "refused" else case
        found = Measurement(ran, row["peer"], int(row["threads"]), row["status"], row["why"], run=row[RUN])
        found.seconds = [float(row["median_seconds"])] if row["median_seconds"] else []
        measurements.append(found)
    limits = [float(row["limit"]) for row in rows if row["limit"] and row["peer"] == OWN]
    return CaseResult(case, measurements, limits[-1:])


def verdicts_in(path: Path, run: str = "") -> list[Verdict]:
    """Those of every run, or of one."""
    return [
        Verdict(
            row["subject"],
            row["measure"],
            float(row["value"]) if row["value"] else None,
            float(row["target"]) if row["target"] else None,
            row["note"],
            SENSES[row["sense"]],
        )
        for row in read(path)[1]
        if not run or row[RUN] == _name_of(run)
    ]


def peers_of(results: Iterable[CaseResult]) -> list[str]:
    """Those that results have a row of: the usual ones in their usual order, then others."""
    there = dict.fromkeys(m.peer for result in results for m in result.measurements)
    return [*(peer for peer in peers.DEFAULT if peer in there), *(peer for peer in there if peer not in peers.DEFAULT)]


def text(folder: Path, cases: Sequence[Case], short_cases: Sequence[Case], threads: int) -> list[str]:
    """table.txt: the runs, the table, the verdicts, the worst short shapes, the cliffs."""
    runs = dict.fromkeys(line for name in FILES for line in read(folder / name)[0])
    results = results_in(folder / PEERS, cases)
    verdicts = verdicts_in(folder / TARGETS)
    lines = list(runs)
    if results:
        names = peers_of(results)
        lines += report.table_header(names, threads).splitlines()
        lines += [report.table_row(result, names, threads) for result in results] + report.refusals(results)
    lines += ["", *report.verdict_lines(verdicts)]
    if shorts := results_in(folder / SHORT, short_cases):
        lines += ["", *short.worst_lines(short.ratios(shorts, threads))]
    lines += ["", report.counts(verdicts)]
    along = cliffs.lines()
    if edges := results_in(folder / CLIFFS, cliffs.cases_of(along)):
        lines += ["", *cliffs.report_lines(along, edges, threads)]
    return lines


PEERS, SHORT, TARGETS, CLIFFS = FILES = ("peers.csv", "short.csv", "targets.csv", "cliffs.csv")
