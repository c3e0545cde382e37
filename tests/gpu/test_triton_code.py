"""The machine code of the shipped kernels, read without a GPU: instructions, spills, shared memory, parameters.

Numbers in the table of tiles are those of TRITON; another version is held to what must be true with any.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashtile.arrays import contiguous
from flashtile.errors import UnavailableError
from flashtile.kernels.triton import aot, installed_version, release, tiles, too_old
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.aot import Chosen, choose
from flashtile.kernels.triton.compiler import compiled
from flashtile.kernels.triton.parameters import flat_names, layout_of
from flashtile.kernels.triton.resources import Parameter, Resources, resources_of
from flashtile.score.options import ScoreOptions
from flashtile.spec import AttentionSpec

TRITON = "3.9"
SLOW = pytest.mark.slow
NVIDIA = ("sm_80", "sm_90", "sm_100")

# Shared memory that a program may ask for, bytes: NVIDIA's tables of compute capabilities, AMD's LDS.
SHARED = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

# The tensor-core instructions that a product in each kind of operand is made of; Blackwell's name no type.
TENSOR = {
    ("sm_80", "bfloat16"): r"HMMA\.16816\.F32\.BF16",
    ("sm_80", "float16"): r"HMMA\.16816\.F32",
    ("sm_80", "float32 tf32"): r"HMMA\.1688\.F32\.TF32",
    ("sm_80", "float64"): r"DMMA\.884",
    ("sm_90", "bfloat16"): r"HGMMA\.64x\d+x16\.F32\.BF16",
    ("sm_90", "float16"): r"HGMMA\.64x\d+x16\.F32",
    ("sm_90", "float32 tf32"): r"HGMMA\.64x\d+x8\.F32\.TF32",
    ("sm_90", "float64"): r"DMMA\.(8x8x4|16x8x16)",  # up to Triton 3.6 the larger one, which Hopper has as well
    ("sm_100", "bfloat16"): r"UTCHMMA",
    ("sm_100", "float16"): r"UTCHMMA",
    ("sm_100", "float32 tf32"): r"UTCHMMA",
    ("sm_100", "float64"): r"DMMA\.8x8x4",
    ("gfx942", "bfloat16"): r"v_mfma_f32_\w+_bf16",
    ("gfx942", "float16"): r"v_mfma_f32_\w+_f16",
    ("gfx942", "float32 tf32"): r"v_mfma_f32_\w+_xf32",
    ("gfx942", "float64"): r"v_mfma_f64_\w+",
    ("gfx942", "float32"): r"v_mfma_f32_\w+_f32",  # an instruction of full precision: no rounding of operands
}
for _arch, _size in itertools.product((*NVIDIA, "gfx942"), ("16", "b16")):
    _name = {"16": "float16", "b16": "bfloat16"}[_size]
    TENSOR[_arch, f"float32 {'fp16' if _size == '16' else 'bf16'}"] = TENSOR[_arch, _name]

# Of kernels with sums in spans, by the version of Triton for which it was counted.
SPAN_SPILLS = {(3, 6): 112, (3, 9): 26}

FEW_WARPS = r"HMMA\..*"  # Hopper and Blackwell compute tiles of less than 64 rows with Ampere's instructions

# One variant of each kind of operand in CI, on every architecture; all others are slow.
QUICK = {
    ("bfloat16", 128, "band"),
    ("float16", 64, "open"),
    ("float32", 64, "band"),
    ("float32 tf32", 64, "open"),
    ("float64", 64, "band"),
}

WIDE = ("float32", "float64")  # whose sums over many keys are formed in spans


def variants(quick_kinds: set[tuple[str, int, str]], quick_archs: tuple[str, ...]) -> list[Any]:
    """Every row of the table, with a band and without, as shipped: (arch, kind, head size, band)."""
    found = []
    for (arch, kind), size, band in itertools.product(tiles.TABLE, tiles.HEADS, aot.BANDS):
        quick = arch in quick_archs and (kind, size, band) in quick_kinds
        found.append(
            pytest.param(
                arch,
                kind,
                size,
                band,
                id=f"{arch}-{kind.replace(' ', '-')}-{size}-{band}",
                marks=() if quick else pytest.mark.slow,
            )
        )
    return found


def chosen(arch: str, kind: str, size: int, band: str, **options: Any) -> list[Chosen]:
    if reason := too_old(arch):
        pytest.skip(reason)
    dtype, _, precision = kind.partition(" ")
    return list(choose(arch, [dtype], [size], precision=precision or "ieee", bands=[band], **options))


def code_of(one: Chosen, arch: str) -> tuple[Any, Resources]:
    kernel = compiled(one.specialisation, arch)
    return kernel.metadata, resources_of(kernel)


def check_tensor_cores(arch: str, kind: str, used: Resources, rows: int) -> None:
    """Instructions of the right kind, and of no other."""
    expected = TENSOR.get((arch, kind))
    if expected is None:
        assert not used.tensor and used.instructions["FFMA"] > 500, "fp32 products in fp32"
        return
    if rows < 64 and arch in ("sm_90", "sm_100") and kind != "float64":
        expected = FEW_WARPS
    assert used.tensor and all(re.fullmatch(expected, name) for name in used.tensor), used.tensor
    other = {"bfloat16": "F16", "float16": "BF16"}.get(kind)
    assert not any(name.endswith("." + str(other)) for name in used.tensor)


@pytest.mark.parametrize(("arch", "kind", "size", "band"), variants(QUICK, NVIDIA))
def test_shipped_kernels_use_what_the_table_says(arch: str, kind: str, size: int, band: str) -> None:
    one = chosen(arch, kind, size, band, kernels=["forward"])[0]
    row = tiles.row_of(arch, kind, size)
    meta, used = code_of(one, arch)
    check_tensor_cores(arch, kind, used, row.tile.tile_q)
    check_limits(arch, meta, used)
    assert used.spills <= row.spills, "on clean data, with any Triton: else another row stands in tiles.OLDER"
    if str(installed_version()).startswith(TRITON):
        assert used.registers <= row.registers and meta.shared <= row.shared


@pytest.mark.parametrize(("arch", "kind", "size", "band"), variants({("bfloat16", 128, "band")}, NVIDIA[1:]))
def test_the_second_launch_of_a_call_spills_no_more_than_the_table_says(
    arch: str, kind: str, size: int, band: str
) -> None:
    """It computes what is not finite. It must load on every device, where it mostly returns at once."""
    one = chosen(arch, kind, size, band, kernels=["forward"])[1]
    assert dict(one.specialisation.constants)["CONTAIN"]
    row = tiles.row_of(arch, kind, size)
    meta, used = code_of(one, arch)
    check_limits(arch, meta, used)
    if str(installed_version()).startswith(TRITON) and band == "band":
        assert used.spills <= row.contained_spills and meta.shared <= row.shared


@pytest.mark.parametrize(
    ("arch", "kind", "size", "band"),
    [v for v in variants({("float32", 64, "band"), ("float64", 64, "band")}, ("sm_90",)) if v.values[1] in WIDE],
)
def test_sums_in_spans_find_room(arch: str, kind: str, size: int, band: str) -> None:
    """Over many keys: those of earlier spans stay in registers, all but a few."""
    one = chosen(arch, kind, size, band, kernels=["forward"])[0]
    row = tiles.row_of(arch, kind, size)
    one = replace(one, specialisation=special.forward(one.spec, one.tile, spans=True))
    meta, used = code_of(one, arch)
    check_tensor_cores(arch, kind, used, one.tile.tile_q)
    check_limits(arch, meta, used)
    most = SPAN_SPILLS.get(release())
    assert most is None or used.spills <= most
    if str(installed_version()).startswith(TRITON):
        assert meta.shared <= row.shared


@pytest.mark.parametrize(
    "options", [{"causal": True}, *(pytest.param(x, marks=SLOW) for x in ({}, {"window": (1, 1)}))]
)
@pytest.mark.parametrize(
    ("place", "row"),
    [
        *(pytest.param(place, row, id=str(place)) for place, row in tiles.DESCRIBED.items()),
        *(pytest.param(p, r, id=f"{p} timed", marks=SLOW) for p, rows in tiles.TIMED.items() for r in rows),
    ],
)
def test_tiles_cut_out_by_descriptors_use_what_the_table_says(
    place: tuple[str, int], row: tiles.Row, options: dict[str, Any]
) -> None:
    """They come through the memory unit (UTMALDG), in fewer registers; unaligned arrays take plain loads."""
    arch, size = place
    if reason := too_old(arch):
        pytest.skip(reason)
    view = contiguous((1, 1, 1, size), "bfloat16")
    spec = AttentionSpec.of(view, view, view, **options)
    assert row.tile in (tiles.forward_tile(spec, arch, described=True), *tiles.timed_tiles(spec, arch))
    plain = tiles.forward_tile(spec, arch)
    assert plain.tile_q == row.tile.tile_q and row.tile.tile_k % plain.tile_k == 0, "for one plan"
    kernel = compiled(special.forward(spec, row.tile), arch)
    used = resources_of(kernel)
    assert used.instructions["UTMALDG"] and kernel.metadata.global_scratch_size > 0
    assert used.spills == row.spills == 0 and 32 <= used.registers <= 255
    assert max(kernel.metadata.shared, row.shared) <= SHARED[arch]
    if str(installed_version()).startswith(TRITON):
        assert used.registers <= row.registers and kernel.metadata.shared <= row.shared
    for memory in (special.Memory(aligned=False), special.Memory(contiguous=False)):
        assert not dict(special.forward(spec, row.tile, memory=memory).constants)["DESCRIBED"]
    assert not dict(special.forward(spec, row.tile, contain=True).constants)["DESCRIBED"]


@SLOW
@pytest.mark.skipif(not str(installed_version()).startswith(TRITON), reason="the page says what that one compiles")
def test_the_documentation_says_what_descriptors_save() -> None:
    view = contiguous((1, 1, 1, 64), "bfloat16")
    spec = AttentionSpec.of(view, view, view, causal=True)
    described, plain = (tiles.forward_tile(spec, "sm_90", described=x) for x in (True, False))
    assert replace(described, described=False) == plain
    page = " ".join((Path(__file__).parents[2] / "docs" / "gpu.md").read_text().split())
    said = re.search(r"sm_90, bf16, causal: (\d+) registers where plain loads take (\d+) at D = 64", page)
    assert said is not None
    used = [resources_of(compiled(special.forward(spec, tile), "sm_90")).registers for tile in (described, plain)]
    assert used == [int(said[1]), int(said[2])]


def test_only_arrays_of_16_bits_are_cut_out_by_descriptors() -> None:
    for dtype in ("float32", "float64"):
        view = contiguous((1, 1, 1, 64), dtype)
        assert not tiles.forward_tile(AttentionSpec.of(view, view, view), "sm_90", described=True).described
    view = contiguous((1, 1, 1, 64), "float16")
    spec = AttentionSpec.of(view, view, view)
    for arch in ("sm_80", "sm_89", "sm_120", "gfx942"):
        assert not tiles.forward_tile(spec, arch, described=True).described
    assert not tiles.forward_tile(spec, "sm_90", few=True, described=True).described


def check_limits(arch: str, meta: Any, used: Resources) -> None:
    assert meta.shared <= SHARED[arch] and used.registers <= (255 if arch in NVIDIA else 512)
    trap = arch in NVIDIA and used.registers < 32
    assert not trap, "a kernel that NVIDIA's assembler could not place is a trap of four registers"
    assert (meta.num_ctas, meta.global_scratch_size, meta.profile_scratch_size) == (1, 0, 0), "plain launches"


def test_a_kernel_that_would_be_a_trap_is_refused() -> None:
    """More tensor memory than there is: the assembler gives a trap for it, without a word."""
    if reason := too_old("sm_100"):
        pytest.skip(reason)
    view = contiguous((1, 1, 1, 256), "bfloat16")
    spec = AttentionSpec.of(view, view, view, causal=True)
    too_large = special.forward(spec, special.Tile(128, 32, 8, 2), contain=True)
    with pytest.raises(UnavailableError, match="for sm_100: got 576 columns of tensor memory, expected 512 at most"):
        compiled(too_large, "sm_100")


def test_the_table_is_whole_and_fits_the_devices() -> None:
    kinds = {kind for _, kind in tiles.TABLE}
    assert {arch for arch, _ in tiles.TABLE} == {to for _, to in tiles.FALLBACK} == {*NVIDIA, "gfx942"}
    assert set(tiles.TABLE) == set(itertools.product({*NVIDIA, "gfx942"}, kinds)) and len(kinds) == 7
    for (arch, _), rows in tiles.TABLE.items():
        for row in rows:
            limit = SHARED["sm_86" if arch == "sm_80" else arch]  # smaller devices take these rows, too
            assert row.registers > 0 and 0 < row.shared <= limit, "every number is there"
            assert row.spills == 0, "no shipped kernel spills on clean data"
            assert row.tile.tile_q % 16 == row.tile.tile_k % 16 == 0


def test_tiles_in_place_of_the_tables_are_others() -> None:
    """Else the row has changed, and nobody has looked whether what stood in its place is still wanted."""
    for (arch, kind, size), tile in tiles.DROPPING.items():
        assert tile != tiles.TABLE[arch, kind][tiles.HEADS.index(size)].tile, (arch, kind, size)
    for (arch, kind, size), (_, instead) in tiles.OLDER.items():
        assert instead.tile != tiles.TABLE[arch, kind][tiles.HEADS.index(size)].tile, (arch, kind, size)


@pytest.mark.parametrize("arch", NVIDIA)
def test_parameters_lie_where_the_manifest_says(arch: str) -> None:
    """By the machine code: with a band, without, partial, and of the merge. A struct in C lies the same."""
    found = chosen(arch, "bfloat16", 128, "band", states=["finished"]) + chosen(arch, "float16", 64, "open")
    for one in found[:1] + found[-1:]:
        rows = aot.parameters_of(one.specialisation)
        _, used = code_of(one, arch)
        assert used.parameters == tuple(Parameter(row["offset"], row["size"]) for row in rows)
        assert layout_of(one.specialisation).size == rows[-1]["offset"] + rows[-1]["size"]
        names = [row["name"] for row in rows]
        assert names[:-2] == [name for name, _ in flat_names(one.specialisation)]
        assert names[-2:] == ["global_scratch", "profile_scratch"]


def scored(arch: str, **options: Any) -> Chosen:
    """The forward kernel of a call with a score program."""
    view = contiguous((1, 2, 64, 64), "bfloat16", "cuda:0")
    spec = AttentionSpec.of(view, view, view, align="top_left")
    spec, _ = ScoreOptions(**options).scoring(spec, False, None, 0)
    tile = tiles.forward_tile(spec, arch)
    return Chosen("scored", special.forward(spec, tile), spec, tile)


@pytest.mark.parametrize("arch", [*(pytest.param(a, marks=pytest.mark.slow) for a in ("sm_80", "sm_100")), "sm_90"])
def test_score_programs_compile_into_the_kernel(arch: str) -> None:
    """A user's function and mask with captured arrays, softcap, ALiBi: still tensor cores, and parameters as told."""
    import numpy as np

    table, document = np.ones((2, 64), np.float32), np.zeros(64, np.int64)
    one = scored(
        arch,
        softcap=20.0,
        alibi_slopes=np.ones(2, np.float32),
        score_mod=lambda s, b, h, i, j: s + table[h, j] * 0.5,
        mask=lambda b, h, i, j: document[i] == document[j],
    )
    meta, used = code_of(one, arch)
    check_tensor_cores(arch, "bfloat16", used, one.tile.tile_q)
    check_limits(arch, meta, used)
    assert used.parameters == tuple(Parameter(x["offset"], x["size"]) for x in aot.parameters_of(one.specialisation))
    assert any(name.startswith("captures[") for name, _ in flat_names(one.specialisation))


