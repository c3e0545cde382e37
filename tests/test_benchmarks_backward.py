"""The benchmark of gradients on tiny cases: its reference, its check, and the columns of the kinds of machines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import benchmarks.__main__ as command
from benchmarks import backward, check, driver, kinds, machine, peers
from benchmarks.cases import Case
from benchmarks.data import make_inputs, sampled

TINY = Case("tiny", "f64", 2, 4, 2, 40, 40, 8, direction="backward", ratio=1.0, percent=50, intel=2.0)
OPTIONS = {
    "dense": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 9},
    "longer-keys": {"keys": 57, "causal": True},
    "padding": {"option": "padding"},
    "score": {"option": "softcap, alibi by hand", "causal": True},
    "sinks": {"option": "softcap, sinks"},
}
FAKE = """
import numpy as np
from benchmarks.peers import flashtile as honest
versions, refuses = honest.versions, honest.refuses
def prepare_backward(*arguments):
    run, to_numpy = honest.prepare_backward(*arguments)
    return run, lambda out: {result}
"""
ONCE = driver.Settings(rounds=1, sample_seconds=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_reference_is_the_slope_of_the_output(name: str) -> None:
    """Each sampled gradient against differences of sum(do * o), and flashtile's gradients against all of them."""
    case = dataclasses.replace(TINY, **OPTIONS[name])
    arrays = make_inputs(case)
    rows = check.sample_rows(case)
    expected = check.expected_rows(case, arrays, rows, rounded=False)
    assert expected.shape == (3, rows.shape[1], 8) and (np.abs(expected).max(axis=(1, 2)) > 1e-3).all()
    run, to_numpy = peers.load("flashtile").prepare_backward(case, *arrays, 1)
    np.testing.assert_allclose(sampled(to_numpy(run()), rows).astype(float), expected.astype(float), atol=1e-13)
    attend = peers.load("flashtile").prepare
    for tensor in range(3):
        for row, want in list(zip(rows[tensor], expected[tensor], strict=True))[:3]:
            outputs = []
            for step in (1e-6, -1e-6):
                moved = [x.copy() for x in arrays]
                moved[tensor][(*row, 2)] += step
                forward, _ = attend(case, *moved[:3], 1)
                outputs.append((forward() * arrays[3]).sum())
            assert (outputs[0] - outputs[1]) / 2e-6 == pytest.approx(float(want[2]), abs=1e-7)


def test_flops_are_five_products() -> None:
    forward, both = (dataclasses.replace(TINY, direction=x) for x in ("forward", "both"))
    assert TINY.flops == 2.5 * forward.flops and both.flops == 3.5 * forward.flops


@pytest.mark.parametrize("wrong", ["out.q * 1.01, out.k, out.v", "out.q, out.k * 1.01, out.v", "out.q, out.k, out.k"])
@pytest.mark.parametrize("direction", ["backward", "both"])
def test_a_gradient_that_is_wrong_is_not_timed(
    wrong: str, direction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = dataclasses.replace(TINY, direction=direction)
    for name, result in (("right", "to_numpy(out)"), ("wrong", f"({wrong})")):
        (tmp_path / f"fake_{name}.py").write_text(FAKE.format(result=result))
    (tmp_path / "fakes").mkdir()
    for name in ("right", "wrong"):
        (tmp_path / f"fake_{name}.py").rename(tmp_path / "fakes" / f"{name}.py")
    (tmp_path / "fakes" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [result] = driver.run_cases([case], [("fakes.right", 1), ("fakes.wrong", 1), ("numpy", 1)], ONCE)
    assert [m.status for m in result.measurements] == ["timed", "failed", "refused"]
    assert [m.why.split(":")[0] for m in result.measurements] == ["", "wrong result", "computes no gradients"]


def test_peers_agree_in_16_bits() -> None:
    pytest.importorskip("ml_dtypes")
    wanted = [("flashtile", 1), *((peer, 1) for peer in ("torch", "jax") if importable(peer))]
    cases = [dataclasses.replace(TINY, dtype=x, causal=True) for x in ("bf16", "f16", "f32")]
    for result in driver.run_cases(cases, wanted, ONCE):
        assert [m.status for m in result.measurements] == ["timed"] * len(wanted), result


def importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


@pytest.fixture
def one_kind(monkeypatch: pytest.MonkeyPatch) -> kinds.Kind:
    """This machine as the second of two kinds; the other has measured nothing."""
    both = (kinds.Kind("Elsewhere", ("none",), "ratio", "percent"), kinds.Kind("Here", ("here",), "intel"))
    monkeypatch.setattr(machine, "core_name", lambda: "here")
    monkeypatch.setattr(kinds, "KINDS", both)
    monkeypatch.setattr(backward, "CASES", (TINY, dataclasses.replace(TINY, name="other", percent=None)))
    return both[1]


def test_a_column_for_each_kind(
    one_kind: kinds.Kind, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of one case, then of the other: the second keeps the first; no value stands in another kind's column."""
    common = ["--parts", "backward", "--peers", "flashtile", "torch", "--threads", "1", "--rounds", "1"]
    for name in ("tiny", "other"):
        assert command.main([*common, "--case", name, "--output", str(tmp_path)]) == 0
    assert "This machine: Here" in capsys.readouterr().out
    lines = (tmp_path / "backward.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["tiny", "tiny", "other"]
    for line in lines[1:]:
        assert kinds.NOT_MEASURED in line.split("best peer")[-1]
    ratio = next(line for line in lines if line.startswith("other"))
    assert f"{kinds.NOT_MEASURED} (target 1)" in ratio
    if importable("torch"):
        assert "(target 2)" in ratio and ratio.count(kinds.NOT_MEASURED) == 1
    stored = kinds.read(tmp_path / one_kind.file("backward"))
    assert {row["subject"] for row in stored} == {"tiny", "other"} and machine.describe() in stored[0]["machine"]
    assert not (tmp_path / kinds.KINDS[0].file("backward")).exists()


def test_a_machine_of_no_kind_writes_no_column(
    one_kind: kinds.Kind, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "core_name", lambda: "unknown")
    arguments = ["--case", "tiny", "--peers", "flashtile", "--threads", "1", "--rounds", "1"]
    assert command.main([*arguments, "--output", str(tmp_path)]) == 0
    assert "unknown, no kind with targets" in capsys.readouterr().out
    assert not list(tmp_path.glob("backward-*.csv")) and (tmp_path / "backward.csv").exists()
