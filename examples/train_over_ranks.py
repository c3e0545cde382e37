"""A training step over several ranks, each with a part of one sequence, under PyTorch; torch.distributed is not needed.

$ flashtile mpi run -n 4 examples/train_over_ranks.py

A layer of attention learns the mean of the tokens so far. Gradients of its weights are summed over ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from flashtile import starpu_mpi

comm = MPI.COMM_WORLD
length, heads, size, tile = 1536, 2, 16, 96
torch.set_num_threads(1)


class OverRanks(torch.autograd.Function):
    """Causal attention of the whole sequence on this rank's rows."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        arrays = [x.detach().numpy() for x in (q, k, v)]
        o, lse = starpu_mpi.attention(*arrays, causal=True, return_lse=True, tile=tile)
        ctx.save_for_backward(q, k, v, torch.from_numpy(o), torch.from_numpy(lse))
        return torch.from_numpy(o)

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> Any:
        saved = [x.detach().numpy() for x in ctx.saved_tensors]
        g = starpu_mpi.attention_backward(do.contiguous().numpy(), *saved, causal=True, tile=tile)
        return torch.from_numpy(g.q), torch.from_numpy(g.k), torch.from_numpy(g.v)


rows = starpu_mpi.part(length, comm.rank, comm.size, tile=tile)
rng = np.random.default_rng(0)
tokens = rng.standard_normal((length, heads * size), dtype=np.float32)
target = np.cumsum(tokens, axis=0) / np.arange(1, length + 1, dtype=np.float32)[:, None]  # the mean so far
mine, wanted = (torch.from_numpy(x[rows]) for x in (tokens, target))

torch.manual_seed(0)  # every rank has the same weights
layer = torch.nn.Linear(heads * size, 3 * heads * size)
optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
losses = []
for _ in range(12):
    q, k, v = layer(mine).view(1, len(rows), 3 * heads, size).transpose(1, 2).split(heads, dim=1)
    o = OverRanks.apply(q, k, v).transpose(1, 2).reshape(len(rows), -1)
    loss = (o - wanted).square().sum() / target.size
    optimizer.zero_grad()
    loss.backward()
    for parameter in layer.parameters():
        comm.Allreduce(MPI.IN_PLACE, parameter.grad.numpy(), MPI.SUM)
    optimizer.step()
    losses.append(comm.allreduce(loss.item()))
if comm.rank == 0:
    print(f"{comm.size} ranks, {length} tokens: the loss fell from {losses[0]:.4f} to {losses[-1]:.4f}")
assert losses[-1] < losses[0] / 2
