"""`python -m benchmarks`: check, time, compare with the targets, write the table into docs/benchmarks."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import signal
import sys
from pathlib import Path
from typing import TextIO

from . import backward, driver, machine, memory, overheads, peers, plot, report, short
from .cases import ALL_CASES, QUICK, short_cases

PARTS = ("table", "backward", "overheads", "memory", "short")
TARGET_CORE = "znver4"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known = [case.name for case in (*ALL_CASES, *backward.CASES)]
    parser.add_argument("--case", nargs="+", metavar="NAME", choices=known, help=f"only these of {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: about 3 minutes")
    parser.add_argument("--threads", type=int, default=2, help="threads of the comparison with peers (default 2)")
    parser.add_argument("--peers", nargs="+", default=list(peers.DEFAULT), help=f"default: {' '.join(peers.DEFAULT)}")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all; with --case only those of the cases")
    parser.add_argument("--rounds", type=int, help="timed rounds a case (default 7, quick 3)")
    output = machine.ROOT / "docs" / "benchmarks"
    parser.add_argument("--output", type=Path, default=output, help="folder for CSV and PNG (default docs/benchmarks)")
    options = parser.parse_args(arguments)
    available = driver.cpu_count()
    if not 1 <= options.threads <= available:
        parser.error(f"--threads: got {options.threads}, expected 1 to {available} (the CPUs this process may use)")
    options.rounds = options.rounds or (3 if options.quick else 7)
    names = options.case or ((*QUICK, *backward.QUICK) if options.quick else known)
    options.cases = [case for case in ALL_CASES if case.name in names]
    options.backward = [case for case in backward.CASES if case.name in names]
    timed = ["table"] * bool(options.cases) + ["backward"] * bool(options.backward)
    options.parts = options.parts or (timed if options.case else list(PARTS))
    return options


def heading(options: argparse.Namespace) -> list[str]:
    """Machine, date and versions: the lines that every output of a run carries."""
    core = machine.core_name()
    match = core == TARGET_CORE
    targets = "the targets' kind of machine" if match else f"targets are stated for {TARGET_CORE}, not {core}"
    versions = ", ".join(f"{name} {version}" for name, version in driver.versions(options.peers).items())
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return [f"{machine.describe()}; {targets}", f"{date}; {options.threads} threads; medians", versions]


def run_table(options: argparse.Namespace, lines: list[str]) -> list[report.Verdict]:
    wanted = [(peer, options.threads) for peer in options.peers]
    if options.threads > 1 and report.OWN in options.peers:
        wanted.append((report.OWN, 1))
    print(report.table_header(options.peers, options.threads), flush=True)
    results = []
    for result in driver.run_cases(options.cases, wanted, driver.Settings(rounds=options.rounds), options.threads):
        results.append(result)
        print(report.table_row(result, options.peers, options.threads), flush=True)
    print(*report.refusals(results), sep="\n")
    report.write_measurements(options.output / "peers.csv", results, lines)
    try:
        plot.draw(options.output / "peers.png", results, options.peers, options.threads, lines)
    except ImportError as error:
        print(f"no picture: {error}")
    return [verdict for result in results for verdict in report.judge(result, options.threads)]


def run_short(options: argparse.Namespace, lines: list[str]) -> list[report.Verdict]:
    cases = short_cases()[:: 4 if options.quick else 1]
    settings = driver.Settings(rounds=3 if options.quick else 5, sample_seconds=0.01)
    results, verdicts = short.compare(cases, options.threads, settings)
    report.write_measurements(options.output / "short.csv", results, lines)
    return verdicts


class Both:
    """Two text files as one: what is shown is kept."""

    def __init__(self, *files: TextIO) -> None:
        self.files = files

    def write(self, text: str) -> None:
        for file in self.files:
            file.write(text)

    def flush(self) -> None:
        for file in self.files:
            file.flush()


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen parts. A missed target is reported, not an error; a wrong result of flashtile's own is."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the stopped processes of the peers would stay behind
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "table.txt").open("w") as file, contextlib.redirect_stdout(Both(sys.stdout, file)):
        return run(options)


def run(options: argparse.Namespace) -> int:
    """The chosen parts in turn; 1 if a result of flashtile's own was wrong."""
    lines = heading(options)
    print(*lines, sep="\n")
    verdicts: list[report.Verdict] = []
    if "table" in options.parts:
        verdicts += run_table(options, lines)
    if "backward" in options.parts:
        settings = driver.Settings(rounds=options.rounds)
        verdicts += backward.run(options.backward, options.peers, options.threads, settings, options.output, lines)
    if "overheads" in options.parts:
        verdicts += overheads.tiny_call(options.threads)
        verdicts += overheads.gpu_host(options.threads)
        verdicts += overheads.first_call(options.threads, repeats=1 if options.quick else 5)
    if "memory" in options.parts:
        verdicts += memory.long_head(options.threads, 16384 if options.quick else 65536)
    if "short" in options.parts:
        verdicts += run_short(options, lines)
    report.write_verdicts(options.output / "targets.csv", verdicts, lines)
    print("", *report.verdict_lines(verdicts), sep="\n")
    counts = [sum(v.met is state for v in verdicts) for state in (True, False, None)]
    print(f"\n{counts[0]} targets met, {counts[1]} not met, {counts[2]} without a target or not measured")
    return int(any("wrong result" in v.note for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
