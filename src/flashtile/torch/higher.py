"""Derivatives of attention of any order: one operator, which says by a text how it was differentiated.

`how` has a letter for each time: "r" for reverse mode, the gradients of what there was to all its inputs, along
cotangents; "f" for forward mode, its tangents along those of all its inputs. So "" is attention, "r" its first
gradients and "frr" the gradients of those of its tangents. The operator's own derivative is itself with one letter
more, and so there are all of them. First and second ones have kernels of their own (operator, second); here they begin
with the third.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.autograd.function import Function

from flashtile import calls
from flashtile.torch.arguments import SCHEMA, Arguments
from flashtile.torch.dispatch import LIBRARY, apply, below, is_recorded, register, unpacked, without_tangents
from flashtile.torch.eager import TENSORS
from flashtile.torch.tiles import INPUTS, OUTPUTS, Tile, Tiles

Tensor = torch.Tensor
REVERSE, FORWARD = "r", "f"

LIBRARY.define(
    f"attention_higher(Tensor q, Tensor k, Tensor v, Tensor?[] along, str how, {SCHEMA}) -> Tensor[]",
)
HIGHER = torch.ops.flashtile.attention_higher.default


class Place(NamedTuple):
    """An input or output: what it is to attention, itself or its derivative, and the value, None where it is 0."""

    kind: Any  # of INPUTS, OUTPUTS, or the number of an array
    value: Tensor | None


def primals(q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> list[Place]:
    """The inputs of attention that are there and have derivatives."""
    sinks, *arrays = a.differentiable
    given = [*zip(INPUTS, (q, k, v, sinks), strict=True), *enumerate(arrays)]
    return [Place(kind, x) for kind, x in given if has_derivative(x)]


def has_derivative(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def there(inputs: Sequence[Tensor | None], listed: Sequence[Any]) -> list[Any]:
    """Of what is listed for q, k, v and `Arguments.differentiable`, what belongs to `primals`."""
    return [x for x, y in zip(listed, inputs, strict=True) if has_derivative(y)]


def levels(inputs: list[Place], along: Sequence[Tensor | None], how: str) -> Iterator[tuple[list[Place], list[Any]]]:
    """The inputs, and the kinds of the outputs, of attention and of each derivative."""
    rest, outputs = iter(along), list(OUTPUTS)
    yield inputs, outputs
    for letter in how:
        more = outputs if letter == REVERSE else [x.kind for x in inputs]
        if letter == REVERSE:
            outputs = [x.kind for x in inputs if x.value is not None]
        inputs = [*inputs, *(Place(kind, next(rest)) for kind in more)]
        yield inputs, outputs


def derivative(q: Tensor, k: Tensor, v: Tensor, along: Sequence[Tensor | None], how: str, a: Arguments) -> list[Tensor]:
    """The operator, of tensors listed by their places."""
    return HIGHER(q, k, v, list(along), how, *a)


def _compute(q: Tensor, k: Tensor, v: Tensor, along: list[Tensor | None], how: str, *rest: Any) -> list[Tensor]:
    a = Arguments(*rest)
    a = a.filled(a.others, [None if x is None else x.detach() for x in a.differentiable])
    request = a.request
    spec, scoring = calls.scored(TENSORS, q, k, v, request)
    stages = list(levels(primals(q, k, v, a), along, how))
    counts = [len(inputs) for inputs, _ in stages]
    inputs, kinds = stages[-1]
    likes = _like(stages, q, v)
    tiles = Tiles(spec, scoring, request.offset(spec), a.differentiable[1:])
    sums = [torch.zeros(x.shape, dtype=tiles.dtype) for x in likes]
    base = [x.kind for x in stages[0][0]]
    finite = all(bool(x.value.isfinite().all()) for x in inputs if x.value is not None)
    with recording():
        for tile in tiles.each(finite):
            leaves = [None if x.value is None else tile.part(x.kind, x.value) for x in inputs]
            found = _differentiated(
                lambda xs, at=tile: at.attend(dict(zip(base, xs, strict=True))), how, counts, leaves
            )
            for total, kind, x in zip(sums, kinds, found, strict=True):
                tile.add(kind, total, x.detach())
    return [total.to(like.dtype) for total, like in zip(sums, likes, strict=True)]


def _attend(tile: Tile, kinds: list[Any], inputs: list[Tensor]) -> list[Tensor]:
    return list(tile.attend(dict(zip(kinds, inputs, strict=True))))


def _differentiated(attend: Any, how: str, counts: list[int], inputs: list[Tensor | None]) -> list[Tensor]:
    """The outputs of this derivative of `attend`, which may be differentiated again."""
    if not how:
        return attend(inputs)
    inner, along = inputs[: counts[-2]], inputs[counts[-2] :]
    outputs = _differentiated(attend, how[:-1], counts[:-1], inner)
    there = [x for x in inner if x is not None]
    if how[-1] == REVERSE:
        return _gradients(outputs, there, along)
    # What is linear in cotangents is differentiated by them, along the tangents.
    cotangents = [torch.zeros_like(x).requires_grad_() for x in outputs]
    back = _gradients(outputs, there, cotangents)
    tangents = [t for x, t in zip(inner, along, strict=True) if x is not None]
    return _gradients(back, cotangents, tangents)


def _gradients(outputs: list[Tensor], inputs: list[Tensor], along: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients of the inputs along cotangents of the outputs, None being 0."""
    pairs = [(y, u) for y, u in zip(outputs, along, strict=True) if u is not None and y.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    ys, us = zip(*pairs, strict=True)
    return list(torch.autograd.grad(ys, inputs, us, create_graph=True, materialize_grads=True))


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Within it autograd records again, in a kernel that the dispatcher calls beneath it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in _AUTOGRAD:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


# What torch._C._AutoDispatchBelowAutograd shuts out.
_AUTOGRAD = ("AutogradCPU", "AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")


def _like(stages: list[tuple[list[Place], list[Any]]], q: Tensor, v: Tensor) -> list[Tensor]:
    """A tensor of the shape and dtype of each output; those of o and lse do not exist."""
    accumulator = torch.float64 if q.dtype is torch.float64 else torch.float32
    o = q.new_empty((1,)).expand(*q.shape[:-1], v.shape[-1])
    known = {"o": o, "lse": q.new_empty((1,), dtype=accumulator).expand(q.shape[:-1])}
    known |= {x.kind: x.value for x in stages[0][0] if x.value is not None}
    return [known[kind] for kind in stages[-1][1]]


def _fake(q: Tensor, k: Tensor, v: Tensor, along: list[Tensor | None], how: str, *rest: Any) -> list[Tensor]:
    stages = list(levels(primals(q, k, v, Arguments(*rest)), along, how))
    return [x.new_empty(x.shape) for x in _like(stages, q, v)]


_below = below(HIGHER)


def _autograd(*args: Any) -> list[Tensor]:
    q, k, v, along, how, *rest = args
    a = Arguments(*rest)
    (q, k, v, *others), tangents = unpacked((q, k, v, *a.differentiable, *along))
    if any(t is not None for t in tangents):
        many = len(a.differentiable)
        still, along = a.filled(a.others, others[:many]), others[many:]
        found = without_tangents(_any_way, *args)
        ours = there((q, k, v, *still.differentiable), tangents[: 3 + many])
        moving = derivative(q, k, v, [*along, *ours, *tangents[3 + many :]], how + FORWARD, still)
        return [forward_ad.make_dual(x, t) for x, t in zip(found, moving, strict=True)]
    return _any_way(*args)


def _any_way(*args: Any) -> list[Tensor]:
    if is_recorded(*args):
        return list(apply(_Higher, args, *args[:3], *Arguments(*args[5:]).differentiable, *args[3]))
    return _below(*args)


class _Higher(Function):
    """A derivative as a function of the inputs, of those that have gradients, and of what it is along."""

    @staticmethod
    def forward(ctx: Any, args: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        a = Arguments(*args[5:])
        ctx.arguments, ctx.how, ctx.many = a.filled(), args[4], 3 + len(a.differentiable)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*a.others, *tensors)
        return tuple(_below(*args))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        others, tensors = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        (q, k, v, *rest), along = tensors[: ctx.many], tensors[ctx.many :]
        a = ctx.arguments.filled(others, rest)
        found = iter(derivative(q, k, v, [*along, *grads], ctx.how + REVERSE, a))
        return None, *(next(found) if has_derivative(x) else None for x in tensors)


register("attention_higher", _compute, _autograd, _fake)
