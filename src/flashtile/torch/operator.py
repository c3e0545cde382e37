"""The dispatcher's operator: attention as autograd, `torch.compile`, transforms of torch.func and modes see it.

`flashtile::attention` and `flashtile::attention_backward` take the options of a call in a schema (`arguments`). Each
has a kernel for the CPU, one for its autograd, one for fake tensors, a rule for vmap; the first also one for autocast.
What they save are torch's own saved tensors, so hooks on them, checks of their versions and checkpointing work as they
do elsewhere; beside tensors a call keeps texts and numbers alone, and nothing of size S_q x S_kv.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch.autograd import forward_ad
from torch.autograd.function import Function

from flashtile import calls
from flashtile.calls import Request, Scored
from flashtile.errors import UnavailableError
from flashtile.score.options import ScoreOptions
from flashtile.torch.arguments import SCHEMA, Arguments, arguments_of
from flashtile.torch.dispatch import LIBRARY, apply, below, is_recorded, register, unpacked, without_tangents
from flashtile.torch.eager import TENSORS, attend_on_gpu, check_scores, traced_on_gpu
from flashtile.torch.gradients import gradients
from flashtile.torch.second import HVP, JVP
from flashtile.torch.tensors import READY, check_untraced, in_forward_mode, is_watched, kind_of, under_autocast

Tensor = torch.Tensor

LIBRARY.define(f"attention(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor o, Tensor lse)")
LIBRARY.define(
    "attention_backward(Tensor? do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, bool[] wanted, "
    f"{SCHEMA}) -> Tensor[]"
)
ATTENTION = torch.ops.flashtile.attention.default
BACKWARD = torch.ops.flashtile.attention_backward.default

# Reports of progress are no argument that a schema knows.
_progress: ContextVar[Any] = ContextVar("flashtile_torch_progress", default=None)


@contextlib.contextmanager
def reporting(progress: Any) -> Iterator[None]:
    """Within it, the operator reports its progress."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


def draw() -> Tensor:
    """A seed of torch's generator, as a tensor of no axes."""
    return torch.randint((1 << 63) - 1, (), dtype=torch.int64, device="cpu")


def attend(
    q: Tensor, k: Tensor, v: Tensor, request: Request, watched: bool, return_lse: bool, progress: Any = None
) -> Any:
    """o, or (o, lse), of an eager call whose gradients are recorded, or that transforms and modes of torch must see
    (`watched`): the operator, past a dispatcher that has nothing to add. Raises: as `arguments_of`."""
    scores = request.scores
    if scores is not None:
        check_scores(scores)
    alone = request.offsets is progress is None and not (watched or return_lse)
    if alone and request.options.kernel == "auto" and q.is_cpu and (scores is None or _is_read_alone(scores)):
        return _apply_alone(request, q, k, v)  # no transform is active
    given = arguments_of(q, k, v, request)
    with reporting(progress):
        found = ATTENTION(q, k, v, *given) if watched else _record(_unwatched, q, k, v, given)
    return found if return_lse else found[0]


