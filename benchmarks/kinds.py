"""Kinds of machines: each has targets of its own, and its column in what a run writes.

What a kind of machine has measured stands in a file of its own, so that a run adds to what others found, and a run of
some cases to what the rest have shown before.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import machine, report
from .cases import Case
from .driver import CaseResult

COLUMNS = ("subject", "measure", "value", "spread", "note", "machine")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Kind:
    """Machines that share targets.

    cores           LLVM's names of their cores
    features        what LLVM says the host has: enough where its core goes by another name, as in virtual machines
    ratio, percent  the fields of a case that have the targets
    folder          of all else that is measured there, in the folder of the output; "": that folder itself
    """

    name: str
    cores: tuple[str, ...]
    ratio: str
    percent: str = ""
    features: tuple[str, ...] = ()
    folder: str = ""

    def fits(self, core: str, features: Iterable[str]) -> bool:
        return core in self.cores or bool(self.features) and set(self.features) <= set(features)

    def file(self, direction: str) -> str:
        return f"{direction}-{self.name.lower().replace(' ', '')}.csv"

    def case(self, case: Case) -> Case:
        """The case with this kind's targets."""
        percent = getattr(case, self.percent) if self.percent else None
        return dataclasses.replace(case, ratio=getattr(case, self.ratio), percent=percent)

    def takes(self, case: Case) -> bool:
        """Whether it is run here if nobody asks for it by name."""
        return case.only in ("", self.name)


# The first that fits. Zen 5 has twice the multiply-adds a cycle, and the targets of Zen 4 all the same: they are ratios
# and shares of its own peak. Gradients have one ratio for all of Intel's, which was set for the vector kernels.
KINDS = (
    Kind("Zen 4", ("znver4",), "ratio", "percent"),
    Kind("Zen 5", ("znver5",), "ratio", "percent", folder="zen-5"),
    Kind("Intel AMX", ("sapphirerapids",), "amx", "amx_percent", ("amx-tile", "amx-bf16"), "intel-amx"),
    Kind(
        "Intel AVX-512",
        ("skylake-avx512", "cascadelake", "cooperlake", "icelake-server"),
        "intel",
        folder="intel-avx-512",
    ),
)


def here() -> Kind | None:
    """The kind of this machine, None if no target is stated for it."""
    core, features = machine.core_name(), machine.features()
    return next((kind for kind in KINDS if kind.fits(core, features)), None)


def targets_here(cases: Sequence[Case]) -> list[Case]:
    """The cases with the targets of this machine's kind; without any on a machine of no kind."""
    kind = here()
    if kind is None:
        return [dataclasses.replace(case, ratio=None, percent=None) for case in cases]
    return [kind.case(case) for case in cases]


def folder_here(output: Path) -> Path:
    """Where this machine's files go, but for the columns."""
    kind = here()
    return output / kind.folder if kind else output


def record(output: Path, direction: str, results: Iterable[CaseResult], threads: int, cases: Sequence[Case]) -> None:
    """The verdicts of these results in this kind's file, in the place of those of the same cases; then all columns."""
    kind = here()
    if kind is not None:
        store(output / kind.file(direction), direction, results, threads)
    text = columns(output, direction, cases)
    (output / f"{direction}.txt").write_text("\n".join(text) + "\n")


def store(path: Path, direction: str, results: Iterable[CaseResult], threads: int, about: str = "") -> None:
    """``about``: the machine, if it is not this one."""
    rows = {(row["subject"], row["measure"]): row for row in read(path)}
    for result in results:
        rows = {key: row for key, row in rows.items() if key[0] != result.case.name}
        own = result.of(report.OWN, threads)
        for v in report.judge(result, threads):
            value = "" if v.value is None else f"{v.value:.4g}"
            spread = f"{own.spread:.3f}" if own and len(own.seconds) > 1 else ""
            row = (v.subject, v.measure, value, spread, v.note, about or machine.describe())
            rows[v.subject, v.measure] = dict(zip(COLUMNS, row, strict=True))
    what = "gradients" if direction == "backward" else direction
    report.write_rows(path, COLUMNS, rows.values(), [f"{what}; medians, each kind of machine in a file of its own"])


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("# ")))


def columns(output: Path, direction: str, cases: Sequence[Case]) -> list[str]:
    """A row for each case and measure that has a target, a column for each kind of machine: value and target."""
    stored = {
        kind.name: {(r["subject"], r["measure"]): r for r in read(output / kind.file(direction))} for kind in KINDS
    }
    wide = max(24, *(len(f"times the rate in {case.base}") + 2 for case in cases if case.base), 0)
    lines = [f"{'case':24}{'shape':>21}  {'measure':{wide}}" + "".join(f"{kind.name:>28}" for kind in KINDS)]
    for case in cases:
        for measure in measures(case):
            cells = (_cell(kind, case, measure, stored[kind.name]) for kind in KINDS)
            row = f"{case.name:24}{case.shape:>21}  {measure:{wide}}" + "".join(f"{cell:>28}" for cell in cells)
            lines.append(row.rstrip())
    return lines


def measures(case: Case) -> list[str]:
    """The names of what a case is held to on some kind of machine, or recorded for, as `report.judge` gives them."""
    targets = [getattr(case, kind.ratio) for kind in KINDS]
    shares = [getattr(case, kind.percent) for kind in KINDS if kind.percent]
    against = f"rate in {case.base}" if case.base else case.rival or "best peer"
    found = [f"times the {against}"] if any(targets) or case.only else []
    found += [f"% of {case.unit} {'bandwidth' if case.reads else 'peak'}"] if any(shares) else []
    return found + (["2 threads over 1"] if case.scaling else [])


def _cell(kind: Kind, case: Case, measure: str, stored: dict[tuple[str, str], dict[str, str]]) -> str:
    own = kind.case(case)
    target = own.percent if "%" in measure else own.scaling if "threads" in measure else own.ratio
    row = stored.get((case.name, measure))
    value = row["value"] if row and row["value"] else NOT_MEASURED
    return value if target is None else f"{value} (target {target:g})"
