"""What XLA calls, with the buffers of a call where they lie, and the operator that asks for it, with its gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashtile import xla
from flashtile.api import attention
from flashtile.gradient_problem import ByIdentity, Gradients
from flashtile.gradients import attention_backward
from flashtile.jax import ready
from flashtile.jax.call import BACKWARD, FORWARD, LEARNED, DescribedCall
from flashtile.jax.native import PYTHON, Arrays, target_of


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(call: DescribedCall, operands: tuple[Any, ...]) -> tuple[Any, Any]:
    """o and lse (B, N, T)."""
    q, v = operands[0], operands[2]
    accumulator = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    shapes = (
        jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype),
        jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), accumulator),
    )
    o, lse = jax.ffi.ffi_call(call.target, shapes, vmap_method="expand_dims")(*operands, call=call.text)
    return o, lse


def kinds_of(operands: tuple[Any, ...]) -> Arrays:
    """Their shapes and dtypes."""
    return tuple((tuple(x.shape), x.dtype) for x in operands)


def _recorded(call: DescribedCall, operands: tuple[Any, ...]) -> Any:
    o, lse = attend(call, operands)
    return (o, lse), (operands, o, lse)


def _differentiate(call: DescribedCall, kept: Any, given: Any) -> Any:
    operands, o, lse = kept
    target = target_of(call, kinds_of(operands), BACKWARD)
    places = [0, 1, 2, *(3 + n for n, name in enumerate(call.operands) if name in call.differentiable)]
    shapes = [jax.ShapeDtypeStruct(operands[n].shape, operands[n].dtype) for n in places]
    found = jax.ffi.ffi_call(target, shapes, vmap_method="expand_dims")(given[0], o, lse, *operands, call=call.text)
    gradients = dict(zip(places, found, strict=True))
    return (tuple(gradients.get(n) for n in range(len(operands))),)


attend.defvjp(_recorded, _differentiate)


def _forward(text: str, arguments: list[xla.Argument], results: list[xla.Argument]) -> None:
    """The handler of FORWARD: axes that vmap added stand first, in every buffer, of length 1 where it added none."""
    call = DescribedCall.of(text)
    if ready.forward((text, *((x.shape, x.element) for x in arguments)), call, arguments, results):
        return
    inputs, outputs = ([x.array() for x in given] for given in (arguments, results))
    for mapped in np.ndindex(outputs[0].shape[:-4]):
        q, k, v, *others = (_at(x, mapped) for x in inputs)
        o, lse = (x[mapped] for x in outputs)
        _, lse[...] = attention(
            *(x.swapaxes(1, 2) for x in (q, k, v)), out=o.swapaxes(1, 2), return_lse=True, **call.keywords(others)
        )


def _backward(text: str, arguments: list[xla.Argument], results: list[xla.Argument]) -> None:
    """The handler of BACKWARD."""
    call = DescribedCall.of(text)
    if ready.backward((text, *((x.shape, x.element) for x in arguments)), call, arguments, results):
        return
    names = ["q", "k", "v", *call.differentiable]
    wrt = [name for name in names if not name.startswith(LEARNED)]
    wrt += ["captured"] if len(wrt) < len(names) else []
    inputs, outputs = ([x.array() for x in given] for given in (arguments, results))
    for mapped in np.ndindex(outputs[0].shape[: outputs[0].ndim - 4]):
        do, o, lse, *operands = (_at(x, mapped) for x in inputs)
        do, q, k, v, o = (x.swapaxes(1, 2) for x in (do, *operands[:3], o))
        targets: dict[str, Any] = {name: x[(*mapped, ...)] for name, x in zip(names, outputs, strict=True)}
        for name in "qkv":
            targets[name] = targets[name].swapaxes(1, 2)
        given = dict(zip(call.operands, operands[3:], strict=True))
        # Those that JAX does not follow are computed with the others, if there are others.
        rest = {name: x for name, x in given.items() if name.startswith(LEARNED)}
        learned = ByIdentity((x, targets.pop(n) if n in targets else np.empty_like(x)) for n, x in rest.items())
        out = Gradients(**targets, captured=learned)
        attention_backward(do, q, k, v, o, lse, wrt=wrt, out=out, **call.keywords(operands[3:]))


def _at(x: np.ndarray, mapped: tuple[int, ...]) -> np.ndarray:
    at: tuple[Any, ...] = tuple(n if size > 1 else 0 for n, size in zip(mapped, x.shape, strict=False))
    return x[(*at, ...)]


@functools.cache
def register() -> None:
    """Tell XLA of the handlers, once, and keep them."""
    for name, work in ((FORWARD, _forward), (BACKWARD, _backward)):
        function = xla.handler(work)
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
        PYTHON[name] = function
