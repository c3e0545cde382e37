"""The gradients of a call on tensors, from what its forward saved to new tensors: the one place that computes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from flashtile import kernels
from flashtile.calls import INPUTS, run_backward
from flashtile.dtypes import DTYPES, round_to_bf16, widen_bits
from flashtile.gradient_problem import array_sum, slots_of
from flashtile.kernels import second
from flashtile.kernels.gradients import Inputs, Sums
from flashtile.score.capture import ArrayCapture
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec
from flashtile.torch.eager import TENSORS

Tensor = torch.Tensor


def gradients(
    family: kernels.Family,
    spec: AttentionSpec,
    scoring: Scoring,
    offset: Any,
    inputs: Sequence[Any],
    sources: Sequence[Any],
    needed: Sequence[bool],
    engine: str = "auto",
) -> list[Tensor]:
    """Gradients to q, k, v and `sources` (sinks, or None, then tensors that the program reads): those needed alone.

    inputs are do, q, k, v, o, lse, dlse (or None).
    """
    wanted = _wanted(scoring, sources, needed)
    qkv: list[Any]
    if family.compile_backward is not None:
        qkv, sums = _compiled(family, spec, scoring, offset, inputs, wanted, engine)
    else:
        assert family.backward is not None  # it was picked for it
        do, q, k, v, o = (_widened(x, 4) for x in inputs[:5])
        lse, dlse = (None if x is None else _widened(x, 3) for x in inputs[5:])
        assert lse is not None
        sums = family.backward(spec, Inputs(do, q, k, v, o, lse, dlse), offset, scoring, wanted)
        qkv = [x for x, asked in zip((sums.q, sums.k, sums.v), needed, strict=False) if asked]
    return _results(qkv, sums, inputs[1:4], sources, needed, scoring)


def second_gradients(
    spec: AttentionSpec,
    scoring: Scoring,
    offset: Any,
    inputs: Sequence[Any],
    sources: Sequence[Any],
    tangents: Sequence[Any],
    needed: Sequence[bool],
) -> list[Tensor]:
    """The tangents of o and lse, and of the gradients those that are needed; tangents are those of q, k, v, sources."""
    do, q, k, v, o = (_widened(x, 4) for x in inputs[:5])
    lse, dlse = (None if x is None else _widened(x, 3) for x in inputs[5:])
    assert lse is not None
    moving = [None if x is None else _widened(x, 4) for x in tangents[:3]]
    sinks = None if tangents[3] is None else np.broadcast_to(_widened(tangents[3], 0), (spec.batch, spec.heads))
    arrays = {}
    for source, tangent in zip(sources[1:], tangents[4:], strict=True):
        for n in slots_of(scoring, source) if tangent is not None else ():
            found = scoring.program.captures[n] if scoring.program is not None else None
            assert isinstance(found, ArrayCapture)
            arrays[n] = _widened(tangent, 0).reshape(found.array.shape)
    along = second.Tangents(moving[0], moving[1], moving[2], sinks, arrays)
    wanted = _wanted(scoring, sources, needed)
    both = second.differentiate(spec, Inputs(do, q, k, v, o, lse, dlse), offset, scoring, along, wanted)
    qkv = [x for x, asked in zip(both.sums[:3], needed, strict=False) if asked]
    results = _results(qkv, both.sums, inputs[1:4], sources, needed, scoring)
    return [_tensor(both.o, inputs[0]), _tensor(both.lse, inputs[5]), *results]


def _wanted(scoring: Scoring, sources: Sequence[Any], needed: Sequence[bool]) -> frozenset[str | int]:
    """What is needed, as a family's backward is asked."""
    named = {name for name, asked in zip(("q", "k", "v", "sinks"), needed, strict=False) if asked}
    arrays = (x for x, asked in zip(sources[1:], needed[4:], strict=True) if asked)
    return frozenset(named).union(*(slots_of(scoring, x) for x in arrays))


def _results(
    qkv: Sequence[Any],
    sums: Sums,
    inputs: Sequence[Tensor],
    sources: Sequence[Any],
    needed: Sequence[bool],
    scoring: Scoring,
) -> list[Tensor]:
    """What is needed, of q, k and v as it is and of the sources from sums, as tensors like those they belong to."""
    values = [*qkv]
    if needed[3]:
        assert sums.sinks is not None
        values.append(sums.sinks.sum(axis=0) if sources[0].ndim == 1 else sums.sinks)
    arrays = (x for x, asked in zip(sources[1:], needed[4:], strict=True) if asked)
    values += [array_sum(sums, x, scoring) for x in arrays]
    targets = (x for x, asked in zip((*inputs, *sources), needed, strict=True) if asked)
    pairs = zip(values, targets, strict=True)
    return [_like(x, like) if isinstance(x, Tensor) else _tensor(np.asarray(x), like) for x, like in pairs]


def _compiled(
    family: kernels.Family,
    spec: AttentionSpec,
    scoring: Scoring,
    offset: Any,
    inputs: Sequence[Any],
    wanted: Collection[str | int],
    engine: str,
) -> tuple[list[Tensor], Sums]:
    """The gradients of a family that compiles its backward, of tensors as they lie: of q, k and v as new tensors, those
    that are wanted alone, and the others."""
    given = {name: x for name, x in zip(INPUTS, inputs, strict=True) if x is not None}
    given |= {name: x.resolve_neg() for name, x in given.items() if x.is_neg()}
    given |= {name: given[name].contiguous() for name in ("lse", "dlse") if name in given}
    asked = [x for x in ("q", "k", "v") if x in wanted]
    results = {f"d{x}": TENSORS.zeros(given[x]) for x in asked}
    if spec.device_kind != "cpu":
        from flashtile import devices

        owner = devices.owner_of("torch")
        sums = devices.gradients(owner, family, spec, given | results, offset, scoring, wanted, engine)
        return list(results.values()), sums
    sums = run_backward(TENSORS, spec, family, engine, given | results, offset, scoring, wanted)
    return list(results.values()), sums


def _widened(x: Tensor, rank: int) -> np.ndarray:
    """A tensor's values with as many axes, where they lie but for bfloat16, which NumPy has no arithmetic for."""
    x = x.detach().resolve_neg()
    values = widen_bits(x.view(torch.int16).numpy().view(np.uint16)) if x.dtype is torch.bfloat16 else x.numpy()
    return values[(None,) * (rank - values.ndim)]


def _like(value: Tensor, like: Tensor) -> Tensor:
    """Sums of a GPU in the shape and dtype of the tensor that they belong to; gradients of q, k and v are so."""
    return value if value.dtype is like.dtype else value.to(like.dtype)


def _tensor(value: np.ndarray, like: Tensor) -> Tensor:
    """Sums as a new tensor of this one's shape and dtype; what the dtype cannot hold is an infinity there."""
    value = np.asarray(value).reshape(tuple(like.shape))
    with np.errstate(over="ignore", invalid="ignore"):
        if like.dtype is torch.bfloat16:
            bits = np.asarray(round_to_bf16(value)).astype(np.uint16)
            return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).to(like.device)
        name = str(like.dtype).removeprefix("torch.")
        return torch.from_numpy(np.require(value, DTYPES[name].numpy, ("C", "W"))).to(like.device)
