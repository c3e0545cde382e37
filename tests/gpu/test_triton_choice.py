"""The choice among rows of the tables: what failed is passed over, what was timed faster is taken. By a fake clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashtile.arrays import contiguous
from flashtile.errors import KernelError, SpecError
from flashtile.kernels.triton import choice, selftest, tiles, timed
from flashtile.kernels.triton.backward_tiles import TIMED, backward_tiles, timed_pairs
from flashtile.kernels.triton.backward_tiles import row as row_of
from flashtile.kernels.triton.selftest import Row
from flashtile.kernels.triton.specialisation import Tile
from flashtile.spec import AttentionSpec

WHERE, VERSION = "Fake GPU 0 (sm_90)", "3.9.0"
PLACE = choice.Place(WHERE, "sm_90", 132, VERSION)
ROWS = [Row("float16", "ieee", 64, frozenset(), (Tile(128, n, 8, 2),)) for n in (32, 64, 128)]


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("FLASHTILE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(timed.VARIABLE, raising=False)
    forget()
    yield
    forget()


def forget() -> None:
    timed._known.clear()
    selftest._verdicts.clear()


def clock(seconds: list[float]) -> Any:
    return lambda row: seconds[ROWS.index(row)]


def taken(seconds: list[float] | None, where: str = WHERE) -> int:
    watch = None if seconds is None else clock(seconds)
    return ROWS.index(timed.fastest(where, VERSION, ROWS, watch))


def test_the_fastest_is_kept_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken(None) == 0, "nothing is known, and nothing may be found out"
    assert taken([2.0, 1.0, 3.0]) == 1
    forget()
    assert taken([1.0, 2.0, 3.0]) == taken(None) == 1, "it is known"
    assert taken([2.0, 2.0, 1.0], "Fake GPU 1 (sm_90)") == 2 and taken(None) == 1, "another device, another choice"
    (line,) = timed.known(WHERE, VERSION)
    assert line.count(" ms") == 3 and "128 x 64 (8 warps, 2 stages): 1e+03 ms" in line
    monkeypatch.setenv(timed.VARIABLE, "0")
    assert taken(None) == 0, "the table's"
    monkeypatch.setenv(timed.VARIABLE, "fast")
    with pytest.raises(SpecError, match="FLASHTILE_GPU_TIMING: got 'fast', expected 0 or 1"):
        taken(None)


def test_what_is_hardly_faster_overrules_nothing() -> None:
    assert taken([1.0, 0.98, 2.0]) == 0


def test_the_least_of_rounds_counts() -> None:
    """Each row in turn, so that what slows the device down for a while slows all of them."""
    seen: list[int] = []

    def watch(row: Row) -> float:
        seen.append(ROWS.index(row))
        return 1.0 if len(seen) == 8 else 2.0

    assert ROWS.index(timed.fastest(WHERE, VERSION, ROWS, watch)) == 1
    assert seen == [0, 1, 2] * timed.ROUNDS


def test_a_problem_that_does_not_run_is_no_choice() -> None:
    def full(row: Row) -> float:
        raise KernelError("no memory for a self-test")

    assert timed.fastest(WHERE, VERSION, ROWS, full) is ROWS[0]
    assert taken([2.0, 1.0, 2.0]) == 1, "another call tries again"


def spec_of(size: int, dtype: str = "bfloat16", **options: Any) -> AttentionSpec:
    view = contiguous((1, 4, 512, size), dtype, "cuda:0")
    return AttentionSpec.of(view, view, view, causal=True, **options)


@pytest.mark.parametrize("size", [64, 128])
def test_rows_by_descriptors_are_passed_over_where_they_fail_and_timed_where_they_do_not(size: int) -> None:
    spec, asked = spec_of(size), list[Row]()
    found = tiles.DESCRIBED["sm_90", size].tile, tiles.TIMED["sm_90", size][0].tile
    plain = tiles.forward_tile(spec, "sm_90")

    def judge(row: Row) -> None:
        asked.append(row)
        assert row.tiles[0] != found[0], "it is wrong"

    def stopwatch(row: Row) -> float:
        return 2.0 - row.tiles[0].described

    assert choice.refusal(spec, PLACE, False, False, judge, stopwatch) is None
    assert [row.tiles[0] for row in asked] == [plain, *found]
    assert choice.forward_tiles(spec, PLACE, False, False) == (found[1], plain)
    with_sinks = replace(spec, sinks=True)
    assert choice.refusal(with_sinks, PLACE, False, False, lambda row: None, never) is None
    assert choice.forward_tiles(with_sinks, PLACE, False, False) == (found[0], plain), "timed is plain attention alone"


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16"])
def test_the_next_row_fits_where_the_table_s_failed(kind: str, size: int) -> None:
    """Another one, of a tile that needs less memory; where it fails as well, nothing is left, and both are named."""
    spec = spec_of(size, kind)
    (first, second), answers = choice.forward_rows(spec, "sm_90", False, False), [True, False]
    assert second.tiles[0] == tiles.cautious_tile(spec) and second.tiles[0].num_stages == 1

    def judge(row: Row) -> None:
        assert not answers or not answers.pop(0), "it is wrong"

    assert choice.refusal(spec, PLACE, False, False, judge) is None
    assert choice.forward_tiles(spec, PLACE, False, False) == (second.tiles[0],) * 2, "nor is any by descriptors"
    forget()
    reason = choice.refusal(spec, PLACE._replace(name="Fake GPU 2"), False, False, wrong)
    assert reason is not None and reason.count("failed its self-test") == 2 and str(first) in reason


def test_gradients_take_the_pair_that_was_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the table's tiles of dQ, and of dK and dV, and their alternatives, those that are right."""
    spec, kind = spec_of(64, "float32"), ("sm_90", "float32", 64)
    ours = backward_tiles(spec, "sm_90")
    of_q, of_kv = (row_of(16, n, 4, 1, 1, 0, 1) for n in (16, 32))
    monkeypatch.setitem(TIMED, kind, (of_q, of_kv))
    assert ours is not None and timed_pairs(spec, "sm_90") == (
        (of_q.tile, ours[1]), (ours[0], of_kv.tile), (of_q.tile, of_kv.tile)
    )  # fmt: skip
    asked: list[Row] = []

    def judge(row: Row) -> None:
        assert row.tiles != (of_q.tile, of_kv.tile), "it is wrong"

    def stopwatch(row: Row) -> float:
        asked.append(row)
        return 2.0 - (row.tiles[0] == of_q.tile) / 2 - (row.tiles[1] == of_kv.tile)

    best = ours[0], of_kv.tile
    assert choice.usable_backward(spec, PLACE, False, judge, stopwatch) == best
    assert len({row.tiles for row in asked}) == 3 and {str(row.uses) for row in asked} == {"frozenset({'backward'})"}
    forget()
    assert choice.usable_backward(spec, PLACE, False) == best, "it is known to other processes"
    sunk = replace(spec, sinks=True)
    assert choice.usable_backward(sunk, PLACE, False, judge, never) == ours, "timed are plain gradients alone"
    monkeypatch.setitem(TIMED, kind, (None, of_kv))
    assert timed_pairs(spec, "sm_90") == ((ours[0], of_kv.tile),)
    monkeypatch.setenv(timed.VARIABLE, "0")
    assert choice.usable_backward(spec, PLACE, False) == ours


def never(row: Row) -> float:
    raise AssertionError("nothing to time")


def wrong(row: Row) -> None:
    raise AssertionError("it is wrong")


def test_plans_fit_all_rows_that_a_call_may_take() -> None:
    for (arch, size), rows in tiles.TIMED.items():
        plain = tiles.forward_tile(spec_of(size), arch)
        for row in rows:
            assert row.tile.described and row.tile != tiles.DESCRIBED[arch, size].tile
            assert row.tile.tile_q == plain.tile_q and row.tile.tile_k % plain.tile_k == 0
