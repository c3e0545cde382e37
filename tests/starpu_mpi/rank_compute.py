"""Computes every case on its ranks; rank 0 writes o and lse of the whole: rank_compute.py OUT.npz."""

from __future__ import annotations

import sys

import numpy as np
from mpi4py import MPI
from rank_cases import cases

from flashtile import starpu_mpi

comm = MPI.COMM_WORLD
results = {}
for name, (arrays, options, cut) in cases().items():
    lengths = [x.shape[2] for x in arrays]
    mine = [x[:, :, starpu_mpi.part(n, comm.rank, comm.size, **cut)] for x, n in zip(arrays, lengths, strict=True)]
    o, lse = starpu_mpi.attention(*mine, return_lse=True, **options, **cut)
    every = comm.gather((o, lse))
    if every is None:
        continue
    for what, index in (("o", 0), ("lse", 1)):
        first = every[0][index]
        whole = np.empty((*first.shape[:2], lengths[0], *first.shape[3:]), first.dtype)
        for rank, parts in enumerate(every):
            whole[:, :, starpu_mpi.part(lengths[0], rank, comm.size, **cut)] = parts[index]
        results[f"{name}: {what}"] = whole.view(np.uint16) if whole.dtype.name == "bfloat16" else whole
if comm.rank == 0:
    np.savez(sys.argv[1], **results)
