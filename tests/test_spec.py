"""The values that cross the layers: dtypes, the spec, tilings and the counts of their coverage."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import plain
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashtile import engines, kernels, rooms
from flashtile.arrays import View, contiguous, device_of
from flashtile.dtypes import DTYPES, dtype_of, round_to_bf16, widen_bits
from flashtile.errors import SpecError
from flashtile.kernels import Capabilities
from flashtile.plan import coverage_of, make_plan
from flashtile.plan.tiling import ENOUGH_ITEMS, flops_of
from flashtile.spec import LARGEST_POSITION, PER_BATCH, AttentionSpec, Band

pytestmark = pytest.mark.core


def spec_of(q: tuple, k: tuple, v: tuple | None = None, name: str = "float32", **options: Any) -> AttentionSpec:
    views = [contiguous(shape, name) for shape in (q, k, k if v is None else v)]
    return AttentionSpec.of(*views, **options)


def menu(tile_q: tuple[int, ...] = (16, 32, 64), tile_k: tuple[int, ...] = (32, 128)) -> Capabilities:
    return Capabilities("test", frozenset(), frozenset(), None, tile_q[0], tile_q, tile_k, frozenset(), True)


def test_dtype_rows_agree_with_the_types(dtype: str) -> None:
    row, info = DTYPES[dtype], ml_dtypes.finfo(dtype)
    assert (row.itemsize, row.eps, row.largest) == (info.dtype.itemsize, float(info.eps), float(info.max))
    assert row.tiny == float(info.smallest_normal)
    assert row.numpy.itemsize == row.itemsize
    assert DTYPES[row.accumulator].itemsize >= max(4, row.itemsize)


@pytest.mark.parametrize("given", ["float32", np.float32, np.dtype("float32"), "torch.float32"])
def test_dtype_is_found_by_name(given: Any) -> None:
    assert dtype_of(given) is DTYPES["float32"]
    assert dtype_of(np.dtype(ml_dtypes.bfloat16)) is dtype_of(ml_dtypes.bfloat16) is DTYPES["bfloat16"]


@pytest.mark.parametrize("given", ["int32", np.dtype(">f4"), np.uint16, np.longdouble, np.complex64, None, object()])
def test_other_dtypes_are_refused(given: Any) -> None:
    for _ in range(2):  # the second look-up must not find what the first refused
        with pytest.raises(SpecError, match="^x: got dtype .*, expected "):
            dtype_of(given, "x")


def test_every_bfloat16_widens_and_rounds_back() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    wide = widen_bits(bits)
    np.testing.assert_array_equal(wide, bits.view(ml_dtypes.bfloat16).astype(np.float32))
    back = round_to_bf16(wide)
    nan = np.isnan(wide)
    np.testing.assert_array_equal(back[~nan], bits[~nan])
    assert np.isnan(widen_bits(back[nan])).all()


@pytest.mark.parametrize("source", [np.float32, np.float64])
def test_rounding_to_bfloat16_is_to_nearest_even(source: type) -> None:
    """Between neighbours: the middle, and one step of the source's type to each side of it."""
    bits = np.arange(0x7F80, dtype=np.uint16)  # every finite value that is not negative
    low = widen_bits(bits).astype(np.float64)
    high = widen_bits(bits + np.uint16(1)).astype(np.float64)
    high[-1] = 2.0**128  # what infinity stands for in rounding
    middle = ((low + high) / 2).astype(source)
    even = bits + (bits & 1)
    for sign, sign_bit in ((1, 0), (-1, 0x8000)):
        np.testing.assert_array_equal(round_to_bf16(sign * middle), even | sign_bit)
        np.testing.assert_array_equal(round_to_bf16(sign * np.nextafter(middle, source(0))), bits | sign_bit)
        beyond = np.nextafter(middle, source(np.inf))
        np.testing.assert_array_equal(round_to_bf16(sign * beyond), (bits + 1) | sign_bit)


