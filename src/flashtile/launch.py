"""`flashtile mpi`: programs on several ranks of this machine, and the mpirun command and environment for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flashtile.engines.starpu_mpi import build
from flashtile.errors import KernelError, UnavailableError, wrong
from flashtile.threads import get_num_threads

_CHECK = """
import numpy as np
from mpi4py import MPI
from flashtile import starpu_mpi
from flashtile.testing import assert_accurate

comm = MPI.COMM_WORLD
x = np.random.default_rng(0).standard_normal((1, 2, 400, 16)).astype(np.float32)
rows = starpu_mpi.part(400, comm.rank, comm.size, tile=96)
o = starpu_mpi.attention(*[np.ascontiguousarray(x[:, :, rows])] * 3, causal=True, tile=96)
parts = comm.gather((rows, o))
if parts is not None:
    whole = np.empty_like(x)
    for rows, o in parts:
        whole[:, :, rows] = o
    assert_accurate(whole, x, x, x, causal=True)
    print("ok", MPI.Get_library_version().partition(",")[0], sep=", ")
"""


def command(ranks: int) -> list[str]:
    """mpirun with the interpreter of this process; the program and its arguments follow. An exception that leaves the
    program on one rank ends all of them (mpi4py's own runner)."""
    options = ["--oversubscribe", "--bind-to", "none"]
    return ["mpirun", "-np", str(ranks), *options, sys.executable, "-m", "mpi4py"]


def environment(ranks: int) -> dict[str, str]:
    """This process's environment, with what ranks on one machine need. What is set already stays."""
    share = max(1, get_num_threads() // ranks)
    wanted = {
        "STARPU_NCPU": str(share),
        "STARPU_MPI_NOBIND": "1",
        "STARPU_SILENT": "1",
        "FLASHTILE_NUM_THREADS": str(share),
    }
    if os.getuid() == 0:  # containers; Open MPI otherwise refuses
        wanted |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**wanted, **os.environ}


def run(ranks: int, program: list[str]) -> int:
    """Start a program on ranks of this machine and wait; its exit code. Raises: SpecError, UnavailableError."""
    if ranks < 1:
        raise wrong("--ranks", ranks, "at least 1")
    if not Path(program[0]).is_file():
        raise wrong("PROGRAM", program[0], "a file that exists")
    require()
    return subprocess.run([*command(ranks), *program], env=environment(ranks)).returncode


def doctor() -> str:
    """What two ranks of this machine compute, in a line. Raises: UnavailableError, KernelError."""
    require()
    done = subprocess.run([*command(2), "-c", _CHECK], env=environment(2), capture_output=True, text=True)
    if done.returncode or not done.stdout.startswith("ok"):
        raise KernelError(f"mpi: 2 ranks: {done.stdout.strip()} {' '.join(done.stderr.split())[-400:]}")
    return f"mpi: 2 ranks: {done.stdout.strip()}, {build.package()}"


def require() -> None:
    """Build what is not built. Raises: UnavailableError with what is missing."""
    if (reason := build.missing()) is not None:
        raise UnavailableError(f"mpi: {reason}")
    build.build()  # once, rather than by every rank
