"""Gradients of arrays that are larger than memory: `flashtile.attention_backward(..., memory_limit=...)`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flashtile.calls import INPUTS, check_rows, describe, gathered
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu.outofcore import Read
from flashtile.engines.starpu.outofcore_gradients import StreamedBackward
from flashtile.engines.starpu.outofcore_sums import Target
from flashtile.errors import wrong
from flashtile.gradient_problem import Gradients, Problem, check_out
from flashtile.kernels.gradients import Sums
from flashtile.outofcore import check_call, described, limit_of, readable
from flashtile.outputs import Place, place_of, reader, writer
from flashtile.score.capture import capture


def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    dlse: Any,
    wrt: Iterable[str],
    out: Any,
    accumulate: bool,
    memory_limit: Any,
    **keywords: Any,
) -> Gradients:
    """`flashtile.attention_backward` with a limit: the same arguments, none left out.

    Shapes:   do, q, k, v, o, lse and dlse NumPy arrays, memory-mapped or not, or arrays in storage (Zarr's, HDF5's).
    Options:  memory_limit  bytes that the call may take beside its inputs, and beside what its options capture.
              out  a Gradients; those of q, k and v are arrays, mapped or not, names of files, .npy or .zarr, or arrays
                   in storage: see outputs.py. Files are put in their places when all are whole.
    Returns:  Gradients; of an .npy file its map, of a Zarr array that, read only.
    Raises:   as flashtile.attention_backward; SpecError for a limit below the smallest working set, which it names.
    """
    limit = limit_of(memory_limit, keywords["engine"])
    given = dict(zip(INPUTS, (do, q, k, v, o, lse, dlse), strict=True))
    arrays = {name: readable(x, name) for name, x in given.items() if x is not None or name != "dlse"}
    views = tuple(described(arrays[name]) for name in "qkv")
    request = describe(views[0], *gathered(**keywords | {"engine": "starpu"}))
    problem = Problem.of(views, request, wrt)
    spec, scoring = problem.spec, problem.scoring
    rest = {name: arrays.get(name) for name in ("do", "o", "lse", "dlse")}
    check_rows(spec, views[0].shape[:-1], views[2].shape[-1:], **rest)
    sinks = keywords["sinks"]
    logits = None if sinks is None else capture(sinks, "sinks").array
    places = _places(problem, out, accumulate, tuple(given.values()))
    in_memory = replace(problem, sources=[x for x in problem.sources if x[0] not in places])
    check_out(out, accumulate, in_memory, (*arrays.values(), request.offsets, logits))
    check_call(spec, keywords["kernel"], "backward")
    folder = next((x.path.parent for x in places.values() if x.path is not None), None)
    call = _planned(problem, request.offsets, limit, 0 if out is not None else _bytes(problem), folder)
    real = DTYPES[DTYPES[spec.dtype].accumulator].numpy
    dsinks = np.zeros((spec.batch, spec.heads), real) if "sinks" in problem.wanted else None
    with ExitStack() as stack:
        made = {name: _made(stack, name, source, out, places) for name, source in problem.sources if name in "qkv"}
        readers = {n: reader(x, given[n], 3 if n in ("lse", "dlse") else 4) for n, x in arrays.items()}
        older = {name: getattr(out, name) for name in made} if accumulate else {}
        old = {name: reader(x, x) for name, x in older.items()}
        targets = {f"d{name}": Target(writer(x), old.get(name), _back(x)) for name, x in made.items()}
        totals = call.run(readers, targets, dsinks)
    done = made | {name: place.result() for name, place in places.items()}
    empty = {n: np.zeros(shape, real) for n, shape in scoring.shapes(problem.wanted).items() if 0 in shape}
    return problem.gradients(Sums(None, None, None, dsinks, empty | totals), out, accumulate, done)


def _bytes(problem: Problem) -> int:
    """Of the gradients of q, k and v that are wanted."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for name, x in problem.sources if name in "qkv")


def _planned(
    problem: Problem, offsets: np.ndarray | None, limit: int, results: int, folder: Path | None
) -> StreamedBackward:
    from flashtile.engines.starpu.engine import tile_sizes

    shapes = sorted(problem.scoring.shapes(problem.wanted).items())
    kept = tuple((n, shape) for n, shape in shapes if 0 not in shape)
    spec, tiles = problem.spec, tile_sizes(problem.spec, "backward")
    return StreamedBackward(spec, tiles, limit, results, offsets, problem.scoring, problem.wanted, kept, folder)


def _back(x: Any) -> Read | None:
    """How sums return that wait in a result; None where they wait in a file (outofcore_sums.py)."""
    return reader(x, x) if isinstance(x, np.ndarray) and not isinstance(x, np.memmap) else None


def _made(stack: ExitStack, name: str, source: Any, out: Any, places: dict[str, Place]) -> Any:
    """Where a gradient goes."""
    if name in places:
        return stack.enter_context(places[name].writing(source.shape, source.dtype))
    return np.empty(source.shape, source.dtype) if out is None else getattr(out, name)


def _places(problem: Problem, out: Any, accumulate: bool, inputs: tuple[Any, ...]) -> dict[str, Place]:
    """The files and arrays in storage that gradients of q, k and v go to. Raises: SpecError."""
    if not isinstance(out, Gradients):
        return {}
    sources = [(n, source) for n, source in problem.sources if n in ("q", "k", "v")]
    found = {n: place for n, _ in sources if (place := place_of(getattr(out, n), f"out.{n}")) is not None}
    for name, source in sources:
        if (place := found.get(name)) is None:
            continue
        if accumulate and place.target is place.path:
            raise wrong(place.name, f"{str(place.path)!r} with accumulate", "an array, which may be the file's map")
        same = [x for x in found.values() if x.target is place.target or (x.path is not None and x.path == place.path)]
        if len(same) > 1:
            raise wrong(place.name, repr(str(place.path or place.target)), "a file of its own")
        place.check(source.shape, source.dtype, inputs)
    return found
