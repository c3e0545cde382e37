"""A call on a GPU, from the arrays of whatever library to the launches of a kernel.

It runs on the stream that is current in that library, and its results and workspace come from that library's
allocator, which knows the stream: nothing here waits for the device, and memory may be given back while a kernel that
uses it has yet to run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from flashtile import kernels
from flashtile.arrays import device_of
from flashtile.calls import (
    CACHE_ENTRIES,
    Call,
    Memory,
    Options,
    as_key,
    check_apart,
    lookup,
    prepare,
    run_backward,
    split_align,
)
from flashtile.checks import check_flag
from flashtile.current import Here, calling
from flashtile.dtypes import DTYPES
from flashtile.errors import wrong
from flashtile.kernels.gradients import Sums
from flashtile.owners import LENDERS, Owner, borrow, give_back, hold, library_of, owner_of
from flashtile.progress import reporter
from flashtile.score.capture import ArrayCapture, capture, is_array
from flashtile.score.keep import keep_of
from flashtile.score.options import ScoreOptions, Scoring
from flashtile.spec import AttentionSpec


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any,
    bias: Any,
    score_mod: Any,
    causal: bool,
    window: Any,
    align: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    scale: Any,
    dropout_p: float,
    seed: int | None,
    precision: str,
    return_lse: bool,
    kernel: str,
    engine: str,
    progress: Any,
    out: Any,
) -> Any:
    """`flashtile.attention` where an input lies on a GPU: the same arguments, none left out.

    Returns:  arrays of the library that q came from, on the device of q, which the launched kernels will have written
              when the stream has come there.
    Raises:   as flashtile.attention; KernelError if the device has no memory left, the library's error as its cause.
    """
    check_flag("return_lse", return_lse)
    keep = keep_of(dropout_p, seed)
    library = one_library(q, k, v, out)
    owner = owner_of(library)
    lent = q, k, v
    if library != owner.name:
        lent = borrow(owner, q), borrow(owner, k), borrow(owner, v)
    offsets = scores = None
    if align is not None:
        align, offsets = split_align(align, tuple(q.shape))
    given = mask, bias, score_mod, softcap, alibi_slopes, sinks, keep
    if any(x is not None for x in given):
        scores = ScoreOptions(*(borrow(owner, x) if is_array(x) else x for x in given))
    options = Options(causal, as_key(window), align, scale, precision, kernel, engine)
    o, lse = attend(owner, lent, options, scores, offsets, return_lse, progress, out, held=library != "torch")
    o = out if out is not None else give_back(library, o)
    return (o, give_back(library, lse)) if return_lse else o


def attention_lent(q: Any, k: Any, v: Any, *, out: Any, **keywords: Any) -> Any:
    """`flashtile.attention` of JAX's arrays on the CPU, which NumPy reads where they lie.

    Returns:  new arrays of JAX.
    Raises:   as flashtile.attention; SpecError for a traced array, which has no values yet.
    """
    import jax

    from flashtile import api

    one_library(q, k, v, out)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, jax.core.Tracer):
            expected = "one with values; inside of jit, grad and vmap call flashtile.jax.dot_product_attention"
            raise wrong(name, f"a {type(x).__name__}", expected)
    return jax.device_put(api.attention(*map(np.asarray, (q, k, v)), **keywords))


def attend(
    owner: Owner,
    inputs: tuple[Any, Any, Any],
    options: Options,
    scores: ScoreOptions | None,
    offsets: np.ndarray | None,
    return_lse: bool,
    progress: Any,
    out: Any,
    held: bool = False,
    check: Callable[[Scoring], None] | None = None,
) -> tuple[Any, Any]:
    """`attention` of arrays of the owner's: the output, and lse or None. A repeated call finds itself by its key.

    held: the inputs live until the device has read them. JAX's memory, lent, and CuPy's, of another stream, might be
    given to an operation that no one orders behind the kernels; with torch that is the caller's record_stream.
    check: sees what the options capture before the device is touched.
    """
    q, k, v = inputs
    key: tuple[Any, ...] = (owner.key(q), owner.key(k), owner.key(v), None if out is None else owner.key(out), options)
    spec = scoring = None
    if scores is not None:
        plain = key, scores.positional
        spec = _remembered(plain)
        if spec is None:
            spec = options.spec(owner.view(q), owner.view(k), owner.view(v), scores.positional)
            if len(_specs) >= CACHE_ENTRIES:
                _specs.clear()
            _specs[plain] = spec
        offset = offsets if spec.offset is None else spec.offset
        spec, scoring = scores.scoring(spec, options.causal, options.window, offset)
        if check is not None:
            check(scoring)
        key += spec.program, spec.sinks, spec.dropout
    call = lookup(key)
    if call is None and spec is None:  # checked before the device is touched
        spec = options.spec(owner.view(q), owner.view(k), owner.view(v))
    report = None if progress is None else reporter(progress)
    with calling(owner, q) as place:
        if call is None:
            target = None if out is None else owner.view(out)
            call = prepare(key, owner.view(q), owner.view(k), owner.view(v), target, options, spec)
        if scoring is not None and scoring.sinks is not None:
            scoring = place_sinks(scoring, call.spec, owner)
        try:
            return run(call, place, inputs, out, offsets, scoring, return_lse, report)
        finally:  # some kernels of a call that failed may be under way
            if held:
                hold(owner, *inputs, scores)


# What was validated of calls before their options that change scores, which are validated at every call.
_specs: dict[Hashable, AttentionSpec] = {}


def _remembered(key: Hashable) -> AttentionSpec | None:
    try:
        return _specs.get(key)
    except TypeError:  # an unhashable option is a wrong one; validation names it
        return None


def run(
    call: Call,
    place: Here,
    inputs: tuple[Any, Any, Any],
    out: Any,
    offsets: np.ndarray | None,
    scoring: Scoring | None,
    return_lse: bool,
    report: Any,
) -> tuple[Any, Any]:
    """Launch a prepared call: its output, and lse or None."""
    owner, spec = place.owner, call.spec
    q_at, k_at, v_at = (owner.address(x) for x in inputs)
    if out is None:
        out = place.empty(call.o_shape, spec.dtype, "the output")
    else:
        check_apart(call, owner.address(out), q_at, k_at, v_at)
    lse = place.empty(call.lse_shape, DTYPES[spec.dtype].accumulator, "lse") if return_lse else None
    lse_at = 0 if lse is None else owner.address(lse)
    offsets_at = 0
    if offsets is not None and spec.offset is None:
        on_device = place.upload(offsets, "align")
        offsets_at = owner.address(on_device)
    call.run(call.pack(q_at, k_at, v_at, owner.address(out), lse_at, offsets_at, scoring), report)
    return out, lse


def gradients(
    owner: Owner,
    family: kernels.Family,
    spec: AttentionSpec,
    arrays: Mapping[str, Any],
    offset: Any,
    scoring: Scoring,
    wanted: Collection[str | int],
    engine: str = "auto",
) -> Sums:
    """`run_backward` of arrays of the owner's, on the current stream: the sums are arrays of the owner's, too."""
    with calling(owner, arrays["q"]) as place:
        if scoring.sinks is not None:
            scoring = place_sinks(scoring, spec, owner)
        memory = Memory(
            zeros=lambda shape, dtype: place.zeros(shape, dtype.name, "a gradient"),
            place=lambda array: place.upload(array, "align"),
            address=owner.address,
        )
        asked: dict[str, Any] = {"address": owner.address, "strides": owner.key, "memory": memory}
        return run_backward(spec, family, engine, arrays, offset, scoring, wanted, **asked)


def one_library(q: Any, k: Any, v: Any, out: Any) -> str:
    """The library that all arrays come from. Raises: SpecError."""
    library = library_of(q)
    for name, x in (("k", k), ("v", v), ("out", out)):
        if x is not None and library_of(x) != library:
            got, expected = (f"a {type(y).__module__}.{type(y).__qualname__}" for y in (x, q))
            raise wrong(name, f"{got} on {device_of(x)}", f"{expected} on {device_of(q)} as q")
    if out is not None and library in LENDERS:
        raise wrong("out", f"an array of {LENDERS[library]}, whose arrays are not written to", "None")
    return library


def place_sinks(scoring: Scoring, spec: AttentionSpec, owner: Owner) -> Scoring:
    """Sinks that lie on the device as kernels read them: (B, H), in the accumulator's dtype."""
    if not isinstance(scoring.sinks, ArrayCapture):
        return scoring
    whole = owner.spread(scoring.sinks.source, (spec.batch, spec.heads), DTYPES[spec.dtype].accumulator)
    return replace(scoring, sinks=capture(whole, "sinks"))
