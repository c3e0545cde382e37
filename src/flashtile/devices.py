"""A call on a GPU, from the arrays of whatever library to the launches of a kernel.

It runs on the stream that is current in that library, and its results and workspace come from that library's
allocator, which knows the stream: nothing here waits for the device, and memory may be given back while a kernel that
uses it has yet to run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from flashtile.arrays import device_of
from flashtile.calls import Call, Options, as_key, check_apart, lookup, prepare, split_align
from flashtile.current import Here, calling
from flashtile.dtypes import DTYPES
from flashtile.errors import wrong
from flashtile.owners import LENDERS, Owner, borrow, give_back, library_of, owner_of
from flashtile.progress import reporter
from flashtile.score.capture import ArrayCapture, capture, is_array
from flashtile.score.keep import keep_of
from flashtile.score.options import ScoreOptions, Scoring
from flashtile.spec import AttentionSpec, check_flag


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
    q, k, v = (borrow(owner, x) for x in (q, k, v))
    views = owner.view(q), owner.view(k), owner.view(v)
    target = None if out is None else owner.view(out)
    offsets = None
    if align is not None:
        align, offsets = split_align(align, views[0].shape)
    options = Options(causal, as_key(window), align, scale, precision, kernel, engine)
    scores = ScoreOptions(mask, bias, score_mod, softcap, alibi_slopes, sinks, keep)
    borrowed = {name: borrow(owner, x) for name, x in vars(scores).items() if is_array(x)}
    spec, scoring = options.scored(replace(scores, **borrowed), *views, offsets)
    key = (views, target, options, spec.program, spec.sinks, spec.dropout)
    report = None if progress is None else reporter(progress)
    with calling(owner, q) as place:
        call = lookup(key) or prepare(key, *views, target, options, spec)
        scoring = place_sinks(scoring, spec, owner)
        o, lse = run(call, place, (q, k, v), out, offsets, scoring, return_lse, report)
    o = out if out is not None else give_back(library, o)
    return (o, give_back(library, lse)) if return_lse else o


def run(
    call: Call,
    place: Here,
    inputs: tuple[Any, Any, Any],
    out: Any,
    offsets: np.ndarray | None,
    scoring: Scoring,
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