def test_spec_is_frozen_hashable_and_equal_by_value() -> None:
    one, two = (spec_of((2, 8, 5, 16), (2, 2, 5, 16), (2, 2, 5, 24), causal=True) for _ in range(2))
    assert one == two and hash(one) == hash(two) and one.group == 4 and one.value_size == 24
    assert one.scale == 0.25 and one.offset == 0 and one.options == {"band"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.scale = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_missing_axes_count_as_one(rank: int) -> None:
    shape = (3, 4, 5, 6)[4 - rank :]
    spec = spec_of(shape, shape)
    assert (spec.batch, spec.heads, spec.q_len, spec.head_size) == (1,) * (4 - rank) + shape


@pytest.mark.parametrize(
    ("causal", "window", "band"),
    [
        (False, None, None),
        (False, (-1, -1), None),
        (False, (None, -1), None),
        (True, None, Band(None, 0)),
        (np.True_, (3, None), Band(3, 0)),
        (True, (2, 5), Band(2, 0)),
        (False, (2, 5), Band(2, 5)),
        (False, [np.int64(2), -1], Band(2, None)),
        (False, (0, LARGEST_POSITION), Band(0, LARGEST_POSITION)),
    ],
)
def test_causal_and_window_intersect(causal: bool, window: Any, band: Band | None) -> None:
    assert spec_of((4, 8), (4, 8), causal=causal, window=window).band == band


@pytest.mark.parametrize(
    ("align", "offset"), [("top_left", 0), ("bottom_right", 4), (-3, -3), (np.int32(7), 7), (PER_BATCH, None)]
)
def test_align_becomes_an_offset(align: Any, offset: int | None) -> None:
    assert spec_of((3, 8), (7, 8), causal=True, align=align).offset == offset
    assert spec_of((3, 8), (7, 8), align=align).offset == 0, "without a rule there is nothing to anchor"


def test_align_is_needed_only_where_lengths_differ_and_a_rule_is_used() -> None:
    assert spec_of((3, 8), (7, 8)).offset == 0
    assert spec_of((3, 8), (3, 8), causal=True).offset == 0
    with pytest.raises(SpecError, match='"top_left".*"bottom_right".*integer'):
        spec_of((3, 8), (7, 8), window=(1, 1))


BANDS = [(None, None), (None, 0), (0, 0), (3, None), (2, 5), (40, 0), (0, 40)]


@pytest.mark.parametrize(("left", "right"), BANDS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (7, 13), (16, 16), (33, 9), (9, 33), (5, 0), (0, 5)])
def test_coverage_counts_what_enumeration_counts(left: Any, right: Any, q_len: int, kv_len: int) -> None:
    for offset, tile_q, tile_k in itertools.product((-40, -3, 0, 1, kv_len - q_len, 40), (4, 16), (1, 8)):
        spec = spec_of((2, 3, q_len, 8), (2, 3, kv_len, 8), window=(left, right), align=offset)
        plan = make_plan(spec, menu((tile_q,), (tile_k,)))
        visible = plain.seen(q_len, kv_len, offset, left, right)
        counts = {"empty": 0, "full": 0, "partial": 0}
        for i, j in itertools.product(range(0, q_len, tile_q), range(0, kv_len, tile_k)):
            tile = visible[i : i + tile_q, j : j + tile_k]
            counts["full" if tile.all() else "partial" if tile.any() else "empty"] += 6
        coverage = coverage_of(spec, plan)
        assert {name: getattr(coverage, name) for name in counts} == counts
        assert coverage.visible == 6 * visible.sum() and coverage.pairs == 6 * q_len * kv_len
        assert plan.flops == 6 * visible.sum() * 2 * (8 + 8)


LENGTH, DISTANCE = st.integers(0, 2**40), st.integers(0, 2**41)


@given(LENGTH, LENGTH, st.integers(-(2**41), 2**41), DISTANCE, DISTANCE)
def test_visible_pairs_are_exact_at_any_size(q_len: int, kv_len: int, offset: int, left: int, right: int) -> None:
    """What is visible, and what lies to the left and to the right of it, make up the whole plane."""

    def pairs(**window: Any) -> int:
        shapes = [View((n, 1), (4, 4), "float32") for n in (q_len, kv_len, kv_len)]
        return flops_of(AttentionSpec.of(*shapes, align=offset, **window)) // 4

    within = pairs(window=(left, right))
    left_of, right_of = q_len * kv_len - pairs(window=(left, -1)), q_len * kv_len - pairs(window=(-1, right))
    assert within + left_of + right_of == q_len * kv_len


def test_coverage_of_offsets_that_come_with_the_call() -> None:
    spec = spec_of((2, 3, 9, 8), (2, 3, 20, 8), causal=True, align=PER_BATCH)
    plan = make_plan(spec, menu((4,), (8,)))
    coverage = coverage_of(spec, plan, [0, 11])
    assert coverage.visible == 3 * (plain.seen(9, 20, 0, None, 0).sum() + plain.seen(9, 20, 11, None, 0).sum())
    assert flops_of(spec, [0, 11]) == coverage.visible * 32 <= plan.flops
    with pytest.raises(ValueError, match="offsets"):
        coverage_of(spec, plan)


