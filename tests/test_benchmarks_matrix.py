"""All that waits for a machine with matrix registers is one command there: its steps, and the code that one times."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import backward, cases, kinds, machine, matrix, overlap, variants
from benchmarks.variants import Variant
from flashtile.kernels.cpu.config import Config
from flashtile.llvm import jit, machines

REAL = machines.known()["amx"]


@pytest.mark.parametrize("name", overlap.PRODUCTS)
def test_mixing_changes_the_order_of_instructions_alone(name: str) -> None:
    """The code generator keeps the order: products stand in one bunch, or vector instructions between all of them."""
    storage, product = overlap.PRODUCTS[name]
    apart, mixed = (
        jit.assembly(overlap.text(REAL, product, storage, 64, order), REAL)
        for order in ("one after the other", "mixed")
    )
    count = 8 * len(product.terms)  # of a strip: 2 x 2 registers, two steps of depth
    for code in (apart, mixed):
        assert len(re.findall(r"\ttdpbf16ps\b", code)) == count and len(re.findall(r"\ttilestored\b", code)) == 4
    between = {order: _vectors_between(code) for order, code in (("apart", apart), ("mixed", mixed))}
    assert max(between["apart"]) <= 2 and len(between["mixed"]) == count - 1
    assert min(between["mixed"]) >= 4 and max(between["mixed"]) < 3 * min(between["mixed"]) + 16
    assert len({frozenset(Counter(re.findall(r"^\t(t\w+|v(?!mov)\w+)", x, re.M)).items()) for x in (apart, mixed)}) == 1


def _vectors_between(code: str) -> list[int]:
    """Instructions on registers of floats from each product of tiles to the next one."""
    pieces = re.split(r"^\ttdpbf16ps.*$", code, flags=re.M)[1:-1]
    return [len(re.findall(r"^\tv\w+\s.*%zmm", piece, re.M)) for piece in pieces]


# The command, but for steps that end in every way that a step may: one that goes well last.
STEPS_THAT_FAIL = """
import os, signal, subprocess, sys, time
from benchmarks import matrix

def on_bits(run):
    yield "begun"
    raise OSError("no such machine")

def on_compile(run):
    yield "begun"
    os.kill(os.getpid(), signal.SIGILL)

def on_overlap(run):
    yield from matrix.command(run, "-c", "import sys; print('begun'); sys.exit(3)")

