"""All that waits for a machine with matrix registers is one command there: its steps, and the code that one times."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
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


def test_a_step_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(run: matrix.Run) -> Iterator[str]:
        yield "begun"
        raise OSError("no such machine")

    monkeypatch.setattr(matrix, "on_overlap", broken)
    assert matrix.main(["--dry", "--steps", "overlap", "machine", "--threads", "1", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "begun\nFAILED: OSError: no such machine" in said and "== machine" in said and "failed: overlap" in said
    assert "bfloat16" in said, "the products that are chosen"
    (written,) = tmp_path.rglob("matrix.txt")
    first = written.read_text()
    assert first in said
    matrix.main(["--dry", "--steps", "overlap", "--threads", "1", "--output", str(tmp_path)])
    added = written.read_text().removeprefix(first)
    assert added and added in capsys.readouterr().out, "a run keeps what those before it found"


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
