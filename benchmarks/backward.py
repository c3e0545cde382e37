"""Gradients: the same peers, checks and turns as the table's, and one column of targets and results a kind of machine.

What a kind of machine has measured stands in a file of its own, so that a run adds to what others found, and a run of
some cases to what the rest have shown before.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import driver, machine, records, report
from .cases import Case

PEERS = ("flashtile", "torch", "jax")
COLUMNS = ("subject", "measure", "value", "spread", "note", "machine")
FILE = "backward.csv"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Kind:
    """Machines that share targets: LLVM's names of their cores, and the field of a case that has the ratio."""

    name: str
    cores: tuple[str, ...]
    ratio: str
    peaks: bool  # whether the shares of the peak are stated for it

    @property
    def file(self) -> str:
        return f"backward-{self.name.lower().replace(' ', '')}.csv"

    def case(self, case: Case) -> Case:
        """The case with this kind's targets."""
        return dataclasses.replace(case, ratio=getattr(case, self.ratio), percent=case.percent if self.peaks else None)


KINDS = (
    Kind("Zen 4", ("znver4",), "ratio", True),
    Kind(
        "Intel AVX-512",
        ("skylake-avx512", "cascadelake", "cooperlake", "icelake-server", "sapphirerapids", "emeraldrapids"),
        "intel",
        False,
    ),
)


def _case(name: str, dtype: str, heads: int, length: int, size: int, ratio: float | None, **fields: object) -> Case:
    """One sequence of as many queries as keys; fp16 is computed in fp32, and so is held to no peak of its own."""
    kv_heads = fields.pop("kv_heads", heads)
    known = {"direction": "backward", "unit": {"f16": "f32"}.get(dtype, dtype), **fields}
    return Case(name, dtype, 1, heads, kv_heads, length, length, size, ratio=ratio, **known)  # type: ignore[arg-type]


CASES = (
    _case("f32-1k64-b", "f32", 8, 1024, 64, 1.25, percent=78, intel=1.0),
    _case("f32-2k128-b", "f32", 8, 2048, 128, 1.05, percent=74, intel=1.0),
    _case("f32-4k64-b", "f32", 8, 4096, 64, 1.15, percent=80, intel=1.0),
    _case("f32-causal-1k64-b", "f32", 8, 1024, 64, 1.6, percent=66, intel=1.3, causal=True),
    _case("f32-causal-2k128-b", "f32", 8, 2048, 128, 1.4, percent=74, intel=1.3, causal=True),
    _case("f32-causal-4k64-b", "f32", 8, 4096, 64, 1.25, percent=78, intel=1.3, causal=True),
    _case("bf16-2k128-b", "bf16", 8, 2048, 128, 1.6, percent=78),
    _case("bf16-causal-2k128-b", "bf16", 8, 2048, 128, 1.7, percent=76, causal=True),
    _case("f16-causal-1k64-b", "f16", 4, 1024, 64, 5.0, intel=1.3, causal=True),
    _case("f64-1k64-b", "f64", 8, 1024, 64, 1.5, percent=72, intel=1.1),
    _case(
        "f32-window-fb", "f32", 8, 8192, 64, 8.0, intel=8.0, causal=True, window=512, direction="both", rival="torch"
    ),
    _case(
        "own-score-fb",
        "f32",
        8,
        2048,
        64,
        4.0,
        intel=4.0,
        causal=True,
        option="softcap, alibi by hand",
        direction="both",
        rival="torch",
    ),
    _case("f32-one-head-b", "f32", 1, 8192, 64, None, causal=True, scaling=1.8),
    _case("f32-gqa-b", "f32", 16, 2048, 128, 1.4, intel=1.3, causal=True, kv_heads=4),
)
QUICK = ("f32-1k64-b", "f32-causal-1k64-b", "f16-causal-1k64-b", "f64-1k64-b")


def kind_here() -> Kind | None:
    """The kind of this machine, None if no target is stated for it."""
    core = machine.core_name()
    return next((kind for kind in KINDS if core in kind.cores), None)


def run(
    cases: Sequence[Case], peers: Sequence[str], threads: int, settings: driver.Settings, output: Path, begun: str
) -> list[report.Verdict]:
    """Check, time and judge the cases; write all measurements, and the file of this kind of machine.
    `begun` is the line that names the run in what it writes (records.py)."""
    kind = kind_here()
    chosen = [peer for peer in peers if peer in PEERS]
    wanted = [(peer, threads) for peer in chosen]
    if threads > 1 and report.OWN in chosen:
        wanted.append((report.OWN, 1))
    print(f"\nGradients. This machine: {kind.name if kind else f'{machine.core_name()}, no kind with targets'}")
    print(report.table_header(chosen, threads), flush=True)
    cases = [kind.case(case) if kind else dataclasses.replace(case, ratio=None, percent=None) for case in cases]
    results = []
    for result in driver.run_cases(cases, wanted, settings, threads):
        results.append(result)
        print(report.table_row(result, chosen, threads), flush=True)
    print(*report.refusals(results), sep="\n")
    records.update_measurements(output / FILE, results, begun)
    verdicts = [v for result in results for v in report.judge(result, threads)]
    if kind is not None:
        store(output / kind.file, results, threads)
    text = columns(output)
    (output / "backward.txt").write_text("\n".join(text) + "\n")
    print("", *text, sep="\n")
    return verdicts


def store(path: Path, results: Iterable[driver.CaseResult], threads: int) -> None:
    """The verdicts of these results in the file of a kind of machine, in the place of those of the same cases."""
    rows = {(row["subject"], row["measure"]): row for row in read(path)}
    for result in results:
        rows = {key: row for key, row in rows.items() if key[0] != result.case.name}
        own = result.of(report.OWN, threads)
        for v in report.judge(result, threads):
            value = "" if v.value is None else f"{v.value:.4g}"
            row = (v.subject, v.measure, value, f"{own.spread:.3f}" if own else "", v.note, machine.describe())
            rows[v.subject, v.measure] = dict(zip(COLUMNS, row, strict=True))
    report.write_rows(path, COLUMNS, rows.values(), ["gradients; medians, each kind of machine in a file of its own"])


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("# ")))


def columns(output: Path) -> list[str]:
    """A row for each case and measure that has a target, a column for each kind of machine: value and target."""
    stored = {kind.name: {(r["subject"], r["measure"]): r for r in read(output / kind.file)} for kind in KINDS}
    lines = [f"{'case':20}{'shape':>18}  {'measure':20}" + "".join(f"{kind.name:>24}" for kind in KINDS)]
    for case in CASES:
        for measure in measures(case):
            cells = (_cell(kind, kind.case(case), measure, stored[kind.name]) for kind in KINDS)
            row = f"{case.name:20}{case.shape:>18}  {measure:20}" + "".join(f"{cell:>24}" for cell in cells)
            lines.append(row.rstrip())
    return lines


def measures(case: Case) -> list[str]:
    """The names of what a case is held to on some kind of machine, as `report.judge` gives them."""
    found = [f"times the {case.rival or 'best peer'}"] if case.ratio or case.intel else []
    found += [f"% of {case.unit} peak"] if case.percent else []
    return found + (["2 threads over 1"] if case.scaling else [])


def _cell(kind: Kind, case: Case, measure: str, stored: dict[tuple[str, str], dict[str, str]]) -> str:
    target = case.percent if "%" in measure else case.scaling if "threads" in measure else case.ratio
    row = stored.get((case.name, measure))
    value = row["value"] if row and row["value"] else NOT_MEASURED
    return value if target is None else f"{value} (target {target:g})"