def _unwatched(q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    if q.is_cpu:
        return calls.attend(TENSORS, q, k, v, a.request, True, _progress.get())
    return attend_on_gpu(q, k, v, a.request, True, _progress.get(), None)


def _scored(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Scored:
    if q.is_cpu:
        return calls.scored(TENSORS, q, k, v, request)
    return traced_on_gpu(q, k, v, request).scores  # type: ignore[return-value]  # they are traced


# -- on a device ----------------------------------------------------------------------------------------


def _compute(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _unwatched(q, k, v, Arguments(*rest))


def _compute_backward(
    do: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    wanted: list[bool],
    *rest: Any,
) -> list[Tensor]:
    """Gradients of q, k, v and `Arguments.differentiable`, of those alone that are wanted."""
    a = Arguments(*rest)
    do = torch.zeros_like(o) if do is None else do
    found = None if any(wanted[3:]) else _of_qkv(do, dlse, (q, k, v, o, lse), a.request, wanted[:3])
    if found is not None:
        return [x for x in found if x is not None]
    if a.captured or not (a.sinks is a.bias is a.alibi_slopes is None):
        # A tensor that came in two places is two here, since gradients are found by identity.
        a = a.filled(a.others, [None if x is None else x.detach() for x in a.differentiable])
    request = a.request
    spec, scoring = _scored(q, k, v, request)
    family = calls.family_of(spec, a.family, "backward")
    inputs = do, q, k, v, o, lse, dlse
    call = family, spec, scoring, request.offset(spec)
    return gradients(*call, inputs, a.differentiable, tuple(wanted), a.engine)


def _of_qkv(
    do: Tensor, dlse: Tensor | None, tensors: Sequence[Tensor], request: Request, needed: Sequence[bool]
) -> list[Tensor | None] | None:
    """Gradients of q, k and v alone, soon done where a call is small; None where something must be looked at closely,
    or no compiled kernel has them. tensors: q, k, v, o, lse."""
    kind = kind_of(do, *tensors) if dlse is None else kind_of(do, dlse, *tensors)
    if kind != READY or torch._C._functorch.is_legacy_batchedtensor(do):
        return None
    q, k, v, o, lse = tensors
    if request.scores is not None:
        request = calls.traced(TENSORS, q, k, v, request)
    inputs = do, q, k, v, o, lse.contiguous(), None if dlse is None else dlse.contiguous()
    return calls.differentiate(TENSORS, inputs, request, tuple(needed))


# -- as graphs are made ----------------------------------------------------------------------------------


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    accumulator = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=accumulator)


def _fake_backward(
    do: Any, dlse: Any, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, wanted: list[bool], *rest: Any
) -> list[Tensor]:
    sources = (q, k, v, *Arguments(*rest).differentiable)
    return [x.new_empty(x.shape) for x, asked in zip(sources, wanted, strict=True) if asked]


# -- autograd --------------------------------------------------------------------------------------------


_attention_below, _backward_below = below(ATTENTION), below(BACKWARD)


def _autograd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*rest)
    primals, tangents = unpacked((q, k, v, *a.differentiable))
    if any(t is not None for t in tangents):
        o, lse = without_tangents(_any_way, q, k, v, a)
        still = a.filled(a.others, primals[3:])
        moving = JVP(*primals[:3], o, lse, tangents, *still)
        return tuple(map(forward_ad.make_dual, (o, lse), moving))
    return _any_way(q, k, v, a)


def _any_way(q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    """The operator beneath this level of autograd, recorded where that is asked for."""
    if is_recorded(q, k, v, *a):
        return _record(lambda q, k, v, a: _attention_below(q, k, v, *a), q, k, v, a)
    return _attention_below(q, k, v, *a)


def _record(run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    """o and lse of `run`, with a backward. Raises: UnavailableError if no kernel named so has it."""
    check_untraced()
    if a.family != "auto" or not q.is_cpu:  # a GPU's kernels may not have a backward
        calls.family_of(_scored(q, k, v, a.request).spec, a.family, "backward")
    return apply(_Attention, run, a, q, k, v, *a.differentiable)


class _Attention(Function):
    """Inputs: what computes o and lse, the arguments, q, k, v, and of the arguments those that have gradients."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], a: Arguments, q: Tensor, k: Tensor, v: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        o, lse = run(q, k, v, a)
        ctx.arguments = a.filled()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, o, lse, *a.others, *rest)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        if do is dlse is None:
            return (None,) * (2 + len(needed))
        saved = ctx.saved_tensors
        a = ctx.arguments.filled(saved[5:8], saved[8:])
        return None, None, *_differentiate(do, dlse, saved[:5], needed, a)


class _Alone(Function):
    """o alone, of a call of whose options no gradient is recorded: half of a small call is the way to it, which each
    further input and output makes longer. Inputs: the call, q, k, v."""

    @staticmethod
    def forward(ctx: Any, request: Request, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = calls.attend(TENSORS, q, k, v, request, True)
        read: tuple[Any, ...] = ()
        if request.scores is not None:
            read = _read_by(request.scores)
            request = _reading(request, None, None, None, None)
        ctx.request = request
        ctx.save_for_backward(q, k, v, o, lse, *read)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        tensors, request = saved[:5], ctx.request
        if request.scores is not None:
            request = _reading(request, *saved[5:])
        found = _of_qkv(do, None, tensors, request, needed)
        if found is not None:
            return None, *found
        q, k, v = tensors[:3]
        return None, *_differentiate(do, None, tensors, needed, arguments_of(q, k, v, request))


_apply_alone = super(Function, _Alone).apply


def _is_read_alone(scores: Any) -> bool:
    """Whether what changes scores is tensors of which no gradient is recorded, and numbers."""
    tensors = all(x is None or type(x) is Tensor and not x.requires_grad for x in _read_by(scores))
    return tensors and scores.score_mod is None


def _read_by(scores: Any) -> tuple[Any, ...]:
    """What may be tensors among the options that change scores, but for what functions read."""
    return scores.mask, scores.bias, scores.alibi_slopes, scores.sinks


def _reading(
    request: Request, mask: Tensor | None, bias: Tensor | None, slopes: Tensor | None, sinks: Tensor | None
) -> Request:
    """The call with other tensors that it reads, which a graph keeps as torch's own."""
    scores = cast(ScoreOptions, request.scores)
    return request._replace(scores=ScoreOptions(mask, bias, None, scores.softcap, slopes, sinks, scores.keep))


def _differentiate(
    do: Tensor | None, dlse: Tensor | None, tensors: Sequence[Tensor], needed: Sequence[bool], a: Arguments
) -> Iterator[Tensor | None]:
    """The gradients of q, k, v and what else was an input, None where none is needed; tensors: q, k, v, o, lse."""
    given: Any = dlse if do is None else do
    if torch._C._functorch.is_legacy_batchedtensor(given):
        raise UnavailableError("is_grads_batched: got True, expected False; torch.vmap of a torch.func.vjp is there")
    wanted = [*needed, *[False] * (3 + len(a.differentiable) - len(needed))]  # of those that were no inputs
    run = BACKWARD if torch.is_grad_enabled() or is_watched() or in_forward_mode() else _compute_backward
    q, k, v, o, lse = tensors
    found = iter(run(do, dlse, q, k, v, o, lse, wanted, *a))
    return (next(found) if asked else None for asked in needed)


def _autograd_backward(*args: Any) -> list[Tensor]:
    wanted, a = args[7], Arguments(*args[8:])
    (do, dlse, q, k, v, o, lse, *rest), tangents = unpacked((*args[:7], *a.differentiable))
    if any(t is not None for t in tangents):
        given = (q, k, v, o, lse), (wanted, *a.filled(a.others, rest))
        # o and lse follow from the others, and move with them.
        along = [*tangents[2:5], *tangents[7:]]
        found = without_tangents(_backward_any_way, *args)
        moving = HVP(do, dlse, q, k, v, lse, along, *given[1])[2:]
        if tangents[0] is not None or tangents[1] is not None:
            linear = BACKWARD(*tangents[:2], *given[0], *given[1])
            moving = [x + y for x, y in zip(moving, linear, strict=True)]
        return [forward_ad.make_dual(x, t) for x, t in zip(found, moving, strict=True)]
    return _backward_any_way(*args)


def _backward_any_way(*args: Any) -> list[Tensor]:
    if is_recorded(*args):
        return list(apply(_AttentionBackward, args, *args[:7], *Arguments(*args[8:]).differentiable))
    return _backward_below(*args)


class _AttentionBackward(Function):
    """The first derivatives as a function of their own; inputs: all arguments, and those that have gradients."""

    @staticmethod
    def forward(ctx: Any, args: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        a = Arguments(*args[8:])
        ctx.wanted, ctx.arguments = args[7], a.filled()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*a.others, *tensors)
        return tuple(_backward_below(*args))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *others, do, dlse, q, k, v, _, lse = ctx.saved_tensors[:10]
        rest = ctx.saved_tensors[10:]
        a = ctx.arguments.filled(others, rest)
        came = iter(grads)
        along = [next(came) if asked else None for asked in ctx.wanted]
        needed = ctx.needs_input_grad[1:]
        wanted = [*needed[2:5], *needed[7:]]
        do_moving, dlse_moving, *found = HVP(do, dlse, q, k, v, lse, along, wanted, *a)
        by = iter(found)
        inputs = [next(by) if asked else None for asked in wanted]
        # o and lse follow from q, k, v and the rest: their share is in those.
        moved = (do_moving if needed[0] else None, dlse_moving if needed[1] else None)
        return None, *moved, *inputs[:3], None, None, *inputs[3:]


# -- autocast -----------------------------------------------------------------------------------


def _autocast(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    q, k, v = under_autocast(q, k, v)
    key = torch._C.DispatchKey.AutocastCPU if q.is_cpu else torch._C.DispatchKey.AutocastCUDA
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        return ATTENTION(q, k, v, *rest)


register("attention", _compute, _autograd, _fake, _compute)
register("attention_backward", _compute_backward, _autograd_backward, _fake_backward, _compute_backward)
for _key in ("AutocastCPU", "AutocastCUDA"):
    LIBRARY.impl("attention", _autocast, _key)
