"""Results held to the accuracy rule (`flashtile.kernels.accuracy`): how far from exact they may be, judged from data.

from flashtile.testing import assert_accurate
o = flashtile.attention(q, k, v, causal=True)
assert_accurate(o, q, k, v, causal=True)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from flashtile.calls import Options, Request
from flashtile.checks import integer
from flashtile.dtypes import DTYPES, dtype_of
from flashtile.gradient_problem import ByIdentity, Gradients, Problem
from flashtile.hints import check_keywords
from flashtile.kernels import vanilla
from flashtile.kernels.accuracy import (
    FACTOR,
    Expected,
    allow,
    expect_values,
    gradient_baselines,
    key_orders,
    ulp,
    values_of,
)
from flashtile.score.keep import keep_of
from flashtile.score.options import ScoreOptions
from flashtile.signature import Align, Precision, Window
from flashtile.spec import PER_BATCH

__all__ = [
    "FACTOR",
    "Expected",
    "allow",
    "allowed_error",
    "assert_accurate",
    "assert_gradients_accurate",
    "expect",
    "expect_gradients",
    "expect_values",
    "key_orders",
    "ulp",
]
__dir__ = __all__.copy  # the public names, and not what stands beside them


def expect(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: Window = None,
    align: Align = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    precision: Precision = "ieee",
    mask: Any = None,
    bias: Any = None,
    score_mod: Any = None,
    softcap: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    **unknown: Any,
) -> tuple[Expected, Expected]:
    """What `flashtile.attention` of the same arguments should return: the output, and lse.

    Shapes:  as `flashtile.attention`: (B, H, S, D), (H, S, D) or (S, D); NumPy arrays or CPU torch tensors.
    Units:   lse in nats.
    Numerics: see the rule; lse is judged by the same rule, in the accumulator's dtype.
    Raises:  SpecError and KeywordError as `flashtile.attention`; ValueError where the baseline overflows in every
             element that the reference has finite, for the rule then says nothing.
    Source:  docs, "What flashtile computes", the accuracy rule.
    """
    check_keywords(expect, unknown)
    align, offsets = _split(align)
    options = Options(causal, window, align, scale, precision, "auto", "auto")
    changes = ScoreOptions(mask, bias, score_mod, softcap, alibi_slopes, sinks, keep_of(dropout_p, seed))
    spec, scoring = options.scored(changes, q, k, v, offsets)
    offset = offsets if spec.offset is None else spec.offset
    return expect_values(spec, [values_of(x) for x in (q, k, v)], offset, scoring)


def _split(align: Any) -> tuple[Any, np.ndarray | None]:
    """`align` as `Options` has it, and the offsets if they are an array."""
    per_batch = not (align is None or isinstance(align, str) or integer(align) is not None)
    return (PER_BATCH, np.asarray(align)) if per_batch else (align, None)


def expect_gradients(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    *,
    dlse: Any = None,
    wrt: Iterable[str] = ("q", "k", "v"),
    scale: float | None = None,
    causal: bool = False,
    window: Window = None,
    align: Align = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    precision: Precision = "ieee",
    mask: Any = None,
    bias: Any = None,
    score_mod: Any = None,
    softcap: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    **unknown: Any,
) -> Gradients:
    """What the gradients of sum(do * o) + sum(dlse * lse) should be, however they are computed.

    Shapes:  do as o, dlse as lse; the rest as `expect`. `wrt` as in `flashtile.attention_backward`.
    Returns: Gradients of `Expected`, None where `wrt` does not ask.
    Numerics: each by the module's rule for gradients: three times the largest error of the unfused backward, over four
             orders of the keys, each from the output and lse of the unfused forward in that order, and of exact
             arithmetic on the stored output and lse.
    Raises:  as `expect`.
    Source:  docs, "What flashtile computes", the accuracy rule.
    """
    check_keywords(expect_gradients, unknown)
    align, offsets = _split(align)
    options = Options(causal, window, align, scale, precision, "auto", "auto")
    changes = ScoreOptions(mask, bias, score_mod, softcap, alibi_slopes, sinks, keep_of(dropout_p, seed))
    problem = Problem.of((q, k, v), Request(options, changes, offsets), wrt)
    spec = problem.spec
    wide = [values_of(x)[(None,) * (4 - x.ndim)] for x in (do, q, k, v)]
    common: dict[str, Any] = {"scale": spec.scale, "band": spec.band, "offset": problem.offset}
    common["scoring"] = problem.scoring
    row = None if dlse is None else values_of(dlse)

    def backward(family: Any, values: Any, o: Any, lse: Any, order: Any) -> Any:
        return problem.values(problem.differentiate(family, [*values, o, lse, row], order))

    truth, baselines, _ = gradient_baselines(spec, wide, backward, **common)
    found: dict[str, Any] = {}
    captured = []
    for (name, source, value), *others in zip(truth, *baselines, strict=True):
        own = dtype_of(source.dtype).name
        allowed = allow(value, [_stored(x, own) for _, _, x in others], own, kind="gradient")
        found[name] = Expected(value, allowed, own)
        captured += [(source, found[name])] if name == "captured" else []
    return Gradients(**{**found, "captured": ByIdentity(captured) if "captured" in problem.names else None})


def assert_gradients_accurate(got: Gradients, do: Any, q: Any, k: Any, v: Any, **options: Any) -> None:
    """Raise AssertionError unless `got` is what `flashtile.attention_backward` should return, whatever computed it.

    Shapes:  got.q as q and so on, got.captured[array] as the array; None, or no such array, where `wrt` does not ask.
    Options: as `expect_gradients`: those of the call, dlse and wrt.
    Numerics: each one's dtype, shape and every element, by the rule of this module.
    Raises:  AssertionError naming the gradient; else as `expect_gradients`.
    Source:  docs, "What flashtile computes", the accuracy rule.
    """
    __tracebackhide__ = True
    expected = expect_gradients(do, q, k, v, **options)
    for name, want in vars(expected).items():
        have = getattr(got, name)
        if (have is None) != (want is None):
            raise AssertionError(f"{name}: got {'none' if have is None else 'one'}, expected a gradient where wrt asks")
        if name != "captured":
            pairs = [(have, want)] if want is not None else []
        else:
            pairs = [(have.get(x), want[x]) for x in want or ()]
        for gradient, right in pairs:
            if gradient is None:
                raise AssertionError(f"{name}: got none for an array, expected a gradient of each one captured")
            right.check(gradient, name)


def _stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """Sums rounded to the dtype that they are kept in, in one that has arithmetic."""
    return vanilla.rounded(x, dtype) if dtype in vanilla.STORED else x.astype(DTYPES[dtype].numpy)


def assert_accurate(got: Any, q: Any, k: Any, v: Any, *, kind: str = "output", **options: Any) -> None:
    """Raise AssertionError unless `got` is what `flashtile.attention(q, k, v, **options)` should return.

    Shapes:  got (B, H, S_q, D_v) for kind "output", (B, H, S_q) for kind "lse", or with as few axes as q.
    Units:   lse in nats.
    Numerics: the dtype, the shape and every element, by the rule.
    Raises:  AssertionError naming the first wrong element; else as `expect`.
    Source:  docs, "What flashtile computes", the accuracy rule.
    """
    __tracebackhide__ = True
    if kind not in ("output", "lse"):
        raise ValueError(f"kind: got {kind!r}, expected 'output' or 'lse'")
    o, lse = expect(q, k, v, **options)
    (o if kind == "output" else lse).check(got, kind)


def allowed_error(q: Any, k: Any, v: Any, *, kind: str = "output", **options: Any) -> float:
    """The largest error that `assert_accurate` of the same arguments lets pass, in the units of the tensor."""
    o, lse = expect(q, k, v, **options)
    return {"output": o, "lse": lse}[kind].allowed
