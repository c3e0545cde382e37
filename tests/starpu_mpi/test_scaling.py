"""Simulated scaling: tasks and bytes are the engine's, network and schedule are what they say, worked out by hand."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from rank_cases import Ranks

from flashtile import scaling
from flashtile.engines.starpu_mpi import build
from flashtile.engines.starpu_mpi.journey import stages_of
from flashtile.engines.starpu_mpi.order import steps_of
from flashtile.engines.starpu_mpi.simulation import backward as backwards
from flashtile.engines.starpu_mpi.simulation import costs, network, schedule
from flashtile.engines.starpu_mpi.simulation.backward import BackwardPlan
from flashtile.engines.starpu_mpi.simulation.network import Network
from flashtile.engines.starpu_mpi.simulation.plan import Plan
from flashtile.errors import SpecError, UnavailableError
from flashtile.scaling import simulate

CALLS: list[dict[str, Any]] = [
    {"dtype": "float32", "causal": True, "distribution": "zigzag"},
    {"dtype": "float32", "causal": False, "distribution": "zigzag"},
    {"dtype": "float16", "causal": True, "window": (150, -1), "distribution": "contiguous"},
]

REAL = """
import json, sys
import numpy as np
from mpi4py import MPI
from flashtile import starpu_mpi
from flashtile.engines.starpu import runtime
from flashtile.engines.starpu_mpi import collective, gradients, link

comm = MPI.COMM_WORLD
said = []

class Counting(collective.Job):
    def submit(self, codelet, handles, modes, tasks, *keep):
        said[-1]["tasks"] = said[-1].get("tasks", 0) + len(tasks)
        super().submit(codelet, handles, modes, tasks, *keep)

received = link.Link.receive
def receive(self, comm, handles, ranks, tags):
    lib = runtime.current().lib
    said[-1]["messages"] = said[-1].get("messages", 0) + len(handles)
    said[-1]["bytes"] = said[-1].get("bytes", 0) + sum(lib.ft_nbytes(int(x)) for x in handles)
    received(self, comm, handles, ranks, tags)

collective.Job = gradients.Job = Counting
link.Link.receive = receive
for call in json.loads(sys.argv[1]):
    said.append({})
    cut = {"tile": 96, "distribution": call.pop("distribution")}
    rows = len(starpu_mpi.part(1000, comm.rank, comm.size, **cut))
    dtype = call.pop("dtype")
    q, k = np.zeros((1, 4, rows, 16), dtype), np.zeros((1, 2, rows, 16), dtype)
    if "window" in call:
        call["window"] = tuple(call["window"])
    o, lse = starpu_mpi.attention(q, k, k, return_lse=True, **call, **cut)
    said.append({})
    starpu_mpi.attention_backward(q, q, k, k, o, lse, **call, **cut)
every = comm.gather(said)
if comm.rank == 0:
    print(json.dumps(every))
