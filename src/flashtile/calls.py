"""A prepared call, and the cache of them: a repeated call is one dictionary lookup away from its kernel."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from flashtile import engines, kernels
from flashtile.arrays import View, address_of, contiguous, view_of
from flashtile.dtypes import DTYPES, dtype_of
from flashtile.errors import described, wrong
from flashtile.kernels import ArrayShapes, BackwardLayout, Layout
from flashtile.kernels.gradients import Sums
from flashtile.score.options import ScoreOptions, Scoring
from flashtile.spec import LARGEST_POSITION, PER_BATCH, AttentionSpec

# A program that meets a new shape at every step, as a decoder does, must not collect calls without end.
CACHE_ENTRIES = 1024

cache: dict[Hashable, Call] = {}
# What is picked for a call does not depend on its lengths, so a decoder's next step need not pick again.
_families: dict[Hashable, kernels.Family] = {}
_choices: dict[Hashable, _Choice] = {}
_backwards: dict[Hashable, engines.BoundBackward] = {}


class Options(NamedTuple):
    """The keywords of attention that decide which kernel runs. `align` is PER_BATCH where an array came."""

    causal: Any
    window: Any
    align: Any
    scale: Any
    precision: Any
    kernel: Any
    engine: Any

    def spec(self, q: Any, k: Any, v: Any, positional: bool = False) -> AttentionSpec:
        """Validate the options against q, k and v (anything with `shape` and `dtype`); see AttentionSpec.of."""
        return AttentionSpec.of(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            align=self.align,
            scale=self.scale,
            precision=self.precision,
            positional=positional,
        )

    def scored(
        self, scores: ScoreOptions, q: Any, k: Any, v: Any, offsets: np.ndarray | None
    ) -> tuple[AttentionSpec, Scoring]:
        """Validate a call with options that change scores: its spec, and their values, read anew at every call."""
        spec = self.spec(q, k, v, scores.positional)
        offset = offsets if spec.offset is None else spec.offset
        return scores.scoring(spec, self.causal, self.window, offset)


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

    @functools.cached_property
    def extents(self) -> tuple[tuple[int, int], ...]:
        """Of o, q, k, v; see View.extent."""
        return tuple(x.extent() for x in self.views)


def lookup(key: Hashable) -> Call | None:
    """The call prepared under a key, if there is one."""
    return _find(cache, key)


def prepare(
    key: Hashable, q: Any, k: Any, v: Any, out: Any, options: Options, spec: AttentionSpec | None = None
) -> Call:
    """Validate (unless there is a spec), choose a kernel, plan and compile; remember the result under `key`.

    out may be None.

    Raises: SpecError and UnavailableError, before any memory is touched.
    """
    views = view_of(q), view_of(k), view_of(v)
    alike = _apart_from_keys(*views, options) if spec is out is None else None
    choice = None if alike is None else _find(_choices, alike)
    if choice is None:
        choice = _choose(*views, out, options, spec)
        if alike is not None:
            _keep(_choices, alike, choice)
    spec = choice.spec.with_keys(views[1].shape[-2], options.align) if spec is None else spec
    o = choice.o
    pack, run = choice.engine.bind(spec, Layout(*(x.strides4() for x in (*views, o))), choice.family)
    call = Call(spec, o.shape, choice.o_like_q, o.shape[:-1], choice.lse_dtype, (o, *views), pack, run)
    _keep(cache, key, call)
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
    cache.clear()
    _backwards.clear()
    _families.clear()
    _choices.clear()


def run_backward(
    spec: AttentionSpec,
    family: kernels.Family,
    engine: str,
    arrays: Mapping[str, Any],
    offset: Any,
    scoring: Scoring | None = None,
    wanted: Collection[str | int] = (),
    *,
    address: Callable[[Any], int],
    strides: Callable[[Any], tuple[int, ...]],
) -> Sums:
    """Gradients of a family that compiles its backward: of q, k and v added to those of dq, dk and dv that are among
    `arrays`; returned, those of "sinks" and of captured arrays, by their slots, that are `wanted`.

    The others are q, k, v, o and do, of any strides, lse and possibly dlse, row-major; `address` and `strides` ask the
    library that owns them.
    """
    captured = {} if scoring is None else scoring.shapes(wanted)
    real = DTYPES[DTYPES[spec.dtype].accumulator].numpy
    empty = {n: np.zeros(shape, real) for n, shape in captured.items() if 0 in shape}
    shapes = tuple(sorted((n, shape) for n, shape in captured.items() if n not in empty))
    key = spec, family.name, engine, shapes, *((name, strides(x)) for name, x in arrays.items())
    found = _backwards.get(key) or _keep(_backwards, key, _bind_backward(spec, family, engine, arrays, shapes))
    at = dict.fromkeys(_OPERANDS, 0) | {name: address(x) for name, x in arrays.items()}
    offsets = None if spec.offset is not None else np.ascontiguousarray(offset, np.int64)
    dsinks = np.zeros((spec.batch, spec.heads), real) if "sinks" in wanted else None
    beside = {name: 0 if x is None else address_of(x) for name, x in (("offsets", offsets), ("dsinks", dsinks))}
    params = found.pack(**at, **beside, scoring=scoring)
    found.run(params)
    return Sums(None, None, None, dsinks, {**empty, **found.totals(params)})


_OPERANDS = ("q", "k", "v", "o", "do", "dq", "dk", "dv", "lse", "dlse")


def _bind_backward(
    spec: AttentionSpec, family: kernels.Family, engine: str, arrays: Mapping[str, Any], shapes: ArrayShapes
) -> engines.BoundBackward:
    """A backward call made ready, by the direct engine where the one named has no backward."""
    absent = (0, 0, 0, 0)
    layout = BackwardLayout(*(view_of(arrays[x]).strides4() if x in arrays else absent for x in _OPERANDS[:8]))
    bind = engine_of(spec, engine).bind_backward or engines.pick("direct").bind_backward
    assert bind is not None
    return bind(spec, layout, family, shapes)


def family_of(spec: AttentionSpec, kernel: object) -> kernels.Family:
    """The kernel family of a call by its name; on a GPU, whose kernels may fail their self-test, picked each time."""
    name = as_name("kernel", kernel)
    if spec.device_kind != "cpu":
        return kernels.pick(spec, name)
    sizes = spec.heads, spec.kv_heads, spec.head_size, spec.value_size
    key = name, spec.dtype, spec.precision, sizes, spec.band is None, spec.program, spec.sinks, spec.dropout
    return _find(_families, key) or _keep(_families, key, kernels.pick(spec, name))


T = TypeVar("T")


def _find(kept: Mapping[Hashable, T], key: Hashable) -> T | None:
    try:
        return kept.get(key)
    except TypeError:  # an unhashable option is a wrong one; validation will name it
        return None


def _keep(kept: dict[Hashable, T], key: Hashable, value: T) -> T:
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


def as_name(argument: str, value: object) -> str:
    """The name of a kernel or engine, which must be a string."""
    if not isinstance(value, str):
        raise wrong(argument, repr(value), "a name")
    return value


def as_key(window: Any) -> Any:
    """A window as a part of a cache key; a list is as good as a tuple."""
    return tuple(window) if type(window) is list else window


def as_offsets(align: Any, batch: int) -> np.ndarray:
    """An integer array given as `align`, as the contiguous int64 array that kernels read."""
    expected = f"an integer array of shape ({batch},)"
    try:
        offsets = np.asarray(align)
    except Exception as cause:
        raise wrong("align", described(align), expected) from cause
    if offsets.dtype.kind not in "iu":
        raise wrong("align", f"dtype {offsets.dtype}", expected)
    if offsets.shape != (batch,):
        raise wrong("align", f"shape {offsets.shape}", expected)
    if offsets.size and not -LARGEST_POSITION <= int(offsets.min()) <= int(offsets.max()) <= LARGEST_POSITION:
        raise wrong("align", f"offsets from {offsets.min()} to {offsets.max()}", f"at most {LARGEST_POSITION}")
    return np.ascontiguousarray(offsets, np.int64)


def split_align(align: Any, q_shape: tuple[int, ...]) -> tuple[Any, np.ndarray | None]:
    """(what `align` contributes to a cache key, the offsets if it is an array)."""
    if align is None or isinstance(align, (str, int, float, np.generic)):
        return align, None
    return PER_BATCH, as_offsets(align, q_shape[0] if len(q_shape) == 4 else 1)


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
