"""The benchmark driver on tiny cases: it checks before it times, counts FLOPs right and writes what it says.

No timing decides anything here, and no package beyond the core's own is needed.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import PATIENCE

import flashtile

ROOT = Path(__file__).resolve().parent.parent

import benchmarks.__main__ as command  # noqa: E402
from benchmarks import backward, check, driver, kinds, machine, peak, peers, report  # noqa: E402
from benchmarks.cases import ALL_CASES, QUICK, Case, short_cases  # noqa: E402
from benchmarks.data import load_inputs, make_inputs, sampled, save_inputs, visible_mask  # noqa: E402
from benchmarks.options import OPTIONS  # noqa: E402

TINY = Case("tiny", "f32", 1, 2, 1, 12, 12, 8, causal=True, ratio=1.0, percent=50)
ONCE = driver.Settings(rounds=1, sample_seconds=1e-4)
SHAPES = [
    Case("dense", "f32", 2, 4, 2, 5, 7, 8),
    Case("causal", "f32", 1, 2, 2, 9, 9, 4, causal=True),
    Case("causal-longer-keys", "f32", 1, 2, 2, 3, 8, 4, causal=True),
    Case("causal-longer-queries", "f32", 1, 2, 2, 8, 3, 4, causal=True),
    Case("window", "f32", 1, 3, 1, 17, 17, 4, causal=True, window=5),
    Case("window-of-one", "f32", 1, 1, 1, 6, 6, 4, causal=True, window=1),
    Case("window-longer-keys", "f32", 1, 1, 1, 4, 11, 4, causal=True, window=3),
]
FAKE = """
from benchmarks.peers import numpy as honest
versions = honest.versions
def refuses(case):
    return {refused!r}
def prepare(case, q, k, v, threads):
    run, to_numpy = honest.prepare(case, q, k, v, threads)
    def counted():
        with open({log!r}, "a") as log:
            log.write("x")
        {before}
        return {result}
    return counted, to_numpy
"""


@pytest.fixture(autouse=True)
def zen4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine is: its files lie in the output's folder itself, its targets are a case's `ratio`."""
    monkeypatch.setattr(machine, "core_name", lambda: "znver4")
    monkeypatch.setattr(machine, "features", frozenset)


@pytest.fixture
def fake_peer(tmp_path, monkeypatch):
    """Makes a peer: a module beside the package's own ones, whose calls are counted in a file."""

    def make(*, result="run()", before="pass", refused=None):
        folder = tmp_path / "fakes"
        folder.mkdir()
        (folder / "__init__.py").touch()
        log = tmp_path / "calls"
        log.touch()
        (folder / "peer.py").write_text(FAKE.format(log=str(log), before=before, result=result, refused=refused))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "fakes.peer", log

    return make


def run_one(peer: str, case: Case = TINY) -> driver.Measurement:
    [result] = driver.run_cases([case], [(peer, 1)], ONCE)
    [measured] = result.measurements
    return measured


def read_csv(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# ")]
    return list(csv.DictReader(lines))


def test_dry_run_writes_the_documented_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "ALL_CASES", (TINY,))
    arguments = ["--parts", "table", "--peers", "flashtile", "numpy", "--threads", "1", "--rounds", "1"]
    status = command.main([*arguments, "--output", str(tmp_path)])
    rows = read_csv(tmp_path / "peers.csv")
    assert [(row["peer"], row["status"]) for row in rows] == [("flashtile", "timed"), ("numpy", "timed")], rows
    assert tuple(rows[0]) == (*report.MEASUREMENT_COLUMNS, "run")
    assert all(float(row["largest_error"]) <= float(row["allowed_error"]) for row in rows)
    assert all(math.isfinite(float(row["rate"])) and row["samples"] == "1" for row in rows)
    verdicts = read_csv(tmp_path / "targets.csv")
    assert tuple(verdicts[0]) == (*report.VERDICT_COLUMNS, "run")
    assert [row["measure"] for row in verdicts] == ["times the best peer", "% of f32 peak"]
    assert {row["met"] for row in verdicts} <= {"met", "NOT MET"}
    assert status == 0
    title, *columns = (tmp_path / "forward.txt").read_text().splitlines()
    assert "Zen 4" in title and [line.split()[0] for line in columns] == ["tiny", "tiny"]
    stored = kinds.read(tmp_path / "forward-zen4.csv")
    # Both are rounded from the same number, targets.csv to more digits: rounding those again may end one unit away.
    assert [float(row["value"]) for row in stored] == pytest.approx([float(row["value"]) for row in verdicts], rel=1e-3)
    assert machine.core_name() in (tmp_path / "peers.csv").read_text().splitlines()[0]
    assert "tiny" in capsys.readouterr().out


