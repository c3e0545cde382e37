"""The door for programs on several ranks (processes, machines): attention of a sequence of which each has some rows::

    rows = flashtile.starpu_mpi.part(length, rank, ranks)              # this rank's rows of q, k, v and o
    q, k, v = (x[:, :, rows] for x in whole)
    o, lse = flashtile.starpu_mpi.attention(q, k, v, causal=True, return_lse=True)
    g = flashtile.starpu_mpi.attention_backward(do, q, k, v, o, lse, causal=True)

Exact, every option of the kernels, and the same bits on any number of ranks. MPI comes from mpi4py, transfers and
tasks from StarPU-MPI and StarPU. Start it with `flashtile mpi run -n 4 script.py`, or any mpirun.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np

from flashtile.arrays import plain
from flashtile.calls import describe
from flashtile.checks import integer
from flashtile.dtypes import DTYPES, dtype_of
from flashtile.engines.starpu.engine import OPTIONS
from flashtile.engines.starpu.tiles import can_tile
from flashtile.engines.starpu_mpi import build, cpus
from flashtile.engines.starpu_mpi.bias import RowsOfBias
from flashtile.engines.starpu_mpi.collective import Collective, Cut, agree, identity, same
from flashtile.engines.starpu_mpi.gradients import CollectiveBackward
from flashtile.engines.starpu_mpi.heads import Heads
from flashtile.engines.starpu_mpi.parts import ZIGZAG, rows_of, tiles_of
from flashtile.errors import UnavailableError, described, wrong
from flashtile.gradient_problem import Gradients, Problem, slots_of, wrt_of
from flashtile.hints import check_keywords
from flashtile.kernels.gradients import Sums
from flashtile.score.keep import keep_of
from flashtile.signature import Align, Precision, Window
from flashtile.spec import AttentionSpec

__all__ = ["TILE", "attention", "attention_backward", "part"]
__dir__ = __all__.copy  # the public names, and not what stands beside them

Whole = tuple[Any, Any, Any]  # q, k and v of all ranks together: what has their shapes and dtypes

TILE = 960  # rows of a tile: whole panels on every instruction set


def part(length: int, rank: int, ranks: int, *, tile: int = TILE, distribution: str = ZIGZAG) -> np.ndarray:
    """The numbers of the rows of a sequence that a rank has: int64, ascending within each of its chunks.

    distribution: "zigzag", two chunks a rank, the rank-th from either end, so that causal work is even; "contiguous",
                  one. Chunks are whole tiles of `tile` rows, as even as they come; a rank may have none.
    Raises:       SpecError.
    """
    for name, n, least in (("length", length, 0), ("ranks", ranks, 1), ("rank", rank, 0)):
        number = integer(n)
        if number is None or number < least:
            raise wrong(name, repr(n), f"an integer of at least {least}")
    if rank >= ranks:
        raise wrong("rank", rank, f"one below the number of ranks, {ranks}")
    return rows_of(tiles_of(length, rank, ranks, _positive("tile", tile), distribution), length, tile)


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    score_mod: Any = None,
    causal: bool = False,
    window: Window = None,
    align: Align = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    precision: Precision = "ieee",
    return_lse: bool = False,
    tile: int = TILE,
    distribution: str = ZIGZAG,
    exchange: int = 1,
    comm: Any = None,
    **unknown: NoReturn,  # checkers refuse it, as calls do
) -> Any:
    """Attention of the whole sequence, on this rank's rows. Every rank of `comm` makes the call, with equal options.

    Shapes:  q (B, H, s_q, D), k (B, H_kv, s_kv, D), v (B, H_kv, s_kv, D_v), NumPy arrays: the rows of the sequence that
             `part` gives this rank, in its order; of the queries by their length, of the keys by theirs.
    Options: as `flashtile.attention`, about the whole: causal and window, i and j of functions count over the whole
             sequence; arrays (masks, slopes, sinks, what functions captured) are whole on every rank. A bias has this
             rank's rows, in their order, or on every rank all of them.
             tile, distribution  as in `part`: results depend on the tile as they do on a kernel, and on nothing else
             of how the sequence is cut.
             exchange  ranks of a group that first exchange rows for heads (Ulysses): tiles then travel between groups
             only, of a rank's heads; for options that count no heads by themselves (no functions, no dropout).
             comm  an mpi4py communicator; None: all ranks.
    Returns: o (B, H, s_q, D_v), or (o, lse) with lse (B, H, s_q): of this rank's rows.
    Memory:  a rank holds, beside its own, the keys and values of others that some of its rows sees.
    Raises:  SpecError, UnavailableError on every rank, before anything is submitted: also where ranks differ, or one
             has rows that `part` does not give it. KernelError on every rank where a task of one failed.
    """
    check_keywords(attention, unknown)
    comm = _communicator(comm)
    options = causal, window, align, scale, precision, "cpu", "starpu"
    mine = agree(comm, lambda: _described(q, k, v, bias, tile, distribution, exchange))
    cut = Cut(comm.Get_size(), tile, distribution)
    whole = _whole(mine, cut)
    part = _rows_of_bias(mine, bias)
    bias = bias if part is None else part.whole
    heads = None if exchange == 1 else _heads(comm, cut, whole, part, exchange)
    plans: list[Collective] = []

    def plan() -> dict[str, str]:
        cpus.start([said["cpus"] for said in mine], comm.Get_rank())
        scores = mask, bias, score_mod, softcap, alibi_slopes, sinks, keep_of(dropout_p, seed)
        own, (on, over) = whole, (comm, cut)
        if heads is not None:
            scores, own, (on, over) = heads.scores(scores), heads.whole(whole), (heads.across, heads.cut)
        request = describe(own[0], scores, options)
        spec, scoring = request.of(*own)
        _check(spec, own)
        plans.append(Collective(on, spec, over, request.offsets, scoring if request.scores else None, part))
        return {"options": repr(request.options), "values of options": identity(spec, scoring, request.offsets)}

    same(agree(comm, plan), exchange)
    spec = plans[0].spec
    accumulator = DTYPES[DTYPES[spec.dtype].accumulator].numpy
    q, k, v = (_reachable(plain(x, name)) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    if heads is not None:
        q, k, v = heads.gather((spec.q_len, spec.kv_len, spec.kv_len), (q, k, v))
    o = np.empty((*q.shape[:3], spec.value_size), q.dtype)
    lse = np.empty(o.shape[:3], accumulator)
    agree(comm, lambda: plans[0].run(q, k, v, o, lse))
    if heads is not None:
        o, lse = heads.scatter((spec.q_len, spec.q_len), (o, lse))
    return (o, lse) if return_lse else o


def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    *,
    dlse: Any = None,
    wrt: Iterable[str] = ("q", "k", "v"),
    mask: Any = None,
    bias: Any = None,
    score_mod: Any = None,
    causal: bool = False,
    window: Window = None,
    align: Align = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    precision: Precision = "ieee",
    tile: int = TILE,
    distribution: str = ZIGZAG,
    exchange: int = 1,
    comm: Any = None,
    **unknown: NoReturn,  # checkers refuse it, as calls do
) -> Gradients:
    """Gradients of sum(do * o) + sum(dlse * lse) over the whole sequence, as `attention` on every rank of `comm`.

    Shapes:  q, k, v, o and lse of this rank's rows, as `attention` took and returned them; do as o, dlse as lse.
    Options: wrt as in `flashtile.attention_backward`, the rest as of the forward call, dropout's seed included.
    Returns: Gradients: of q, k and v, and of a bias cut by rows, this rank's rows; of what every rank has whole (bias,
             sinks, alibi_slopes, captured arrays) the same whole gradient on each.
    Numerics: as `flashtile.attention_backward` by tasks of this tile; the same bits on any number of ranks, but
             of an array without room for copies (4 MB) to whose elements keys of several tiles (rows, where neither dk
             nor dv is wanted) add: ranks add it up.
    Memory:  a rank holds, beside its own, q, do, lse, a number a row and a sum of dq of rows that see its keys; where
             not both dq and one of dk and dv are wanted no sums, but for dq keys and values that its rows see.
    Raises:  as `attention`.
    """
    check_keywords(attention_backward, unknown)
    comm = _communicator(comm)
    options = causal, window, align, scale, precision, "cpu", "starpu"
    mine = agree(comm, lambda: _described(q, k, v, bias, tile, distribution, exchange))
    cut = Cut(comm.Get_size(), tile, distribution)
    whole = _whole(mine, cut)
    part = _rows_of_bias(mine, bias)
    bias = bias if part is None else part.whole
    heads = None if exchange == 1 else _heads(comm, cut, whole, part, exchange)
    names = wrt_of(wrt)
    plans: list[tuple[CollectiveBackward, Problem, dict[str, np.ndarray]]] = []

    def plan() -> dict[str, str]:
        cpus.start([said["cpus"] for said in mine], comm.Get_rank())
        scores = mask, bias, score_mod, softcap, alibi_slopes, sinks, keep_of(dropout_p, seed)
        own, (on, over) = whole, (comm, cut)
        if heads is not None:
            scores, own, (on, over) = heads.scores(scores), heads.whole(whole), (heads.across, heads.cut)
        request = describe(own[0], scores, options)
        problem = Problem.of(own, request, names)
        spec, scoring = problem.spec, problem.scoring
        _check(spec, own)
        if heads is not None and (others := set(names) - set("qkv")):
            raise UnavailableError(
                f"wrt: got {', '.join(sorted(others))} with exchange {exchange}, expected q, k and v"
            )
        given = _rows_of_gradients(spec, {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": dlse})
        shapes = sorted(scoring.shapes(problem.wanted).items())
        arrays = tuple((n, shape) for n, shape in shapes if 0 not in shape)
        planned = CollectiveBackward(on, spec, over, request.offsets, scoring, problem.wanted, arrays, part)
        plans.append((planned, problem, given))
        said = {"options": repr(request.options), "wrt": repr(names), "dlse": str(dlse is not None)}
        return said | {"values of options": identity(spec, scoring, request.offsets)}

    same(agree(comm, plan), exchange)
    ((planned, problem, given),) = plans
    lengths = {n: problem.spec.kv_len if n in "kv" else problem.spec.q_len for n in given}
    if heads is not None:
        given = dict(zip(given, heads.gather(list(lengths.values()), list(given.values())), strict=True))
    sums = {f"d{n}": np.zeros(given[n].shape, given[n].dtype) for n in "qkv" if n in names}
    ended: list[Any] = []
    agree(comm, lambda: ended.append(planned.run(given, sums)))
    ((dsinks, totals),) = ended
    if heads is not None:
        back = heads.scatter([lengths[n.removeprefix("d")] for n in sums], list(sums.values()))
        sums = dict(zip(sums, back, strict=True))
    if part is not None and "bias" in names:
        found = sum(totals.pop(n) for n in sorted(slots_of(problem.scoring, bias)))
        sums["bias"] = np.asarray(found, part.mine.dtype)
    return _gradients(problem, sums, dsinks, totals)


def _gradients(problem: Problem, sums: dict[str, np.ndarray], dsinks: Any, totals: dict[int, np.ndarray]) -> Gradients:
    """Of this rank's rows, and of what is whole."""
    done = {n.removeprefix("d"): x for n, x in sums.items()}
    real = DTYPES[DTYPES[problem.spec.dtype].accumulator].numpy
    shapes = problem.scoring.shapes(problem.wanted)
    arrays = {n: np.zeros(shape, real) for n, shape in shapes.items() if 0 in shape} | totals
    return problem.gradients(Sums(None, None, None, dsinks, arrays), done=done)


