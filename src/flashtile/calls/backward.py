"""`run_backward`: gradients of a family that compiles its backward, of the arrays of whatever library; `differentiate`:
those of q, k and v, of a call that is one lookup away from its kernel when it is repeated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from flashtile import engines, kernels
from flashtile.arrays import address_of, view_of
from flashtile.calls.forward import Arrays
from flashtile.calls.prepared import backwards, engine_of, family_of, find, keep, repeated_backwards
from flashtile.calls.request import Request, Scored
from flashtile.dtypes import DTYPES, dtype_of
from flashtile.errors import wrong
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


class Differentiable(Arrays, Strided, Protocol):
    """A library whose arrays lie in the host's memory."""

    def zeros(self, like: Any) -> Any:
        """A new row-major array of this one's shape and dtype."""
        ...


def differentiate(
    arrays: Differentiable, inputs: Sequence[Any], request: Request, wanted: tuple[bool, ...]
) -> list[Any] | None:
    """Gradients of q, k and v, None where one is not wanted, of a call whose request is traced, or has nothing that
    changes scores; None if the family that computes it does not compile its backward. inputs: in the order of `INPUTS`,
    of which lse and dlse are row-major, and dlse may be None.

    Raises: as `flashtile.attention_backward`.
    """
    do, q, k, v, o, lse, dlse = inputs
    options, scores, offsets, known = request
    of_rows = arrays.key(do, o, lse, None), None if dlse is None else (dlse.shape, dlse.dtype)
    key: tuple[Any, ...] = (known or arrays.key(q, k, v, None), of_rows, options, wanted)
    scoring = None
    if scores is not None:
        spec, scoring = cast(Scored, scores)
        key += spec.program, spec.sinks, spec.dropout
    found, call = find(repeated_backwards, key), None
    if found is None:
        call = _validated(arrays, inputs, request)
        if call[1].compile_backward is None:
            return None
    gradients = [arrays.zeros(x) if asked else None for x, asked in zip((q, k, v), wanted, strict=True)]
    if call is not None:
        given = {name: x for name, x in zip(INPUTS, inputs, strict=True) if x is not None}
        given |= {f"d{n}": x for n, x in zip("qkv", gradients, strict=True) if x is not None}
        found = keep(repeated_backwards, key, _bound(arrays, *call, options.engine, given, ()))
    assert found is not None
    at = arrays.address
    of_dlse, dq, dk, dv = (0 if x is None else at(x) for x in (dlse, *gradients))
    offsets_at = 0 if offsets is None else address_of(offsets)
    found.run(found.pack(at(q), at(k), at(v), at(o), at(lse), at(do), of_dlse, dq, dk, dv, offsets_at, scoring))
    return gradients


def _validated(arrays: Differentiable, inputs: Sequence[Any], request: Request) -> tuple[AttentionSpec, kernels.Family]:
    do, q, k, v, o, lse, dlse = inputs
    spec, _ = request.of(arrays.view(q), arrays.view(k), arrays.view(v))
    check_rows(spec, tuple(q.shape[:-1]), tuple(v.shape[-1:]), do=do, o=o, lse=lse, dlse=dlse)
    engine_of(spec, request.options.engine)  # unless there is none
    return spec, family_of(spec, request.options.kernel, "backward")


def check_rows(spec: AttentionSpec, rows: tuple[int, ...], size: tuple[int, ...], **given: Any) -> None:
    """Raise SpecError unless the arrays among do, o, lse and dlse that are given have so many rows, of `size`."""
    accumulator = dtype_of(np.dtype(DTYPES[spec.dtype].accumulator)).name
    for name, x in given.items():
        if name in ("do", "o"):
            _check(x, name, rows + size, spec.dtype)
        elif x is not None:
            _check(x, name, rows, accumulator)


def _check(x: Any, name: str, shape: tuple[int, ...], dtype: str) -> None:
    if tuple(x.shape) != shape:
        raise wrong(name, f"shape {x.shape}", f"{shape}")
    if dtype_of(x.dtype, name).name != dtype:
        raise wrong(name, f"dtype {x.dtype}", dtype)


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
    found = _bound(arrays, spec, family, engine, given, shapes)
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


def _bound(
    arrays: Strided,
    spec: AttentionSpec,
    family: kernels.Family,
    engine: str,
    given: Mapping[str, Any],
    shapes: ArrayShapes,
) -> engines.BoundBackward:
    key = spec, family.name, engine, shapes, *given, *map(arrays.strides, given.values())
    return backwards.get(key) or keep(backwards, key, _bind(spec, family, engine, given, shapes))


def _bind(
    spec: AttentionSpec, family: kernels.Family, engine: str, given: Mapping[str, Any], shapes: ArrayShapes
) -> engines.BoundBackward:
    """A backward call made ready, by the direct engine where the one named has no backward."""
    absent = (0, 0, 0, 0)
    layout = BackwardLayout(*(view_of(given[x]).strides4() if x in given else absent for x in _STRIDED))
    bind = engine_of(spec, engine).bind_backward or engines.pick("direct").bind_backward
    assert bind is not None
    return bind(spec, layout, family, shapes)