@pytest.mark.parametrize("result", ["run() * 1.01", "run() * float('nan')", "run()[..., :-1]"])
def test_wrong_result_is_reported_and_not_timed(fake_peer, result):
    peer, log = fake_peer(result=result)
    measured = run_one(peer)
    assert measured.status == "failed" and measured.seconds == []
    assert measured.why.startswith("wrong result")
    assert len(log.read_text()) == 2, "only the two calls of the preparation"


def test_the_same_peer_with_the_right_result_is_timed(fake_peer):
    peer, log = fake_peer()
    measured = run_one(peer)
    assert measured.status == "timed" and len(measured.seconds) == 1
    assert len(log.read_text()) > 2


def test_peer_that_raises_or_dies_is_reported(fake_peer):
    peer, _ = fake_peer(before="raise MemoryError('no room')")
    measured = run_one(peer)
    assert (measured.status, measured.why) == ("failed", "MemoryError: no room")


def test_dead_process_is_reported_and_the_others_go_on(fake_peer):
    peer, _ = fake_peer(before="import os; os._exit(3)")
    [result] = driver.run_cases([TINY], [(peer, 1), ("numpy", 1)], ONCE)
    dead, alive = result.measurements
    assert (dead.status, dead.why) == ("failed", "its process ended with status 3")
    assert alive.status == "timed"


def test_peer_that_refuses_says_why_and_is_never_called(fake_peer):
    peer, log = fake_peer(refused="not my kind")
    measured = run_one(peer)
    assert (measured.status, measured.why) == ("refused", "not my kind")
    assert log.read_text() == ""


