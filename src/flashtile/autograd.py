"""Autograd of the PyTorch door: a call on tensors that require grad, and its first-order backward.

What the backward reads are torch's own saved tensors, so that hooks on them, checks of their versions and
checkpointing work as they do elsewhere; beside them it keeps the traced program, o, lse and dropout's seed, and nothing
of size S_q x S_kv.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from flashtile import kernels
from flashtile.calls import as_name, run_backward
from flashtile.dtypes import DTYPES, round_to_bf16, widen_bits
from flashtile.errors import UnavailableError
from flashtile.gradients import array_sum, slots_of
from flashtile.kernels.gradients import Inputs
from flashtile.score.capture import ArrayCapture, capture
from flashtile.score.options import Scoring, sinks_of
from flashtile.spec import AttentionSpec

Tensor = torch.Tensor
Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Scored(NamedTuple):
    """What `Options.scored` says of a call: it traces functions, which happens once for both directions."""

    spec: AttentionSpec
    scoring: Scoring


def tensors_of(scoring: Scoring) -> list[Tensor]:
    """The tensors that a call's program reads, each once; whether it depends on them smoothly or not."""
    program = scoring.program
    sources = () if program is None else (x.source for x in program.captures if isinstance(x, ArrayCapture))
    return list({id(x): x for x in sources if isinstance(x, Tensor)}.values())


def attend(
    forward: Forward,
    inputs: tuple[Tensor, Tensor, Tensor],
    scored: Scored,
    sinks: Any,
    offsets: np.ndarray | None,
    kernel: Any,
) -> tuple[Tensor, Tensor]:
    """o and lse of `forward`, recorded. Raises: UnavailableError if no kernel named so has the backward."""
    spec, scoring = scored
    family = kernels.pick(spec, as_name("kernel", kernel), "backward")
    sources = tensors_of(scoring)
    places = {id(x): n for n, x in enumerate(sources)}
    captures = () if scoring.program is None else scoring.program.captures
    # The tensors themselves are left out: what the backward reads is what torch has kept of them.
    slots = tuple(
        _Saved(places[id(x.source)], x.name, x.array.shape)
        if isinstance(x, ArrayCapture) and id(x.source) in places
        else x
        for x in captures
    )
    bare = replace(scoring, program=scoring.program and replace(scoring.program, captures=()), sinks=None)
    offset: Any = offsets if spec.offset is None else spec.offset
    given: list[Any] = [sinks] if isinstance(sinks, Tensor) else []
    fixed = None if given else scoring.sinks
    call = _Call(family, spec, bare, slots, fixed, np.array(offset), len(sources))
    o, lse = _Attention.apply(forward, call, *inputs, *sources, *given)
    return o, lse


@dataclass(frozen=True)
class _Saved:
    """The place of a captured tensor among the saved ones."""

    number: int
    name: str
    shape: tuple[int, ...]  # as the program reads it


@dataclass(frozen=True, eq=False)
class _Call:
    """What the backward needs beside saved tensors."""

    family: kernels.Family
    spec: AttentionSpec
    bare: Scoring  # without captures and sinks
    slots: tuple[Any, ...]  # captures, or where they are saved
    sinks: Any  # where they did not come as a tensor
    offset: np.ndarray
    arrays: int  # tensors among the inputs that the program reads

    def scoring(self, sources: tuple[Tensor, ...]) -> Scoring:
        """The call's scoring again, of the tensors that were saved."""
        program = self.bare.program
        if program is not None:
            program = replace(
                program,
                captures=tuple(_captured(sources[x.number], x) if isinstance(x, _Saved) else x for x in self.slots),
            )
        given = sources[self.arrays :]
        sinks = sinks_of(given[0], self.spec) if given else self.sinks
        return replace(self.bare, program=program, sinks=sinks)


def _captured(tensor: Tensor, saved: _Saved) -> ArrayCapture:
    found = capture(tensor, saved.name)
    return replace(found, array=found.array.reshape(saved.shape))


