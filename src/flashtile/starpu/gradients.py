"""Gradients for programs on StarPU: what `flashtile.starpu.submit_backward` is made of."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from flashtile.arrays import address_of
from flashtile.calls import describe
from flashtile.engines.starpu import runtime, session
from flashtile.engines.starpu.backward import BackwardFlow
from flashtile.engines.starpu.matching import check_gradients, check_heads, check_read
from flashtile.engines.starpu.tiles import TiledTensor
from flashtile.errors import UnavailableError, described, wrong
from flashtile.gradient_problem import Gradients, Problem, wrt_of
from flashtile.kernels.gradients import Sums
from flashtile.score.keep import keep_of
from flashtile.signature import Align, Precision, Window

OTHERS = ("bias", "sinks", "alibi_slopes", "captured")


class PendingGradients:
    """Gradients on their way. tasks: how many compute them."""

    def __init__(self, problem: Problem, flow: BackwardFlow, tasks: int, sinks: TiledTensor | None, sums: Any) -> None:
        self.tasks = tasks
        self._problem, self._flow, self._sinks, self._sums = problem, flow, sinks, sums

    def wait(self) -> Gradients:
        """Wait as `flashtile.starpu.wait`; returns the gradients of what wrt named. dq, dk and dv are in their tensors.

        Raises: KernelError as `flashtile.starpu.wait`.
        """
        try:
            session.current().door_job().wait()
        finally:
            _forget(self._sinks, *self._flow.boxed)
        shapes, real = self._problem.scoring.shapes(self._problem.wanted), self._flow.accumulator.numpy
        arrays = {n: np.zeros(shape, real) for n, shape in shapes.items() if 0 in shape} | self._flow.totals()
        return self._problem.gradients(Sums(None, None, None, self._sums, arrays))


def submit_backward(
    do: TiledTensor,
    q: TiledTensor,
    k: TiledTensor,
    v: TiledTensor,
    o: TiledTensor,
    lse: TiledTensor,
    dq: TiledTensor | None = None,
    dk: TiledTensor | None = None,
    dv: TiledTensor | None = None,
    *,
    dlse: TiledTensor | None = None,
    wrt: Iterable[str] = (),
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
) -> PendingGradients:
    """Submit the gradients of sum(do * o) + sum(dlse * lse): one task for each pair of tiles that meet.

    Shapes:   all registered, o and lse as a forward pass has written them, or will: tasks wait for its own. do as o,
              dlse as lse, dq, dk and dv as q, k and v, cut into the same rows. Gradients are added to what dq, dk and
              dv hold, each in the dtype of q or in accumulators; those that are None are not computed.
    Options:  wrt  names among "bias", "sinks", "alibi_slopes", "captured", whose gradients the result returns.
              the rest as of the forward call, dropout's seed included.
    Returns:  what to wait for: `wait()`, which gives the gradients of wrt; or `flashtile.starpu.wait`. Does not wait.
    Numerics: sums in accumulators, rounded once where a gradient is of 16 bits. The bits depend on neither workers nor
              scheduler.
    Raises:   SpecError, UnavailableError; what happens in tasks is raised by waiting.
    """
    given = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse}
    given |= {n: x for n, x in (("dlse", dlse), ("dq", dq), ("dk", dk), ("dv", dv)) if x is not None}
    for name, x in given.items():
        if not isinstance(x, TiledTensor):
            raise wrong(name, described(x), "a registered tensor")
    names = wrt_of(wrt)
    for name in names:
        if name not in OTHERS:
            raise wrong("wrt", repr(name), "names among " + ", ".join(OTHERS) + ": q, k and v by their tensors")
    if not names and not {"dq", "dk", "dv"} & given.keys():
        raise wrong("dq, dk, dv", "None with an empty wrt", "at least one gradient to compute")
    check_gradients(given)
    scores = mask, bias, score_mod, softcap, alibi_slopes, sinks, keep_of(dropout_p, seed)
    request = describe(q, scores, (causal, window, align, scale, precision, "cpu", "starpu"))
    views = tuple(SimpleNamespace(shape=x.shape, dtype=x.dtype.name) for x in (q, k, v))
    problem = Problem.of(views, request, names)  # type: ignore[arg-type]  # three of them
    if problem.spec.empty:
        raise UnavailableError(f"submit_backward: got q {q.shape} and k {k.shape}, expected rows and keys")
    offsets = request.offsets if problem.spec.offset is None else None
    check_read({n: given[n] for n in ("dq", "dk", "dv") if n in given}, problem.scoring, offsets)
    flow = _flow(problem, given, offsets)
    check_heads(q, flow.heads)
    job = session.current().door_job()
    sums = sunk = None
    if flow.sunk:
        sums = np.zeros((*q.shape[:2], 1), flow.accumulator.numpy)
        made = partial(TiledTensor, sums.shape, flow.accumulator, 1, heads=q.heads)
        sunk = made(address=address_of(sums), strides=sums.strides, keep=sums)
        given["dsinks"] = sunk
    try:
        tasks = flow.submit(job, given)
    except BaseException:
        _forget(sunk, *flow.boxed)
        raise
    return PendingGradients(problem, flow, tasks, sunk, None if sums is None else sums[:, :, 0])


def _forget(*sums: TiledTensor | None) -> None:
    for x in sums:
        if x is not None and x.live and not x.runtime.over:
            x.unregister()


def _flow(problem: Problem, given: dict[str, TiledTensor], offsets: Any) -> BackwardFlow:
    """The flow of these options on tensors of these shapes; remembered, unless it holds values of the call."""
    spec, scoring, now = problem.spec, problem.scoring, runtime.current()
    tiles, heads = (given["q"].rows, given["k"].rows), given["q"].heads
    wanted = problem.wanted | {name for name in "qkv" if f"d{name}" in given}
    if scoring.program is scoring.sinks is scoring.keep is None and spec.offset is not None:
        key = "backward", spec, tiles, heads, wanted
        return session.current().flow(key, lambda: BackwardFlow(now, spec, *tiles, wanted=wanted, heads=heads))
    shapes = tuple(sorted(scoring.shapes(problem.wanted).items()))
    return BackwardFlow(
        now,
        spec,
        *tiles,
        wanted=wanted,
        heads=heads,
        offsets=offsets,
        scoring=scoring,
        arrays=tuple((n, shape) for n, shape in shapes if 0 not in shape),
    )
