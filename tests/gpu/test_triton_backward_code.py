"""The machine code of the backward's kernels, read without a GPU, as test_triton_code.py reads the forward's."""

from __future__ import annotations

import itertools
import re
import sys
from typing import Any

import numpy as np
import pytest
from test_triton_code import FEW_WARPS, NVIDIA, SHARED, TENSOR, TRITON, check_limits

from flashtile.arrays import contiguous
from flashtile.kernels.triton import aot, installed_version, tiles, too_old
from flashtile.kernels.triton import backward_forms as forms
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.backward_tiles import ALIKE, TABLE, TIMED, Row, of_arrays, rows_for
from flashtile.kernels.triton.compiler import compiled
from flashtile.kernels.triton.resources import Parameter, resources_of
from flashtile.kernels.triton.specialisation import Memory, Specialisation
from flashtile.score.keep import keep_of
from flashtile.score.options import ScoreOptions
from flashtile.spec import AttentionSpec

MEMORY = Memory()
QUICK = {("sm_90", "bfloat16", 128), ("sm_80", "float32", 64)}


def compiles(what: Specialisation, arch: str) -> tuple[Any, Any]:
    if reason := too_old(arch):
        pytest.skip(reason)
    kernel = compiled(what, arch)
    return kernel.metadata, resources_of(kernel)


def kernel_of(arch: str, kind: str, size: int, direction: str, contain: bool = False) -> tuple[Row, Specialisation]:
    """A causal call's kernel and its row."""
    dtype, _, precision = kind.partition(" ")
    view = contiguous((1, 1, 1, size), dtype)
    spec = AttentionSpec.of(view, view, view, causal=True, precision=precision or "ieee")
    rows = rows_for(arch, kind, size)
    assert rows is not None
    row = rows[direction == "kv"]
    form = forms.backward_kv if direction == "kv" else forms.backward_q
    return row, form(spec, row.tile, contain=contain, memory=MEMORY)


def variants() -> list[Any]:
    found = []
    for (arch, kind), size, direction in itertools.product(TABLE, tiles.HEADS, ("q", "kv")):
        if rows_for(arch, kind, size) is not None:
            marks = () if (arch, kind, size) in QUICK else pytest.mark.slow
            name = f"{arch}-{kind.replace(' ', '-')}-{size}-{direction}"
            found.append(pytest.param(arch, kind, size, direction, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("arch", "kind", "size", "direction"), variants())
def test_kernels_use_what_the_table_says(arch: str, kind: str, size: int, direction: str) -> None:
    """Tensor cores of the right kind, none for fp32; nothing on the stack."""
    row, what = kernel_of(arch, kind, size, direction)
    meta, used = compiles(what, arch)
    expected = TENSOR.get((arch, kind))
    if expected is None:
        assert not used.tensor and used.instructions["FFMA"] > 500, "fp32 products in fp32"
    else:
        few = FEW_WARPS if arch in NVIDIA[1:] and kind != "float64" else expected
        assert used.tensor
        assert all(re.fullmatch(expected, name) or re.fullmatch(few, name) for name in used.tensor), used.tensor
    check_limits(arch, meta, used)
    assert used.spills <= row.spills, "with any Triton: else another row stands in OLDER"
    if str(installed_version()).startswith(TRITON):
        assert used.registers <= row.registers and meta.shared <= row.shared


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "kind", "size"), TIMED, ids=str)
@pytest.mark.parametrize("direction", ["q", "kv"])
def test_timed_rows_use_what_the_table_says(arch: str, kind: str, size: int, direction: str) -> None:
    row = TIMED[arch, kind, size][direction == "kv"]
    if row is None:
        return
    view = contiguous((1, 1, 1, size), kind)
    spec = AttentionSpec.of(view, view, view, causal=True)
    form: Any = forms.backward_kv if direction == "kv" else forms.backward_q
    for contain in (False, True):
        meta, used = compiles(form(spec, row.tile, contain=contain, memory=MEMORY), arch)
        check_limits(arch, meta, used)
        if not contain and str(installed_version()).startswith(TRITON):
            assert used.registers <= row.registers and used.spills <= row.spills and meta.shared <= row.shared


SECOND_SPILLS = 4452
SECOND = ("sm_100", "bfloat16", 64, "kv")  # of every run: what Triton 3.9 fails to compile with larger tiles


@pytest.mark.parametrize(
    ("arch", "kind", "size", "direction"),
    [pytest.param(*x.values, marks=() if x.values == SECOND else pytest.mark.slow) for x in variants()],
)
def test_the_second_launches_load_on_every_device(arch: str, kind: str, size: int, direction: str) -> None:
    """They may spill, as far as the GPU page says, and not before they have every register."""
    meta, used = compiles(kernel_of(arch, kind, size, direction, contain=True)[1], arch)
    check_limits(arch, meta, used)
    if arch in NVIDIA:
        assert not used.spills or used.registers == forms.MOST_REGISTERS
    if str(installed_version()).startswith(TRITON):
        assert used.spills <= SECOND_SPILLS


