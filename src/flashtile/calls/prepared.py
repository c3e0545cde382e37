"""What calls of the same shapes, strides, dtypes and options have in common, and the caches of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from flashtile import engines, kernels
from flashtile.arrays import View, check_outside, contiguous, view_of
from flashtile.calls.request import Options, as_name
from flashtile.dtypes import DTYPES, dtype_of
from flashtile.errors import wrong
from flashtile.kernels import Keys, Layout, Strides
from flashtile.score.options import Scoring, read_beside
from flashtile.spec import AttentionSpec

# A program that meets a new shape at every step, as a decoder does, must not collect calls without end.
CACHE_ENTRIES = 1024

cache: dict[Hashable, Call] = {}
# What was validated of calls before their options that change scores, which are read anew at every call; `_specs`: for
# whatever number of keys.
specs: dict[Hashable, AttentionSpec] = {}
_specs: dict[Hashable, AttentionSpec] = {}
backwards: dict[Hashable, engines.BoundBackward] = {}
repeated_backwards: dict[Hashable, engines.BoundBackward] = {}  # found without validation
# Neither what is picked for a call nor what is compiled depends on its lengths: a decoder's next step finds both here.
_families: dict[Hashable, kernels.Family] = {}
_choices: dict[Hashable, _Choice] = {}


class Call(NamedTuple):
    """What every call with the same shapes, strides, dtypes and options has in common."""

    like: AttentionSpec  # `spec`, of whatever keys
    keys: Keys
    o_shape: tuple[int, ...]
    o_like_q: bool  # q itself has the shape and layout of a new output
    lse_shape: tuple[int, ...]
    lse_dtype: np.dtype[Any]
    extents: tuple[tuple[int, int], ...]  # of o, q, k, v where `out` is given; see View.extent
    pack: engines.Pack
    run: engines.Run
    native: engines.Native | None

    @property
    def spec(self) -> AttentionSpec:
        kv_len, offset, _, _ = self.keys
        return self.like if self.like.kv_len == kv_len else self.like.changed(kv_len=kv_len, offset=offset)


def lookup(key: Hashable) -> Call | None:
    """The call prepared under a key, if there is one."""
    return find(cache, key)


def prepare(
    key: Hashable, q: Any, k: Any, v: Any, out: Any, options: Options, spec: AttentionSpec | None = None
) -> Call:
    """Validate (unless there is a spec), choose a kernel, plan and compile; remember the result under `key`. Of a call
    that differs from an earlier one in its number of keys alone, only what follows from that number is found out.

    out may be None.

    Raises: SpecError and UnavailableError, before any memory is touched.
    """
    views = view_of(q), view_of(k), view_of(v)
    target = None if out is None else view_of(out)
    alike = _apart_from_keys(*views, target, options, spec)
    choice = None if alike is None else find(_choices, alike)
    if choice is None:
        choice = _choose(*views, target, options, spec)
    like, kv_len = choice.spec if spec is None else spec, views[1].shape[-2]
    offset = like.offset if like.kv_len == kv_len else like.offset_at(kv_len, options.align)
    keys = Keys(kv_len, offset, views[1].strides4(), views[2].strides4())
    bound = None if choice.at is None else choice.at(keys)
    if bound is None:
        like = like.changed(kv_len=kv_len, offset=offset)
        bound = choice.engine.bind(like, Layout(choice.q_strides, keys.k, keys.v, choice.o_strides), choice.family)
        if alike is not None:
            keep(_choices, alike, choice._replace(spec=like, at=bound.at))
    o = choice.o
    extents = () if out is None else tuple(x.extent() for x in (o, *views))
    shapes = o.shape, choice.o_like_q, o.shape[:-1], choice.lse_dtype
    return keep(cache, key, Call(like, keys, *shapes, extents, bound.pack, bound.run, bound.native))


class _Choice(NamedTuple):
    """What calls have in common that differ in their keys alone: `spec` is one of theirs, and `at`, where there is one,
    makes others of what was bound."""

    spec: AttentionSpec
    o: View
    o_like_q: bool
    lse_dtype: np.dtype[Any]
    q_strides: Strides
    o_strides: Strides
    engine: engines.Engine
    family: kernels.Family
    at: Callable[[Keys], engines.Bound | None] | None = None


def _apart_from_keys(
    q: View, k: View, v: View, out: View | None, options: Options, spec: AttentionSpec | None = None
) -> Hashable | None:
    """All that is validated and chosen by, except for the number of keys: a decoder's next step finds it again. None
    where k and v are not of one length, or where a choice may not last (family_of)."""
    if q.device != "cpu" or len(k.shape) < 2 or k.shape[-2:-1] != v.shape[-2:-1]:
        return None
    of_k, of_v = (k.shape[:-2], k.shape[-1], k.dtype, k.device), (v.shape[:-2], v.shape[-1], v.dtype, v.device)
    given = None if spec is None else (spec.band, spec.program, spec.sinks, spec.dropout)
    return q, of_k, of_v, out, options, given


def _choose(q: View, k: View, v: View, out: View | None, options: Options, spec: AttentionSpec | None) -> _Choice:
    """Validate (unless there is a spec), and choose what computes the call."""
    spec = options.spec(q, k, v) if spec is None else spec
    o_shape = q.shape[:-1] + v.shape[-1:]
    o = contiguous(o_shape, q.dtype, spec.device) if out is None else check_out(out, o_shape, spec)
    lse_dtype = DTYPES[DTYPES[spec.dtype].accumulator].numpy
    computed_by = engine_of(spec, options.engine), family_of(spec, options.kernel)
    return _Choice(spec, o, o == q, lse_dtype, q.strides4(), o.strides4(), *computed_by)


def validated(q: View, k: View, v: View, options: Options, positional: bool) -> AttentionSpec:
    """The spec of a call before the options that change scores; positional: as of `AttentionSpec.of`.

    Raises: SpecError.
    """
    alike = _apart_from_keys(q, k, v, None, options), positional
    near = None if alike[0] is None else find(_specs, alike)
    if near is None:
        near = options.spec(q, k, v, positional)
        if alike[0] is not None:
            keep(_specs, alike, near)
    return near.with_keys(k.shape[-2], options.align, positional)


def clear_cache() -> None:
    """Forget every prepared call: the next one chooses its kernel anew."""
    for kept in (cache, specs, _specs, backwards, repeated_backwards, _families, _choices):
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
    """Remember a value in place of the oldest ones, where there is no room."""
    if len(kept) >= CACHE_ENTRIES and key not in kept:
        for old in list(itertools.islice(kept, 1 + CACHE_ENTRIES // 8)):
            kept.pop(old, None)  # another thread may have been faster
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


def check_apart(
    call: Call, o: int, q: int, k: int, v: int, offsets: Any = None, scoring: Scoring | None = None
) -> None:
    """Raise SpecError if `out` may share memory with anything that the call reads, by the bytes that each spans from
    its address: what is read while rows are written must still be what the caller gave.

    Arrays that interleave within one span count as sharing: telling them apart can take exponential time.
    """
    below, above = call.extents[0]
    memory = o + below, o + above
    inputs = zip("qkv", (q, k, v), call.extents[1:], strict=True)
    read = [(name, at + below, at + above) for name, at, (below, above) in inputs]
    check_outside("out", memory, (*read, *read_beside(scoring, offsets)))
