"""`flashtile.attention_backward` of arrays on a GPU whose library has no autograd: CuPy's, and JAX's outside of jit."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashtile import kernels
from flashtile.arrays import View, device_of
from flashtile.calls import as_name, describe, gathered
from flashtile.current import Here, calling
from flashtile.devices import gradients, one_library
from flashtile.dtypes import DTYPES, dtype_of
from flashtile.errors import owned, wrong
from flashtile.gradient_problem import ByIdentity, Gradients, Problem, array_sum
from flashtile.kernels.gradients import Sums
from flashtile.owners import Owner, borrow, give_back, hold, library_of, owner_of
from flashtile.score.capture import is_array


def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    dlse: Any,
    wrt: Any,
    out: Any,
    accumulate: bool,
    **keywords: Any,
) -> Gradients:
    """The same arguments, none left out; `out` is not taken.

    Returns:  Gradients of arrays of the library that q came from, on its device, which the launched kernels will have
              written when the stream has come there; those of arrays on the host, too.
    Raises:   as flashtile.attention_backward; KernelError if the device has no memory left.
    """
    if out is not None or accumulate:
        raise wrong("out", "an array to write to", "None for arrays on a GPU: they are new")
    library = one_library(q, k, v, None)
    owner = owner_of(library)
    given, options = gathered(**keywords)
    request = describe(q, tuple(borrow(owner, x) if is_array(x) else x for x in given), options)
    arrays = {name: borrow(owner, x) for name, x in (("q", q), ("k", k), ("v", v))}
    views = owner.view(arrays["q"]), owner.view(arrays["k"]), owner.view(arrays["v"])
    problem = Problem.of(views, request, wrt)
    for name, x in (("do", do), ("o", o), ("lse", lse), ("dlse", dlse)):
        if x is not None or name != "dlse":
            arrays[name] = _checked(owner, library, problem, name, x, q, v)
    with calling(owner, arrays["q"]) as place:
        family = kernels.pick(problem.spec, as_name("kernel", options.kernel), "backward")
        results = {f"d{n}": _like(place, x) for n, x in problem.sources if n in ("q", "k", "v")}
        call = problem.spec, arrays | results, problem.offset, problem.scoring, problem.wanted
        try:
            sums = gradients(owner, family, *call, engine=as_name("engine", options.engine))
            return _finished(owner, place, library, problem, results, sums)
        finally:
            if library != "torch":
                hold(owner, *arrays.values(), request.scores)


def _checked(owner: Owner, library: str, problem: Problem, name: str, x: Any, q: Any, v: Any) -> Any:
    """An array beside q, k and v, as the owner's; lse and dlse row-major. Raises: SpecError."""
    if library_of(x) != library or device_of(x) != problem.spec.device:
        raise wrong(name, f"{owned(x)} on {device_of(x)}", f"an array on {problem.spec.device} as q")
    found = borrow(owner, x)
    view, row = owner.view(found), name in ("lse", "dlse")
    shape = tuple(q.shape[:-1]) + (() if row else tuple(v.shape[-1:]))
    dtype = DTYPES[problem.spec.dtype].accumulator if row else problem.spec.dtype
    if tuple(view.shape) != shape:
        raise wrong(name, f"shape {tuple(view.shape)}", f"{shape}")
    if dtype_of(view.dtype, name).name != dtype:
        raise wrong(name, f"dtype {dtype_of(view.dtype).name}", dtype)
    return owner.spread(found, shape, dtype) if row else found


def _like(place: Here, x: View) -> Any:
    """Zeros of an array's shape and dtype."""
    return place.zeros(tuple(x.shape), dtype_of(x.dtype).name, "a gradient")


def _finished(
    owner: Owner, place: Here, library: str, problem: Problem, results: dict[str, Any], sums: Sums
) -> Gradients:
    """Sums in their arrays' dtypes, and everything as arrays of the library."""
    done: dict[str, Any] = {}
    captured: list[tuple[Any, Any]] = []
    for name, source in problem.sources:
        if f"d{name}" in results:
            done[name] = give_back(library, results[f"d{name}"])
            continue
        total: Any = sums.sinks if name == "sinks" else array_sum(sums, source, problem.scoring)
        if name == "sinks" and source.ndim == 1:
            total = total.sum(axis=0)
        dtype = dtype_of(source.dtype).name
        if isinstance(total, np.ndarray):  # nothing depends on it
            total = place.zeros(tuple(source.shape), dtype, "a gradient")
        found = give_back(library, owner.spread(total, tuple(source.shape), dtype))
        if name == "captured":
            captured.append((source, found))
        else:
            done[name] = found
    return Gradients(**done, captured=ByIdentity(captured) if "captured" in problem.names else None)
