"""Computes cases on its ranks; rank 0 writes o, lse and gradients of the whole: rank_compute.py OUT.npz NAMES..."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from mpi4py import MPI
from rank_cases import QKV, cases

from flashtile import starpu_mpi

comm = MPI.COMM_WORLD
results: dict[str, Any] = {}


def gather(name: str, x: np.ndarray, length: int, cut: dict[str, Any]) -> None:
    """Put the rows of all ranks together."""
    every = comm.gather(x)
    if every is None:
        return
    whole = np.empty((*x.shape[:2], length, *x.shape[3:]), x.dtype)
    for rank, part in enumerate(every):
        whole[:, :, starpu_mpi.part(length, rank, comm.size, **cut)] = part
    results[name] = whole.view(np.uint16) if whole.dtype.name == "bfloat16" else whole


every_case = cases()
for name in sys.argv[2:]:
    case = every_case[name]
    arrays, options, cut = case.arrays, case.options, case.cut
    lengths = [x.shape[2] for x in arrays]
    parts = [starpu_mpi.part(n, comm.rank, comm.size, **cut) for n in lengths]
    mine = [x[:, :, part] for x, part in zip(arrays, parts, strict=True)]
    if "bias" in options:  # by rows, as q
        options = {**options, "bias": np.ascontiguousarray(options["bias"][..., parts[0], :])}
    o, lse = starpu_mpi.attention(*mine, return_lse=True, **options, **cut)
    gather(f"{name}: o", o, lengths[0], cut)
    gather(f"{name}: lse", lse, lengths[0], cut)
    exchanged = comm.size > 1 and name in ("causal", "float16", "sinks, softcap, ALiBi")
    if exchanged:  # rows for heads first: the same bits
        again = starpu_mpi.attention(*mine, return_lse=True, exchange=2, **options, **cut)
        assert again[0].tobytes() == o.tobytes() and again[1].tobytes() == lse.tobytes(), name
    if not case.wrt:
        continue
    found = starpu_mpi.attention_backward(case.do[:, :, parts[0]], *mine, o, lse, wrt=case.wrt, **options, **cut)
    if exchanged and case.wrt == QKV:
        given = case.do[:, :, parts[0]], *mine, o, lse
        again = starpu_mpi.attention_backward(*given, exchange=2, **options, **cut)
        assert all(getattr(again, n).tobytes() == getattr(found, n).tobytes() for n in "qkv"), name
    for which, length in zip("qkv", lengths, strict=True):
        if getattr(found, which) is not None:
            gather(f"{name}: d{which}", getattr(found, which), length, cut)
    if found.bias is not None:
        gather(f"{name}: bias", found.bias, lengths[0], cut)
    whole = {n: getattr(found, n) for n in ("sinks", "alibi_slopes")}
    whole |= {f"captured {n}": x for n, x in enumerate((found.captured or {}).values())}
    for which, x in whole.items():
        if x is not None:
            every = comm.allgather(x.tobytes())
            assert all(other == every[0] for other in every), which
            results[f"{name}: {which}"] = x
if comm.rank == 0:
    np.savez(sys.argv[1], **results)