def test_idle_processes_are_stopped():
    with driver.participants([("numpy", 1)]) as [who]:
        assert "numpy" in who.ask("versions")["versions"]
        deadline = time.monotonic() + PATIENCE
        while (state := Path(f"/proc/{who.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]) != "T":
            assert time.monotonic() < deadline, state
        assert "numpy" in who.ask("versions")["versions"], "and woken again"
    assert who.process.returncode is not None


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_flops_and_mask_against_brute_force(case):
    offset = case.keys - case.queries
    pairs = 0
    for i in range(case.queries):
        for j in range(case.keys):
            seen = (not case.causal or j <= i + offset) and (not case.window or i + offset - j < case.window)
            assert visible_mask(case)[i, j] == seen
            assert (j in case.visible_keys(i)) == seen
            pairs += seen
    assert case.flops == 4 * case.batch * case.heads * pairs * case.head_size


@pytest.mark.parametrize("name", OPTIONS)
def test_options_against_brute_force(name):
    """FLOPs, the sampled reference, flashtile's keywords and NumPy's form: all say the same of an option."""
    window = 9 if "sinks" in name or "window" in name else 0
    case = Case("option", "f64", 2, 4, 2, 40, 40, 8, causal=window > 0, window=window, option=name)
    shape, option = (2, 4, 40, 40), OPTIONS[name]
    i, j = np.arange(40)[:, None], np.arange(40)
    seen = np.broadcast_to(((j <= i) & (i - j < window)) | (window == 0), shape)
    if option.mask:
        seen = seen & np.broadcast_to(option.mask(case), shape)
    assert case.flops == 4 * seen.sum() * case.head_size
    q, k, v = make_inputs(case)
    k_all, v_all = (np.repeat(x, 2, axis=1) for x in (k, v))
    scores = q @ k_all.swapaxes(-1, -2) * case.scale
    scores = option.softcap * np.tanh(scores / option.softcap) if option.softcap else scores
    scores = scores + (option.bias(case) if option.bias else 0)
    weights = np.where(seen, np.exp(scores), 0)
    extra = np.exp(option.sinks(case).astype(float))[:, None, None] if option.sinks else 0
    dense = weights @ v_all / (weights.sum(-1, keepdims=True) + extra)
    rows = check.sample_rows(case)[0]
    found = check.attend_rows(case, q, k, v, rows, rounded=False)
    np.testing.assert_allclose(found.astype(np.float64), dense[tuple(rows.T)], rtol=0, atol=1e-13)
    for peer in ("flashtile", "numpy"):
        run, to_numpy = peers.load(peer).prepare(case, q, k, v, 1)
        np.testing.assert_allclose(to_numpy(run()), dense, rtol=0, atol=1e-12)


def test_cases_with_a_base_share_its_inputs():
    by_name = {case.name: case for case in ALL_CASES}
    held = [case for case in ALL_CASES if case.base]
    assert held
    for case in held:
        base = by_name[case.base]
        for field in ("dtype", "batch", "heads", "kv_heads", "queries", "keys", "head_size"):
            assert getattr(case, field) == getattr(base, field)
        assert driver.task_of(case, driver.BASE) is base and driver.task_of(case, "flashtile") is case
        assert isinstance(driver.task_of(case, "torch"), str)
        assert isinstance(driver.task_of(base, driver.BASE), (str, Case))


def test_a_base_is_compared_by_rate_and_a_rival_by_time():
    def measured(case, peer, seconds):
        return driver.Measurement(case, peer, 2, seconds=[seconds])

    base = dataclasses.replace(TINY, name="whole", causal=False)  # TINY sees 78 of its 144 pairs
    case = dataclasses.replace(TINY, base="whole", ratio=0.9)
    both = [measured(case, "flashtile", 1.0), measured(base, driver.BASE, 2.0)]
    verdict = report.judge(driver.CaseResult(case, both, []), threads=2)[0]
    assert (verdict.measure, verdict.note) == ("times the rate in whole", "against whole")
    assert verdict.value == pytest.approx(2 * 78 / 144) and verdict.met
    case = dataclasses.replace(TINY, rival="slow", ratio=3)
    three = [measured(case, "flashtile", 1.0), measured(case, "slow", 4.0), measured(case, "good", 2.0)]
    verdict = report.judge(driver.CaseResult(case, three, []), threads=2)[0]
    assert (verdict.value, verdict.measure, verdict.met) == (4.0, "times the slow", True)


def test_a_base_is_checked_against_its_own_reference():
    """flashtile and flashtile_base give different results in one case; both pass, and both are timed."""
    case = next(case for case in ALL_CASES if case.name == "f32-softcap")
    base = next(other for other in ALL_CASES if other.name == case.base)
    small = {"heads": 2, "kv_heads": 2, "queries": 64, "keys": 64}
    case, base = (dataclasses.replace(x, **small) for x in (case, base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "ALL_CASES", (case, base))
        [result] = driver.run_cases([case], [("flashtile", 1), (driver.BASE, 1)], ONCE)
    assert [m.status for m in result.measurements] == ["timed", "timed"], result
    assert [m.case.name for m in result.measurements] == ["f32-softcap", base.name]


@pytest.mark.parametrize("element", ["f64", "f32", "f16", "bf16"])
def test_inputs_survive_their_files_and_are_not_degenerate(tmp_path, element):
    if element == "bf16":
        pytest.importorskip("ml_dtypes")
    case = dataclasses.replace(TINY, dtype=element)
    arrays = make_inputs(case)
    save_inputs(tmp_path, case, arrays)
    for made, loaded in zip(arrays, load_inputs(tmp_path, case), strict=True):
        assert made.dtype == loaded.dtype
        np.testing.assert_array_equal(made.view(np.uint8), loaded.view(np.uint8))
        assert 0.5 < made.astype(np.float64).std() < 1.5


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_sampled_reference_is_attention(case):
    q, k, v = make_inputs(dataclasses.replace(case, dtype="f64"))
    group = case.heads // case.kv_heads
    k_all, v_all = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.where(visible_mask(case), q @ k_all.swapaxes(-1, -2) * case.scale, -np.inf)
    reachable = visible_mask(case).any(axis=1)
    rows = np.array([row for row in check.sample_rows(case)[0] if reachable[row[2]]])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-1e9))
    dense = (weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)) @ v_all
    found = check.attend_rows(dataclasses.replace(case, dtype="f64"), q, k, v, rows, rounded=False)
    np.testing.assert_allclose(found.astype(np.float64), dense[tuple(rows.T)], rtol=0, atol=1e-13)


