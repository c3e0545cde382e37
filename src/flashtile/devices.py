"""A call on a GPU, from the arrays of whatever library to the launches of a kernel.

It runs on the stream that is current in that library, and its results and workspace come from that library's
allocator, which knows the stream: nothing here waits for the device, and memory may be given back while a kernel that
uses it has yet to run.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from flashtile import calls
from flashtile.arrays import View, device_of
from flashtile.calls import Call, Request, describe, gathered
from flashtile.calls.backward import Memory
from flashtile.checks import check_flag
from flashtile.current import Here, calling
from flashtile.dtypes import DTYPES
from flashtile.errors import owned, wrong
from flashtile.kernels import Family
from flashtile.kernels.gradients import Sums
from flashtile.owners import LENDERS, Owner, borrow, give_back, hold, library_of, owner_of
from flashtile.score.capture import ArrayCapture, capture, is_array
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec


def attention(q: Any, k: Any, v: Any, *, return_lse: bool, progress: Any, out: Any, **keywords: Any) -> Any:
    """`flashtile.attention` where an input lies on a GPU: the same arguments, none left out.

    Returns:  arrays of the library that q came from, on the device of q, which the launched kernels will have written
              when the stream has come there.
    Raises:   as flashtile.attention; KernelError if the device has no memory left, the library's error as its cause.
    """
    check_flag("return_lse", return_lse)
    library = one_library(q, k, v, out)
    owner = owner_of(library)
    inputs = borrow(owner, q), borrow(owner, k), borrow(owner, v)
    given, options = gathered(**keywords)
    request = describe(q, tuple(borrow(owner, x) if is_array(x) else x for x in given), options)
    # JAX's memory, lent, and CuPy's, of another stream, might be given to an operation that no one orders behind the
    # kernels; with torch that is the caller's record_stream.
    held = () if library == "torch" else (*inputs, request.scores)
    found = attend(owner, *inputs, request, return_lse, progress, out, held=held)
    results = found if return_lse else (found,)
    results = tuple(x if x is out else give_back(library, x) for x in results)
    return results if return_lse else results[0]


def lent(q: Any, k: Any, v: Any, out: Any) -> list[np.ndarray]:
    """JAX's arrays on the CPU, which NumPy reads where they lie.

    Raises:   SpecError for arrays of another library beside them, and for a traced one, which has no values yet.
    """
    import jax

    one_library(q, k, v, out)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, jax.core.Tracer):
            expected = "one with values; inside of jit, grad and vmap call flashtile.jax.dot_product_attention"
            raise wrong(name, f"a {type(x).__name__}", expected)
    return [np.asarray(x) for x in (q, k, v)]


def attend(owner: Owner, q: Any, *call: Any, held: tuple[Any, ...] = ()) -> Any:
    """`calls.attend` of arrays of the owner's, on the device of q and its current stream.

    held: what lives until the device has read it.
    """
    with calling(owner, q) as place:
        arrays = OnDevice(owner, place)
        try:
            return calls.attend(arrays, q, *call)
        finally:  # some kernels of a call that failed may be under way
            if held and arrays.read:
                hold(owner, *held)


def traced(owner: Owner, q: Any, k: Any, v: Any, request: Request) -> Request:
    """`calls.traced` of arrays of the owner's, for which nothing is asked of the device."""
    return calls.traced(OnDevice(owner), q, k, v, request)


def gradients(
    owner: Owner,
    family: Family,
    spec: AttentionSpec,
    given: Mapping[str, Any],
    offset: Any,
    scoring: Scoring,
    wanted: Collection[str | int],
    engine: str = "auto",
) -> Sums:
    """`calls.run_backward` of arrays of the owner's, on the current stream: the sums are arrays of the owner's, too."""
    with calling(owner, given["q"]) as place:
        arrays = OnDevice(owner, place)
        placed = arrays.reach(spec, None, scoring)[1]
        memory = Memory(
            zeros=lambda shape, dtype: place.zeros(shape, dtype.name, "a gradient"),
            place=lambda array: place.upload(array, "align"),
            address=owner.address,
        )
        return calls.run_backward(arrays, spec, family, engine, given, offset, placed, wanted, memory=memory)


class OnDevice:
    """The arrays of one call on a GPU; see `calls.Arrays`. place: None for who makes no array and reads none."""

    def __init__(self, owner: Owner, place: Here | None = None) -> None:
        self._owner, self._here = owner, place
        self.read = False  # whether kernels may have been told where they lie
        self._kept: Any = None  # what the launched kernels read, until the call's own memory was asked for

    def key(self, q: Any, k: Any, v: Any, out: Any) -> Hashable:
        key = self._owner.key
        return key(q), key(k), key(v), None if out is None else key(out)

    def view(self, x: Any) -> View:
        return self._owner.view(x)

    def strides(self, x: Any) -> Hashable:
        return self._owner.key(x)

    @property
    def _place(self) -> Here:
        assert self._here is not None
        return self._here

    def output(self, call: Call, q: Any) -> Any:
        return self._place.empty(call.o_shape, call.spec.dtype, "the output")

    def lse(self, call: Call, q: Any) -> Any:
        return self._place.empty(call.lse_shape, DTYPES[call.spec.dtype].accumulator, "lse")

    def address(self, x: Any) -> int:
        return self._owner.address(x)

    def addresses(self, q: Any, k: Any, v: Any, o: Any) -> tuple[int, int, int, int]:
        self.read = True
        at = self._owner.address
        return at(q), at(k), at(v), at(o)

    def reach(self, spec: AttentionSpec, offsets: Any, scoring: Scoring | None) -> tuple[int, Scoring | None]:
        """Offsets in a copy there; of sinks that lie on the device, too, as kernels read them: (B, H), in the
        accumulator's dtype."""
        offsets_at = 0
        if offsets is not None and spec.offset is None:
            self._kept = self._place.upload(offsets, "align")
            offsets_at = self._owner.address(self._kept)
        if scoring is not None and isinstance(scoring.sinks, ArrayCapture):
            shape, dtype = (spec.batch, spec.heads), DTYPES[spec.dtype].accumulator
            scoring = replace(scoring, sinks=capture(self._owner.spread(scoring.sinks.source, shape, dtype), "sinks"))
        return offsets_at, scoring


def one_library(q: Any, k: Any, v: Any, out: Any) -> str:
    """The library that all arrays come from. Raises: SpecError."""
    library = library_of(q)
    for name, x in (("k", k), ("v", v), ("out", out)):
        if (x is None and name == "out") or type(x) is type(q) or library_of(x) == library:
            continue
        got = f"{owned(x)} on {device_of(x)}" if is_array(x) else owned(x)
        raise wrong(name, got, f"{owned(q)} on {device_of(q)} as q")
    if out is not None and library in LENDERS:
        raise wrong("out", f"an array of {LENDERS[library]}, whose arrays are not written to", "None")
    return library
