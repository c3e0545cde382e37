"""The hardware-day script: its dry run on the interpreter, and its checks, which must be able to fail."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import run

ROOT = Path(__file__).resolve().parent.parent

torch = pytest.importorskip("torch")
from benchmarks import gpu, gpu_checks, gpu_peers, report  # noqa: E402

SIZES = (60, 100)  # with fewer rows the largest error of the baseline, and so what is allowed, is a matter of luck


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_dry_run_goes_all_the_way(tmp_path: Path) -> None:
    """Every check and every peer on the interpreter, in a process of its own; files with a row for each."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = run(command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("everything of flashtile's is right\n") and "WRONG" not in done.stdout
    checks = _rows(tmp_path / "checks.csv")
    small = {c.name for c in gpu_checks.CHECKS if (c.kv_len or 0) < 1000 and c.size <= 128}
    assert {row["check"] for row in checks} == small and not any(row["problem"] for row in checks)
    timed = _rows(tmp_path / "gpu.csv")
    assert len(timed) == len(gpu.cases(["bf16"], dry=True)) * len(gpu_peers.PEERS)
    assert {row["status"] for row in timed if row["peer"] in ("flashtile", "triton_vanilla", "torch_sdpa")} == {"timed"}
    assert {row["why"] for row in timed if row["peer"] == "cudnn"} == {"no cuDNN here"}


def test_the_cases_are_those_that_were_asked_for() -> None:
    found = gpu.cases(["bf16", "f16"], dry=False)
    assert len(found) == 2 * 2 * 2 * 6
    assert {case.batch * case.queries for case in found} == {gpu.TOKENS}
    assert {case.heads * case.head_size for case in found} == {gpu.WIDTH}
    assert {case.queries for case in found} == set(gpu.LENGTHS) and {case.head_size for case in found} == {64, 128}


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--output", str(tmp_path / "never")]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err and not (tmp_path / "never").exists()


def test_every_check_passes_on_the_cpu_and_finds_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of checks itself, on the CPU kernel: what it calls right is right, and an error is found by each."""
    import flashtile.torch

    honest = flashtile.torch.attention
    one = [c for c in gpu_checks.CHECKS if (c.kv_len or 0) < 1000]
    for name, dtype, problem in gpu_checks.every("cpu", lambda x: x, SIZES, ("float32",), tuple(one)):
        assert problem is None, (name, dtype, problem)

    def off(*arguments: Any, **options: Any) -> Any:
        result = honest(*arguments, **options)
        for x in result if isinstance(result, tuple) else (result,):
            if x.numel():
                x.view(-1)[0] = 2 * x.view(-1)[0] + 1
        return result

    monkeypatch.setattr(flashtile.torch, "attention", off)
    for name, _, problem in gpu_checks.every("cpu", lambda x: x, SIZES, ("float32",), tuple(one)):
        assert (problem is None) == (name == "no query"), name


def test_a_wrong_peer_is_not_timed() -> None:
    def wrong(case: Any, q: Any, k: Any, v: Any) -> gpu_peers.Run:
        return lambda: q * 0

    def absent(case: Any, q: Any, k: Any, v: Any) -> gpu_peers.Run:
        raise gpu_peers.Refused("not here")

    case = gpu.cases(["bf16"], dry=True)[0]
    result = gpu.measure(case, (gpu_peers.torch_sdpa, wrong, absent), "cpu")
    assert [m.status for m in result.measurements] == ["timed", "failed", "refused"]
    assert "wrong result" in result.measurements[1].why and not result.measurements[1].seconds
    assert len(report.refusals([result])) == 2


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("option", ["causal", "mask function"])
def test_the_host_side_of_a_call_is_measured_without_a_gpu(option: str) -> None:
    """It launches; how long it takes is decided by no test."""
    command = [sys.executable, "-m", "benchmarks.snippets", "gpu_host", option, "1"]
    done = run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"microseconds", "torch"} | ({"trace"} if option == "mask function" else set())
    assert all(value > 0 for value in found.values())
