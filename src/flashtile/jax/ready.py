"""Calls that machine code leaves to Python, made ready when it is first entered for them, then given their buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from flashtile.arrays import view_of
from flashtile.calls import lookup, prepare
from flashtile.calls.prepared import backwards, keep
from flashtile.jax.call import DescribedCall
from flashtile.jax.native import bound, places_of, scored, unread
from flashtile.score.capture import ArrayCapture
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec
from flashtile.xla import Argument


class _Known(NamedTuple):
    """What calls of the same shapes and options have in common: what changes their scores is without its arrays, which
    are at these places among the arguments."""

    spec: AttentionSpec
    scoring: Scoring
    places: dict[str | int, int]

    def learned(self, call: DescribedCall, first: int) -> dict[int, str]:
        """The slots of arrays that have a gradient, and the names of these."""
        names = {first + n: x for n, x in enumerate(call.operands) if x in call.differentiable}
        return {n: names[at] for n, at in self.places.items() if isinstance(n, int) and at in names}

    def filled(self, arguments: Sequence[Argument]) -> Scoring | None:
        """What changes scores, with the arrays of a call; None if nothing does."""
        program, sinks = self.scoring.program, self.scoring.sinks
        if program is sinks is None:
            return None
        if program is not None:
            read = (
                x.read_at(arguments[self.places[n]].storage()) if isinstance(x, ArrayCapture) else x
                for n, x in enumerate(program.captures)
            )
            program = replace(program, captures=tuple(read))
        return Scoring(program, None if sinks is None else arguments[self.places["sinks"]].storage())


_known: dict[Any, _Known | None] = {}


def _find(key: Any, call: DescribedCall, arguments: list[Argument], first: int) -> _Known | None:
    """Of a call whose operands begin with the `first` argument, q, k and v before them; None where vmap added axes, or
    elements of arrays have a say in what the call is beyond whether they fit, which `filled` looks at."""
    if key in _known:
        return _known[key]
    found = None
    operands = unread(tuple((x.shape, x.array().dtype) for x in arguments[first:]))
    views = [view_of(x.array().swapaxes(-3, -2)) for x in arguments[first - 3 : first]]
    if len(arguments[0].shape) == 4 and (answer := scored(call, views, operands, wide=True)) is not None:
        found = _Known(answer.spec, answer.scoring, places_of(call, answer.scoring, operands, first))
    return keep(_known, key, found)


def forward(key: Any, call: DescribedCall, arguments: list[Argument], results: list[Argument]) -> bool:
    """Run a call that is known by its key. False for one that must be looked at anew. Raises: as `prepare`."""
    known = _find(key, call, arguments, 3)
    if known is None:
        return False
    prepared = lookup(key)
    if prepared is None:
        q, k, v, o = (x.array().swapaxes(1, 2) for x in (*arguments[:3], results[0]))
        prepared = prepare(key, q, k, v, o, call.options, known.spec)
    q_at, k_at, v_at = (x.address for x in arguments[:3])
    o_at, lse_at = (x.address for x in results)
    prepared.run(prepared.pack(q_at, k_at, v_at, o_at, lse_at, 0, known.filled(arguments)), None)
    return True


def backward(key: Any, call: DescribedCall, arguments: list[Argument], results: list[Argument]) -> bool:
    """The same for (do, o, lse, q, k, v, operands) and the gradients."""
    known = _find(key, call, arguments, 6)
    if known is None:
        return False
    do, o, lse, q, k, v = arguments[:6]
    into = dict(zip(("q", "k", "v", *call.differentiable), results, strict=True))
    slots = known.learned(call, 6)
    ready = backwards.get(key)
    if ready is None:
        shapes = tuple((n, arguments[known.places[n]].shape) for n in sorted(slots))
        views = [view_of(x.array().swapaxes(1, 2)) for x in (q, k, v, o)]
        ready = None if any(0 in shape for _, shape in shapes) else bound(known.spec, views, shapes)
        if ready is None:
            return False
        keep(backwards, key, ready)
    for name, x in into.items():
        if name not in slots.values():
            x.storage()[...] = 0  # kernels add to them
    dq, dk, dv = (into[x].address for x in "qkv")
    dsinks = into["sinks"].address if "sinks" in into else 0
    at_q, at_k, at_v, at_o, at_lse, at_do = (x.address for x in (q, k, v, o, lse, do))
    scoring = known.filled(arguments)
    params = ready.pack(at_q, at_k, at_v, at_o, at_lse, at_do, 0, dq, dk, dv, 0, scoring, dsinks)
    ready.run(params)
    sums = ready.totals(params)
    with np.errstate(over="ignore", invalid="ignore"):  # what the dtype cannot hold is an infinity there
        for name in set(slots.values()):
            into[name].array()[...] = sum(sums[n] for n, of in slots.items() if of == name)
    return True
