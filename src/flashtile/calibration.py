"""What two ranks of this machine pay for messages, measured: `flashtile starpu simulate --calibrate`.

This module is also the program that measures, on both ranks: calibration.py JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import numpy as np

from flashtile import launch
from flashtile.dtypes import DTYPES
from flashtile.errors import KernelError

__all__ = ["Calibration", "calibrate"]
__dir__ = __all__.copy  # the public names, and not what stands beside them

ROUNDS = 4
MESSAGES = 20
BURST = 32  # messages at once
FEW_ROWS = 16  # of a small tile
PAUSE_SECONDS = 5e-3
WORD = "calibrated "


class Calibration(NamedTuple):
    """Of two ranks: keyword arguments of `flashtile.scaling.simulate`, in its units."""

    latency: float
    bandwidth: float
    message: float
    share: float
    start: float

    def __str__(self) -> str:
        return (
            f"a message {1e6 * self.latency:.0f} us, in a row {1e6 * self.message:.0f} us and "
            f"{self.bandwidth / 1e9:.2f} GB/s, beside busy workers; tasks take {100 * self.share:.1f}% longer while "
            f"tiles travel; {1e3 * self.start:.1f} ms of a call beside its tasks"
        )


def calibrate(head_size: int = 128, dtype: str = "float32", tile: int = 960, workers: int = 1) -> Calibration:
    """Measure, on two ranks of so many workers, with tiles of such calls. Raises: UnavailableError, KernelError."""
    launch.require()
    environment = launch.environment(2) | {"STARPU_NCPU": str(workers), "FLASHTILE_NUM_THREADS": str(workers)}
    call = json.dumps({"head_size": head_size, "dtype": dtype, "tile": tile, "workers": workers})
    done = subprocess.run([*launch.command(2), __file__, call], env=environment, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(WORD)]
    if done.returncode or not found:
        raise KernelError(f"calibrate: 2 ranks: {done.stdout.strip()} {' '.join(done.stderr.split())[-400:]}")
    return Calibration(**json.loads(found[0].removeprefix(WORD)))


class _Ranks:
    """This rank's part of the measurements."""

    def __init__(self, head_size: int, dtype: str, tile: int, workers: int) -> None:
        from mpi4py import MPI

        from flashtile import scaling
        from flashtile.engines.starpu_mpi.simulation.backward import BackwardPlan
        from flashtile.engines.starpu_mpi.simulation.plan import Plan

        self.comm, self.tile, self.workers = MPI.COMM_WORLD, tile, workers
        self.head_size, self.dtype = head_size, dtype
        spec = scaling.spec_of(1, 2, 2, 8 * tile, head_size, dtype, True, None)
        self.plan = BackwardPlan(Plan(spec, 2, tile, "zigzag"))

    def call(self, tile: int, window: tuple[int, int]) -> Any:
        """A backward of eight tiles, ready to run."""
        from flashtile import starpu_mpi

        rows = len(starpu_mpi.part(8 * tile, self.comm.Get_rank(), 2, tile=tile))
        x = np.random.default_rng(0).standard_normal((1, 2, rows, self.head_size), np.float32)
        x = x.astype(DTYPES[self.dtype].numpy)
        options: Any = {"window": window, "tile": tile}
        o, lse = starpu_mpi.attention(x, x, x, return_lse=True, **options)
        return lambda: starpu_mpi.attention_backward(x, x, x, o, o, lse, **options)

    def start(self) -> float:
        """Seconds of a call whose tasks take next to nothing, and wait for no tiles."""
        call, times = self.call(96, (0, 0)), []
        call()
        for _ in range(2 * ROUNDS):
            self.comm.Barrier()
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        return float(np.median(times))

    def share(self) -> float:
        """How much longer tasks of a call take than their kernels alone."""
        from flashtile import starpu
        from flashtile.engines.starpu_mpi.simulation.costs import seconds_of_backward

        call, ratios = self.call(self.tile, (-1, 0)), []
        call()
        for _ in range(ROUNDS):
            alone = 0.0
            if self.comm.Get_rank() == 0:
                alone = 2 * float(seconds_of_backward(self.plan, None, self.workers, models=False)[0].sum())
            self.comm.Barrier()
            with starpu.profile() as seen:
                call()
            took = sum(x.end - x.start for x in seen.tasks if "backward" in x.codelet)
            ratios.append(self.comm.allreduce(took) / self.comm.allreduce(alone))
        return max(0.0, float(np.median(ratios)) - 1)

    def messages(self) -> tuple[float, float, float]:
        """(latency, bandwidth, seconds that a message adds), beside as many busy threads as there are workers."""
        from flashtile.engines.starpu_mpi.simulation.costs import compute

        stop = threading.Event()
        threads = [threading.Thread(target=compute, args=(self.plan, stop)) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        try:
            one = self._crossing(1, FEW_ROWS)
            small, large = (self._crossing(BURST, rows) for rows in (FEW_ROWS, self.tile))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        more = BURST * (self.tile - FEW_ROWS) * self.head_size * DTYPES[self.dtype].itemsize
        # Of few bytes the pauses between polls hide what they take: then as if all of the time had gone to them.
        seconds = large - small if large > small else large
        return one, more / seconds, max(0.0, small - one) / (BURST - 1)

    def _crossing(self, tiles: int, rows: int) -> float:
        """Seconds until so many tiles that are sent together are there: the median. They are sent after a pause, as
        those of a call are, whose tasks take milliseconds."""
        from flashtile.engines.starpu import runtime
        from flashtile.engines.starpu.tiles import DROP, TiledTensor
        from flashtile.engines.starpu_mpi.link import Link

        link, rank, times = runtime.current().once(Link), self.comm.Get_rank(), []
        x = np.zeros((1, tiles, rows, self.head_size), DTYPES[self.dtype].numpy)
        for _ in range(MESSAGES):
            tensor = TiledTensor(x.shape, DTYPES[self.dtype], rows, address=x.ctypes.data, strides=x.strides, keep=x)
            handles, other, tags = tensor.handles.ravel(), np.full(tiles, 1 - rank), link.take_tags(tiles)
            if rank == 1:
                link.receive(self.comm, handles, other, tags)
            self.comm.Barrier()
            time.sleep(PAUSE_SECONDS)
            sent = time.monotonic()
            if rank == 0:
                link.send(self.comm, handles, other, tags)
            link.wait()
            times.append(link.last_event() - self.comm.bcast(sent))  # ranks of one machine have one clock
            tensor.unregister(DROP if tensor.owned else None)
        return float(self.comm.bcast(np.median(times), root=1))


def main(call: str) -> None:
    """Measure, and print what was found on the first rank."""
    ranks = _Ranks(**json.loads(call))
    start, share = ranks.start(), ranks.share()
    found = Calibration(*ranks.messages(), share, ranks.comm.allreduce(start) / 2)
    if ranks.comm.Get_rank() == 0:
        print(WORD + json.dumps(found._asdict()))


if __name__ == "__main__":
    main(sys.argv[1])
