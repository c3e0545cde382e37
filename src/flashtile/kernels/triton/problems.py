"""The problems of the self-test: one for each use of a row of the tables, computed on a device and judged.

Heads that share keys, lengths that fill no tile, rows that see no key, NaN that few rows see or none; of the size that
brings the kernels of that use about. A second of work or a few, most of which is compiling.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from flashtile import current
from flashtile.arrays import contiguous
from flashtile.dtypes import DTYPES, round_to_bf16, widen_bits
from flashtile.errors import KernelError
from flashtile.kernels import BackwardLayout, Capabilities, Layout
from flashtile.kernels.accuracy import Expected, expect_sums, expect_values
from flashtile.kernels.triton.backward_host import Backward
from flashtile.kernels.triton.backward_parts import PART_LENGTH
from flashtile.kernels.triton.device import Device
from flashtile.kernels.triton.host import Forward
from flashtile.kernels.triton.selftest import Row
from flashtile.kernels.triton.specialisation import SPAN
from flashtile.plan import make_plan
from flashtile.score.document import document
from flashtile.score.keep import keep_of
from flashtile.score.options import ScoreOptions, Scoring
from flashtile.spec import AttentionSpec

Q_LEN, KV_LEN = 137, 100
FEW, LONG = 3, 2 * PART_LENGTH + 76
TIMED_SHAPE, TIMED_CALLS = (1, 32, 4096), 8  # (B, H, S): half a millisecond of an H100, in 16 bits
clock = time.perf_counter


class Problem(NamedTuple):
    """do, q, k, v as they are stored (bfloat16: its bits), of four axes, and widened."""

    spec: AttentionSpec
    scoring: Scoring
    stored: tuple[np.ndarray, ...]
    wide: tuple[np.ndarray, ...]


def problem_of(row: Row, device: str) -> Problem:
    """The problem of a row on a device, by its name."""
    heads, kv_heads, q_len, kv_len = 4, 2, Q_LEN, KV_LEN
    if row.uses & {"packed", "few rows"}:
        kv_heads, q_len, kv_len = 2 if "packed" in row.uses else 4, FEW, LONG
    if "parts" in row.uses:
        q_len, kv_len = LONG, LONG - 100
    if "many keys" in row.uses:
        heads, kv_heads, kv_len = 2, 2, SPAN * row.tiles[0].tile_k + 50
    rng, size, backward = np.random.default_rng(0), row.size, "backward" in row.uses
    lengths = (heads, q_len), (heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len)
    values = [rng.standard_normal((1, *x, size)) for x in lengths]
    # The last key, which the last row sees, or of gradients none: it sees all keys. Not of every head: what one tile of
    # keys holds sends all of a work item to the second launch, and the first is to be judged, too.
    values[3][:, -1, -1, 0] = np.nan
    views = [contiguous(x.shape, row.dtype, device) for x in values[1:]]
    align = kv_len - q_len - backward
    spec = AttentionSpec.of(*views, causal=True, align=align, precision=row.precision)
    options: dict[str, Any] = {"keep": keep_of(0.25, 7) if "dropout" in row.uses else None}
    if "sinks" in row.uses:
        options["sinks"] = np.linspace(-1, 2, heads).astype(np.float32)
    if "program" in row.uses:
        options["bias"] = rng.standard_normal((1, heads, 1, kv_len)).astype(np.float32)
        options["mask"] = document(np.arange(q_len) // 37, (np.arange(kv_len) - align) // 37)
        options["softcap"] = 2.0
    spec, scoring = ScoreOptions(**options).scoring(spec, True, None, align)
    bits = row.dtype == "bfloat16"
    stored = tuple(round_to_bf16(x) if bits else x.astype(row.dtype) for x in values)
    return Problem(spec, scoring, stored, tuple(map(widen_bits, stored)) if bits else stored)


def judge(capabilities: Callable[[AttentionSpec], Capabilities], device: Device, row: Row) -> None:
    """Compute a row's problem on the device that the call in progress runs on, which it waits for.

    Raises: AssertionError for a wrong answer; KernelError.
    """
    problem = problem_of(row, current.here().device)
    if "backward" in row.uses:
        _gradients(row, problem, device)
    else:
        _forward(row, problem, device, capabilities(problem.spec))


def stopwatch(capabilities: Callable[[AttentionSpec], Capabilities], device: Device, row: Row) -> float:
    """Seconds of a row's kernels in a causal call that fills the device, which this waits for: of gradients, those of
    dQ, dK and dV together."""
    here, shape = current.here(), (*TIMED_SHAPE, row.size)
    view = contiguous(shape, row.dtype, here.device)
    spec = AttentionSpec.of(view, view, view, causal=True, precision=row.precision)
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    x = _upload(round_to_bf16(values) if row.dtype == "bfloat16" else values.astype(row.dtype))
    made = _timed_gradients if "backward" in row.uses else _timed_forward
    run, result, *held = made(spec, row, here.owner.address(x), device, capabilities)
    seconds = []
    for repeats in (1, TIMED_CALLS):  # the first compiles and warms up
        began = clock()
        for _ in range(repeats):
            run()
        here.owner.download(result[:1])  # waits
        seconds.append((clock() - began) / repeats)
    del x, held
    return seconds[-1]


def _timed_forward(spec: AttentionSpec, row: Row, at: int, device: Device, capabilities: Any) -> tuple[Any, ...]:
    """What launches the forward of arrays that all lie at one address, and its result."""
    (tile,), shape = row.tiles, (*TIMED_SHAPE, row.size)
    plan = make_plan(spec, replace(capabilities(spec), tile_q=(tile.tile_q,), tile_k=(tile.tile_k,)))
    kernel = Forward(spec, plan, Layout(*(_strides(spec, shape) for _ in "qkvo")), tile, device)
    o = _zeros(row.dtype, shape)
    call = kernel.pack(at, at, at, current.here().owner.address(o), 0, 0)
    return functools.partial(_run, kernel, call, plan.items), o


def _timed_gradients(spec: AttentionSpec, row: Row, at: int, device: Device, capabilities: Any) -> tuple[Any, ...]:
    """The same of gradients, and what else must live as long: weights are not those of a softmax, but finite."""
    shape, address = (*TIMED_SHAPE, row.size), current.here().owner.address
    kernel = Backward(spec, BackwardLayout(*[_strides(spec, shape)] * 8), (), row.tiles[0], row.tiles[1], device)
    lse, *sums = _zeros(DTYPES[row.dtype].accumulator, TIMED_SHAPE), *(_zeros(row.dtype, shape) for _ in "qkv")
    given: dict[str, Any] = dict.fromkeys(("q", "k", "v", "o", "do"), at)
    into: dict[str, Any] = dict(zip(("dq", "dk", "dv"), map(address, sums), strict=True))
    call = kernel.pack(**given, **into, lse=address(lse), dlse=0, offsets=0)
    return functools.partial(_run, kernel, call, 1), sums[0], lse, sums


def _forward(row: Row, problem: Problem, device: Device, able: Capabilities) -> None:
    spec, (tile,) = problem.spec, row.tiles
    expected = expect_values(spec, problem.wide[1:], scoring=problem.scoring)
    plan = make_plan(spec, replace(able, tile_q=(tile.tile_q,), tile_k=(tile.tile_k,)))
    shapes = [x.shape for x in problem.stored]
    kernel = Forward(spec, plan, Layout(*(_strides(spec, shapes[n]) for n in (1, 2, 3, 1))), tile, device)
    inputs = [_upload(x) for x in problem.stored[1:]]
    o, lse = _zeros(spec.dtype, shapes[1]), _zeros(DTYPES[spec.dtype].accumulator, shapes[1][:-1])
    at = [current.here().owner.address(x) for x in (*inputs, o, lse)]
    _run(kernel, kernel.pack(at[0], at[1], at[2], at[3], at[4], 0, _values(problem)), plan.items)
    _check(expected[0], o, "output")
    _check(expected[1], lse, "lse")


def _gradients(row: Row, problem: Problem, device: Device) -> None:
    spec, scoring, here = problem.spec, problem.scoring, current.here()
    wanted: set[str | int] = {"q", "k", "v", *(["sinks"] if "sinks" in row.uses else [])}
    if "arrays" in row.uses and scoring.program is not None:
        wanted |= {x.slot.number for x in scoring.program.array_gradients}
    expected, o, lse = expect_sums(spec, problem.wide, scoring, frozenset(wanted))
    arrays = tuple(sorted(scoring.shapes(wanted).items()))
    do, q, k, v = (_strides(spec, x.shape) for x in problem.stored)
    kernel = Backward(spec, BackwardLayout(q, k, v, q, do, q, k, v), arrays, row.tiles[0], row.tiles[1], device)
    accumulator = DTYPES[spec.dtype].accumulator
    stored = round_to_bf16(o) if spec.dtype == "bfloat16" else o.astype(spec.dtype)
    inputs = [_upload(x) for x in (*problem.stored[1:], stored, lse.astype(accumulator), problem.stored[0])]
    out: dict[str | int, Any] = {n: _zeros(spec.dtype, x.shape) for n, x in zip("qkv", problem.stored[1:], strict=True)}
    if "sinks" in wanted:
        out["sinks"] = _zeros(accumulator, (spec.batch, spec.heads))
    at = dict(zip(("q", "k", "v", "o", "lse", "do"), map(here.owner.address, inputs), strict=True))
    at |= {f"d{name}": here.owner.address(x) for name, x in out.items()}
    call = kernel.pack(**at, dlse=0, offsets=0, scoring=_values(problem))
    _run(kernel, call, 1)
    for name, want in expected.items():
        _check(want, out[name] if name in out else kernel.totals(call)[int(name)], f"gradient of {name}")


def _values(problem: Problem) -> Scoring | None:
    spec = problem.spec
    return problem.scoring if spec.program or spec.sinks or spec.dropout else None


def _strides(spec: AttentionSpec, shape: tuple[int, ...]) -> Any:
    return contiguous(shape, spec.dtype).strides4()


def _upload(array: np.ndarray) -> Any:
    return current.here().upload(array, "a self-test")


def _zeros(dtype: str, shape: tuple[int, ...]) -> Any:
    """As bytes: libraries do not copy every dtype to the host."""
    return _upload(np.zeros(math.prod(shape) * DTYPES[dtype].itemsize, np.uint8))


def _check(want: Expected, got: Any, name: str) -> None:
    raw = got if isinstance(got, np.ndarray) else current.here().owner.download(got)
    values = raw.reshape(-1).view(np.uint8).view(DTYPES[want.dtype].numpy).reshape(want.value.shape)
    if want.dtype == "bfloat16":
        want, values = replace(want, dtype="float32"), widen_bits(values)
    with np.errstate(all="ignore"):  # wrong answers may be anything
        want.check(values, name)


def _run(kernel: Forward | Backward, params: Any, items: int) -> None:
    try:
        status = kernel.run(params, 0, items, 0)
    except Exception as cause:
        raise KernelError(f"a kernel failed in its self-test: {cause}") from cause
    if status:
        raise KernelError(f"a kernel failed in its self-test: status {status}")