@pytest.mark.parametrize("arch", [*(pytest.param(a, marks=pytest.mark.slow) for a in ("sm_80", "sm_100")), "sm_90"])
def test_every_other_kernel_compiles_within_the_limits(arch: str) -> None:
    """Of a call with everything: programs, captured arrays with gradients, a mask, sinks, dropout."""
    view = contiguous((1, 2, 64, 64), "bfloat16", "cuda:0")
    table, document = np.ones((2, 64), np.float32), np.zeros(64, np.int64)
    options = ScoreOptions(
        softcap=20.0,
        score_mod=lambda s, b, h, i, j: s + table[h, j] * 0.5,
        mask=lambda b, h, i, j: document[i] == document[j],
        keep=keep_of(0.25, 1),
    )
    spec, _ = options.scoring(AttentionSpec.of(view, view, view, align="top_left"), False, None, 0)
    rows = rows_for(arch, "bfloat16", 64)
    assert rows is not None and spec.program is not None
    kernels = [forms.row_deltas(spec, True, MEMORY), forms.sink_sums(spec), forms.clear()]
    kernels += [forms.array_finish(spec, joins=True)]  # which has all that the other has
    tile = of_arrays(rows[0].tile)
    kernels += [forms.array_sums(spec, tile, 0, totals=x, memory=MEMORY) for x in (False, True)]
    kernels += [forms.array_sums(spec, tile, 0, totals=True, part=True, memory=MEMORY)]
    for what in kernels:
        meta, used = compiles(what, arch)
        assert meta.shared <= SHARED[arch] and used.registers <= 255 and meta.global_scratch_size == 0
        assert not used.spills or not str(installed_version()).startswith(TRITON)
        assert used.parameters == tuple(Parameter(x["offset"], x["size"]) for x in aot.parameters_of(what))
    for what in (
        forms.backward_q(spec, rows[0].tile, contain=False, memory=MEMORY),
        forms.backward_kv(spec, rows[1].tile, contain=False, memory=MEMORY),
    ):
        meta, used = compiles(what, arch)
        check_limits(arch, meta, used)
        assert used.tensor
        assert not used.spills or not str(installed_version()).startswith(TRITON)


@pytest.mark.slow
@pytest.mark.parametrize("size", tiles.HEADS)
@pytest.mark.parametrize(("arch", "kind"), tiles.TABLE)
def test_drawing_what_dropout_keeps_does_not_spill(arch: str, kind: str, size: int) -> None:
    """In the rows of the table, and in the tiles that stand in their place because those would."""
    dtype, _, precision = kind.partition(" ")
    view = contiguous((1, 1, 64, size), dtype)
    spec = AttentionSpec.of(view, view, view, causal=True, precision=precision or "ieee")
    spec, _ = ScoreOptions(keep=keep_of(0.25, 1)).scoring(spec, True, None, 0)
    assert spec.dropout
    tile = tiles.forward_tile(spec, arch)
    assert tile == tiles.DROPPING.get((arch, kind, size), tiles.row_of(arch, kind, size).tile)
    meta, used = compiles(special.forward(spec, tile), arch)
    check_limits(arch, meta, used)
    assert used.spills == 0


def test_the_table_is_whole_and_fits_the_devices() -> None:
    kinds = {kind for _, kind in tiles.TABLE}
    assert {(arch, kind) for arch, kind in tiles.TABLE if arch in NVIDIA} == {
        (arch, kind) for arch in NVIDIA for kind in kinds if (arch, ALIKE.get(kind, kind)) in TABLE
    }
    for (arch, kind), directions in TABLE.items():
        for row in itertools.chain(*directions):
            if row is None:
                assert kind == "float64" or arch == "gfx942"
                continue
            limit = SHARED["sm_86" if arch == "sm_80" else arch]  # smaller devices take these rows, too
            assert row.registers > 0 and 0 < row.shared <= limit and row.spills == 0
            assert row.tile.tile_q % 16 == row.tile.tile_k % 16 == 0


def test_timed_rows_are_others_that_fit() -> None:
    for (arch, kind, size), others in TIMED.items():
        ours = rows_for(arch, kind, size)
        assert ours is not None and any(others)
        for row, table in zip(others, ours, strict=True):
            assert row is None or row.tile != table.tile and row.spills == 0
            assert row is None or row.shared <= SHARED["sm_86" if arch == "sm_80" else arch]


def test_an_older_triton_has_rows_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {(3, 6): (0, 0), (3, 7): (0, 0), (3, 8): (0, 1), (3, 9): (1, 1)}  # of float32: which rows are the table's
    for version, same in kept.items():
        monkeypatch.setattr(sys.modules[rows_for.__module__], "installed", lambda version=version: version)
        for kind in ("bfloat16", "float16"):
            found, table = rows_for("sm_90", kind, 64), TABLE["sm_90", "bfloat16"]
            assert found is not None and found[0] == table[0][0]
            assert (found[1] == table[1][0]) == (version >= (3, 7)) and found[1].spills == 0
        wide, table = rows_for("sm_90", "float32", 64), TABLE["sm_90", "float32"]
        assert wide is not None and tuple(x == y[0] for x, y in zip(wide, table, strict=True)) == same