"""


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_tasks_and_bytes_are_those_of_four_ranks(ranks: Ranks) -> None:
    done = ranks(4, REAL, json.dumps(CALLS))
    assert done.returncode == 0, done.stdout + done.stderr
    every = json.loads(done.stdout)
    for n, (call, backward) in enumerate(itertools.product(CALLS, (False, True))):
        found = simulate(4, 1000, heads=4, kv_heads=2, head_size=16, tile=96, rate=1e9, backward=backward, **call)
        assert found.tasks.tolist() == [rank[n]["tasks"] for rank in every], call
        assert found.received_bytes.tolist() == [rank[n].get("bytes", 0) for rank in every], call
        assert found.sent_bytes.sum() == found.received_bytes.sum() > 0
        plan = Plan(
            scaling.spec_of(1, 4, 2, 1000, 16, call["dtype"], call["causal"], call.get("window")),
            4,
            96,
            call["distribution"],
        )
        messages = plan.needs.sum(axis=1) * 2 * 2
        if backward:
            both = BackwardPlan(plan)
            messages = both.traffic.needs.sum(axis=1) * 4 * 4 + 4 * np.bincount(both.legs.receiver, minlength=4)
        assert messages.tolist() == [rank[n].get("messages", 0) for rank in every], call


def plan(ranks: int = 2, length: int = 400, **given: Any) -> Plan:
    options = {
        "batch": 1,
        "heads": 1,
        "kv_heads": None,
        "head_size": 25,
        "dtype": "float32",
        "causal": False,
        "window": None,
    }
    options |= given
    tile, distribution = options.pop("tile", 100), options.pop("distribution", "contiguous")
    return Plan(scaling.spec_of(length=length, **options), ranks, tile, distribution)


def test_a_link_sends_and_receives_one_message_at_a_time() -> None:
    """Tiles of 10 kB at 10 kB/s: one second each. Two ranks with two tiles each."""
    (found,) = network.arrivals([plan().traffic], Network(0.25, 1e4), "posted")
    found = found[:, 0]
    # k of both tiles, then v of both; a tile is there with its v
    assert found[0].tolist() == [0, 0, 3.25, 4.25] and found[1].tolist() == [3.25, 4.25, 0, 0]
    # rank 0 meets tile 3 first, then 2; rank 1 from tile 2 goes down to 1, then 0. k and v together.
    needed = network.arrivals([plan().traffic], Network(0.25, 1e4), "needed")[0][:, 0]
    assert needed[0].tolist() == [0, 0, 4.25, 2.25] and needed[1].tolist() == [4.25, 2.25, 0, 0]


def test_a_receiver_takes_one_message_after_the_other() -> None:
    """Three ranks, a tile each: two senders begin with rank 0 at once, whose link takes them in turn."""
    found = network.arrivals([plan(3, 300).traffic], Network(0.0, 1e4), "posted")[0][:, 0]
    # rank 0: k of tiles 1 and 2 have left at 1, v at 3: in at 1, 2, 3, 4
    assert found[0].tolist() == [0, 3, 4]


def test_departures_of_heads_are_those_of_a_queue() -> None:
    """Against the queue of every message, sorted and added up one by one."""
    p = plan(3, 650, heads=3, causal=True, distribution="zigzag")
    for order in ("posted", "needed"):
        d = network.departures_of(p.traffic, Network(0.0, 1e4, 0.5), order)
        sender = p.key_owner[d.tile]
        urgency = p.traffic.urgency[d.receiver, d.tile]
        queues: dict[int, list[Any]] = {}
        for n, head, which in itertools.product(range(len(d.tile)), range(3), range(2)):
            place = (d.receiver[n], d.tile[n])
            key = (which, place[0], head, place[1]) if order == "posted" else (urgency[n], head, which, *place)
            queues.setdefault(sender[n], []).append((key, p.heights[d.tile[n]] * 100 / 1e4 + 0.5, n, head, which))
        for queue in queues.values():
            clock = 0.0
            for _, seconds, n, head, which in sorted(queue):
                clock += seconds
                assert np.isclose(d.first[n, which] + head * d.step[n, which], clock)


def test_workers_take_what_is_ready_and_has_most_left() -> None:
    p = plan(1, 300, heads=2, causal=True)  # chains of 1, 2, 3 tasks, twice
    seconds = np.ones(6)
    for workers, end in ((1, 12.0), (2, 6.0), (3, 4.0), (6, 3.0), (7, 3.0)):
        times = schedule.run(p, seconds, np.zeros((1, 2, 3)), workers, 0.0)
        assert (times.end.tolist(), times.busy.tolist()) == ([end], [12.0])
    late = np.zeros((1, 2, 3))
    late[0, :, 0] = 10.0  # every chain ends with tile 0
    assert schedule.run(p, seconds, late, 6, 0.0).end.tolist() == [11.0]
    assert schedule.run(p, seconds, late, 1, 0.5).end.tolist() == [10.0 + 6 * 1.5]


def test_tasks_of_gradients_wait_for_tiles_and_for_sums() -> None:
    """Two ranks, a tile each, open: each has the pair of its own tiles, then that of its keys and the other's rows;
    their sum comes when the other is done with it, and goes home."""
    p = BackwardPlan(plan(2, 200))
    fast, slow = Network(0.0, np.inf), Network(1.0, 5e3)  # a sum of 10 kB takes two seconds, and one to cross

    def end(late: float, workers: int, link: Network, overhead: float = 0.0) -> list[float]:
        arrived = np.zeros((2, 1, 2))
        arrived[1, 0, 0] = late  # at rank 1, the rows of rank 0
        return backwards.run(p, np.full(4, 5.0), arrived, workers, overhead, link).end.tolist()

    assert p.tasks.tolist() == [3, 3] and p.received_bytes.tolist() == [100 * (200 + 8) + 2 * 10000] * 2
    assert end(0, 1, fast) == end(0, 2, fast) == [10.0, 10.0]
    assert end(0, 1, fast, 0.5) == [11.5, 11.5], "delta first"
    assert end(0, 1, slow) == [16.0, 16.0]
    assert end(20, 1, fast) == [25.0, 25.0]
    assert end(20, 1, slow) == [28.0, 25.0], "rank 0 waits for the sum of its rows"


def test_tasks_take_longer_while_tiles_travel() -> None:
    p, seconds, arrived = plan(2, 200), np.ones(4), np.zeros((2, 1, 2))
    arrived[1, 0, 0] = 1.5  # at rank 1: its second task begins after that
    for share, ends in ((0.0, [2.0, 2.5]), (0.25, [2.0, 2.5])):
        assert schedule.run(p, seconds, arrived, 1, 0.0, share).end.tolist() == ends
    arrived[1, 0, 0] = 0.5
    assert schedule.run(p, seconds, arrived, 1, 0.0, 0.25).end.tolist() == [2.0, 2.25], "the first of the two"
    both, link = BackwardPlan(p), Network(0.0, np.inf)
    assert backwards.run(both, seconds, np.zeros((2, 1, 2)), 1, 0.0, link, 0.25).end.tolist() == [2.5, 2.5]
    alone = BackwardPlan(plan(1, 200))
    assert backwards.run(alone, seconds, np.zeros((1, 1, 2)), 1, 0.0, link, 0.25).end.tolist() == [4.0]
    call = {"heads": 2, "tile": 96, "rate": 1e9}
    assert simulate(2, 900, start=0.5, **call).seconds == pytest.approx(0.5 + simulate(2, 900, **call).seconds)


def test_one_rank_of_gradients_is_busy_all_of_the_time() -> None:
    p = BackwardPlan(plan(1, 700, heads=4, kv_heads=2, causal=True))
    times = backwards.run(p, np.ones(28), np.zeros((1, 4, 7)), 2, 0.0, Network(0.0, np.inf))
    assert times.busy.tolist() == [4 * 28] and 2 * 28 <= times.end[0] <= 2 * 28 + 2 and not p.received_bytes.any()


@pytest.mark.parametrize("distribution", ["zigzag", "contiguous"])
@pytest.mark.parametrize("window", [None, (250, 120)])
def test_sums_meet_their_keys_in_order_on_every_rank(window: Any, distribution: str) -> None:
    """What each rank posts, run as processes that send and receive: no one waits for ever, and every sum is added to by
    the pairs of its chain one after the other, wherever they are."""
    whole = plan(4, 1250, heads=1, window=window, distribution=distribution)
    p, legs = BackwardPlan(whole).pairs, BackwardPlan(whole).legs
    found: dict[int, list[int]] = {}
    at = whole.query_owner.copy()  # where each sum is
    done = np.zeros(len(legs.sender), bool)
    posted = []
    for rank in range(4):
        stages = stages_of(legs, np.flatnonzero(whole.key_owner[p.key_tile] == rank), rank)
        mine: dict[int, list[tuple[str, int]]] = {}  # of each sum, in order, as StarPU keeps it
        for stage in stages:
            for what, tiles, numbers in (
                ("come", legs.query_tile, stage.come),
                ("pair", p.query_tile, stage.pairs),
                ("go", legs.query_tile, stage.go),
            ):
                for n in numbers:
                    mine.setdefault(int(tiles[n]), []).append((what, int(n)))
        posted.append(mine)
    moved = True
    while moved:
        moved = False
        for rank, tile in itertools.product(range(4), range(13)):
            events = posted[rank].get(tile, [])
            while events and (events[0][0] != "come" or done[events[0][1]]):
                what, n = events.pop(0)
                moved = True
                if what == "come":
                    at[tile] = rank
                elif what == "pair":
                    assert at[tile] == rank
                    found.setdefault(tile, []).append(n)
                else:
                    assert at[tile] == rank == legs.sender[n]
                    done[n] = True
    assert done.all() and not any(events for mine in posted for events in mine.values())
    assert (at == whole.query_owner).all()
    assert all(found[i] == np.flatnonzero(p.query_tile == i).tolist() for i in range(13))


def test_ranks_simulated_in_blocks_give_what_they_give_together(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = simulate(8, 3000, heads=2, tile=96, rate=1e9, workers=2)
    monkeypatch.setattr(schedule, "AT_ONCE", 1)
    apart = simulate(8, 3000, heads=2, tile=96, rate=1e9, workers=2)
    assert apart.seconds == whole.seconds and apart.waited == whole.waited


@pytest.mark.parametrize("heads", [1, 4])
def test_gradients_over_ranks_lose_little(heads: int) -> None:
    """Of however few heads: in the order of the forward one head had 67%."""
    found = simulate(32, 6144, heads=heads, kv_heads=1, tile=96, rate=1e9, backward=True)
    assert found.waited < 0.02 * found.seconds and 0.97 < found.efficiency < 1


@pytest.mark.parametrize("tiles", [1, 4, 9, 12])
def test_tiles_meet_one_at_a_time(tiles: int) -> None:
    """In a step no row has two keys, no key two rows, and where tiles fold evenly no rank has two pairs."""
    square = np.ones((tiles, tiles), bool)
    for touched, causal in ((np.tril(square), True), (square, False)):
        steps = np.where(touched, steps_of(touched), -1)
        for lines in (steps, steps.T):
            assert all(len(set(x)) == len(x) for x in (line[line >= 0].tolist() for line in lines))
        if tiles % 2 == 0 and causal:
            fold = np.minimum(np.arange(tiles), tiles - 1 - np.arange(tiles))[np.nonzero(touched)[1]]
            _, count = np.unique(np.stack([steps[touched], fold]), axis=1, return_counts=True)
            assert count.max() == 1 and len(np.unique(steps[touched])) == tiles + 1
    band = np.tril(square) & ~np.tril(square, -2)
    assert len(np.unique(steps_of(band)[band])) <= 2, "a narrow band in the order of the forward"


def test_no_simulation_beats_the_ideal() -> None:
    for exchange, order, distribution in (
        (1, "posted", "zigzag"),
        (2, "needed", "zigzag"),
        (4, "posted", "contiguous"),
    ):
        found = simulate(
            8, 5000, heads=4, tile=96, rate=1e10, exchange=exchange, order=order, distribution=distribution
        )
        assert 0 < found.efficiency <= 1 and found.waited >= 0 and found.seconds > found.ideal
        assert found.exchange_bytes == (0 if exchange == 1 else 4 * 625 * 4 * 128 * 4 * (exchange - 1) // exchange)
    assert simulate(1, 96, heads=1, tile=96, rate=1e9).received_bytes.tolist() == [0]


def test_a_wide_machine_with_zigzag_order_is_even() -> None:
    even = simulate(256, 1 << 18, heads=1, tile=512, order="needed", rate=1e11)
    uneven = simulate(256, 1 << 18, heads=1, tile=512, order="needed", rate=1e11, distribution="contiguous")
    assert even.tasks.min() == even.tasks.max() == 513
    assert even.efficiency > 0.9 > 0.6 > uneven.efficiency


@pytest.mark.parametrize("home", ["XDG_CACHE_HOME", "STARPU_HOME", "HOME"])
def test_models_are_read_where_starpu_keeps_them(home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("STARPU_PERF_MODEL_DIR", "XDG_CACHE_HOME", "STARPU_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "STARPU_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
        if name == home:
            break
    monkeypatch.setenv("STARPU_HOSTNAME", "here")
    folder = tmp_path / home / ".starpu" / "sampling" / "codelets" / "45"
    folder.mkdir(parents=True)
    (folder / "flashtile_forward_float32.here").write_text("0000000a 12345 0.0 2.5e+03 1e-1 2.5e+04 6.25e+07 10\n")
    assert costs.history("float32") == {10: 2.5e-3}


def test_costs_are_measured_once_a_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Or come from StarPU's models, in the text of its files."""
    monkeypatch.setenv("STARPU_PERF_MODEL_DIR", str(tmp_path))
    monkeypatch.setenv("STARPU_HOSTNAME", "here")
    monkeypatch.setattr(costs, "MEASURED_SECONDS", 0.0)
    ran: list[int] = []
    measured = costs.measured
    monkeypatch.setattr(costs, "measured", lambda call, busy: ran.append(call) or measured(call, busy))
    seconds, text = costs.seconds_of(plan(1, 1000, causal=True, tile=96, head_size=16), busy=2)
    _, said = costs.seconds_of_backward(BackwardPlan(plan(2, 1000, causal=True, tile=96, head_size=16)))
    assert said == "4 cases: 0 of StarPU's models, 4 measured here"
    del ran[4:]
    assert len(ran) == len(set(seconds.tolist())) == 4 and (seconds > 0).all()  # a diagonal or full tile, first or last
    assert text == "4 cases: 0 of StarPU's models, 4 measured here"
    from flashtile.engines.starpu.footprint import footprints
    from flashtile.kernels import tile_kernels

    p = plan(1, 1000, causal=True, tile=96, head_size=16)
    pairs = p.pairs
    _, cases = p.coverage.amount(pairs.batch, pairs.head, pairs.query_tile, pairs.key_tile)
    identity = tile_kernels().forward(p.coverage.spec, 96, 96).identity
    marks = footprints(identity, np.concatenate([cases, pairs.place[:, None] > 0], axis=1))
    folder = tmp_path / "codelets" / "45"
    folder.mkdir(parents=True)
    lines = [f"{mark:08x} 12345 0.000000e+00 2.500000e+03 1e-1 2.5e+04 6.25e+07 10" for mark in sorted(set(marks))]
    (folder / "flashtile_forward_float32.here").write_text(
        "# hash size flops mean dev sum sum2 n\n" + "\n".join(lines) + "\n"
    )
    seconds, text = costs.seconds_of(p)
    assert set(seconds.tolist()) == {2.5e-3} and text.startswith("4 cases: 4 of StarPU's models")


