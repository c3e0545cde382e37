"""`python -m benchmarks`: check, time, compare with the targets, write what was measured into docs/benchmarks."""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
from pathlib import Path

from . import backward, cliffs, doors, driver, kinds, machine, memory, overheads, peers, plot, records, report, short
from .cases import ALL_CASES, AMX, QUICK, short_cases

USUAL = ("table", "backward", "overheads", "memory", "short")
PARTS = (*USUAL, "cliffs", "doors")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known = [case.name for case in (*ALL_CASES, *backward.CASES)]
    parser.add_argument("--case", nargs="+", metavar="NAME", choices=known, help=f"only these of {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: about 3 minutes")
    parser.add_argument("--threads", type=int, default=2, help="threads of the comparison with peers (default 2)")
    parser.add_argument("--peers", nargs="+", default=list(peers.DEFAULT), help=f"default: {' '.join(peers.DEFAULT)}")
    usual = f"default: {' '.join(USUAL)}; with --case only those of the cases"
    parser.add_argument("--parts", nargs="+", choices=PARTS, help=usual)
    parser.add_argument("--axes", nargs="+", choices=cliffs.AXES, help="of the cliffs; default: all")
    parser.add_argument(
        "--doors", nargs="+", choices=doors.NAMES, default=doors.NAMES, help="of the doors; default: all"
    )
    parser.add_argument("--rounds", type=int, help="timed rounds a case (default 7, quick 3)")
    output = machine.ROOT / "docs" / "benchmarks"
    parser.add_argument("--output", type=Path, default=output, help="folder of the files (default docs/benchmarks)")
    options = parser.parse_args(arguments)
    available = driver.cpu_count()
    if not 1 <= options.threads <= available:
        parser.error(f"--threads: got {options.threads}, expected 1 to {available} (the CPUs this process may use)")
    options.rounds = options.rounds or (3 if options.quick else 7)
    kind = kinds.here()
    usual_here = [case.name for case in (*ALL_CASES, *backward.CASES) if kind is None or kind.takes(case)]
    names = options.case or ((*QUICK, *backward.QUICK) if options.quick else usual_here)
    options.cases = [case for case in ALL_CASES if case.name in names]
    options.backward = [case for case in backward.CASES if case.name in names]
    timed = ["table"] * bool(options.cases) + ["backward"] * bool(options.backward)
    options.parts = options.parts or (timed if options.case else list(USUAL))
    options.folder = kinds.folder_here(options.output)
    return options


def heading(options: argparse.Namespace) -> str:
    """When, machine and versions: the line that names a run in every file with a row of it."""
    kind = kinds.here()
    targets = f"targets of {kind.name}" if kind else f"no targets for {machine.core_name()}"
    versions = ", ".join(f"{name} {version}" for name, version in driver.versions(options.peers).items())
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f"{date}; {machine.describe()}; {targets}; {options.threads} threads, medians; {versions}"


def run_table(options: argparse.Namespace, run: str) -> None:
    wanted = [(peer, options.threads) for peer in options.peers]
    if options.threads > 1 and report.OWN in options.peers:
        wanted.append((report.OWN, 1))
    print(report.table_header(options.peers, options.threads), flush=True)
    folder, fresh = options.folder, []
    path, cases = folder / records.PEERS, kinds.targets_here(options.cases)
    for result in driver.run_cases(cases, wanted, driver.Settings(rounds=options.rounds), options.threads):
        fresh.append(result)
        print(report.table_row(result, options.peers, options.threads), flush=True)
    records.update_measurements(path, fresh, run)
    results = records.results_in(path, kinds.targets_here(ALL_CASES))
    measured = [result for result in results if result.case in cases]
    verdicts = [verdict for result in measured for verdict in report.judge(result, options.threads)]
    records.update_verdicts(folder / records.TARGETS, verdicts, run, (case.name for case in cases))
    kinds.record(options.output, "forward", fresh, options.threads, ALL_CASES)
    try:
        names = records.peers_of(results)
        plot.draw(folder / "peers.png", results, names, options.threads, records.read(path)[0])
    except ImportError as error:
        print(f"no picture: {error}")