def test_check_rejects_nan_wrong_shape_and_wrong_value():
    reference = np.ones((3, 4))
    [allowed] = check.allowed_error(TINY, reference[None], reference[None])
    assert 0 < allowed < 1e-6
    assert check.complaint(check.largest_error(reference, reference), allowed) is None
    assert check.complaint(check.largest_error(reference[:2], reference), allowed)
    assert check.complaint(check.largest_error(reference + 1e-5, reference), allowed)
    assert check.complaint(check.largest_error(reference * 0, reference), allowed)
    spoiled = reference.copy()
    spoiled[1, 2] = np.nan
    assert check.complaint(check.largest_error(spoiled, reference), allowed)


def test_check_allows_what_an_unfused_product_of_matrices_loses():
    """On inputs whose worst row is among the sampled ones: what it loses is a matter of how products are summed."""
    case = Case("case", "f32", 1, 8, 8, 64, 256, 128)
    inputs = make_inputs(case)
    rows = check.sample_rows(case)
    reference, rounded = (check.expected_rows(case, inputs, rows, rounded=how) for how in (False, True))
    error, allowed = check.worst(
        sampled([flashtile.attention(*inputs)], rows), reference, check.allowed_error(case, reference, rounded)
    )
    assert check.complaint(error, allowed) is None
    assert allowed < 100 * check.EPSILON["f32"] * np.abs(reference).max()


def test_verdicts_know_their_direction_and_their_gaps():
    assert report.Verdict("a", "m", 2.0, 1.0).met is True
    assert report.Verdict("a", "m", 0.5, 1.0).met is False
    assert report.Verdict("a", "m", 2.0, 1.0, at_most=True).met is False
    assert report.Verdict("a", "m", 0.5, 1.0, at_most=True).met is True
    assert report.Verdict("a", "m", None, 1.0).met is None
    assert report.Verdict("a", "m", 1.0, None).met is None


def test_ratio_is_to_the_best_peer_whose_result_was_right():
    def measured(peer, seconds, status="timed", threads=2):
        return driver.Measurement(TINY, peer, threads, status, seconds=seconds)

    own, single = measured("flashtile", [2.0, 1.0, 9.0]), measured("flashtile", [3.6], threads=1)
    others = [measured("slow", [8.0]), measured("good", [3.0]), measured("cheat", [], "failed")]
    result = driver.CaseResult(TINY, [own, single, *others], limits=[2 * TINY.flops / 3.6 / 1e9])
    ratio, percent, scaling = report.judge(result, threads=2)
    assert (ratio.value, ratio.note) == (1.5, "best: good")
    assert percent.value == pytest.approx(50)
    assert (scaling.value, scaling.target) == (pytest.approx(1.8), 1.85)


def test_peers_load_and_refuse_without_their_packages():
    names = [module.name for module in pkgutil.iter_modules(peers.__path__)]
    assert set(peers.DEFAULT) <= set(names)
    code = (
        "import sys; from benchmarks import peers; from benchmarks.cases import ALL_CASES\n"
        f"for name in {sorted(names, key=lambda name: name.startswith('starpu'))}:\n"
        "    peer = peers.load(name)\n"
        "    assert callable(peer.prepare) and callable(peer.versions)\n"
        "    assert all(why is None or len(why) > 3 for why in map(peer.refuses, ALL_CASES))\n"
        "    if not name.startswith('starpu'):\n"  # which ask flashtile whether StarPU is there
        "        assert 'flashtile' not in sys.modules, name\n"
        "print(*sorted({'torch', 'jax', 'onnx', 'onnxruntime', 'openvino'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_case_names_are_unique_and_quick_is_a_part_of_all():
    names = [case.name for case in (*ALL_CASES, *backward.CASES, *short_cases())]
    assert len(set(names)) == len(names)
    assert set(QUICK) <= {case.name for case in ALL_CASES}
    assert set(backward.QUICK) <= {case.name for case in backward.CASES}


def test_workarounds_for_old_blas_do_not_reach_the_peers(monkeypatch):
    for name in machine.DROPPED_VARIABLES:
        monkeypatch.setenv(name, "1")
    env = machine.child_environment(2)
    assert not set(machine.DROPPED_VARIABLES) & set(env)
    assert env["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize("unit", ["f32", "f64", "bf16"])
def test_peak_loops_compile_and_run_here(unit):
    value = peak.measure(unit, 1)
    if value is None:
        assert unit == "bf16" and not peak.available("bf16")
    else:
        assert math.isfinite(value) and value > 0
