"""Simulated scaling: what a call of `flashtile.starpu_mpi` would take on many ranks, without the ranks.

Tasks, their order and the tiles that travel are those of the real plan; the seconds of a task are measured on this
machine (or StarPU's models of it, or a rate that is given), the network is a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashtile.calls import Options
from flashtile.checks import check_flag, integer
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu_mpi.parts import ZIGZAG, tiles_of
from flashtile.engines.starpu_mpi.simulation import backward as backwards
from flashtile.engines.starpu_mpi.simulation import schedule
from flashtile.engines.starpu_mpi.simulation.costs import seconds_of, seconds_of_backward
from flashtile.engines.starpu_mpi.simulation.network import NEEDED, POSTED, Network, arrivals
from flashtile.engines.starpu_mpi.simulation.plan import Plan
from flashtile.errors import UnavailableError, wrong
from flashtile.signature import Window

if TYPE_CHECKING:
    from flashtile.spec import AttentionSpec

__all__ = ["Simulation", "plot", "simulate"]
__dir__ = __all__.copy  # the public names, and not what stands beside them

TILE = 960  # as flashtile.starpu_mpi's
FREE = "latency", "message", "share", "start"  # numbers that may be 0
TASK_SECONDS = 10e-6  # that StarPU takes for a task (docs/starpu.md)


@dataclass(frozen=True)
class Simulation:
    """What a call takes on `ranks` ranks. Arrays are (ranks,).

    seconds     from the start of the call to the end of the last task
    ideal       seconds if all workers computed all of the time, and nothing twice: efficiency is ideal / seconds
    idle        share of the workers' time in which they compute nothing
    tasks, received_bytes, sent_bytes   of each rank, exactly those of the engine (without an exchange of heads)
    exchange_seconds, exchange_bytes    before and after it, of an exchange of heads; bytes that a rank receives
    waited      seconds that transfers add to a network that takes no time
    costs       where the seconds of tasks come from
    """

    ranks: int
    length: int
    tile: int
    workers: int
    seconds: float
    ideal: float
    tasks: np.ndarray
    received_bytes: np.ndarray
    sent_bytes: np.ndarray
    exchange_seconds: float
    exchange_bytes: int
    waited: float
    costs: str

    @property
    def efficiency(self) -> float:
        return self.ideal / self.seconds if self.seconds else 1.0

    @property
    def idle(self) -> float:
        return 1.0 - self.efficiency

    def __str__(self) -> str:
        heaviest = int(self.received_bytes.max(initial=0))
        rows = [
            ("ranks", f"{self.ranks} of {self.workers} workers, {self.length} rows in tiles of {self.tile}"),
            ("time", f"{self.seconds:.4g} s; {self.ideal:.4g} s if no worker ever waited"),
            ("efficiency", f"{100 * self.efficiency:.1f}%; workers idle {100 * self.idle:.1f}% of the time"),
            ("tasks", f"{int(self.tasks.sum())}; {int(self.tasks.min())} to {int(self.tasks.max())} a rank"),
            ("transfers", f"{_bytes(int(self.received_bytes.sum()))}, at most {_bytes(heaviest)} to a rank"),
            ("", f"they add {self.waited:.4g} s"),
            ("costs", self.costs),
        ]
        if self.exchange_bytes:
            text = f"{_bytes(self.exchange_bytes)} to a rank, {self.exchange_seconds:.4g} s, before and after"
            rows.insert(-1, ("heads", text))
        return "\n".join(f"{name:<12} {text}" for name, text in rows)


def simulate(
    ranks: int,
    length: int,
    *,
    heads: int = 8,
    kv_heads: int | None = None,
    head_size: int = 128,
    batch: int = 1,
    dtype: str = "float32",
    causal: bool = True,
    window: Window = None,
    tile: int = TILE,
    distribution: str = ZIGZAG,
    order: str = NEEDED,
    exchange: int = 1,
    workers: int = 1,
    bandwidth: float = 12.5e9,
    latency: float = 2e-6,
    message: float = 0.0,
    share: float = 0.0,
    start: float = 0.0,
    rate: float | None = None,
    busy: int | None = None,
    backward: bool = False,
) -> Simulation:
    """Predict a call of `flashtile.starpu_mpi.attention` on q, k, v of `length` rows over `ranks` ranks; or, with
    `backward`, of `attention_backward` with respect to q, k and v.

    Options: heads, kv_heads, head_size, batch, dtype, causal, window  of the call.
             tile, distribution  of its plan, as in `flashtile.starpu_mpi.part`.
             order     in which a rank sends: "needed", what receivers meet first, as the engine does; or "posted",
                       rank by rank, keys before values.
             exchange  ranks that first exchange heads (Ulysses): each then has all rows of the group and
                       1 / exchange of the heads, and tiles travel between groups only, as with the engine's option.
             workers   of each rank. bandwidth, latency  of a rank's link: bytes a second in each direction, seconds.
             message   seconds that a message holds a link beside its bytes.
             share     how much longer tasks take while tiles travel (0.05: 5%), where workers share their CPUs with
                       the thread that moves them. start  seconds of a call beside its tasks: to compare and plan it.
                       `flashtile.calibration.calibrate` measures latency, bandwidth, message, share and start of two
                       ranks on this machine.
             rate      FLOP/s of a worker, for a machine that is not there; None: tasks are measured here, at once.
             busy      threads that compute while a task is measured, for cores that share caches, memory or clock;
                       None: as many as a rank has workers.
    Returns: Simulation.
    Raises:  SpecError; UnavailableError for what the CPU kernels cannot do.
    Numerics: a link sends and receives one message at a time, in order; the switch between links is ideal. Workers
              take ready tasks by what is left of their chains, in the backward as they are submitted; a task costs
              10 us beside its kernel. Tasks of delta, and those that cast gradients, cost nothing but that.
    """
    spec = spec_of(batch, heads, kv_heads, length, head_size, dtype, causal, window)
    check_flag("backward", backward)
    counts = {"ranks": ranks, "tile": tile, "exchange": exchange, "workers": workers}
    numbers = {"bandwidth": bandwidth, "latency": latency, "message": message, "share": share, "start": start}
    numbers["rate"] = 1.0 if rate is None else rate
    _check({**counts, "busy": 1 if busy is None else busy}, numbers, order)
    tiles_of(0, 0, 1, 1, distribution)
    busy = workers if busy is None else busy
    call = _Call(ranks, exchange, workers, busy, order, rate, backward, share, start)
    return call.simulated(spec, tile, distribution, Network(latency, bandwidth, message))


class _Call(NamedTuple):
    """How a call runs; as the options of simulate."""

    ranks: int
    exchange: int
    workers: int
    busy: int
    order: str
    rate: float | None
    backward: bool
    share: float
    start: float

    def simulated(self, spec: AttentionSpec, tile: int, distribution: str, network: Network) -> Simulation:
        """Of a spec of all heads. Raises: SpecError for an exchange that ranks or heads do not allow."""
        length, share = spec.q_len, self.exchange
        for name, n in {"ranks": self.ranks, "heads": spec.heads, "kv_heads": spec.kv_heads}.items():
            if n % share:
                raise wrong(name, n, f"a multiple of exchange = {share}")
        spec = replace(spec, heads=spec.heads // share, kv_heads=spec.kv_heads // share)
        plan = Plan(spec, self.ranks // share, tile, distribution)
        found = (_backward if self.backward else _forward)(plan, network, self)
        moved, moving = _exchange(spec, self.ranks, share, network)
        if self.backward:  # q, k, v, o and do, and gradients back
            moved, moving = 2 * moved, 2 * moving
        end = float(found.times.end.max(initial=0))
        return Simulation(
            ranks=self.ranks,
            length=length,
            tile=tile,
            workers=self.workers,
            seconds=self.start + end + moving,
            ideal=found.ideal / (plan.ranks * self.workers),
            tasks=np.repeat(found.tasks, share),
            received_bytes=np.repeat(found.received_bytes, share),
            sent_bytes=np.repeat(found.sent_bytes, share),
            exchange_seconds=moving,
            exchange_bytes=moved,
            waited=end - float(found.free.max(initial=0)),
            costs=found.costs,
        )


class _Run(NamedTuple):
    """What came of a plan: times, and those on a network that takes no time; seconds of all tasks, none done twice."""

    times: schedule.Times
    free: np.ndarray
    ideal: float
    tasks: np.ndarray
    received_bytes: np.ndarray
    sent_bytes: np.ndarray
    costs: str


def _forward(plan: Plan, network: Network, call: _Call) -> _Run:
    seconds, costs = seconds_of(plan, call.rate, call.busy)
    (arrived,) = arrivals([plan.traffic], network, call.order)
    times = schedule.run(plan, seconds, arrived, call.workers, TASK_SECONDS, call.share)
    free = times.busy  # one worker whose tiles are all there never waits
    if call.workers > 1 or call.share:
        free = schedule.run(plan, seconds, np.zeros_like(arrived), call.workers, TASK_SECONDS).end
    ideal = float(seconds.sum()) * plan.heads
    return _Run(times, free, ideal, plan.tasks, plan.received_bytes, plan.sent_bytes, costs)


def _backward(plan: Plan, network: Network, call: _Call) -> _Run:
    both = backwards.BackwardPlan(plan)
    seconds, costs = seconds_of_backward(both, call.rate, call.busy)
    (rows,) = arrivals([both.traffic], network, call.order)
    times = backwards.run(both, seconds, rows, call.workers, TASK_SECONDS, network, call.share)
    free = backwards.run(both, seconds, np.zeros_like(rows), call.workers, TASK_SECONDS, Network(0.0, math.inf)).end
    ideal = float(seconds.sum()) * plan.heads
    return _Run(times, free, ideal, both.tasks, both.received_bytes, both.sent_bytes, costs)


def _check(counts: dict[str, Any], numbers: dict[str, Any], order: Any) -> None:
    """Raise SpecError for what is no count, no number above 0, no order."""
    for name, n in counts.items():
        if integer(n) is None or n < 1:
            raise wrong(name, repr(n), "a positive integer")
    for name, x in numbers.items():
        if not isinstance(x, (int, float)) or not math.isfinite(x) or x < 0 or (x == 0 and name not in FREE):
            raise wrong(name, repr(x), "a finite number above 0")
    if order not in (POSTED, NEEDED):
        raise wrong("order", repr(order), f"{POSTED!r} or {NEEDED!r}")


def spec_of(
    batch: Any, heads: Any, kv_heads: Any, length: Any, head_size: Any, dtype: Any, causal: Any, window: Any
) -> AttentionSpec:
    check_flag("causal", causal)
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads or heads, "length": length, "head_size": head_size}
    for name, n in sizes.items():
        if integer(n) is None or n < 1:
            raise wrong(name, repr(n), "a positive integer")
    q = SimpleNamespace(shape=(batch, heads, length, head_size), dtype=dtype)
    k = SimpleNamespace(shape=(batch, kv_heads or heads, length, head_size), dtype=dtype)
    return Options(causal, window, None, None, "ieee", "cpu", "starpu").spec(q, k, k)


def _exchange(spec: AttentionSpec, ranks: int, exchange: int, network: Network) -> tuple[int, float]:
    """(bytes that a rank receives, seconds) of an exchange of heads among so many ranks, and of the outputs back."""
    if exchange == 1:
        return 0, 0.0
    rows = -(-spec.q_len // ranks) * spec.batch * exchange  # of the group; the heads are those that a rank then has
    columns = spec.heads * (spec.head_size + spec.value_size) + spec.kv_heads * (spec.head_size + spec.value_size)
    nbytes = rows * columns * DTYPES[spec.dtype].itemsize * (exchange - 1) // exchange
    return nbytes, nbytes / network.bandwidth + 2 * (exchange - 1) * network.latency


def _bytes(n: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.4g} {unit}"
    return f"{n} bytes"


def plot(path: Any, curves: dict[str, list[Simulation]], title: str) -> None:
    """Draw efficiency over ranks, a curve for each name, and write it as a PNG. Raises: UnavailableError, OSError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as cause:
        raise UnavailableError(f"plot: got {cause}, expected matplotlib: pip install matplotlib") from cause
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, found), mark in zip(curves.items(), "os^vDx*" * len(curves), strict=False):
        axes.plot([x.ranks for x in found], [100 * x.efficiency for x in found], marker=mark, markersize=4, label=name)
    axes.axhline(90, color="#888888", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="ranks", ylabel="efficiency, %", ylim=(0, 103), title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=120)
