"""The dispatcher's operator: attention as autograd, `torch.compile`, transforms of torch.func and modes see it.

`flashtile::attention` and `flashtile::attention_backward` take the options of a call in a schema (`arguments`). Each
has a kernel for the CPU, one for its autograd, one for fake tensors, a rule for vmap; the first also one for autocast.
What they save are torch's own saved tensors, so hooks on them, checks of their versions and checkpointing work as they
do elsewhere; beside tensors a call keeps texts and numbers alone, and nothing of size S_q x S_kv.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd.function import Function

from flashtile import kernels
from flashtile.autograd import gradients
from flashtile.calls import as_name
from flashtile.errors import UnavailableError
from flashtile.torch.arguments import SCHEMA, Arguments, plain_arguments
from flashtile.torch.eager import attend
from flashtile.torch.tensors import check_tangents, check_untraced, is_watched, under_autocast

Tensor = torch.Tensor

LIBRARY = torch.library.Library("flashtile", "DEF")
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


def recorded(q: Tensor, k: Tensor, v: Tensor, given: Arguments) -> tuple[Tensor, Tensor]:
    """o and lse of an eager call that records gradients: the operator, past a dispatcher that has nothing to add."""
    return ATTENTION(q, k, v, *given) if is_watched() else _record(_unwatched, q, k, v, given)


def recorded_plainly(q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """`recorded` of a call that nobody looks at, with these options alone: half of a small call is the way to it."""
    a = plain_arguments(q, k, v, options)
    if options[5] != "auto":
        return _record(_unwatched, q, k, v, a)

    def run(q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, options, None, None, True)

    return super(Function, _Attention).apply(run, a, q, k, v)  # no transform is active


def _unwatched(q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    return attend(q, k, v, a.options, a.scores, a.offsets_array, True, _progress.get())


# -- on the CPU ------------------------------------------------------------------------------------------


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
    # A tensor that came in two places is two here, since gradients are found by identity.
    a = a.filled(a.others, [None if x is None else x.detach() for x in a.differentiable])
    spec, scoring = a.scored(q, k, v)
    family = kernels.pick(spec, as_name("kernel", a.family), "backward")
    offset = a.offsets_array if spec.offset is None else spec.offset
    do = torch.zeros_like(o) if do is None else do
    inputs = do, q, k, v, o, lse, dlse
    return gradients(family, spec, scoring, offset, inputs, a.differentiable, tuple(wanted))


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


def _apply(function: type[Function], *args: Any) -> Any:
    """Function.apply at the level of torch.func's transforms that the dispatcher has come to."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    from torch._functorch.autograd_function import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return super(Function, function).apply(*args)  # type: ignore[misc]


def _below(op: Any) -> Callable[..., Any]:
    """The operator beneath autograd; levels of torch.func below this one record as they would without it."""

    def call(*args: Any) -> Any:
        below = torch._C._AutoDispatchBelowAutograd()
        with below, torch.enable_grad() if torch._C._are_functorch_transforms_active() else contextlib.nullcontext():
            return op(*args)

    return call


_attention_below, _backward_below = _below(ATTENTION), _below(BACKWARD)


def _autograd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*rest)
    sinks, bias, slopes, *captured = a.differentiable
    check_tangents(q=q, k=k, v=v, sinks=sinks, bias=bias, alibi_slopes=slopes, **_named(captured))
    if torch.is_grad_enabled() and torch._C._any_requires_grad(q, k, v, *a):
        return _record(lambda q, k, v, a: _attention_below(q, k, v, *a), q, k, v, a)
    return _attention_below(q, k, v, *rest)


def _named(captured: list[Tensor]) -> dict[str, Tensor]:
    return {f"captured_{n}": x for n, x in enumerate(captured)}


def _record(run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    """o and lse of `run`, with a backward. Raises: UnavailableError if no kernel named so has it."""
    check_untraced()
    if a.family != "auto":
        kernels.pick(a.scored(q, k, v).spec, as_name("kernel", a.family), "backward")
    return _apply(_Attention, run, a, q, k, v, *a.differentiable)


class _Attention(Function):
    """Inputs: what computes o and lse, the arguments, q, k, v, and of the arguments those that have gradients."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], a: Arguments, q: Tensor, k: Tensor, v: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        o, lse = run(q, k, v, a)
        ctx.arguments = a.filled() if rest else a
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, o, lse, *(a.others if rest else ()), *rest)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        given = dlse if do is None else do
        if given is None:
            return (None,) * (2 + len(needed))
        if torch._C._functorch.is_legacy_batchedtensor(given):
            raise UnavailableError(
                "is_grads_batched: got True, expected False; torch.vmap of a torch.func.vjp is there"
            )
        q, k, v, o, lse, *rest = ctx.saved_tensors
        a = ctx.arguments.filled(rest[:3], rest[3:]) if rest else ctx.arguments
        wanted = [*needed] if rest else [*needed, False, False, False]
        run = BACKWARD if torch.is_grad_enabled() or is_watched() else _compute_backward
        found = iter(run(do, dlse, q, k, v, o, lse, wanted, *a))
        return None, None, *(next(found) if asked else None for asked in needed)


def _autograd_backward(*args: Any) -> list[Tensor]:
    tensors = [x for x in args[:7] if x is not None]
    check_tangents(**_named(tensors))
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        rest = Arguments(*args[8:])
        return list(_apply(_AttentionBackward, args, *args[:7], *rest.differentiable))
    return _backward_below(*args)


class _AttentionBackward(Function):
    """The first derivatives as a function of their own; inputs: all arguments, and those that have gradients."""

    @staticmethod
    def forward(ctx: Any, args: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        return tuple(_backward_below(*args))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise UnavailableError(
            "create_graph: got a derivative of attention's gradients, expected first derivatives: second ones are not "
            "available yet"
        )


# -- vmap and autocast -----------------------------------------------------------------------------------


def _autocast(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    q, k, v = under_autocast(q, k, v)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        return ATTENTION(q, k, v, *rest)


def _vmap(op: Any) -> Callable[..., Any]:
    """One call a sample: exact whatever the options say of b, h and dropout."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def sample(x: Any, dim: Any, n: int) -> Any:
            if isinstance(x, (list, tuple)) and isinstance(dim, (list, tuple)):
                return [sample(y, d, n) for y, d in zip(x, dim, strict=True)]
            return x if dim is None else x.select(dim, n)

        calls = [op(*(sample(x, d, n) for x, d in zip(args, in_dims, strict=True))) for n in range(info.batch_size)]
        results = [torch.stack(x) for x in zip(*calls, strict=True)]
        dims = [0] * len(results)
        return (tuple(results), tuple(dims)) if op is ATTENTION else (results, dims)

    return rule


LIBRARY.impl("attention", _compute, "CPU")
LIBRARY.impl("attention", _autograd, "AutogradCPU")
LIBRARY.impl("attention", _autocast, "AutocastCPU")
LIBRARY.impl("attention_backward", _compute_backward, "CPU")
LIBRARY.impl("attention_backward", _autograd_backward, "AutogradCPU")
torch.library.register_fake("flashtile::attention", _fake, lib=LIBRARY)
torch.library.register_fake("flashtile::attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_vmap("flashtile::attention", _vmap(ATTENTION), lib=LIBRARY)
torch.library.register_vmap("flashtile::attention_backward", _vmap(BACKWARD), lib=LIBRARY)
