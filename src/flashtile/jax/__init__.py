"""The door for JAX: `jax.nn.dot_product_attention` by its own signature, under jit, grad and vmap, on CPUs.

XLA calls back with the buffers of a call, where they lie: nothing is copied on the way in or out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import jax

from flashtile.checks import check_flag
from flashtile.errors import SpecError, UnavailableError, described, rename
from flashtile.hints import check_keywords
from flashtile.jax.arguments import SPELLINGS, Rule, broadcast, inputs_of, lengths, number, sinks_of, window_of
from flashtile.jax.call import FORWARD, DescribedCall
from flashtile.jax.native import target_of
from flashtile.jax.run import attend, kinds_of, register

__all__ = ["dot_product_attention"]
__dir__ = __all__.copy  # the public names, and not what stands beside them


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: bool = False,
    softcap: float | None = None,
    sinks: Any = None,
    score_mod: Any = None,
    **unknown: Any,
) -> Any:
    """`jax.nn.dot_product_attention` by its own signature and defaults, and a few options more.

    Shapes:   query (B, T, N, H), key (B, S, K, H), value (B, S, K, H_v), or all without B -> (B, T, N, H_v); query head
              n reads head n // (N / K).
    Options:  is_causal and local_window_size, (left, right) or one number for both, are anchored at the top left, as in
              JAX: row t stands at key t. mask (boolean, True = attend) and bias (added) broadcast to (B, N, T, S).
              query_seq_lengths, key_value_seq_lengths (B,): what is past a sequence's end is padding.
              softcap, sinks, (N,) or (B, N), and score_mod as in `flashtile.attention`; float arrays that score_mod
              captures have gradients, too. implementation must be None: flashtile is neither of JAX's two.
    Returns:  an array of query's dtype; with return_residual=True also lse, (B, T, N), float32 (float64 for float64),
              to which, as in JAX, no gradient flows.
    Numerics: as `flashtile.attention`; a row that sees no key gives 0, where JAX gives the mean of all values.
    Raises:   SpecError, while tracing; errors of a run come as JAX's, with flashtile's text. Forward mode and second
              derivatives raise. Where arrays are sharded over devices the call is replicated.
    Source:   JAX 0.10.2, jax.nn.dot_product_attention.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 5, 4, 8))
    >>> dot_product_attention(x, x, x, is_causal=True).shape
    (1, 5, 4, 8)
    """
    if unknown:
        check_keywords(dot_product_attention, unknown)
    if implementation is not None:
        raise UnavailableError(f"implementation: got {described(implementation)}, expected None: that is flashtile's")
    check_flag("return_residual", return_residual)
    check_flag("is_causal", is_causal)
    arrays, single = inputs_of({"query": query, "key": key, "value": value})
    q, k, v = arrays
    shape = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    rule = Rule.of(score_mod, shape)
    given = {
        "bias": None if bias is None else broadcast("bias", bias, shape),
        "mask": None if mask is None else broadcast("mask", mask, shape),
        "query_seq_lengths": lengths("query_seq_lengths", query_seq_lengths, shape),
        "key_value_seq_lengths": lengths("key_value_seq_lengths", key_value_seq_lengths, shape),
        "sinks": sinks_of(sinks, shape, q.dtype),
        **rule.operands,
    }
    others = {name: x for name, x in given.items() if x is not None}
    sources = {"bias": bias, "sinks": sinks, **rule.sources}  # as they came: in a trace jnp has only what it follows
    call = DescribedCall(
        scale=number("scale", scale),
        is_causal=bool(is_causal),  # of NumPy's no text can be made
        window=window_of(local_window_size),
        softcap=number("softcap", softcap),
        score_mod=rule.text,
        numbers=rule.numbers,
        operands=tuple(others),
        fixed=tuple(name for name, x in sources.items() if name in others and not isinstance(x, jax.core.Tracer)),
    )
    try:
        call.check(q, k, v, shape)
    except SpecError as e:
        rename(e, SPELLINGS)
        raise
    operands = q, k, v, *others.values()
    register()
    call = replace(call, target=target_of(call, kinds_of(operands), FORWARD))
    o, lse = attend(call, operands)
    lse = jax.lax.stop_gradient(lse).swapaxes(1, 2)
    o, lse = (o[0], lse[0]) if single else (o, lse)
    return (o, lse) if return_residual else o