class _Attention(torch.autograd.Function):
    """Inputs: what computes o and lse, a _Call, q, k, v, the tensors that its program reads, and a tensor of sinks."""

    @staticmethod
    def forward(
        ctx: Any, compute: Forward, call: _Call, q: Tensor, k: Tensor, v: Tensor, *sources: Tensor
    ) -> tuple[Tensor, Tensor]:
        o, lse = compute(q, k, v)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, o, lse, *sources)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UnavailableError(
                "create_graph: got True, expected False: derivatives of attention's gradients are not available yet"
            )
        needed = ctx.needs_input_grad[2:]
        if do is None and dlse is None:
            return (None,) * (2 + len(needed))
        q, k, v, o, lse, *sources = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        return (None, None, *_gradients(ctx.call, (do, q, k, v, o, lse, dlse), tuple(sources), needed))


def _gradients(
    call: _Call, inputs: tuple[Any, ...], sources: tuple[Tensor, ...], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients to q, k, v and the sources, None where not needed."""
    if call.family.compile_backward is not None:
        return _compiled(call, inputs, call.scoring(sources), needed)
    scoring = call.scoring(sources)
    do, q, k, v, o = (_widened(x, 4) for x in inputs[:5])
    lse, dlse = (None if x is None else _widened(x, 3) for x in inputs[5:])
    assert lse is not None
    wanted: set[str | int] = {name for name, asked in zip("qkv", needed, strict=False) if asked}
    for source, asked in zip(sources[: call.arrays], needed[3:], strict=False):
        wanted |= slots_of(scoring, source) if asked else set()
    if any(needed[3 + call.arrays :]):
        wanted.add("sinks")
    offset: Any = call.offset if call.offset.ndim else int(call.offset)
    backward = call.family.backward
    assert backward is not None  # it was picked for it
    sums = backward(call.spec, Inputs(do, q, k, v, o, lse, dlse), offset, scoring, frozenset(wanted))
    values: list[Any] = [sums.q, sums.k, sums.v]
    for n, source in enumerate(sources):
        if not needed[3 + n]:
            values.append(None)
        elif n < call.arrays:
            values.append(array_sum(sums, source, scoring))
        else:
            assert sums.sinks is not None
            values.append(sums.sinks.sum(axis=0) if source.ndim == 1 else sums.sinks)
    targets = (*inputs[1:4], *sources)
    return [_tensor(x, like) if asked else None for x, like, asked in zip(values, targets, needed, strict=True)]


def _compiled(call: _Call, inputs: tuple[Any, ...], scoring: Scoring, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradients of a family that compiles its backward, of tensors as they lie."""
    names = ("do", "q", "k", "v", "o", "lse", "dlse")
    arrays = {name: x.detach().resolve_neg() for name, x in zip(names, inputs, strict=True) if x is not None}
    arrays |= {name: arrays[name].contiguous() for name in ("lse", "dlse") if name in arrays}
    results = [torch.zeros_like(arrays[x]) if asked else None for x, asked in zip("qkv", needed, strict=False)]
    arrays |= {f"d{x}": result for x, result in zip("qkv", results, strict=True) if result is not None}
    run_backward(call.spec, call.family, "auto", arrays, _address, call.offset, scoring)
    return results + [None] * (len(needed) - 3)


def _address(x: Tensor) -> int:
    try:
        return x.data_ptr()
    except RuntimeError as cause:  # is_grads_batched runs the backward under vmap
        raise UnavailableError("a gradient: got a Tensor without memory, expected one in memory") from cause


def _widened(x: Tensor, rank: int) -> np.ndarray:
    """A tensor's values with as many axes, where they lie but for bfloat16, which NumPy has no arithmetic for."""
    try:
        x = x.detach().resolve_neg()
        values = widen_bits(x.view(torch.int16).numpy().view(np.uint16)) if x.dtype is torch.bfloat16 else x.numpy()
    except RuntimeError as cause:  # is_grads_batched runs the backward under vmap
        raise UnavailableError("a gradient: got a Tensor without memory, expected one in memory") from cause
    return values[(None,) * (rank - values.ndim)]


def _tensor(value: np.ndarray, like: Tensor) -> Tensor:
    """Sums as a new tensor of this one's shape and dtype; what the dtype cannot hold is an infinity there."""
    value = np.asarray(value).reshape(tuple(like.shape))
    with np.errstate(over="ignore", invalid="ignore"):
        if like.dtype is torch.bfloat16:
            bits = np.asarray(round_to_bf16(value)).astype(np.uint16)
            return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        name = str(like.dtype).removeprefix("torch.")
        return torch.from_numpy(np.array(value, DTYPES[name].numpy, order="C"))
