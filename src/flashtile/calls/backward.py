"""`run_backward`: gradients of a family that compiles its backward, of the arrays of whatever library."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from flashtile import engines, kernels
from flashtile.arrays import address_of, view_of
from flashtile.calls.prepared import backwards, engine_of, keep
from flashtile.dtypes import DTYPES
from flashtile.kernels import ArrayShapes, BackwardLayout
from flashtile.kernels.gradients import Sums
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

INPUTS = ("do", "q", "k", "v", "o", "lse", "dlse")  # as in kernels.gradients.Inputs
_STRIDED = ("q", "k", "v", "o", "do", "dq", "dk", "dv")  # as in BackwardLayout
_OPERANDS = (*_STRIDED, "lse", "dlse")


class Memory(NamedTuple):
    """Where a backward call has what it makes itself: zeros of a shape and NumPy dtype, and arrays of the host."""

    zeros: Callable[[tuple[int, ...], np.dtype[Any]], Any]
    place: Callable[[np.ndarray], Any]
    address: Callable[[Any], int]


HOST = Memory(np.zeros, lambda x: x, address_of)


class Strided(Protocol):
    """How the library that owns a call's arrays is asked where they lie."""

    def address(self, x: Any) -> int: ...

    def strides(self, x: Any) -> Hashable:
        """In whatever unit the library has: they tell arrays apart."""
        ...


def run_backward(
    arrays: Strided,
    spec: AttentionSpec,
    family: kernels.Family,
    engine: str,
    given: Mapping[str, Any],
    offset: Any,
    scoring: Scoring | None = None,
    wanted: Collection[str | int] = (),
    memory: Memory = HOST,
) -> Sums:
    """Gradients of q, k and v added to those of dq, dk and dv that are `given`; returned, those of "sinks" and of
    captured arrays, by their slots, that are `wanted`.

    Also given are q, k, v, o and do, of any strides, lse and possibly dlse, row-major. memory: of a GPU, where these
    lie; what is returned is then of its library.
    """
    captured = {} if scoring is None else scoring.shapes(wanted)
    real = DTYPES[DTYPES[spec.dtype].accumulator].numpy
    empty = {n: np.zeros(shape, real) for n, shape in captured.items() if 0 in shape}
    shapes = tuple(sorted((n, shape) for n, shape in captured.items() if n not in empty))
    key = spec, family.name, engine, shapes, *given, *map(arrays.strides, given.values())
    found = backwards.get(key) or keep(backwards, key, _bind(spec, family, engine, given, shapes))
    at = dict.fromkeys(_OPERANDS, 0)
    for name, x in given.items():
        at[name] = arrays.address(x)
    offsets = None if spec.offset is not None else memory.place(np.ascontiguousarray(offset, np.int64))
    dsinks = memory.zeros((spec.batch, spec.heads), real) if "sinks" in wanted else None
    offsets_at, dsinks_at = (0 if x is None else memory.address(x) for x in (offsets, dsinks))
    values = scoring if spec.program or spec.sinks or spec.dropout else None
    params = found.pack(**at, offsets=offsets_at, dsinks=dsinks_at, scoring=values)
    found.run(params)
    return Sums(None, None, None, dsinks, {**empty, **found.totals(params)})


def _bind(
    spec: AttentionSpec, family: kernels.Family, engine: str, given: Mapping[str, Any], shapes: ArrayShapes
) -> engines.BoundBackward:
    """A backward call made ready, by the direct engine where the one named has no backward."""
    absent = (0, 0, 0, 0)
    layout = BackwardLayout(*(view_of(given[x]).strides4() if x in given else absent for x in _STRIDED))
    bind = engine_of(spec, engine).bind_backward or engines.pick("direct").bind_backward
    assert bind is not None
    return bind(spec, layout, family, shapes)