BAD: dict[str, dict[str, Any]] = {
    "ranks": {"ranks": 0},
    "length": {"length": -1},
    "heads": {"heads": 0},
    "k": {"heads": 3, "kv_heads": 2},
    "tile": {"tile": 0},
    "workers": {"workers": 1.5},
    "bandwidth": {"bandwidth": 0.0},
    "latency": {"latency": float("nan")},
    "rate": {"rate": -1.0},
    "order": {"order": "random"},
    "distribution": {"distribution": "ring"},
    "causal": {"causal": 1},
    "kv_heads": {"exchange": 2, "kv_heads": 1},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    with pytest.raises(SpecError, match=f"^{name}: got "):
        simulate(**{"ranks": 4, "length": 1000, "rate": 1e9, **BAD[name]})


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "flashtile", "starpu", "simulate", "--ranks", "1,4", "--seq", "4K", "--dim", "32"]
    done = processes.run(
        [*command, "--heads", "2", "--tile", "96", "--rate", "1e9", "--weak", "--plot", tmp_path / "x.png"]
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("\n\n")
    assert "2048 rows" in first and "4096 rows" in second and "efficiency" in second
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    wrong = processes.run([*command, "--rate", "-1"])
    assert (
        wrong.returncode == 2
        and wrong.stderr == "flashtile starpu: error: rate: got -1.0, expected a finite number above 0\n"
    )


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_the_command_measures_what_messages_cost_here() -> None:
    call = [
        "--ranks",
        "2",
        "--seq",
        "768",
        "--dim",
        "16",
        "--heads",
        "2",
        "--tile",
        "96",
        "--rate",
        "1e9",
        "--calibrate",
    ]
    done = processes.run([sys.executable, "-m", "flashtile", "starpu", "simulate", *call])
    assert done.returncode == 0, done.stderr
    measured, told = done.stdout.split("\n\n")
    found = [float(x) for x in re.findall(r"([\d.]+) (?:us|GB|ms)", measured)]
    assert len(found) == 4 and all(x > 0 for x in (found[0], *found[2:])), measured
    bare = simulate(2, 768, heads=2, head_size=16, tile=96, rate=1e9)
    assert float(re.findall(r"time +([\d.]+) s", told)[0]) > bare.seconds + 1e-3 * found[3] / 2


def test_plotting_without_matplotlib_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnavailableError, match="pip install matplotlib"):
        scaling.plot("x.png", {}, "")
