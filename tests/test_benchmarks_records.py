"""What a run writes: rows that it measured, beside those of earlier runs, and the table that they make."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import processes
import pytest

import benchmarks.__main__ as command
from benchmarks import backward, door_calls, doors, driver, kinds, machine, overheads, records, report, short
from benchmarks.cases import ALL_CASES, Case
from benchmarks.report import Verdict

ROOT = Path(__file__).resolve().parents[1]
FIRST, SECOND = "2026-01-01 00:00 UTC; here; 2 threads", "2026-01-02 00:00 UTC; there; 2 threads"
ONE = Case("one", "f32", 1, 1, 1, 8, 8, 8, ratio=1.0, percent=50)
TWO = dataclasses.replace(ONE, name="two")
BASED = dataclasses.replace(ONE, name="based", base="one", ratio=0.9)


@pytest.fixture(autouse=True)
def zen4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine is: its files lie in the output's folder itself, its targets are a case's `ratio`."""
    monkeypatch.setattr(machine, "core_name", lambda: "znver4")
    monkeypatch.setattr(machine, "features", frozenset)


def result(case: Case, limit: float = 4.0, **seconds: float) -> driver.CaseResult:
    """Two threads of each peer, and flashtile's one."""
    ran = {"flashtile_base": ONE if case.base else case}
    found = [driver.Measurement(ran.get(p, case), p, 2, seconds=[s]) for p, s in seconds.items()]
    return driver.CaseResult(case, [*found, driver.Measurement(case, "flashtile", 1, seconds=[2.0])], [limit])


def table(folder: Path, *shorts: Case) -> str:
    return "\n".join(records.text(folder, (ONE, TWO, BASED), shorts, 2))


def test_rows_of_other_cases_and_peers_stay_with_the_run_that_measured_them(tmp_path: Path) -> None:
    path = tmp_path / records.PEERS
    records.update_measurements(path, [result(ONE, flashtile=1, torch=2), result(TWO, flashtile=1, torch=2)], FIRST)
    records.update_measurements(path, [result(ONE, flashtile=0.5)], SECOND)
    about, rows = records.read(path)
    assert about == [FIRST, SECOND]
    measured = {(row["case"], row["peer"], row["threads"]): (row["median_seconds"], row["run"][:10]) for row in rows}
    assert measured == {
        ("one", "flashtile", "2"): ("0.5", "2026-01-02"),
        ("one", "torch", "2"): ("2", "2026-01-01"),
        ("one", "flashtile", "1"): ("2", "2026-01-02"),
        ("two", "flashtile", "2"): ("1", "2026-01-01"),
        ("two", "torch", "2"): ("2", "2026-01-01"),
        ("two", "flashtile", "1"): ("2", "2026-01-01"),
    }


def test_a_run_without_rows_left_is_not_named(tmp_path: Path) -> None:
    path = tmp_path / records.PEERS
    for run in (FIRST, SECOND):
        records.update_measurements(path, [result(ONE, flashtile=1)], run)
    assert records.read(path)[0] == [SECOND]


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / records.PEERS
    given = [result(ONE, flashtile=1, torch=2), result(BASED, limit=8, flashtile=1, flashtile_base=3)]
    given[0].measurements.append(driver.Measurement(ONE, "jax", 2, "refused", "not my kind"))
    records.update_measurements(path, given, FIRST)
    found = records.results_in(path, (ONE, TWO, BASED))
    assert [r.case.name for r in found] == ["one", "based"]
    for before, after in zip(given, found, strict=True):
        assert [dataclasses.replace(m, run="") for m in after.measurements] == before.measurements
        assert report.judge(before, 2) == report.judge(after, 2)
    assert table(tmp_path).count("not my kind") == 1


def test_a_ratio_to_another_run_says_so(tmp_path: Path) -> None:
    path = tmp_path / records.PEERS
    records.update_measurements(path, [result(ONE, flashtile=1, torch=2)], FIRST)
    assert report.judge(records.results_in(path, [ONE])[0], 2)[0].note == "best: torch"
    records.update_measurements(path, [result(ONE, flashtile=0.5)], SECOND)
    verdict = report.judge(records.results_in(path, [ONE])[0], 2)[0]
    assert (verdict.value, verdict.note) == (4.0, "best: torch, which ran 2026-01-01 00:00 UTC")


