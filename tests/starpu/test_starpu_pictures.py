"""Profiles: every task once, where and when it ran, what it waited for; the trace, the chart, the graph in DOT."""

from __future__ import annotations

import ctypes
import json
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashtile.engines.starpu import pictures, runtime, session
from flashtile.engines.starpu.flow import Flow
from flashtile.engines.starpu.profile import EVENT, Profile
from flashtile.errors import KernelError, SpecError, UnavailableError
from flashtile.plan.tiling import flops_of

Script = Callable[..., Any]
HEADS, LENGTH, ROWS = 2, 450, 100
TILES = 5
FORWARD, FINISH = "flashtile_forward_float16", "flashtile_finish_float16"


def name(head: int, i: int, j: int | None = None) -> str:
    return f"batch 0, head {head}, query tile {i}" + ("" if j is None else f", key tile {j}")


def chain(i: int) -> list[int]:
    """The key tiles of a query tile under a causal mask, in their order."""
    return list(range(i, -1, -1))


@pytest.fixture
def tensors(starpu: Any) -> Any:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, HEADS, LENGTH, 16)).astype("float16") for _ in range(3))
    given = [starpu.register(x, ROWS) for x in (q, k, v, np.zeros_like(q), np.zeros((1, HEADS, LENGTH), "float32"))]
    yield given
    for tensor in given:
        tensor.unregister()


@pytest.fixture
def profile(starpu: Any, tensors: Any) -> Profile:
    """Of one causal pass with 16-bit outputs: chains of forward tasks, each with a cast at its end."""
    with starpu.profile() as p:
        starpu.submit_forward(*tensors, causal=True)
        starpu.wait()
    return p


def submitted_flow() -> Flow:
    """That of the pass, which the door remembers."""
    flows = [flow for flow in session.current().flows.values() if isinstance(flow, Flow)]
    return next(flow for flow in flows if flow.spec.q_len == LENGTH and flow.spec.band is not None)


def test_every_task_is_there_once(profile: Profile) -> None:
    expected = Counter((FORWARD, name(h, i, j)) for h in range(HEADS) for i in range(TILES) for j in chain(i))
    expected += Counter((FINISH, name(h, i)) for h in range(HEADS) for i in range(TILES))
    assert Counter((task.codelet, task.tile) for task in profile.tasks) == expected
    assert [task.number for task in profile.tasks] == list(range(len(profile.tasks)))
    assert {task.outcome for task in profile.tasks} == {"done"}


def test_flops_and_footprints_are_those_of_the_tasks(profile: Profile) -> None:
    assert sum(task.flops for task in profile.tasks) == flops_of(submitted_flow().spec)
    kinds = {task.tile[-24:]: task.footprint for task in profile.tasks if task.codelet == FORWARD}
    diagonal = {kinds[f"query tile {i}, key tile {i}"] for i in range(TILES - 1)}
    assert len(diagonal) == 1 and kinds["query tile 1, key tile 0"] not in diagonal


def test_a_worker_does_one_thing_at_a_time(profile: Profile) -> None:
    assert len(profile.workers) == runtime.current().workers()
    for worker in range(len(profile.workers)):
        mine = sorted((task for task in profile.tasks if task.worker == worker), key=lambda task: task.start)
        assert all(before.end <= after.start for before, after in pairwise(mine))
    assert {task.worker for task in profile.tasks} <= set(range(len(profile.workers)))


def test_times_follow_the_order_of_the_chains(profile: Profile) -> None:
    assert min(task.submitted for task in profile.tasks) == 0
    assert all(0 <= task.submitted <= task.start < task.end for task in profile.tasks)
    assert profile.dependencies
    for earlier, later in profile.dependencies:
        assert profile.tasks[earlier].end <= profile.tasks[later].start


def chain_edges() -> set[tuple[str, str]]:
    edges = set()
    for h in range(HEADS):
        for i in range(TILES):
            names = [name(h, i, j) for j in chain(i)] + [name(h, i)]
            edges |= set(pairwise(names))
    return edges


def test_dependencies_are_those_of_the_chains(profile: Profile) -> None:
    tiles = [task.tile for task in profile.tasks]
    found = [(tiles[earlier], tiles[later]) for earlier, later in profile.dependencies]
    assert len(found) == len(set(found)) and set(found) == chain_edges()


# The trace


