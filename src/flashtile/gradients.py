"""`flashtile.attention_backward`: the gradients of attention, from arrays to the kernel that computes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import numpy as np

from flashtile import engines, kernels
from flashtile.arrays import device_of, is_lazy, is_torch, plain
from flashtile.calls import INPUTS, NUMPY, Request, as_name, check_rows, describe, differentiate, run_backward, traced
from flashtile.checks import check_flag
from flashtile.errors import wrong
from flashtile.gradient_problem import Gradients, Problem, check_out, target_of
from flashtile.hints import check_keywords
from flashtile.score.capture import capture
from flashtile.score.keep import keep_of
from flashtile.spec import AttentionSpec


def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    dlse: Any = None,
    wrt: Iterable[str] = ("q", "k", "v"),
    mask: Any = None,
    bias: Any = None,
    score_mod: Any = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    align: Any = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    precision: str = "ieee",
    kernel: str = "auto",
    engine: str = "auto",
    out: Gradients | None = None,
    accumulate: bool = False,
    memory_limit: int | None = None,
    **unknown: NoReturn,  # checkers refuse it, as calls do
) -> Gradients:
    """Gradients of sum(do * o) + sum(dlse * lse), from what `attention(..., return_lse=True)` took and returned.

    Shapes:  do and o (B, H, S_q, D_v), lse and dlse (B, H, S_q), or with as few axes as q; NumPy arrays,
             Dask's, or arrays in storage.
    Options: wrt    names among "q", "k", "v", "bias", "sinks", "alibi_slopes", "captured": only these are computed.
             out    a Gradients with a writable array for each of them, written to; accumulate=True adds to it.
             memory_limit  bytes that a call on arrays in files may take (docs, "Larger than memory"), by
                    engine="starpu"; q, k and v of out are then also names of .npy or .zarr files,
                    or arrays in storage.
             the rest as in `flashtile.attention`.
    Returns: Gradients. `captured[array]` is found by the array's identity: one sum for an array captured twice;
             an array given as bias or alibi_slopes has all of its gradient there.
    Numerics: sums in the accumulator's dtype, then cast. A row that sees no key gives 0; what is hidden
             reaches nothing.
             Kernel "cpu" is fused, on all threads, and adds in its accumulators; vanilla and reference are unfused,
             run on the calling thread whatever the engine, and vanilla holds S_q x S_kv scores of a head.
    Raises:  SpecError, UnavailableError before any memory is touched.
    Source:  Dao 2023, FlashAttention-2, section 3.1.2.
    """
    given = dict(locals())
    check_keywords(attention_backward, given.pop("unknown"))
    check_flag("accumulate", accumulate)
    if memory_limit is not None:
        from flashtile import outofcore_gradients

        return outofcore_gradients.attention_backward(**given)
    del given["memory_limit"]
    if any(device_of(x) != "cpu" and not is_torch(x) for x in (q, k, v)):
        from flashtile import device_gradients

        return device_gradients.attention_backward(**given)
    if any(map(is_lazy, (do, q, k, v, o, lse, dlse))):
        from flashtile import lazy

        return lazy.attention_backward(**given)
    q, k, v = _array(q, "q"), _array(k, "k"), _array(v, "v")
    scores = mask, bias, score_mod, softcap, alibi_slopes, sinks, keep_of(dropout_p, seed)
    options = causal, window, align, scale, precision, kernel, engine
    request = describe(q, scores, options)
    if out is None and not accumulate and type(wrt) is tuple and wrt and all(x in ("q", "k", "v") for x in wrt):
        if request.scores is not None:
            request = traced(NUMPY, q, k, v, request)
        found = _of_qkv(do, q, k, v, o, lse, dlse, request, wrt)
        if found is not None:
            return found
    problem = Problem.of((q, k, v), request, wrt)
    inputs = _inputs(problem.spec, do, q, k, v, o, lse, dlse)
    logits = None if sinks is None else capture(sinks, "sinks").array
    check_out(out, accumulate, problem, (*inputs, request.offsets, logits))
    engines.pick(as_name("engine", engine))
    family = kernels.pick(problem.spec, as_name("kernel", kernel), "backward")
    if family.compile_backward is not None:
        return _run(problem, family, as_name("engine", engine), inputs, out, accumulate)
    return problem.gradients(problem.differentiate(family, inputs), out, accumulate)


def _of_qkv(
    do: Any,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    o: Any,
    lse: Any,
    dlse: Any,
    request: Request,
    wrt: tuple[str, ...],
) -> Gradients | None:
    """Gradients of q, k and v alone, soon done where a call is small; None if no compiled kernel has them."""
    do, o, lse = _array(do, "do"), _array(o, "o"), np.ascontiguousarray(_array(lse, "lse"))
    dlse = None if dlse is None else np.ascontiguousarray(_array(dlse, "dlse"))
    inputs = do, q, k, v, o, lse, dlse
    found = differentiate(NUMPY, inputs, request, ("q" in wrt, "k" in wrt, "v" in wrt))
    return None if found is None else Gradients(*found)


def _inputs(spec: AttentionSpec, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, dlse: Any) -> tuple[Any, ...]:
    """The arrays of a call, in the order of `kernels.backward.Inputs`. Raises: SpecError."""
    do, o, lse = _array(do, "do"), _array(o, "o"), _array(lse, "lse")
    dlse = None if dlse is None else _array(dlse, "dlse")
    check_rows(spec, q.shape[:-1], v.shape[-1:], do=do, o=o, lse=lse, dlse=dlse)
    return do, q, k, v, o, lse, dlse


def _array(x: Any, name: str) -> np.ndarray:
    if is_torch(x):
        raise wrong(name, "a torch tensor", "a NumPy array: tensors have their gradients by autograd")
    return plain(x, name)


def _run(
    problem: Problem, family: Any, engine: str, inputs: Sequence[Any], out: Gradients | None, accumulate: bool
) -> Gradients:
    """The gradients of a family that compiles its backward, which adds those of q, k and v to arrays."""
    given = {name: x for name, x in zip(INPUTS, inputs, strict=True) if x is not None}
    given |= {name: np.ascontiguousarray(given[name]) for name in ("lse", "dlse") if name in given}
    done: dict[str, Any] = {}
    for name, source in problem.sources:
        if name in ("q", "k", "v"):
            done[name] = NUMPY.zeros(source) if out is None else target_of(out, name, source)
            if out is not None and not accumulate:
                done[name][...] = 0
    given |= {f"d{name}": x for name, x in done.items()}
    sums = run_backward(NUMPY, problem.spec, family, engine, given, problem.offset, problem.scoring, problem.wanted)
    return problem.gradients(sums, out, accumulate, done)