def test_verdicts_of_what_was_measured_replace_others_stay(tmp_path: Path) -> None:
    path = tmp_path / records.TARGETS
    kept = Verdict("tiny call", "us", 5.0, 10.0, at_most=True)
    records.update_verdicts(path, [kept, Verdict("a", "ratio", 1.0, 2.0), Verdict("b", "ratio", 1.0, 2.0)], FIRST)
    records.update_verdicts(path, [Verdict("a", "ratio", 3.0, 2.0)], SECOND, subjects=["a", "b"])
    assert records.verdicts_in(path) == [kept, Verdict("a", "ratio", 3.0, 2.0)]
    assert [v.subject for v in records.verdicts_in(path, SECOND)] == ["a"]


def test_a_short_shape_that_no_longer_loses_has_no_verdict_any_more(tmp_path: Path, monkeypatch) -> None:
    """And a run of a part of them leaves the verdicts on the others."""
    cases = [dataclasses.replace(ONE, name=f"short-{n}") for n in range(5)]
    speed = dict.fromkeys(cases, 2.0)  # flashtile's seconds; NumPy takes 1
    ran = []

    def measure(wanted, *_):
        ran.append(list(wanted))
        return [result(case, flashtile=speed[case], numpy=1.0) for case in wanted]

    monkeypatch.setattr(command, "short_cases", lambda: cases)
    monkeypatch.setattr(short, "measure", measure)
    monkeypatch.setattr(command, "ALL_CASES", ())
    arguments = ["--parts", "short", "--threads", "1", "--peers", "numpy", "--output", str(tmp_path)]
    command.run_short(_options(arguments, threads=2), FIRST)
    subjects = [v.subject for v in records.verdicts_in(tmp_path / records.TARGETS)]
    assert subjects == [short.WORST, *map(short.label, cases)]
    speed.update(dict.fromkeys(cases, 0.5))
    command.run_short(_options([*arguments, "--quick"], threads=2), SECOND)
    assert ran[1] == [cases[0], cases[4]]
    worst, *lost = records.verdicts_in(tmp_path / records.TARGETS)
    assert (worst.subject, worst.value, worst.note[:16]) == (short.WORST, 0.5, "worst of 5 cases")
    assert {v.subject for v in lost} == {short.label(case) for case in cases[1:4]}


def _options(arguments: list[str], threads: int):
    found = command.parse(arguments)
    found.threads = threads  # of the fake results, whatever this machine has
    return found


def test_a_part_alone_leaves_the_files_of_the_others(tmp_path: Path, monkeypatch) -> None:
    records.update_measurements(tmp_path / records.PEERS, [result(ONE, flashtile=1, torch=2)], FIRST)
    records.update_verdicts(tmp_path / records.TARGETS, [Verdict("one", "ratio", 2.0, 1.0)], FIRST)
    before = (tmp_path / records.PEERS).read_text()
    monkeypatch.setattr(command, "ALL_CASES", (ONE, TWO, BASED))
    monkeypatch.setattr(overheads, "tiny_call", lambda threads: [Verdict("tiny call", "us", 5.0, 10.0, at_most=True)])
    for other in ("new_length", "gpu_host", "xla_entry", "first_call"):
        monkeypatch.setattr(overheads, other, lambda *_, **__: [])
    assert command.main(["--parts", "overheads", "--threads", "1", "--peers", "numpy", "--output", str(tmp_path)]) == 0
    assert (tmp_path / records.PEERS).read_text() == before
    text = (tmp_path / "table.txt").read_text()
    assert FIRST in text and "tiny call" in text and "2 targets met" in text
    assert [v.subject for v in records.verdicts_in(tmp_path / records.TARGETS)] == ["one", "tiny call"]


def test_table_of_the_docs_is_what_the_files_say() -> None:
    from benchmarks.cases import short_cases

    folder = ROOT / "docs" / "benchmarks"
    threads = max(int(row["threads"]) for row in records.read(folder / records.PEERS)[1])
    lines = records.text(folder, ALL_CASES, short_cases(), threads)
    assert (folder / "table.txt").read_text().splitlines() == lines


