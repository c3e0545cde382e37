"""What calls of the same shapes, strides, dtypes and options have in common, and the caches of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from flashtile import engines, kernels
from flashtile.arrays import View, contiguous, view_of
from flashtile.calls.request import Options, as_name
from flashtile.dtypes import DTYPES, dtype_of
from flashtile.errors import wrong
from flashtile.kernels import Layout
from flashtile.spec import AttentionSpec

# A program that meets a new shape at every step, as a decoder does, must not collect calls without end.
CACHE_ENTRIES = 1024

cache: dict[Hashable, Call] = {}
# What was validated of calls before their options that change scores, which are read anew at every call.
specs: dict[Hashable, AttentionSpec] = {}
backwards: dict[Hashable, engines.BoundBackward] = {}
# What is picked for a call does not depend on its lengths, so a decoder's next step need not pick again.
_families: dict[Hashable, kernels.Family] = {}
_choices: dict[Hashable, _Choice] = {}


@dataclass(frozen=True)
class Call:
    """What every call with the same shapes, strides, dtypes and options has in common."""

    spec: AttentionSpec
    o_shape: tuple[int, ...]
    o_like_q: bool  # q itself has the shape and layout of a new output
    lse_shape: tuple[int, ...]
    lse_dtype: np.dtype[Any]
    views: tuple[View, ...]  # o, q, k, v
    pack: engines.Pack
    run: engines.Run
    alone: engines.Alone | None

    @functools.cached_property
    def extents(self) -> tuple[tuple[int, int], ...]:
        """Of o, q, k, v; see View.extent."""
        return tuple(x.extent() for x in self.views)


def lookup(key: Hashable) -> Call | None:
    """The call prepared under a key, if there is one."""
    return find(cache, key)


def prepare(
    key: Hashable, q: Any, k: Any, v: Any, out: Any, options: Options, spec: AttentionSpec | None = None
) -> Call:
    """Validate (unless there is a spec), choose a kernel, plan and compile; remember the result under `key`.

    out may be None.

    Raises: SpecError and UnavailableError, before any memory is touched.
    """
    views = view_of(q), view_of(k), view_of(v)
    alike = _apart_from_keys(*views, options) if spec is out is None else None
    choice = None if alike is None else find(_choices, alike)
    if choice is None:
        choice = _choose(*views, out, options, spec)
        if alike is not None:
            keep(_choices, alike, choice)
    spec = choice.spec.with_keys(views[1].shape[-2], options.align) if spec is None else spec
    o = choice.o
    bound = choice.engine.bind(spec, Layout(*(x.strides4() for x in (*views, o))), choice.family)
    call = Call(spec, o.shape, choice.o_like_q, o.shape[:-1], choice.lse_dtype, (o, *views), *bound)
    keep(cache, key, call)
    return call


class _Choice(NamedTuple):
    """What calls have in common that differ in their number of keys alone; `spec` is one of theirs."""

    spec: AttentionSpec
    o: View
    o_like_q: bool
    lse_dtype: np.dtype[Any]
    engine: engines.Engine
    family: kernels.Family


def _apart_from_keys(q: View, k: View, v: View, options: Options) -> Hashable | None:
    """All that is validated and chosen by, except for the number of keys: a decoder's next step finds it again. None
    where k and v are not of one length, or where a choice may not last (family_of)."""
    if q.device != "cpu" or len(k.shape) < 2 or k.shape[-2:-1] != v.shape[-2:-1]:
        return None
    return q, k.shape[:-2], k.shape[-1], k.dtype, k.device, v.shape[:-2], v.shape[-1], v.dtype, v.device, options


def _choose(q: View, k: View, v: View, out: Any, options: Options, spec: AttentionSpec | None) -> _Choice:
    """Validate (unless there is a spec), and choose what computes the call."""
    spec = options.spec(q, k, v) if spec is None else spec
    o_shape = q.shape[:-1] + v.shape[-1:]
    o = contiguous(o_shape, q.dtype, spec.device) if out is None else check_out(view_of(out), o_shape, spec)
    lse_dtype = DTYPES[DTYPES[spec.dtype].accumulator].numpy
    return _Choice(spec, o, o == q, lse_dtype, engine_of(spec, options.engine), family_of(spec, options.kernel))


def clear_cache() -> None:
    """Forget every prepared call: the next one chooses its kernel anew."""
    for kept in (cache, specs, backwards, _families, _choices):
        kept.clear()


def family_of(spec: AttentionSpec, kernel: object, direction: str = "forward") -> kernels.Family:
    """The kernel family of a call by its name; on a GPU, whose kernels may fail their self-test, picked each time."""
    name = as_name("kernel", kernel)
    if spec.device_kind != "cpu":
        return kernels.pick(spec, name, direction)
    sizes = spec.heads, spec.kv_heads, spec.head_size, spec.value_size
    key = name, direction, spec.dtype, spec.precision, sizes, spec.band is None, spec.program, spec.sinks, spec.dropout
    return find(_families, key) or keep(_families, key, kernels.pick(spec, name, direction))


T = TypeVar("T")


def find(kept: Mapping[Hashable, T], key: Hashable) -> T | None:
    try:
        return kept.get(key)
    except TypeError:  # an unhashable option is a wrong one; validation will name it
        return None


def keep(kept: dict[Hashable, T], key: Hashable, value: T) -> T:
    """Remember a value in place of the oldest, where there is no room."""
    if len(kept) >= CACHE_ENTRIES:
        with contextlib.suppress(RuntimeError, StopIteration, KeyError):  # another thread was faster
            del kept[next(iter(kept))]
    kept[key] = value
    return value


def engine_of(spec: AttentionSpec, engine: object) -> engines.Engine:
    """The engine of a call by its name; the direct one where there are no tiles to cut, and little to share."""
    chosen = engines.pick(as_name("engine", engine))
    return engines.pick("direct") if spec.empty else chosen


def check_out(o: View, shape: tuple[int, ...], spec: AttentionSpec) -> View:
    """`out`, if results of this shape can be written to it. Raises: SpecError."""
    if tuple(o.shape) != shape:
        raise wrong("out", f"shape {tuple(o.shape)}", f"{shape}")
    if o.device != spec.device:
        raise wrong("out", f"an array on {o.device}", f"one on {spec.device} as q")
    if dtype_of(o.dtype, "out").name != spec.dtype:
        raise wrong("out", f"dtype {dtype_of(o.dtype).name}", f"{spec.dtype} as in q")
    if o.may_overlap_itself():
        raise wrong("out", f"strides of {o.strides} bytes for shape {shape}", "elements that do not share memory")
    return o


def check_apart(call: Call, o: int, q: int, k: int, v: int) -> None:
    """Raise SpecError if `out` may share memory with an input, by the bytes that each spans from its address.

    Arrays that interleave within one span count as sharing: telling them apart can take exponential time.
    """
    below, above = call.extents[0]
    first, last = o + below, o + above
    for name, address, (below, above) in zip("qkv", (q, k, v), call.extents[1:], strict=True):
        if max(first, address + below) < min(last, address + above):
            raise wrong("out", f"an array within the memory that {name} spans", "memory of its own")
