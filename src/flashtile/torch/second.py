"""Operators for forward mode and second derivatives: J t and H t of `kernels.second`, on tensors.

Tangents and what is wanted are listed as everywhere: q, k, v, then `Arguments.differentiable`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import Function

from flashtile import calls
from flashtile.torch.arguments import SCHEMA, Arguments
from flashtile.torch.dispatch import LIBRARY, apply, below, is_recorded, register, unpacked, without_tangents
from flashtile.torch.eager import TENSORS
from flashtile.torch.gradients import second_gradients
from flashtile.torch.higher import derivative, has_derivative, there

Tensor = torch.Tensor

LIBRARY.define(
    f"attention_jvp(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor?[] tangents, {SCHEMA}) "
    "-> (Tensor o, Tensor lse)"
)
LIBRARY.define(
    "attention_hvp(Tensor? do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor?[] tangents, "
    f"bool[] wanted, {SCHEMA}) -> Tensor[]"
)
JVP = torch.ops.flashtile.attention_jvp.default
HVP = torch.ops.flashtile.attention_hvp.default


def _jvp(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, tangents: list[Any], *rest: Any
) -> tuple[Tensor, Tensor]:
    found = _hvp(None, None, q, k, v, lse, tangents, [False] * len(tangents), *rest)
    return found[0], found[1]


def _hvp(
    do: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    tangents: list[Tensor | None],
    wanted: list[bool],
    *rest: Any,
) -> list[Tensor]:
    """J t for o and lse, then H t where it is wanted."""
    a = Arguments(*rest)
    a = a.filled(a.others, [None if x is None else x.detach() for x in a.differentiable])
    request = a.request
    spec, scoring = calls.scored(TENSORS, q, k, v, request)
    offset = request.offset(spec)
    do = q.new_zeros((*q.shape[:-1], v.shape[-1])) if do is None else do
    return second_gradients(spec, scoring, offset, (do, q, k, v, do, lse, dlse), a.differentiable, tangents, wanted)


def _fake_jvp(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape), lse.new_empty(lse.shape)


def _fake_hvp(
    do: Any, dlse: Any, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, tangents: Any, wanted: list[bool], *rest: Any
) -> list[Tensor]:
    sources = (q, k, v, *Arguments(*rest).differentiable)
    moving = [q.new_empty((*q.shape[:-1], v.shape[-1])), lse.new_empty(lse.shape)]
    return moving + [x.new_empty(x.shape) for x, asked in zip(sources, wanted, strict=True) if asked]


_jvp_below, _hvp_below = below(JVP), below(HVP)


def _autograd_jvp(*args: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*args[6:])
    many = len(a.differentiable)
    (q, k, v, o, lse, *others), moving = unpacked((*args[:5], *a.differentiable, *args[5]))
    if any(t is not None for t in moving):
        still, along = a.filled(a.others, others[:many]), others[many:]
        found = without_tangents(_jvp_any_way, *args)
        inputs = q, k, v, *still.differentiable
        listed = (along, [*moving[:3], *moving[5 : 5 + many]], moving[5 + many :])
        tangents = derivative(q, k, v, [t for ts in listed for t in there(inputs, ts)], "ff", still)
        return tuple(map(forward_ad.make_dual, found, tangents))
    return _jvp_any_way(*args)


def _jvp_any_way(*args: Any) -> tuple[Tensor, Tensor]:
    if is_recorded(*args):
        return apply(_Jvp, args, *args[:5], *args[5], *Arguments(*args[6:]).differentiable)
    return _jvp_below(*args)


class _Jvp(Function):
    """J t as a function of the inputs and of t, in which it is linear."""

    @staticmethod
    def forward(ctx: Any, args: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, Tensor]:
        a = Arguments(*args[6:])
        ctx.arguments, ctx.many = a.filled(), len(args[5])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*a.others, *tensors)
        return _jvp_below(*args)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *others, q, k, v, o, lse = ctx.saved_tensors[:8]
        tangents, rest = ctx.saved_tensors[8 : 8 + ctx.many], ctx.saved_tensors[8 + ctx.many :]
        needed = ctx.needs_input_grad[1:]
        if do is None and dlse is None:
            return (None,) * (1 + len(needed))
        a = ctx.arguments.filled(others, rest)
        by_tangents = [*needed[5 : 5 + ctx.many]]
        linear = iter(torch.ops.flashtile.attention_backward.default(do, dlse, q, k, v, o, lse, by_tangents, *a))
        wanted = [*needed[:3], *needed[5 + ctx.many :]]
        found = iter(HVP(do, dlse, q, k, v, lse, [*tangents], wanted, *a)[2:])
        inputs = [next(found) if asked else None for asked in wanted]
        moved = [next(linear) if asked else None for asked in by_tangents]
        return None, *inputs[:3], None, None, *moved, *inputs[3:]


def _autograd_hvp(*args: Any) -> list[Tensor]:
    a, wanted = Arguments(*args[8:]), args[7]
    many = len(a.differentiable)
    (do, dlse, q, k, v, lse, *others), moving = unpacked((*args[:6], *a.differentiable, *args[6]))
    if any(t is not None for t in moving):
        still, along = a.filled(a.others, others[:many]), others[many:]
        found = without_tangents(_hvp_any_way, *args)
        inputs = q, k, v, *still.differentiable
        t, ours, theirs = (there(inputs, x) for x in (along, [*moving[2:5], *moving[6 : 6 + many]], moving[6 + many :]))
        tangents = derivative(q, k, v, [*t, *ours, *theirs], "ff", still)
        of_gradients = derivative(q, k, v, [*t, do, dlse, *ours, *theirs, *moving[:2]], "frf", still)
        asked = there(inputs, wanted)
        tangents += [x for x, needed in zip(of_gradients, asked, strict=False) if needed]
        return [forward_ad.make_dual(x, t) for x, t in zip(found, tangents, strict=True)]
    return _hvp_any_way(*args)


def _hvp_any_way(*args: Any) -> list[Tensor]:
    if is_recorded(*args):
        return list(apply(_Hvp, args, *args[:6], *Arguments(*args[8:]).differentiable, *args[6]))
    return _hvp_below(*args)


class _Hvp(Function):
    """J t, and what of H t is wanted, as a function of do, dlse, the inputs and of t."""

    @staticmethod
    def forward(ctx: Any, args: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        a = Arguments(*args[8:])
        ctx.arguments, ctx.wanted, ctx.many = a.filled(), args[7], len(a.differentiable)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*a.others, *tensors)
        return tuple(_hvp_below(*args))

    @staticmethod
    def backward(ctx: Any, do_moving: Tensor | None, dlse_moving: Tensor | None, *grads: Tensor | None) -> Any:
        *others, do, dlse, q, k, v, _ = ctx.saved_tensors[:9]
        rest = ctx.saved_tensors[9:]
        a = ctx.arguments.filled(others, rest[: ctx.many])
        inputs, along = (q, k, v, *a.differentiable), rest[ctx.many :]
        t = there(inputs, along)
        came = iter(grads)
        of_gradients = there(inputs, [next(came) if asked else None for asked in ctx.wanted])
        of_gradients += [None for x in t if x is not None]  # those of H t to t are nobody's
        by_tangents = derivative(q, k, v, [*t, do_moving, dlse_moving], "fr", a)
        by_gradients = derivative(q, k, v, [*t, do, dlse, *of_gradients], "frr", a)
        found = iter([x + y for x, y in zip(by_tangents, by_gradients, strict=False)])
        ours = [next(found) if has_derivative(x) else None for x in inputs]
        theirs = [
            next(found) if has_derivative(x) and y is not None else None for x, y in zip(inputs, along, strict=True)
        ]
        left = iter(by_gradients[len(by_tangents) :])
        outer = [None if x is None else next(left) for x in (do, dlse)]
        return None, *outer, *ours[:3], None, *ours[3:], *theirs


register("attention_jvp", _jvp, _autograd_jvp, _fake_jvp)
register("attention_hvp", _hvp, _autograd_hvp, _fake_hvp)