def others() -> list[Any]:
    """The kernels beside the finished forward one: states, the merge, the baseline."""
    found = []
    for arch, (kernel, state), dtype in itertools.product(
        (*NVIDIA, "gfx942"),
        (
            ("forward", "partial"),
            ("forward", "carried"),
            ("merge", "finished"),
            ("merge", "partial"),
            ("scores", "finished"),
            ("softmax", "finished"),
            ("output", "finished"),
        ),
        ("bfloat16", "float64"),
    ):
        often = arch == "sm_90" and state != "carried" or (arch, kernel) == ("sm_100", "output")
        quick = dtype == "bfloat16" and often
        marks = () if quick else pytest.mark.slow
        found.append(pytest.param(arch, kernel, state, dtype, id=f"{arch}-{kernel}-{state}-{dtype}", marks=marks))
    return found


@pytest.mark.parametrize(("arch", "stage", "state", "storage"), others())
def test_every_other_kernel_compiles_within_the_limits(arch: str, stage: str, state: str, storage: str) -> None:
    for one in chosen(arch, storage, 64, "band", kernels=[stage], states=[state])[:1]:
        meta, used = code_of(one, arch)
        check_limits(arch, meta, used)
        assert used.spills == 0
        if stage in ("forward", "scores"):
            check_tensor_cores(arch, storage, used, one.tile.tile_q)
        if stage == "output":  # which also counts what is not finite, in fp16
            few = one.tile.tile_q < 64 and arch in NVIDIA[1:] and storage != "float64"
            expected = FEW_WARPS if few else TENSOR[arch, storage]
            assert any(re.fullmatch(expected, name) for name in used.tensor), used.tensor


def test_counting_finds_what_is_there_and_what_is_not() -> None:
    """The checks above are no better than this: tf32 is found where it was asked for, and called wrong elsewhere."""
    (one, _) = chosen("sm_80", "float32 tf32", 64, "open", kernels=["forward"])
    _, used = code_of(one, "sm_80")
    check_tensor_cores("sm_80", "float32 tf32", used, 64)
    for kind in ("float32", "bfloat16", "float64"):
        with pytest.raises(AssertionError):
            check_tensor_cores("sm_80", kind, used, 64)