def run_backward(options: argparse.Namespace, run: str) -> None:
    settings = driver.Settings(rounds=options.rounds)
    verdicts = backward.run(options.backward, options.peers, options.threads, settings, options.output, run)
    records.update_verdicts(options.folder / records.TARGETS, verdicts, run, (case.name for case in options.backward))


def run_short(options: argparse.Namespace, run: str) -> None:
    every = short_cases()
    cases = every[:: 4 if options.quick else 1]
    settings = driver.Settings(rounds=3 if options.quick else 5, sample_seconds=0.01)
    path = options.folder / records.SHORT
    records.update_measurements(path, short.measure(cases, options.threads, settings), run)
    results = records.results_in(path, every)
    subjects = [short.WORST, *map(short.label, cases)]
    verdicts = [verdict for verdict in short.judge(results, options.threads) if verdict.subject in subjects]
    records.update_verdicts(options.folder / records.TARGETS, verdicts, run, subjects)
    print("", *short.worst_lines(short.ratios(results, options.threads)), sep="\n")


def run_cliffs(options: argparse.Namespace, run: str) -> None:
    along = [line for line in cliffs.lines() if line.axis in (options.axes or cliffs.AXES)]
    path = options.folder / records.CLIFFS
    records.update_measurements(path, cliffs.measure(along, options.threads), run)
    results = records.results_in(path, cliffs.cases_of(along))
    print("", *cliffs.report_lines(along, results, options.threads), sep="\n", flush=True)


def run_doors(options: argparse.Namespace, run: str) -> None:
    for verdict in doors.measure(options.doors, options.threads):
        records.update_verdicts(options.folder / records.TARGETS, [verdict], run)


def first_calls(threads: int, repeats: int) -> list[report.Verdict]:
    kind = kinds.here()
    if kind is None or kind.name != AMX:
        return overheads.first_call(threads, repeats)
    each = (overheads.first_call(threads, repeats, x, overheads.FIRST_ON_TILES) for x in ("f32", "f16", "bf16"))
    return [verdict for found in each for verdict in found]


def run_fixed_costs(options: argparse.Namespace, run: str) -> None:
    """What takes no table: overheads and memory."""
    verdicts: list[report.Verdict] = []
    if "overheads" in options.parts:
        verdicts += overheads.tiny_call(options.threads)
        verdicts += overheads.new_length(options.threads)
        verdicts += overheads.gpu_host(options.threads)
        verdicts += overheads.xla_entry(options.threads)
        verdicts += first_calls(options.threads, repeats=1 if options.quick else 5)
    if "memory" in options.parts:
        verdicts += memory.long_head(options.threads, 16384 if options.quick else 65536)
    records.update_verdicts(options.folder / records.TARGETS, verdicts, run)


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen parts. A missed target is reported, not an error; a wrong result of flashtile's own is."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the stopped processes of the peers would stay behind
    options.folder.mkdir(parents=True, exist_ok=True)
    run = heading(options)
    print(run, flush=True)
    parts = {
        "table": run_table,
        "backward": run_backward,
        "overheads": run_fixed_costs,
        "short": run_short,
        "cliffs": run_cliffs,
        "doors": run_doors,
    }
    asked = {"overheads" if part == "memory" else part for part in options.parts}
    for part, measure in parts.items():
        if part in asked:
            measure(options, run)
    lines = records.text(options.folder, kinds.targets_here(ALL_CASES), short_cases(), options.threads)
    (options.folder / "table.txt").write_text("\n".join(lines) + "\n")
    rows = [row for name in (*records.FILES, backward.FILE) for row in records.read(options.folder / name)[1]]
    fresh = [row for row in rows if row[records.RUN] == run.split(";")[0]]
    verdicts = records.verdicts_in(options.folder / records.TARGETS, run)
    print("", *report.verdict_lines(verdicts), "", report.counts(verdicts), sep="\n")
    return int(any("wrong result" in row.get("why", "") and row["peer"] == report.OWN for row in fresh))


if __name__ == "__main__":
    sys.exit(main())
