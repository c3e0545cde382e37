"""What the operators share: their library, and how each meets autograd, transforms of torch.func, and vmap."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import Function

from flashtile.errors import UnavailableError
from flashtile.torch.tensors import in_forward_mode

Tensor = torch.Tensor
_NOT_THERE = {"attention_jvp": "forward mode", "attention_hvp": "a second derivative"}
LIBRARY = torch.library.Library("flashtile", "DEF")


def apply(function: type[Function], *args: Any) -> Any:
    """Function.apply at the level of torch.func's transforms that the dispatcher has come to."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    from torch._functorch.autograd_function import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return super(Function, function).apply(*args)  # type: ignore[misc]  # past its own apply


def below(op: Any) -> Callable[..., Any]:
    """The operator beneath autograd. Levels of torch.func below this one differentiate as they would without it, in
    both modes: a Function switches both off for what it runs."""

    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if not torch._C._are_functorch_transforms_active():
                return op(*args)
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return op(*args)

    return call


def unpacked(tensors: Any) -> tuple[list[Any], list[Any]]:
    """Tensors without their tangents, and those, None where there is none."""
    if not in_forward_mode():
        return list(tensors), [None for _ in tensors]
    pairs = [(x, None) if x is None else forward_ad.unpack_dual(x) for x in tensors]
    return [x for x, _ in pairs], [t for _, t in pairs]


def without_tangents(run: Callable[..., Any], *args: Any) -> Any:
    """The results themselves. What is saved meanwhile keeps its tangents, for those of what is computed from it."""
    with forward_ad._set_fwd_grad_enabled(False):
        return run(*args)


def outside_of_graphs(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of what breaks a graph of torch.compile; its own error gives the reason where it may not, if this
    torch can say one."""
    known = "reason" in inspect.signature(torch.compiler.disable).parameters
    return functools.partial(torch.compiler.disable, **({"reason": reason} if known else {}))


def is_recorded(*args: Any) -> bool:
    """Whether autograd records a gradient of one of an operator's arguments."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def each_sample(op: Any) -> Callable[..., Any]:
    """One call a sample: exact whatever the options say of b, h and dropout."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def sample(x: Any, dim: Any, n: int) -> Any:
            if isinstance(x, (list, tuple)) and isinstance(dim, (list, tuple)):
                return [sample(y, d, n) for y, d in zip(x, dim, strict=True)]
            return x if dim is None else x.select(dim, n)

        calls = [op(*(sample(x, d, n) for x, d in zip(args, in_dims, strict=True))) for n in range(info.batch_size)]
        results = [torch.stack(x) for x in zip(*calls, strict=True)]
        dims = [0] * len(results)
        return (tuple(results), tuple(dims)) if isinstance(calls[0], tuple) else (results, dims)

    return rule


def register(name: str, cpu: Any, autograd: Any, fake: Any, cuda: Any = None) -> None:
    """The kernels of one operator of ours; on a GPU, where `cuda` is none, it raises."""

    def refuse(*args: Any) -> Any:
        raise UnavailableError(
            f"create_graph: got {_NOT_THERE.get(name, 'a third derivative')} on a GPU, expected it on the CPU"
        )

    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda or refuse, "CUDA")
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, autograd, f"Autograd{device}")
    torch.library.register_fake(f"flashtile::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.flashtile, name).default
    torch.library.register_vmap(f"flashtile::{name}", each_sample(op), lib=LIBRARY)
