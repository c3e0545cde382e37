"""Which shapes count as cliffs, on times that are made up; no clock decides anything here."""

from __future__ import annotations

import math

import numpy as np
import pytest

import benchmarks.__main__ as command
from benchmarks import cliffs, kinds, records
from benchmarks.cases import Case
from benchmarks.cliffs import Line, work
from benchmarks.driver import CaseResult, Measurement
from benchmarks.layouts import LAYOUTS

AVX512 = 64
case = cliffs._case


def found(line: Line, seconds: list[float]) -> dict[str, float]:
    """The cliffs of one line, by their place on it."""
    timed = {c.name: s for c, s in zip(line.cases, seconds, strict=True) if s}
    names = [c.name for c in line.cases]
    return {names.index(c.case.name): round(c.times, 3) for c in cliffs.cliffs([line], timed, AVX512)}


def of_keys(*keys: int) -> Line:
    return Line("lengths", tuple(case(queries=64, keys=n) for n in keys))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([1, 2, 4, 8], {}),  # as the work
        ([5, 5, 5, 5], {}),  # a fixed cost
        ([1, 1, 1, 8], {3: 4.0}),  # 8 times a neighbour with half the work
        ([1, 7, 4, 8], {1: 3.5}),  # a bump: longer than with less work before it, and than with more after it
        ([9, 3, 4, 8], {0: 3.0}),  # less work takes longer
        ([1, 0, 4, 8], {}),  # not timed: nobody's neighbour
        ([1, 2, 4, 11.9], {}),
        ([1, 2, 4, 12.1], {3: 1.512}),
    ],
)
def test_a_cliff_is_above_what_a_neighbour_makes_expect(seconds: list[float], expected: dict[int, float]) -> None:
    assert found(of_keys(128, 256, 512, 1024), seconds) == expected


def test_without_an_order_the_first_is_everybodys_neighbour() -> None:
    line = Line("options", tuple(case(queries=64, option=name) for name in cliffs.OPTIONS[:4]), ordered=False)
    assert found(line, [1, 1.4, 3, 1.6]) == {2: 3.0, 3: 1.6}


def test_a_shape_on_two_lines_is_named_once_where_it_is_worst() -> None:
    shared, one, other = case(keys=512), case(keys=256), case(keys=512, head_size=32)
    lines = [Line("lengths", (one, shared)), Line("head sizes", (other, shared))]
    seconds = {shared.name: 9.0, one.name: 1.0, other.name: 1.5}
    [cliff] = cliffs.cliffs(lines, seconds, AVX512)
    assert (cliff.axis, cliff.beside, cliff.times) == ("lengths", one, pytest.approx(4.5, rel=0.01))


@pytest.mark.parametrize(("kind", "lanes"), [("f64", 8), ("f32", 16), ("f16", 16), ("bf16", 16)])
def test_work_is_counted_in_whole_vectors(kind: str, lanes: int) -> None:
    whole = {n: work(case(kind, queries=n, keys=4096), AVX512) for n in range(1, 8 * lanes + 1)}
    many = [whole[n] for n in range(lanes + 1, 8 * lanes + 1)]
    assert many == sorted(many)
    assert whole[6 * lanes] < whole[6 * lanes + 1] == whole[7 * lanes] < whole[7 * lanes + 1] == whole[8 * lanes]
    sizes = [work(case(kind, queries=64, keys=256, head_size=n), AVX512) for n in (1, lanes, lanes + 1, 2 * lanes)]
    assert sizes[0] == sizes[1] == sizes[2] / 2 == sizes[3] / 2
    assert whole[8 * lanes] == case(kind, queries=8 * lanes, keys=4096).flops * 16 // lanes


def test_few_queries_are_counted_by_what_is_read() -> None:
    one, grouped = case(keys=2048), case(heads=16, kv_heads=1, keys=2048, queries=1)
    assert work(one, AVX512) == cliffs.BALANCE * one.bytes
    assert work(grouped, AVX512) == cliffs.BALANCE * grouped.bytes
    assert work(case("bf16", keys=2048), AVX512) == work(one, AVX512) / 2
    many = case(heads=71, kv_heads=1, keys=2048, queries=2)
    assert work(many, AVX512) == many.flops * 8 > cliffs.BALANCE * many.bytes