def _rows_of_gradients(spec: AttentionSpec, given: dict[str, Any]) -> dict[str, np.ndarray]:
    """This rank's arrays, rows of adjacent elements. Raises: SpecError."""
    accumulator = DTYPES[spec.dtype].accumulator
    arrays = {name: plain(x, name) for name, x in given.items() if x is not None}
    rows = arrays["q"].shape[:3]
    for name, x in arrays.items():
        if name in ("q", "k", "v"):
            continue
        shape, dtype = (rows, accumulator) if name in ("lse", "dlse") else ((*rows, spec.value_size), spec.dtype)
        if x.shape != shape:
            raise wrong(name, f"shape {x.shape}", f"{shape}, this rank's rows")
        if dtype_of(x.dtype, name).name != dtype:
            raise wrong(name, f"dtype {x.dtype}", dtype)
    return {n: np.ascontiguousarray(x) if x.ndim == 3 else _reachable(x) for n, x in arrays.items()}


def _check(spec: AttentionSpec, whole: Whole) -> None:
    """Raise UnavailableError for what its tasks do not know."""
    if missing := spec.options - OPTIONS:
        raise UnavailableError(f"starpu_mpi: got {', '.join(sorted(missing))}, expected options that its tasks know")
    if 0 in (spec.batch, spec.heads, spec.head_size, spec.value_size):
        raise UnavailableError(
            f"starpu_mpi: got q {whole[0].shape}, v {whole[2].shape}, expected sizes B, H, D above 0"
        )


