"""Attention of one sequence over several ranks, each with its own rows in a file of its own.

$ flashtile mpi run -n 4 examples/several_ranks.py

The same bits come out on any number of ranks; started without mpirun, it runs on one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from mpi4py import MPI

import flashtile
from flashtile import starpu_mpi

comm = MPI.COMM_WORLD
length, heads, kv_heads, size = 8000, 2, 1, 64
folder = Path(comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None))

# Whoever made the sequence has left a rank's rows of q, k and v in its file; here each rank makes its own.
rows = starpu_mpi.part(length, comm.rank, comm.size)
rng = np.random.default_rng(0)
whole = [rng.standard_normal((1, h, length, size), dtype=np.float32) for h in (heads, kv_heads, kv_heads)]
np.savez(folder / f"rank{comm.rank}.npz", **{name: x[:, :, rows] for name, x in zip("qkv", whole, strict=True)})

with np.load(folder / f"rank{comm.rank}.npz") as mine:
    o = starpu_mpi.attention(*(mine[name] for name in "qkv"), causal=True, window=(1500, 0))
np.save(folder / f"o{comm.rank}.npy", o)

expected = flashtile.attention(*whole, causal=True, window=(1500, 0))[:, :, rows]
error = comm.allreduce(float(np.abs(o - expected).max(initial=0)), MPI.MAX)
if comm.rank == 0:
    print(f"{comm.size} ranks, {length} tokens, {len(rows)} of them on rank 0: largest difference {error:.1e}")
assert error < 1e-5
