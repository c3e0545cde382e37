"""The benchmark of the engine on a tiny case: every contestant is right, and every row is printed. No time decides."""

from __future__ import annotations

import pytest

from benchmarks import starpu as command
from benchmarks.cases import Case


def test_every_contestant_is_checked_and_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "ALL_CASES", (Case("tiny", "f32", 1, 2, 1, 300, 300, 16, causal=True),))
    monkeypatch.setattr(command, "CASE", "tiny")
    assert command.main(["--rounds", "1", "--threads", "1", "--parts", "engines", "--case", "tiny"]) == 0
    shown = capsys.readouterr().out
    for peer in command.PEERS:
        assert f"  {peer:16} " in shown
    assert shown.count("GFLOP/s") == len(command.PEERS) and "failed" not in shown
    for subject, *_ in command.RATIOS:
        assert subject in shown


def test_calls_on_files_have_the_bits_of_those_in_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "LARGER", ((300, 24000),))
    assert command.main(["--rounds", "1", "--threads", "1", "--parts", "files"]) == 0
    shown = capsys.readouterr().out
    assert "error" not in shown and shown.count("in memory / from files") == 2
