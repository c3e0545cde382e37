"""What calls of the same shapes, strides, dtypes and options have in common, and the caches of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

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


def lookup(key: Hashable, kept: dict[Hashable, Any] = cache) -> Any:
    """What was prepared under a key, by default a call; None if nothing was."""
    try:
        return kept.get(key)
    except TypeError:  # an unhashable option is a wrong one; validation will name it
        return None


def prepare(
    key: Hashable, q: Any, k: Any, v: Any, out: Any, options: Options, spec: AttentionSpec | None = None
) -> Call:
    """Validate (unless there is a spec), choose a kernel, plan and compile; remember the result under `key`.

    out may be None.

    Raises: SpecError and UnavailableError, before any memory is touched.
    """
    spec = options.spec(q, k, v) if spec is None else spec
    views = [view_of(x) for x in (q, k, v)]
    o_shape = views[0].shape[:-1] + views[2].shape[-1:]
    o = contiguous(o_shape, q.dtype, spec.device) if out is None else check_out(view_of(out), o_shape, spec)
    engine = engine_of(spec, options.engine)
    family = family_of(spec, options.kernel)
    layout = Layout(*(x.strides4() for x in (*views, o)))
    pack, run = engine.bind(spec, layout, family)
    call = Call(
        spec,
        o_shape,
        o_like_q=o == views[0],
        lse_shape=o_shape[:-1],
        lse_dtype=DTYPES[DTYPES[spec.dtype].accumulator].numpy,
        views=(o, *views),
        pack=pack,
        run=run,
    )
    forget_oldest(cache)
    cache[key] = call
    return call


def clear_cache() -> None:
    """Forget every prepared call: the next one chooses its kernel anew."""
    for kept in (cache, specs, backwards, _families):
        kept.clear()


def family_of(spec: AttentionSpec, kernel: object, direction: str = "forward") -> kernels.Family:
    """The kernel family of a call by its name; on a GPU, whose kernels may fail their self-test, picked each time."""
    name = as_name("kernel", kernel)
    if spec.device_kind != "cpu":
        return kernels.pick(spec, name, direction)
    sizes = spec.heads, spec.kv_heads, spec.head_size, spec.value_size
    key = name, direction, spec.dtype, spec.precision, sizes, spec.band is None, spec.program, spec.sinks, spec.dropout
    found = _families.get(key)
    if found is None:
        forget_oldest(_families)
        found = _families[key] = kernels.pick(spec, name, direction)
    return found


def forget_oldest(kept: dict[Hashable, Any]) -> None:
    """Make room for one more."""
    if len(kept) >= CACHE_ENTRIES:
        with contextlib.suppress(RuntimeError, StopIteration, KeyError):  # another thread was faster
            del kept[next(iter(kept))]


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