def on_vectors(run):
    subprocess.Popen([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"])
    yield "begun"
    time.sleep(600)

for step in (on_bits, on_compile, on_overlap, on_vectors):
    setattr(matrix, step.__name__, step)
sys.exit(matrix.main())
"""


def test_a_step_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = ("bits", "compile", "overlap", "machine")
    said, written = run_steps_that_fail(steps, tmp_path, monkeypatch, capfd)
    assert "begun\nFAILED: OSError: no such machine" in said
    assert "begun\nFAILED: compile: ended by SIGILL" in said
    assert re.search(r"begun\nFAILED: -c .* ended with status 3", said)
    assert "== machine" in said and "bfloat16" in said, "the products that are chosen"
    assert said.endswith("failed: bits, compile, overlap\n")
    assert all(f"== {name}" in written for name in steps)
    assert sum(line.startswith("FAILED: ") for line in written.splitlines()) == 3


def test_a_step_that_does_not_end_is_stopped_with_all_that_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said, written = run_steps_that_fail(("vectors", "bits"), tmp_path, monkeypatch, capfd, "--limit", "15")
    assert "FAILED: vectors: stopped after 15 seconds" in said and "FAILED: vectors: stopped" in written
    assert "FAILED: OSError: no such machine" in said, "the next step"
    (child,) = re.findall(r"^(\d+)$", said, re.M)
    with pytest.raises(ProcessLookupError):
        while not _ended(int(child)):
            time.sleep(0.1)


def run_steps_that_fail(
    steps: tuple[str, ...],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *arguments: str,
) -> tuple[str, str]:
    """What was printed, and what the file holds."""
    script = folder / "steps.py"
    script.write_text(STEPS_THAT_FAIL)
    monkeypatch.setattr(matrix, "PROGRAM", (sys.executable, str(script)))
    monkeypatch.setenv("PYTHONPATH", str(machine.ROOT))
    asked = ["--dry", "--steps", *steps, "--threads", "1", "--output", str(folder), *arguments]
    assert matrix.main(asked) == 1
    (written,) = folder.rglob("matrix.txt")
    return capfd.readouterr().out, written.read_text()


def _ended(process: int) -> bool:
    """Raises where there is none; a killed one whom nobody has waited for yet is no more than its name."""
    os.kill(process, 0)
    if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
        raise ProcessLookupError
    return False


def test_a_step_alone_adds_to_what_others_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--dry", "--steps", "machine", "--threads", "1", "--output", str(tmp_path)]
    assert matrix.main(asked) == 0
    (written,) = tmp_path.rglob("matrix.txt")
    first = written.read_text()
    assert first == capsys.readouterr().out
    assert matrix.main(asked) == 0
    added = written.read_text().removeprefix(first)
    assert added and added == capsys.readouterr().out


def test_where_the_registers_are_refused_no_step_would_meet_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = "the system refuses matrix registers: arch_prctl: Operation not permitted"
    monkeypatch.setattr(machines, "unavailable", lambda isa: refused if isa.tiles else None)
    monkeypatch.setattr(matrix, "on_overlap", lambda run: pytest.fail("would end the process"))
    assert matrix.main(["--steps", "overlap", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"FAILED: amx: {refused}" in said and f"nothing else was begun: {refused}" in said


def test_variants_change_fields_that_there_are() -> None:
    for group in variants.GROUPS.values():
        assert group.isa in ("", *machines.known()) and Variant() in group.variants.values()
        for variant in group.variants.values():
            assert all(hasattr(Config(REAL, "float"), name) for name in variant.config)
            assert all(hasattr(REAL, name) for name in variant.isa)


@pytest.mark.slow
@pytest.mark.parametrize("group", variants.GROUPS)
def test_variants_run_and_are_accurate(group: str) -> None:
    said = list(variants.run(group, "amx_emulated" if group == "tiles" else "", small=True))
    assert len(said) == len(variants.GROUPS[group].variants) * len(variants.GROUPS[group].dtypes)
    assert all("GFLOP/s" in line for line in said)


def test_what_other_kinds_are_held_to() -> None:
    names = [kind.name for kind in kinds.KINDS]
    every = (*cases.ALL_CASES, *backward.CASES)
    assert cases.AMX in names and {case.only for case in every} <= {"", *names}
    for kind in kinds.KINDS:
        assert [case for case in backward.CASES if kind.case(case).ratio], kind.name
    amx = kinds.KINDS[names.index(cases.AMX)]
    assert all(amx.takes(case) and not kinds.KINDS[0].takes(case) for case in cases.AMX_CASES)
    based = {case.base for case in cases.AMX_CASES if case.base}
    assert based <= {case.name for case in cases.ALL_CASES if amx.takes(case)}


@pytest.mark.parametrize(
    ("core", "features", "name"),
    [
        ("znver4", {"avx512bf16"}, "Zen 4"),
        ("znver5", {"avx512bf16"}, "Zen 5"),
        ("sapphirerapids", {"amx-tile", "amx-bf16"}, "Intel AMX"),
        ("rocketlake", {"amx-tile", "amx-bf16", "avx512f"}, "Intel AMX"),  # Granite Rapids, as a virtual machine has it
        ("icelake-server", {"avx512f"}, "Intel AVX-512"),
        ("neoverse-v2", {"neon"}, None),
    ],
)
def test_a_machine_is_known_by_its_core_or_what_it_has(
    core: str, features: set[str], name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "core_name", lambda: core)
    monkeypatch.setattr(machine, "features", lambda: frozenset(features))
    kind = kinds.here()
    assert (kind.name if kind else None) == name


def test_both_kernels_of_few_queries_are_timed() -> None:
    command = [sys.executable, "-m", "benchmarks.few", "--small"]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert len(said) == 3 and all(re.search(r"decode +\d+ us, forward +\d+ us; takes \w+", line) for line in said)