@pytest.mark.parametrize(
    ("heads", "q_len", "tile_q"),
    [(1, 1, 16), (1, 64, 16), (64, 17, 32), (64, 16, 16), (8, 1000, 64), (1, 10**6, 64), (40, 40, 64), (1, 0, 16)],
)
def test_tiles_are_as_large_as_leaves_enough_items(heads: int, q_len: int, tile_q: int) -> None:
    plan = make_plan(spec_of((1, heads, q_len, 8), (1, heads, 100, 8)), menu())
    assert plan.tile_q == tile_q and plan.tile_k == 128
    assert plan.query_tiles == -(-q_len // tile_q) and plan.items == heads * plan.query_tiles
    assert plan.items >= ENOUGH_ITEMS or tile_q == 16


def test_items_are_numbered_by_batch_head_and_tile() -> None:
    plan = make_plan(spec_of((2, 3, 40, 8), (2, 3, 40, 8)), menu((16,)))
    where = list(itertools.product(range(2), range(3), range(3), range(1)))
    assert [plan.locate(item) for item in range(plan.items)] == where


def test_extent_and_overlap_of_a_view() -> None:
    x = np.zeros((4, 6), np.float32)
    reverse = View((4, 6), (-24, 4), "float32")
    assert reverse.extent() == (-72, 24) and not reverse.may_overlap_itself()
    assert View((0, 6), (24, 4), "float32").extent() == (0, 0)
    assert View((4, 6), (0, 4), "float32").may_overlap_itself()
    assert View((4, 6), (4, 4), "float32").may_overlap_itself()
    assert not View(x.T.shape, x.T.strides, "float32").may_overlap_itself()
    assert not View((1, 6), (0, 4), "float32").may_overlap_itself(), "the stride of one element is never taken"


def test_keys_are_split_until_a_device_is_busy() -> None:
    """One row on 4,096 keys: 32 parts for threads, as many as a device has processors where the kernel says so."""
    spec = spec_of((1, 1, 1, 8), (1, 1, 4096, 8))
    able = dataclasses.replace(menu((16,), (32,)), part_keys=32)
    assert make_plan(spec, able).items == ENOUGH_ITEMS
    assert make_plan(spec, dataclasses.replace(able, enough_items=64)).items == 64


class Exported:
    """What says by DLPack where it lies."""

    def __init__(self, kind: int, number: int) -> None:
        self.__dlpack_device__ = lambda: (kind, number)


def test_a_device_is_data_that_kernels_declare() -> None:
    assert device_of(np.zeros(2)) == device_of(object()) == device_of(Exported(1, 0)) == "cpu"
    assert device_of(Exported(2, 1)) == device_of(Exported(10, 1)) == "cuda:1"
    host, near, far = (contiguous((2, 3, 8, 4), "float32", device) for device in ("cpu", "cuda:0", "cuda:1"))
    spec = AttentionSpec.of(near, near, near)
    assert (spec.device, spec.device_kind) == ("cuda:0", "cuda") and AttentionSpec.of(host, host, host).device == "cpu"
    for k, v, message in ((host, near, "k: got an array on cpu"), (near, far, "v: got an array on cuda:1")):
        with pytest.raises(SpecError, match=f"^{message}, expected one on cuda:0 as q"):
            AttentionSpec.of(near, k, v)
    for name in ("cpu", "vanilla", "reference"):
        assert kernels.objection(dict(kernels.families())[name], spec) == "runs on cpu, not on cuda"


def test_rooms_are_found_by_listing_a_folder() -> None:
    import flashtile.kernels as package

    names = rooms.names(package, ("reference", "absent"))
    assert names[0] == "reference" and "absent" not in names and names[1:] == sorted(names[1:])
    family = package.reference.FAMILY  # type: ignore[attr-defined]
    assert rooms.load(package, "reference", "FAMILY", kernels.Family) is family
    assert rooms.load(package, "reference", "FAMILY", str) is None
    assert rooms.load(package, "views", "FAMILY", kernels.Family) is None
    assert "No module named" in str(rooms.load(package, "absent", "FAMILY", kernels.Family))


def test_a_room_is_offered_under_its_module_s_name() -> None:
    for found in (*kernels.families(), *engines.engines()):
        assert isinstance(found[1], str) or found[1].name == found[0]