def test_the_trace_is_valid_and_complete(profile: Profile, tmp_path: Path) -> None:
    """Every event has what its phase requires; slices are the tasks, arrows the dependencies."""
    path = tmp_path / "trace.json"
    profile.chrome_trace(path)
    trace = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert set(trace) == {"traceEvents", "displayTimeUnit"} and trace["displayTimeUnit"] == "ms"
    by_phase: dict[str, list[dict[str, Any]]] = {"M": [], "X": [], "s": [], "f": []}
    for event in trace["traceEvents"]:
        by_phase[event["ph"]].append(event)
        assert isinstance(event["name"], str) and type(event["pid"]) is int
        if event["ph"] != "M":
            assert type(event["tid"]) is int and event["ts"] >= 0 and isinstance(event["cat"], str)
    names = {event["tid"]: event["args"]["name"] for event in by_phase["M"] if event["name"] == "thread_name"}
    assert tuple(names[tid] for tid in sorted(names)) == profile.workers
    slices = by_phase["X"]
    assert [(s["name"], s["args"]["tile"]) for s in slices] == [(task.codelet, task.tile) for task in profile.tasks]
    for s, task in zip(slices, profile.tasks, strict=True):
        assert s["tid"] == task.worker and s["args"]["outcome"] == "done"
        assert abs(s["ts"] - 1e6 * task.start) < 1e-3 and abs(s["ts"] + s["dur"] - 1e6 * task.end) < 2e-3
    for begin, end, (earlier, later) in zip(by_phase["s"], by_phase["f"], profile.dependencies, strict=True):
        assert begin["id"] == end["id"] and end["bp"] == "e" and begin["ts"] <= end["ts"]
        for arrow, s in ((begin, slices[earlier]), (end, slices[later])):
            assert arrow["tid"] == s["tid"] and s["ts"] <= arrow["ts"] <= s["ts"] + s["dur"]