def _communicator(comm: Any) -> Any:
    if (reason := build.missing()) is not None:
        raise UnavailableError(f"starpu_mpi: {reason}")
    from mpi4py import MPI

    if comm is None:
        return MPI.COMM_WORLD
    if not isinstance(comm, MPI.Intracomm):
        raise wrong("comm", described(comm), "an intracommunicator of mpi4py, or None")
    return comm


def _positive(name: str, value: Any) -> int:
    number = integer(value)
    if number is None or number < 1:
        raise wrong(name, repr(value), "a positive integer")
    return number


def _heads(comm: Any, cut: Cut, whole: Whole, part: RowsOfBias | None, exchange: int) -> Heads:
    """Raises: SpecError, UnavailableError, on every rank."""
    if part is not None:
        raise UnavailableError(f"exchange: got {exchange} with a bias cut by rows, expected 1, or the whole bias")
    return Heads(comm, cut, exchange, whole)


def _described(q: Any, k: Any, v: Any, bias: Any, tile: Any, distribution: Any, exchange: Any) -> dict[str, Any]:
    """What the other ranks must know of this one's arrays. Raises: SpecError."""
    said: dict[str, Any] = {"tile": _positive("tile", tile), "distribution": distribution}
    said["exchange"] = _positive("exchange", exchange)
    tiles_of(0, 0, 1, tile, distribution)
    for name, x in (("q", q), ("k", k), ("v", v)):
        x = plain(x, name)
        if x.ndim != 4:
            raise wrong(name, f"shape {x.shape}", "(B, H, S, D)")
        said[f"dtype of {name}"] = dtype_of(x.dtype, name).name
        said[f"(B, H, D) of {name}"] = x.shape[:2] + x.shape[3:]
        said[f"rows of {name}"] = x.shape[2]
    said["cpus"] = cpus.here()
    cuts = isinstance(bias, np.ndarray) and bias.ndim > 1
    said["rows of bias"] = bias.shape[-2] if cuts else None
    return said