@pytest.mark.parametrize(("direction", "cases"), [("forward", ALL_CASES), ("backward", backward.CASES)])
def test_columns_of_the_docs_are_what_the_files_say(direction: str, cases: tuple[Case, ...]) -> None:
    folder = ROOT / "docs" / "benchmarks"
    assert (folder / f"{direction}.txt").read_text().splitlines() == kinds.columns(folder, direction, cases)


@pytest.mark.parametrize("name", [name for name in records.FILES if (ROOT / "docs" / "benchmarks" / name).exists()])
def test_every_row_of_the_docs_names_a_run_that_is_described(name: str) -> None:
    about, rows = records.read(ROOT / "docs" / "benchmarks" / name)
    assert {row["run"] for row in rows} == {line.split(";")[0] for line in about}


def test_doors_are_held_to_what_they_stand_in_for() -> None:
    ratio, beyond = (doors.Row(("call",), "a call", **held) for held in ({"ratio": 2.0}, {"beyond": 6.0}))
    found = {"ours": 1.5e-5, "other": 1e-5, "ratio": 0.7}
    assert doors.judge(ratio, found).met is False
    judged = doors.judge(beyond, found)
    assert judged.met and (judged.value, judged.target) == pytest.approx((15.0, 16.0))
    for row in (ratio, beyond):
        assert doors.judge(row, {"error": "wrong"}).met is None and doors.judge(row, {"error": "wrong"}).note == "wrong"


def test_a_door_that_is_wrong_is_not_timed() -> None:
    torch = pytest.importorskip("torch")
    exact = torch.linspace(0, 1, 9, dtype=torch.float64)
    near, far = exact + 1e-3, exact + 1e-2
    door_calls.check([far, near], [far, far], [exact, exact])
    for wrong in (far, exact + torch.nan):
        with pytest.raises(AssertionError, match="result 1: error"):
            door_calls.check([near, wrong], [near, near], [exact, exact])


def test_how_jax_enters_is_measured() -> None:
    """Machine code reads the clock as XLA calls, and as the kernel starts."""
    pytest.importorskip("jax")
    done = processes.run(
        [sys.executable, "-m", "benchmarks.snippets", "xla_entry", "causal"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["forward"] > 0 and found["gradient"] > 0
    assert not found["python forward"] and not found["python gradient"]


# What a row of README.md's table holds: cases by how their names begin, the forward's or the gradients'.
SUMMARY = {
    "dense": ("forward", ("1k64", "2k128", "4k64", "512")),
    "causal": ("forward", ("causal-",)),
    "a window of 512 on 8,192 rows": ("forward", ("window",)),
    "one query on 8,192 or 16,384 keys": ("forward", ("decode",)),
    "gradients": ("backward", ("1k64-b", "2k128-b", "4k64-b", "causal-", "gqa-b")),
}


def summary(part: str, kind: str, dtype: str, names: tuple[str, ...]) -> str:
    """The least and the largest measured ratio to the best peer, as the table gives them."""
    _, rows = records.read(ROOT / "docs" / "benchmarks" / f"{part}-{kind}.csv")
    starts = tuple(f"{dtype}-{name}" for name in names)
    mine = [row for row in rows if row["subject"].startswith(starts) and row["measure"] == "times the best peer"]
    found = sorted({float(row["value"]) for row in mine if row["value"]})
    told = dict.fromkeys(f"{x:.1f}" if x < 9.95 else f"{x:.0f}" for x in (found[:1] + found[-1:]))
    return " to ".join(told)


def test_the_readme_says_what_was_measured() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    head = lines.index("| | fp32 | bf16 | fp16 |")
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[head + 2 : head + 2 + len(SUMMARY)]]
    for name, *cells in told:
        part, names = SUMMARY[name]
        for dtype, cell in zip(("f32", "bf16", "f16"), cells, strict=True):
            kinds_of = [summary(part, kind, dtype, names) for kind in ("zen4", "zen5")]
            assert cell == " / ".join(filter(None, kinds_of)), (name, dtype)
    assert [name for name, *_ in told] == list(SUMMARY)