def test_the_lines_vary_one_thing_each() -> None:
    by_axis = {axis: [line for line in cliffs.lines() if line.axis == axis] for axis in cliffs.AXES}
    varied = {
        "queries": {"queries"},
        "heads": {"heads", "kv_heads"},
        "groups": {"heads"},
        "head sizes": {"head_size"},
        "lengths": {"keys"},
        "options": {"option"},
        "layouts": {"layout"},
        "dtypes": {"dtype"},
    }
    fields = ("dtype", "batch", "heads", "kv_heads", "queries", "keys", "head_size", "option", "layout", "causal")
    for axis, along in by_axis.items():
        assert along
        for line in along:
            assert len({c.name for c in line.cases}) == len(line.cases)
            moving = {f for f in fields if len({getattr(c, f) for c in line.cases}) > 1}
            assert moving in (varied[axis], {"queries", "keys"} if axis == "lengths" else varied[axis])

    def values(axis: str, field: str) -> set[int]:
        return {getattr(c, field) for line in by_axis[axis] for c in line.cases}

    assert values("queries", "queries") == set(range(1, 41))
    for axis, field, ends in (("heads", "heads", (1, 96)), ("groups", "heads", (1, 64))):
        assert (min(values(axis, field)), max(values(axis, field))) == ends
    assert (min(values("head sizes", "head_size")), max(values("head sizes", "head_size"))) == (1, 512)
    assert (min(values("lengths", "keys")), max(values("lengths", "keys"))) == (1, 5000)


def test_names_tell_cases_apart() -> None:
    every = [c for line in cliffs.lines() for c in line.cases]
    assert len({c.name for c in every}) == len(set(every))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_keep_values(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 4))
    laid = LAYOUTS[name](x)
    np.testing.assert_array_equal(laid, x)
    assert (laid.strides == x.strides) == (name == "")


def test_what_there_was_no_time_for_is_counted() -> None:
    line = of_keys(8, 16, 24)
    results = cliffs.measure([line], 1, limit=0)
    assert [r.case for r in results] == [line.cases[0]]
    assert cliffs.report_lines([line], results, 1)[-1] == "not measured: 2 of 3 shapes"


def test_what_was_slow_by_chance_is_run_again(monkeypatch) -> None:
    """A shape that is slow each time stays; with its neighbour it is run three times, the others once."""
    line = of_keys(128, 256, 512, 1024)
    slow = {128: [1, 1, 1], 256: [9, 2, 2], 512: [4], 1024: [64, 60, 62]}
    asked = []

    def run_cases(cases, *_):
        asked.append([c.keys for c in cases])
        for c in cases:
            times = slow[c.keys]
            yield CaseResult(c, [Measurement(c, "flashtile", 1, seconds=[times.pop(0) if times else 4])], [])

    monkeypatch.setattr(cliffs, "run_cases", run_cases)
    monkeypatch.setattr(cliffs, "REPEATS", 3)
    results = cliffs.measure([line], 1)
    assert asked == [[128, 256, 512, 1024], [1024, 512, 256, 128], [1024, 512]]
    assert {r.case.keys: cliffs._seconds(r, 1) for r in results} == {128: 1, 256: 2, 512: 4, 1024: 60}
    said = cliffs.report_lines([line], results, 1)
    assert len(said) == 2 and said[1].split()[0] == "7.50"


def test_a_failure_is_reported_whatever_came_later(monkeypatch) -> None:
    line = of_keys(128, 256)
    failure = Measurement(line.cases[0], "flashtile", 1, "failed", "wrong result: it is")
    good = Measurement(line.cases[1], "flashtile", 1, seconds=[1.0])
    monkeypatch.setattr(
        cliffs,
        "run_cases",
        lambda *_: [CaseResult(c, [m], []) for c, m in zip(line.cases, (failure, good), strict=True)],
    )
    said = cliffs.report_lines([line], cliffs.measure([line], 1), 1)
    assert said[1:] == [f"{line.cases[0].name}: failed: wrong result: it is"]


def test_the_part_checks_times_writes_and_reports(tmp_path, monkeypatch, capsys) -> None:
    tiny = {"queries": 2, "keys": 8, "head_size": 8, "heads": 2, "kv_heads": 1}

    def options():
        yield [Case(f"o-{name}", "f32", 1, **tiny, option=name) for name in cliffs.OPTIONS]

    def layouts():
        yield [Case(f"l-{name}", "f32", 1, **tiny, layout=name) for name in LAYOUTS]

    monkeypatch.setattr(cliffs, "AXES", {"options": options, "layouts": layouts})
    arguments = ["--parts", "cliffs", "--threads", "1", "--peers", "flashtile", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    _, rows = records.read(kinds.folder_here(tmp_path) / records.CLIFFS)
    assert len(rows) == len(cliffs.OPTIONS) + len(LAYOUTS)
    assert {row["status"] for row in rows} == {"timed"}, [row["why"] for row in rows]
    assert all(row["samples"] == "3" and math.isfinite(float(row["median_seconds"])) for row in rows)
    said = capsys.readouterr().out
    assert f"of {len(rows)} shapes, the worst first" in said and "not measured:" not in said
    assert "Above 1.5 times a neighbour" in (kinds.folder_here(tmp_path) / "table.txt").read_text()
    before = [row for row in rows if row["case"].startswith("o-")]
    assert command.main([*arguments, "--axes", "layouts"]) == 0
    after = records.read(kinds.folder_here(tmp_path) / records.CLIFFS)[1]
    assert [row for row in after if row["case"].startswith("o-")] == before