def _whole(mine: list[dict[str, Any]], cut: Cut) -> Whole:
    """The whole of what ranks said. Raises: SpecError, on every rank."""
    first, rows = mine[0], [f"rows of {x}" for x in "qkv"]
    same([{name: x for name, x in said.items() if name not in (*rows, "rows of bias", "cpus")} for said in mine])
    whole = []
    for name, x in zip(rows, "qkv", strict=True):
        length = sum(said[name] for said in mine)
        for rank, said in enumerate(mine):
            expected = cut.rows(length, rank)
            if said[name] != expected:
                raise wrong(f"rank {rank}: {x}", f"{said[name]} rows of {length}", f"{expected}, as part() gives it")
        batch, heads, size = first[f"(B, H, D) of {x}"]
        whole.append(SimpleNamespace(shape=(batch, heads, length, size), dtype=first[f"dtype of {x}"]))
    return tuple(whole)  # type: ignore[return-value]  # three of them


def _rows_of_bias(mine: list[dict[str, Any]], bias: Any) -> RowsOfBias | None:
    """This rank's rows of a bias, where each rank has those of its queries; None where every rank has the whole.

    Raises: SpecError, on every rank.
    """
    rows, own = [said["rows of bias"] for said in mine], [said["rows of q"] for said in mine]
    length = sum(own)
    if len(set(rows)) == 1 and rows[0] in (None, 1, length):
        return None
    for rank, (found, expected) in enumerate(zip(rows, own, strict=True)):
        if found != expected:
            got = "none" if found is None else f"{found} rows"
            raise wrong(f"rank {rank}: bias", got, f"this rank's {expected}, or on every rank all {length}")
    return RowsOfBias.of(bias, length)


def _reachable(x: np.ndarray) -> np.ndarray:
    """The array; or a copy, where no matrix handle describes how its rows lie."""
    fits = can_tile(x.strides[2:], max(1, x.shape[3]), x.itemsize)
    return x if fits else np.ascontiguousarray(x)
