"""The hardware-day script: its dry run on the interpreter, and its checks, which must be able to fail."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import run

ROOT = Path(__file__).resolve().parent.parent

torch = pytest.importorskip("torch")
from benchmarks import report  # noqa: E402
from benchmarks.gpu import __main__ as command_line  # noqa: E402
from benchmarks.gpu import checks, habits, peers, stand_ins, steps, timing  # noqa: E402
from flashtile.kernels.triton import gluon, release  # noqa: E402

IN_GLUON = "the kernel in Gluon"
SIZES = (60, 100)  # with fewer rows the largest error of the baseline, and so what is allowed, is a matter of luck


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_dry_run_goes_all_the_way(tmp_path: Path) -> None:
    """Every check and every peer on the interpreter, in a process of its own; files with a row for each."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--budget", "1e6", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = run(command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("everything of flashtile's is right\n") and "   WRONG" not in done.stdout
    summary = (tmp_path / "summary.txt").read_text()
    assert [name for name in command_line.STEPS if f"== {name}: ok" in summary] == list(command_line.STEPS)
    assert "Job(size=64" in (tmp_path / "log.txt").read_text()  # something was compiled ahead
    checked = _rows(tmp_path / "checks.csv")
    small = {c.name for c in checks.CHECKS if (c.kv_len or 0) < 1000 and c.size <= 128}
    assert {row["check"] for row in checked} == small and {row["verdict"] for row in checked} == {"ok"}
    looked = {row["check"]: row["verdict"] for row in _rows(tmp_path / "habits.csv")}
    here = habits.ANYWHERE - ({IN_GLUON} if (release() or (0,)) < gluon.NEEDS else set())
    assert {name for name, verdict in looked.items() if verdict == "ok"} == here and len(looked) - len(here) < 5
    rows, cases = _rows(tmp_path / "gpu.csv"), timing.cases(["bf16"], dry=True)
    graphs = {row["case"]: row["status"] for row in rows if row["peer"] == "flashtile, graph"}
    assert graphs == {case.name: "timed" for case in cases if case.direction == "forward"}
    timed = [row for row in rows if not row["peer"].endswith(", graph")]
    assert len(timed) == len(cases) * len(peers.PEERS)
    assert {row["status"] for row in timed if row["peer"] == "flashtile"} == {"timed"}
    assert {row["status"] for row in timed if row["peer"] == "triton_vanilla"} == {"timed", "refused"}, "no backward"
    assert {row["why"] for row in timed if row["peer"] == "cudnn"} == {"no cuDNN here"}


def test_a_step_that_fails_or_takes_too_long_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own, but for the one step that is to be ended: what it started would sleep for an hour,
    and would hold its output open, as the workers of a pool do."""
    monkeypatch.setattr(steps, "GRACE", 1.0)
    moment = [0.0]
    steps_run = steps.Run(tmp_path, 100, clock=lambda: moment[0])
    steps_run.step(steps.Step("broken", 50, ("-c", "print('half'); raise SystemExit(3)")))
    family = "import subprocess as s, sys; s.run([sys.executable, '-c', 'import time; time.sleep(3600)'])"
    steps_run.step(steps.Step("endless", 1, ("-c", "print('begun', flush=True);" + family)))
    last = "\ntry: time.sleep(3600)\nexcept KeyboardInterrupt: print('what was found')"
    steps_run.step(steps.Step("long", 2, ("-c", "import time" + last)))
    steps_run.step(steps.Step("beside", 50, ("-c", family), beside=True))
    steps_run.step(steps.Step("right", 50, ("-c", "print('whole')")))
    moment[0] = 99.5
    steps_run.step(steps.Step("late", 50, ("-c", "print('never')")))
    steps_run.end()
    assert steps_run.failed == ["broken"] and steps_run.late == ["endless", "long", "late"]
    summary = (tmp_path / "summary.txt").read_text()
    assert "== broken: 3" in summary and "   half" in summary and "== endless: out of time" in summary
    assert "begun" in (tmp_path / "log.txt").read_text() and "   what was found" in summary
    assert "== right: ok" in summary and "== late: no time left" in summary and "never" not in summary


def test_a_check_that_does_not_end_leaves_the_others_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one of which has written a row and sleeps: no time is left for it."""
    told = "check,dtype,verdict,why\\nsmall,float16,ok,1 s\\n"
    body = (
        "import pathlib, sys, time; number = sys.argv[-2];"
        f"pathlib.Path({str(tmp_path)!r}, f'checks-{{number}}.csv').write_text('{told}');"
        "time.sleep(3600 * int(number))"
    )
    honest = subprocess.Popen

    def instead(command: list[str], **options: Any) -> Any:
        return honest([sys.executable, "-c", body, *command], **options)

    monkeypatch.setattr(command_line.subprocess, "Popen", instead)
    monkeypatch.setattr(command_line.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(command_line, "heading", lambda dry: [])
    monkeypatch.setattr(command_line, "SLACK", 3)
    monkeypatch.setenv("UNTIL", str(time.time()))
    assert command_line.step_checks(command_line.parse(["--output", str(tmp_path)])) == 0
    found = [(row["check"], row["verdict"]) for row in _rows(tmp_path / "checks.csv")]
    assert found == [("small", "ok"), ("process 1", "not run"), ("small", "ok")]


def test_a_habit_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str | None:
        raise RuntimeError("no such stream")

    def absent() -> str | None:
        raise ImportError("no module named cupy")

    monkeypatch.setattr(habits, "HABITS", {"a": broken, "b": absent, "c": lambda: "wrong", "d": lambda: None})
    monkeypatch.setattr(habits, "dry", False)
    verdicts = {name: (verdict, why) for name, verdict, why in habits.every(False)}
    assert verdicts["a"] == ("WRONG", "RuntimeError: no such stream")
    assert verdicts["b"] == ("not run", "no module named cupy")
    assert verdicts["c"] == ("WRONG", "wrong") and verdicts["d"][0] == "ok"
    monkeypatch.setenv("UNTIL", "0")
    assert {verdict for _, verdict, why in habits.every(False)} == {"not run"}


def test_the_cases_are_those_that_were_asked_for() -> None:
    found = timing.cases(["bf16", "f16"], dry=False)
    square = [case for case in found if case.queries == case.keys and not (case.option or case.window)]
    grid = [case for case in square if case.direction == "forward"]
    assert len(grid) == 2 * 2 * 2 * 6
    backward = {(case.head_size, case.causal, case.queries) for case in square if case not in grid}
    assert backward == {(d, c, n) for d in (64, 128) for c, n in ((1, 1024), (1, 4096), (1, 8192), (0, 4096))}
    assert [case.name for case in found if case not in square] == [
        "bf16-decode-8192",
        "bf16-decode-65536",
        "bf16-window",
        "bf16-documents",
        "bf16-softcap",
    ]
    early = [case.name for case in found[:9]]
    assert "bf16-d128-causal-16384" in early and "bf16-d128-causal-4096-backward" in early, "before time may end"
    assert [case.dtype for case in found] == sorted((case.dtype for case in found), key=["bf16", "f16"].index)
    found = grid
    assert {case.batch * case.queries for case in found} == {timing.TOKENS}
    assert {case.heads * case.head_size for case in found} == {timing.WIDTH}
    assert {case.queries for case in found} == set(timing.LENGTHS) and {case.head_size for case in found} == {64, 128}


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command_line.main(["--output", str(tmp_path / "never")]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err and not (tmp_path / "never").exists()


def test_every_check_passes_on_the_cpu_and_finds_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of checks itself, on the CPU kernel: what it calls right is right, and an error is found by each."""
    import flashtile.torch

    honest = flashtile.torch.attention
    one = [c for c in checks.CHECKS if (c.kv_len or 0) < 1000]
    for name, dtype, problem in checks.every("cpu", lambda x: x, SIZES, ("float32",), tuple(one)):
        assert problem is None, (name, dtype, problem)

    def off(*arguments: Any, **options: Any) -> Any:
        result = honest(*arguments, **options)
        for x in result if isinstance(result, tuple) else (result,):
            if x.numel():
                x.view(-1)[0] = 2 * x.view(-1)[0] + 1
        return result

    monkeypatch.setattr(flashtile.torch, "attention", off)
    for name, _, problem in checks.every("cpu", lambda x: x, SIZES, ("float32",), tuple(one)):
        assert (problem is None) == (name == "no query"), name


def test_cudnn_is_checked_on_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashtile import kernels
    from flashtile.arrays import contiguous
    from flashtile.kernels import cudnn, triton
    from flashtile.spec import AttentionSpec

    monkeypatch.setattr(triton.driver, "device", lambda number: triton.driver.Device("Fake GPU", "sm_90", 232448, 132))
    family = dataclasses.replace(cudnn.FAMILY, unavailable=lambda: None)
    assert [c.name for c in checks.BY_CUDNN] == list(checks.CUDNN)
    for check in checks.BY_CUDNN:
        arrays, shape = checks.problem(check, "bfloat16", (20, 33))
        views = [contiguous(tuple(x.shape), "bfloat16", "cuda:0") for x in arrays]
        spec = AttentionSpec.of(*views, **check.options(lambda x: x, shape))
        assert kernels.objection(family, spec) is None, check.name


def test_a_wrong_peer_is_not_timed() -> None:
    def wrong(case: Any, q: Any, k: Any, v: Any) -> peers.Run:
        return lambda: q * 0

    def absent(case: Any, q: Any, k: Any, v: Any) -> peers.Run:
        raise peers.Refused("not here")

    case = timing.cases(["bf16"], dry=True)[0]
    with stand_ins.installed():
        result = timing.measure(case, (peers.torch_sdpa, wrong, absent), "cpu")
    result.measurements.remove(next(m for m in result.measurements if m.peer == "torch_sdpa, graph"))
    assert [m.status for m in result.measurements] == ["timed", "failed", "refused"]
    assert "wrong result" in result.measurements[1].why and not result.measurements[1].seconds
    assert len(report.refusals([result])) == 2


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_host_side_of_a_call_is_measured_without_a_gpu() -> None:
    """It launches; how long it takes is decided by no test."""
    command = [sys.executable, "-m", "benchmarks.snippets", "gpu_host", "mask function", "1"]
    done = run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"microseconds", "torch", "trace"}
    assert all(value > 0 for value in found.values())
