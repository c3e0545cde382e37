"""Calls made ready while JAX traces them: XLA then runs them without Python."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from flashtile import xla_native
from flashtile.arrays import View, contiguous
from flashtile.calls import Scored, engine_of, family_of, prepare
from flashtile.engines import BoundBackward, Native
from flashtile.errors import SpecError, UnavailableError
from flashtile.jax.call import BACKWARD, FORWARD, DescribedCall
from flashtile.kernels import ArrayShapes, BackwardLayout
from flashtile.score.capture import Access, ArrayCapture, ReadTooEarly, Unread
from flashtile.score.expr import postorder
from flashtile.score.options import ScoreOptions, Scoring
from flashtile.spec import AttentionSpec
from flashtile.xla_native import Buffers

Arrays = tuple[tuple[tuple[int, ...], Any], ...]  # the shape and dtype of each operand, in JAX's order
_WIDE = ("int64", "uint32", "uint64")  # whose elements are looked at before they are taken for int32


PYTHON: dict[str, Any] = {}  # the handlers in Python, by the names of FORWARD and BACKWARD
_native: dict[str, Any] = {}  # functions that XLA may call, for good
_lock = threading.Lock()


@functools.lru_cache(maxsize=1024)
def target_of(call: DescribedCall, arrays: Arrays, direction: str) -> str:
    """The function for calls of these shapes and dtypes: where there is one that needs no Python, by a name that says
    what it computes, since compiled programs may be kept on disk; else that of PYTHON.

    direction: FORWARD or BACKWARD.
    """
    try:
        found = {FORWARD: _forward, BACKWARD: _backward}[direction](call, arrays)
    except (SpecError, UnavailableError):  # the run tells of it
        found = None
    if found is None:
        return direction
    name = f"{direction}_{hashlib.blake2b(f'{call.text} {arrays}'.encode(), digest_size=12).hexdigest()}"
    with _lock:
        if name not in _native:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(found), platform="cpu")
            _native[name] = found
    return name


def _forward(call: DescribedCall, arrays: Arrays) -> Any:
    """A handler of (q, k, v, operands) -> (o, lse)."""
    (q, dtype), _, (v, _) = arrays[:3]
    o, lse = (*q[:-1], v[-1]), (q[0], q[2], q[1])
    q_view, k_view, v_view, o_view = views = [_swapped(shape, dtype) for shape in (*_shapes(arrays[:3]), o)]
    operands = unread(arrays[3:])
    found = scored(call, views, operands)
    if found is None:
        return None
    spec, scoring = found
    ready = prepare(("jax", call, arrays), q_view, k_view, v_view, o_view, call.options, spec)
    numbers: dict[str | int, int] = {"q": 0, "k": 1, "v": 2, "o": len(arrays), "lse": len(arrays) + 1}
    numbers |= places_of(call, scoring, operands, 3)
    results = [(o, np.dtype(dtype).itemsize), (lse, _accumulator(dtype))]
    return _handler(ready.native, scoring, Buffers(_sized(arrays), results, numbers), FORWARD)


def _backward(call: DescribedCall, arrays: Arrays) -> Any:
    """A handler of (do, o, lse, q, k, v, operands) -> gradients of q, k, v and sinks; None where another array has
    one, whose sums are put together in Python."""
    if set(call.differentiable) - {"sinks"}:
        return None
    (q, dtype), (k, _), (v, _) = arrays[:3]
    o, lse = (*q[:-1], v[-1]), (q[0], q[2], q[1])
    views = {name: _swapped(shape, dtype) for name, shape in (("q", q), ("k", k), ("v", v), ("o", o))}
    operands = unread(arrays[3:])
    found = scored(call, [views[x] for x in "qkv"], operands)
    ready = None if found is None else bound(found.spec, [views[x] for x in "qkvo"])
    if found is None or ready is None:
        return None
    scoring = found.scoring
    names = ["do", "o", "lse", "q", "k", "v"]
    numbers: dict[str | int, int] = {name: n for n, name in enumerate(names)}
    numbers |= places_of(call, scoring, operands, 6)
    given = ["dq", "dk", "dv", *(["dsinks"] if call.differentiable else [])]
    numbers |= {name: 3 + len(arrays) + n for n, name in enumerate(given)}
    size = np.dtype(dtype).itemsize
    inputs = [(o, size), (o, size), (lse, _accumulator(dtype)), *_sized(arrays)]
    results = [(x, size) for x in (q, k, v)]
    results += _sized(arrays[3 + call.operands.index(x)] for x in call.differentiable)
    return _handler(ready.native, scoring, Buffers(inputs, results, numbers), BACKWARD)


def bound(spec: AttentionSpec, views: Sequence[View], arrays: ArrayShapes = ()) -> BoundBackward | None:
    """The backward of a call on q, k, v and o that lie so, and to captured arrays of these slots and shapes; None where
    there is none that writes to arrays."""
    family, bind = family_of(spec, "auto", "backward"), engine_of(spec, "auto").bind_backward
    if family.compile_backward is None or bind is None or spec.empty:
        return None
    q, k, v, o = (x.strides4() for x in views)
    return bind(spec, BackwardLayout(q, k, v, o, o, q, k, v), family, arrays)


def unread(arrays: Arrays) -> list[Unread]:
    """What stands for operands that are not there yet."""
    return [Unread(shape, str(dtype)) for shape, dtype in arrays]


def scored(call: DescribedCall, views: Sequence[View], operands: list[Any], wide: bool = False) -> Scored | None:
    """What the call asks for, traced with arrays that are not there yet; None where their elements have a say in it: in
    integers that must fit in 32 bits, but for `wide` (who has them looks), places that may lie outside of an array, or
    an element that is read by a number. Raises: SpecError."""
    if not wide and any(x.dtype in _WIDE for x in operands):
        return None
    keywords: dict[str, Any] = call.keywords(operands)
    scores = {name: keywords[name] for name in ("mask", "bias", "score_mod", "softcap", "sinks")}
    q, k, v = views[:3]
    if all(x is None for x in scores.values()):
        return Scored(call.options.spec(q, k, v), Scoring(None, None))
    try:
        found = call.options.scored(ScoreOptions(**scores), q, k, v, None)
    except ReadTooEarly:
        return None
    roots = [] if found.scoring.program is None else found.scoring.program.roots
    loads = (x.data for x in postorder(roots) if isinstance(x.data, Access))
    return None if any(any(x.clamp) for x in loads) else found


def places_of(call: DescribedCall, scoring: Scoring, operands: Sequence[Any], first: int) -> dict[str | int, int]:
    """The buffers of sinks, and of the arrays that fill a score program's slots; operands begin with the `first`."""
    place = {id(x): first + n for n, x in enumerate(operands)}
    captures = () if scoring.program is None else scoring.program.captures
    found: dict[str | int, int] = {
        n: place[id(x.source)] for n, x in enumerate(captures) if isinstance(x, ArrayCapture)
    }
    return found | ({"sinks": first + call.operands.index("sinks")} if "sinks" in call.operands else {})


def _handler(native: Native | None, scoring: Scoring, buffers: Buffers, direction: str) -> Any:
    if native is None:
        return None
    template = native.template(None if scoring.program is scoring.sinks is None else scoring)
    if native.shared and template is not None and template.blind:  # Python looks at the values first
        return None
    return xla_native.handler(native, template, buffers, PYTHON[direction])


def _sized(arrays: Iterable[tuple[tuple[int, ...], Any]]) -> list[tuple[tuple[int, ...], int]]:
    return [(shape, np.dtype(dtype).itemsize) for shape, dtype in arrays]


def _shapes(arrays: Arrays) -> list[tuple[int, ...]]:
    return [shape for shape, _ in arrays]


def _accumulator(dtype: Any) -> int:
    """Bytes of an element of lse."""
    return 8 if np.dtype(dtype) == np.float64 else 4


def _swapped(shape: tuple[int, ...], dtype: Any) -> View:
    """A row-major array of JAX's order of the axes, in flashtile's."""
    view = contiguous(shape, dtype)
    (b, t, n, h), strides = view.shape, view.strides
    return view._replace(shape=(b, n, t, h), strides=(strides[0], strides[2], strides[1], strides[3]))