def test_slices_of_a_worker_do_not_overlap_in_the_trace(profile: Profile, tmp_path: Path) -> None:
    """Rounded as they are written: Perfetto drops slices that overlap by a nanosecond."""
    profile.chrome_trace(tmp_path / "trace.json")
    slices = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    for tid in {s["tid"] for s in slices}:
        mine = sorted((s for s in slices if s["tid"] == tid), key=lambda s: s["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in pairwise(mine))


# The graph and the chart


def test_the_graph_in_dot(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "graph.dot"
    profile.dot(path)
    first, style, *lines, last = path.read_text().splitlines()
    assert (first, last) == ("digraph tasks {", "}") and style.startswith("  node [")
    labels, edges = {}, set()
    for line in lines:
        if node := re.fullmatch(r'  (t\d+) \[label="([^"]+)", fillcolor="#[0-9a-f]{6}"\]', line):
            labels[node[1]] = node[2].replace("\\n", ", ")
        else:
            edge = re.fullmatch(r"  (t\d+) -> (t\d+)", line)
            assert edge, line
            edges.add((edge[1], edge[2]))
    short = {tile.partition(", ")[2] if tile.startswith(("forward", "finish")) else tile for tile in labels.values()}
    assert len(labels) == len(profile.tasks) and short == {task.tile for task in profile.tasks}
    tile = {node: label.partition(", ")[2] for node, label in labels.items()}
    assert {(tile[a], tile[b]) for a, b in edges} == chain_edges()


def test_the_gantt_chart(profile: Profile, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "workers.png"
    profile.gantt(path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width == 1200 and 250 < height < 1000
    pixels = {tuple(pixel) for pixel in (255 * image.imread(path)[..., :3]).round().astype(int).reshape(-1, 3)}
    for colour in pictures.COLOURS[:2]:  # forward and finish
        assert tuple(bytes.fromhex(colour[1:])) in pixels
    assert tuple(bytes.fromhex(pictures.FAILED[1:])) not in pixels


def test_bars_are_the_tasks(profile: Profile) -> None:
    bars = [(row, *bar) for _, row, some in pictures._bars(list(profile.tasks)) for bar in some]
    assert sorted(bars) == sorted((t.worker, 1e3 * t.start, 1e3 * (t.end - t.start)) for t in profile.tasks)


# Errors


def test_a_failure_is_shown_and_raised_by_wait(starpu: Any, tensors: Any, tmp_path: Path) -> None:
    starpu.submit_forward(*tensors, causal=True)
    starpu.wait()
    flow = submitted_flow()
    native, failing = flow.program.data.cpu, (0 * TILES + 3) * TILES + 2  # head 0, query tile 3, key tile 2

    @ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    def kernel(params: int, begin: int, end: int, scratch: int) -> int:
        return 5 if begin == failing else 0

    flow.program.data.cpu = ctypes.cast(kernel, ctypes.c_void_p).value
    try:
        with starpu.profile() as p:
            starpu.submit_forward(*tensors, causal=True)
        with pytest.raises(KernelError, match="query tile 3, key tile 2 with status 5"):
            starpu.wait()
    finally:
        flow.program.data.cpu = native
    outcomes = {task.tile: task.outcome for task in p.tasks}
    assert outcomes[name(0, 3, 2)] == "failed" and Counter(outcomes.values())["failed"] == 1
    assert outcomes[name(0, 3, 3)] == "done" and outcomes[name(0, 3, 1)] == outcomes[name(0, 3)] == "skipped"
    p.chrome_trace(tmp_path / "trace.json")
    p.gantt(tmp_path / "workers.png")
    p.dot(tmp_path / "graph.dot")
    assert pictures.FAILED in (tmp_path / "graph.dot").read_text()


def test_a_refused_submission_leaves_no_task(starpu: Any, tensors: Any) -> None:
    now = runtime.current()
    starpu.submit_forward(*tensors)
    starpu.wait()
    codelet = session.current().codelets[FORWARD]
    now.lib.ft_codelet_where(codelet.pointer, now.constant("CUDA"))
    try:
        with starpu.profile() as p, pytest.raises(UnavailableError):
            starpu.submit_forward(*tensors)
    finally:
        now.lib.ft_codelet_where(codelet.pointer, now.constant("CPU"))
    assert p.tasks == () and p.dependencies == []


def test_nothing_is_recorded_outside_of_a_block(starpu: Any, tensors: Any, profile: Profile) -> None:
    now, before = runtime.current(), len(profile.tasks)
    assert now.recorder is None and now.lib.ft_profiling(0) == 0
    starpu.submit_forward(*tensors)
    starpu.wait()
    assert len(profile.tasks) == before


def test_the_program_keeps_its_own_profiling(starpu: Any) -> None:
    lib = runtime.current().lib
    lib.ft_profiling(1)
    with starpu.profile():
        pass
    assert lib.ft_profiling(0) == 1


def test_misuse(starpu: Any, tmp_path: Path) -> None:
    with starpu.profile() as p:
        with pytest.raises(SpecError, match="profile: got a block inside of another, expected the other one to end"):
            starpu.profile().__enter__()
        for read in (lambda: p.tasks, lambda: p.dependencies, lambda: p.dot(tmp_path / "x"), p.__enter__):
            with pytest.raises(SpecError, match="profile: got a block"):
                read()
    with pytest.raises(SpecError, match="expected a new profile"):
        p.__enter__()
    with pytest.raises(SpecError, match="gantt: got a profile without a task that ran"):
        p.gantt(tmp_path / "x.png")
    with pytest.raises(SpecError, match=r"path: got '.*x.jpg', expected a name that ends in .png"):
        p.gantt(tmp_path / "x.jpg")
    with pytest.raises(SpecError, match="profile: got a block that has not ended"):
        starpu.profile().dot(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    p.chrome_trace(tmp_path / "empty.json")
    p.dot(tmp_path / "empty.dot")


def test_a_chart_without_matplotlib(profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnavailableError, match="gantt: got .*matplotlib.*, expected matplotlib: pip install"):
        profile.gantt(tmp_path / "x.png")
    profile.dot(tmp_path / "x.dot")


def test_profiles_of_a_process(script: Script, tmp_path: Path) -> None:
    """Before init; over a shutdown; in a fork; and with no picture library loaded."""
    done = script("""
        print(message(lambda: starpu.profile().__enter__(), UnavailableError))
        starpu.init(workers=2)
        _, tensors = registered()
        with starpu.profile() as p:
            starpu.submit_forward(*tensors)
            starpu.shutdown()
        assert len(p.tasks) == 18 and {task.outcome for task in p.tasks} <= {"done", "skipped"}
        starpu.init(workers=1)
        with starpu.profile() as again:
            child = os.fork()
            if child == 0:
                print(message(lambda: again.tasks, UnavailableError), flush=True)
                break_out = True
            else:
                break_out = False
        if break_out:
            os._exit(0)
        os.waitpid(child, 0)
        assert again.tasks == () and len(p.workers) == 2 and len(again.workers) == 1
        starpu.shutdown()
        flashtile.attention(*arrays()[:3], engine="starpu")  # which leaves StarPU paused
        with starpu.profile() as p:
            flashtile.attention(*arrays()[:3], engine="starpu")
        assert p.tasks and {task.outcome for task in p.tasks} == {"done"}
        assert not {"matplotlib", "json.tool"} & set(sys.modules)
    """)
    assert "expected flashtile.starpu.init() first" in done.stdout
    assert "profile: got a fork of the process that it records" in done.stdout


def test_an_event_is_laid_out_as_in_c(starpu: Any) -> None:
    ffi = runtime.current().ffi
    assert ffi.sizeof("ft_event") == EVENT.itemsize
    for field in EVENT.names or ():
        assert ffi.offsetof("ft_event", field) == EVENT.fields[field][1], field  # type: ignore[index]
