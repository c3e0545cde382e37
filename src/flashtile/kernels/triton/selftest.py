"""The first use on a device: one small problem, held against the reference by the accuracy rule.

No kernel here has met every GPU, driver and Triton that it may run with, and a miscompiled kernel gives wrong numbers,
not errors. So the first call in a dtype on a device computes a problem with known answer. The verdict is kept on disk
for that device, Triton and version of the kernels; a failure takes the kernels out of the choice there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flashtile import current
from flashtile.arrays import contiguous
from flashtile.dtypes import DTYPES, round_to_bf16, widen_bits
from flashtile.errors import FlashtileError, KernelError
from flashtile.kernels import Capabilities, CompiledKernel, Layout
from flashtile.kernels.accuracy import expect_values
from flashtile.llvm import cache
from flashtile.plan import Plan, make_plan
from flashtile.spec import PRECISIONS, AttentionSpec

# Heads that share keys, lengths that fill no tile, rows that see no key, and a NaN that one row may see: a second of
# work, most of which is compiling.
Q_LEN, KV_LEN, HEAD_SIZE = 137, 100, 64
HEADS, KV_HEADS = 4, 2


class Problem(NamedTuple):
    """The problem in one dtype: q, k, v as they are stored (bfloat16: its bits), and widened."""

    spec: AttentionSpec
    stored: tuple[np.ndarray, np.ndarray, np.ndarray]
    wide: tuple[np.ndarray, np.ndarray, np.ndarray]


# Computes the problem on the device under test: o as it is stored, and lse.
Compute = Callable[[Problem], tuple[np.ndarray, np.ndarray]]

_lock = threading.Lock()
_verdicts: dict[str, str | None] = {}


def failure(where: str, version: str, spec: AttentionSpec, compute: Compute | None) -> str | None:
    """Why the kernels must not be used for calls like spec on the device named `where`; None if nothing is known.

    compute: how to find out where no verdict is known yet; None: do not. An error for want of memory is no verdict, and
    is raised.
    """
    key = f"self-test on {where}, triton {version}, {sources_digest()}, {spec.dtype}, {spec.precision}"
    with _lock:
        if key not in _verdicts:
            known = cache.peek(key)
            if known is None and compute is None:
                return None
            if known is None and compute is not None:
                verdict = judge(problem_of(spec), compute)
                known = json.dumps(verdict).encode()
                cache.rebuild(key, lambda: known)
            _verdicts[key] = json.loads(known or b"null")
        reason = _verdicts[key]
    if reason is None:
        return None
    again = f"to have it tried again, remove {cache.path_of(key)}"
    return f"failed its self-test in {label_of(spec)} on {where}: {reason} ({again})"


def known_failures(where: str, version: str) -> list[str]:
    """Every failure on a device that is known."""
    view = contiguous((1, 1), "float32")
    base = AttentionSpec.of(view, view, view)
    specs = [replace(base, dtype=dtype) for dtype in DTYPES]
    specs += [replace(base, precision=precision) for precision in PRECISIONS if precision != base.precision]
    return [reason for spec in specs if (reason := failure(where, version, spec, None))]


def judge(problem: Problem, compute: Compute) -> str | None:
    """What is wrong with the device's answer; None if nothing is."""
    o, lse = expect_values(problem.spec, problem.wide)
    try:
        got, got_lse = compute(problem)
        if problem.spec.dtype == "bfloat16":
            o, got = replace(o, dtype="float32"), widen_bits(got)
        o.check(got, "output")
        lse.check(got_lse, "lse")
    except AssertionError as mistake:
        return str(mistake)
    except (FlashtileError, RuntimeError) as broken:
        if out_of_memory(broken):
            raise
        return f"{type(broken).__name__}: {broken}"
    return None


def problem_of(spec: AttentionSpec) -> Problem:
    """The problem in the dtype and precision of a spec, on its device."""
    rng = np.random.default_rng(0)
    shapes = (HEADS, Q_LEN, HEAD_SIZE), (KV_HEADS, KV_LEN, HEAD_SIZE), (KV_HEADS, KV_LEN, HEAD_SIZE)
    values = [rng.standard_normal(shape) for shape in shapes]
    values[2][:, -1, 0] = np.nan  # of the last key, which the last row alone sees
    views = [contiguous(shape, spec.dtype, spec.device) for shape in shapes]
    asked = AttentionSpec.of(*views, causal=True, align="bottom_right", precision=spec.precision)
    bits = spec.dtype == "bfloat16"
    q, k, v = (round_to_bf16(x) if bits else x.astype(spec.dtype) for x in values)
    wide = (widen_bits(q), widen_bits(k), widen_bits(v)) if bits else (q, k, v)
    return Problem(asked, (q, k, v), wide)


def on_gpu(
    capabilities: Callable[[AttentionSpec], Capabilities],
    compile: Callable[[AttentionSpec, Plan, Layout], CompiledKernel],
    problem: Problem,
) -> tuple[np.ndarray, np.ndarray]:
    """The answer of a family's kernels on the device that the call in progress runs on. It waits for the device."""
    spec, here = problem.spec, current.here()
    plan = make_plan(spec, capabilities(spec))
    q, k, v = (contiguous(x.shape, spec.dtype).strides4() for x in problem.stored)
    kernel = compile(spec, plan, Layout(q, k, v, q))
    inputs = [here.upload(x, "a self-test") for x in problem.stored]
    row, accumulator = DTYPES[spec.dtype], DTYPES[DTYPES[spec.dtype].accumulator]
    o = here.empty((HEADS * Q_LEN * HEAD_SIZE * row.itemsize,), "uint8", "a self-test")
    lse = here.empty((HEADS * Q_LEN * accumulator.itemsize,), "uint8", "a self-test")
    at = [here.owner.address(x) for x in (*inputs, o, lse)]
    _run(kernel, kernel.pack(at[0], at[1], at[2], at[3], at[4], 0), plan.items)
    return (
        here.owner.download(o).view(row.numpy).reshape(HEADS, Q_LEN, HEAD_SIZE),
        here.owner.download(lse).view(accumulator.numpy).reshape(HEADS, Q_LEN),
    )


def _run(kernel: CompiledKernel, params: Any, items: int) -> None:
    """Launch all work items at once, then the merge of their parts, if there is one."""
    merge = kernel.merge_stage
    for run, count in ((kernel.run, items), *([] if merge is None else [(merge.run, merge.items)])):
        try:
            status = run(params, 0, count, 0)
        except Exception as cause:
            raise KernelError(f"a kernel failed in its self-test: {cause}") from cause
        if status:
            raise KernelError(f"a kernel failed in its self-test: status {status}")


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is the device's want of memory."""
    full: tuple[type[Exception], ...] = (MemoryError,)
    if current.in_call():
        full += current.here().owner.out_of_memory()
    while error is not None:
        if isinstance(error, full):
            return True
        error = error.__cause__
    return False


def label_of(spec: AttentionSpec) -> str:
    return spec.dtype if spec.precision == "ieee" else f"{spec.dtype} with precision {spec.precision}"


@functools.cache
def sources_digest() -> str:
    """Digest of the kernels' sources: a verdict is about them."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
