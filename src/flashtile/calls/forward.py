"""`attend`: the whole flow of a call in one screen, from the arrays of whatever library to the kernel."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any, Protocol

import numpy as np

from flashtile.arrays import View, address_of, addresses_of, view_of
from flashtile.calls.prepared import Call, cache, check_apart, find, keep, prepare, specs, validated
from flashtile.calls.request import Request, Scored
from flashtile.progress import reporter
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec


class Arrays(Protocol):
    """How the library that owns a call's arrays is asked about them, and for new ones."""

    def key(self, q: Any, k: Any, v: Any, out: Any) -> Hashable:
        """What a kernel depends on of them: equal for arrays that have equal views; `out` may be None."""
        ...

    def view(self, x: Any) -> View:
        """One without its memory."""
        ...

    def output(self, call: Call, q: Any) -> Any:
        """A new array for o, where q lies."""
        ...

    def lse(self, call: Call, q: Any) -> Any:
        """A new row-major array for lse, where q lies."""
        ...

    def addresses(self, q: Any, k: Any, v: Any, o: Any) -> tuple[int, int, int, int]:
        """Where their elements lie. Raises: SpecError for one that is not in memory."""
        ...

    def address(self, x: Any) -> int: ...

    def reach(self, spec: AttentionSpec, offsets: Any, scoring: Scoring | None) -> tuple[int, Scoring | None]:
        """What a kernel reads beside them, where it can: the address of the offsets, 0 if it needs none, and the values
        that change scores. Called where there are some."""
        ...


def attend(
    arrays: Arrays,
    q: Any,
    k: Any,
    v: Any,
    request: Request,
    return_lse: bool = False,
    progress: Any = None,
    out: Any = None,
) -> Any:
    """o, or (o, lse), of arrays that one library owns. A repeated call is one lookup away from its kernel.

    Raises: as `flashtile.attention`.
    """
    spec = scoring = None
    if request.scores is not None:
        if type(request.scores) is not Scored:
            request = traced(arrays, q, k, v, request)
        spec, scoring = request.scores  # type: ignore[misc]  # they are traced
    options, _, offsets, known = request
    if known is None or out is not None:
        known = arrays.key(q, k, v, out)
    key: tuple[Any, ...] = (known, options)
    if spec is not None:
        key += spec.program, spec.sinks, spec.dropout
    try:
        call = cache.get(key)
    except TypeError:  # an unhashable option is a wrong one; validation will name it
        call = None
    if call is None:
        target = None if out is None else arrays.view(out)
        call = prepare(key, arrays.view(q), arrays.view(k), arrays.view(v), target, options, spec)
    report = None if progress is None else reporter(progress)
    o = arrays.output(call, q) if out is None else out
    lse = arrays.lse(call, q) if return_lse else None
    q_at, k_at, v_at, o_at = arrays.addresses(q, k, v, o)
    lse_at = offsets_at = 0
    if lse is not None:
        lse_at = arrays.address(lse)
    if out is not None:
        check_apart(call, o_at, q_at, k_at, v_at, offsets, scoring)
    if offsets is not None or scoring is not None:
        offsets_at, scoring = arrays.reach(call.spec, offsets, scoring)
    params = call.pack(q_at, k_at, v_at, o_at, lse_at, offsets_at, scoring)
    call.run(params, report)
    return o if lse is None else (o, lse)


def scored(arrays: Arrays, q: Any, k: Any, v: Any, request: Request) -> Scored:
    """`Request.of`: what its options that change scores mean, read anew at every call; the rest is validated once."""
    return traced(arrays, q, k, v, request).scores  # type: ignore[return-value]  # they are traced


def traced(arrays: Arrays, q: Any, k: Any, v: Any, request: Request) -> Request:
    """The request of a call on these arrays with its options `scored`, so that nothing of it is traced twice."""
    options, scores, offsets, _ = request
    assert not isinstance(scores, Scored)
    positional = scores is not None and scores.positional
    views = arrays.key(q, k, v, None)
    key = views, options, positional
    spec = find(specs, key)
    if spec is None:
        spec = keep(specs, key, validated(arrays.view(q), arrays.view(k), arrays.view(v), options, positional))
    offset = offsets if spec.offset is None else spec.offset
    found = (spec, _PLAIN) if scores is None else scores.scoring(spec, options.causal, options.window, offset)
    return _new(Request, (options, _new(Scored, found), offsets, views))


_PLAIN = Scoring(None, None)
_new = tuple.__new__  # past the checks of a NamedTuple's own


class _NumPy:
    """NumPy's arrays, and what else kernels on the CPU read where it lies."""

    view = staticmethod(view_of)
    address, addresses = staticmethod(address_of), staticmethod(addresses_of)
    strides = staticmethod(operator.attrgetter("strides"))

    def key(self, q: Any, k: Any, v: Any, out: Any) -> Hashable:
        views = q.shape, q.strides, q.dtype, k.shape, k.strides, k.dtype, v.shape, v.strides, v.dtype
        return views if out is None else (views, out.shape, out.strides, out.dtype)

    def output(self, call: Call, q: Any) -> Any:
        return np.empty(call.o_shape, q.dtype)

    def lse(self, call: Call, q: Any) -> Any:
        return np.empty(call.lse_shape, call.lse_dtype)

    def zeros(self, like: Any) -> Any:
        # Written, not asked of the system as zeros: kernels add, and a page that is read before it is written is mapped
        # twice, the second time with every thread stopped (a third of a call on two threads).
        found = np.empty(like.shape, like.dtype)
        found[...] = 0
        return found

    def reach(self, spec: AttentionSpec, offsets: Any, scoring: Scoring | None) -> tuple[int, Scoring | None]:
        return 0 if offsets is None or spec.offset is not None else address_of(offsets), scoring


NUMPY = _NumPy()
