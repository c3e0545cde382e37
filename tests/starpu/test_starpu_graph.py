"""Which tasks wait for which: the rule, and what StarPU itself records."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashtile.engines.starpu.graph import Graph, Modes

Script = Callable[..., Any]
R, W, RW, SCRATCH, COMMUTE = 1, 2, 3, 4, 16


@pytest.mark.parametrize(
    ("accesses", "expected"),
    [
        ([R, R, W, R], {(0, 2), (1, 2), (2, 3)}),
        ([W, R, R, W, W], {(0, 1), (0, 2), (1, 3), (2, 3), (3, 4)}),
        ([W, RW, RW], {(0, 1), (1, 2)}),
        ([SCRATCH, SCRATCH, RW], set()),
        ([W, RW | COMMUTE, RW | COMMUTE, R], {(0, 1), (0, 2), (1, 3), (2, 3)}),
        ([R, RW | COMMUTE, RW | COMMUTE, RW], {(0, 1), (0, 2), (1, 3), (2, 3)}),
        ([RW | COMMUTE, R, RW | COMMUTE, RW | COMMUTE], {(0, 1), (1, 2), (1, 3)}),
    ],
)
def test_the_rule_of_dependencies(accesses: list[int], expected: set[tuple[int, int]]) -> None:
    """Accesses of successive tasks to one tile."""
    graph = Graph(Modes(write=W, scratch=SCRATCH, commute=COMMUTE))
    for mode in accesses:
        graph.add([7], [mode])
    assert graph.edges == expected


def test_a_tile_used_twice_by_a_task_is_no_dependency_on_itself() -> None:
    graph = Graph(Modes(W, SCRATCH, COMMUTE))
    graph.add([7, 7], [R, RW])
    graph.add([7, 8], [R, W])
    graph.forget([7])
    graph.add([7], [RW])
    assert graph.edges == {(0, 1)}


@pytest.mark.parametrize("accumulate", ["ordered", "commute"])
def test_dependencies_are_what_starpu_records(script: Script, tmp_path: Path, accumulate: str) -> None:
    """StarPU's own record of the task graph, for passes, merges and casts on the same tiles.

    Where a task follows several that commute, StarPU puts an empty task of its own between them, which it leaves out
    of the record with most of what leads to it: so there, its record is only a part of ours.
    """
    script(
        """
        import ctypes
        starpu.init(workers=2)
        given, (q, k, v, o, lse) = registered(rows=100, q_len=450, kv_len=350)
        narrow = starpu.register(np.zeros(given[3].shape, "float16"), 100)
        other = [starpu.empty(x.shape, "float32", 100) for x in given[3:]]
        C = starpu_library()
        with starpu.profile() as p:
            C.starpu_bound_start(1, 1)
            starpu.submit_forward(q, k, v, o, lse, accumulate=os.environ["ACCUMULATE"])
            starpu.submit_forward(q, k, v, *other, causal=True, align=0)
            starpu.submit_merge(o, lse, *other)
            starpu.submit_finish(o, lse, narrow)
            starpu.submit_forward(q, k, v, o, lse)
            starpu.wait()
        C.starpu_bound_stop()
        C.fopen.restype = ctypes.c_void_p
        file = ctypes.c_void_p(C.fopen(os.environ["DOT"].encode(), b"w"))
        C.starpu_bound_print_dot(file)
        C.fclose(file)
        p.dot(os.environ["OURS"])
        """,
        ACCUMULATE=accumulate,
        DOT=str(tmp_path / "starpu.dot"),
        OURS=str(tmp_path / "ours.dot"),
    )
    theirs, ours = ((tmp_path / f).read_text() for f in ("starpu.dot", "ours.dot"))
    numbers = sorted(int(n) for n in re.findall(r'^"t(\d+)" \[', theirs, re.MULTILINE))
    place = {n: at for at, n in enumerate(numbers)}
    expected = {(place[int(a)], place[int(b)]) for a, b in re.findall(r'"t(\d+)" -> "t(\d+)"', theirs)}
    found = {(int(a), int(b)) for a, b in re.findall(r"t(\d+) -> t(\d+)", ours)}
    assert len(numbers) == len(re.findall(r"t\d+ \[", ours)) > 50
    if accumulate == "ordered":
        assert found == expected
        return
    assert expected <= closure(found)
    merges = {int(n) for n in re.findall(r't(\d+) \[label="merge', ours)}
    commuting = {n for n in range(2 * 5 * 4) if n % 4}  # the first pass: 2 heads, 5 query tiles, chains of 4
    assert len(merges) == 2 * 5
    assert found - expected == {(a, b) for a, b in found if a in commuting and b in merges}


def closure(edges: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """(a, b) wherever b can be reached from a. Edges lead from lower to higher numbers."""
    before: dict[int, set[int]] = {}
    for a, b in sorted(edges, key=lambda edge: edge[1]):
        before.setdefault(b, set()).update({a}, before.get(a, set()))
    return {(a, b) for b, earlier in before.items() for a in earlier}


def test_tiles_that_were_unregistered_depend_on_nothing(starpu: Any) -> None:
    """The states of two calls may stand at the same addresses."""
    import flashtile

    q, k, v = np.zeros((3, 1, 1, 300, 16), "float16")
    with starpu.profile() as p:
        for _ in range(3):
            flashtile.attention(q, k, v, engine="starpu")
    assert len(p.tasks) % 3 == 0 and p.dependencies
    third = len(p.tasks) // 3
    assert all(earlier // third == later // third for earlier, later in p.dependencies)


@pytest.mark.parametrize("q_len", [900, 5])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "align": 1500}, {"mask": np.tri(900, 2300, dtype=bool)}], ids=str
)
def test_explain_says_which_tasks_there_will_be(starpu: Any, options: dict[str, Any], q_len: int) -> None:
    """A task of one head for each pair of tiles that meets; forward and backward."""
    import flashtile

    if "mask" in options:
        options = {"mask": options["mask"][-q_len:]}
    q, k, v = np.zeros((1, 1, q_len, 48), "float32"), *np.zeros((2, 1, 1, 2300, 48), "float32")
    o, lse = flashtile.attention(q, k, v, return_lse=True, **options)
    for backward in (False, True):
        told = flashtile.explain(q, k, v, engine="starpu", backward=backward, **options)
        with starpu.profile() as p:
            if backward:
                flashtile.attention_backward(o, q, k, v, o, lse, engine="starpu", **options)
            else:
                flashtile.attention(q, k, v, engine="starpu", **options)
        name = f"flashtile_{told.direction}_float32"
        ran = [task for task in p.tasks if task.codelet == name]
        assert len(ran) == told.coverage.full + told.coverage.partial
        assert f"{told.plan.tile_q} queries x {told.plan.tile_k} keys; a task for each pair that meets" in str(told)
        assert told.variant == told.direction and "starpu, on its workers" in str(told)


def test_every_door_is_recorded(starpu: Any) -> None:
    """Pairs of tiles, the unfused codelets, NNTile's accumulation."""
    from flashtile import nntile

    q, k, v, o = np.zeros((4, 1, 1, 200, 16), "float32")
    tensors = [starpu.register(x, 100) for x in (q, k, v, o, np.zeros((1, 1, 200), "float32"))]
    tiles = [nntile.register(np.zeros((16, 32, 1, 1, 2), "float32", order="F")) for _ in range(4)]
    logsumexp = nntile.register(np.full((32, 1, 1, 2), -np.inf, "float32", order="F"))
    with starpu.profile() as p:
        for j in range(2):
            starpu.submit_forward(
                *(x[0, 0, 0] if n not in (1, 2) else x[0, 0, j] for n, x in enumerate(tensors)), carry=j > 0
            )
        starpu.submit_forward(*tensors, kernel="vanilla")
        for n in range(3):
            nntile.flash_sdpa_fwd_async(tiles[0], tiles[1], None, logsumexp, tiles[2], tiles[3], first_key=32 * n)
    starpu.wait()
    operations = [task.codelet.removeprefix("flashtile_").removesuffix("_float32") for task in p.tasks]
    assert operations[:2] == ["forward"] * 2 and operations[-3:] == ["accumulate"] * 3
    assert set(operations[2:-3]) == {"scores", "softmax", "output"}
    assert [task.tile for task in p.tasks[-3:]] == [f"first query 0, first key {32 * n}" for n in range(3)]
    last = len(p.tasks) - 1
    assert {(a, b) for a, b in p.dependencies if b >= last - 2} == {(last - 2, last - 1), (last - 1, last)}
    assert (0, 1) in p.dependencies
    for x in (*tensors, *tiles, logsumexp):
        x.unregister()
