"""The eager way of a call on tensors: described, looked up, run. What records gradients or is watched stands above."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from flashtile.calls import Options, check_apart, lookup, prepare
from flashtile.errors import wrong
from flashtile.progress import reporter
from flashtile.score.capture import ArrayCapture
from flashtile.score.options import ScoreOptions, Scoring
from flashtile.spec import AttentionSpec
from flashtile.torch.tensors import address, addresses, check_tensors, check_untraced, has_tangent, in_forward_mode

Tensor = torch.Tensor


class Scored(NamedTuple):
    """What `Options.scored` says of a call: it traces functions, which happens once."""

    spec: AttentionSpec
    scoring: Scoring


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: tuple[Any, ...],
    scores: ScoreOptions | Scored | None,
    offsets: np.ndarray | None = None,
    return_lse: bool = False,
    progress: Any = None,
    out: Tensor | None = None,
) -> Any:
    """`attention` of tensors on the CPU that were checked, without a gradient; `options` as in `Options`."""
    spec = scoring = out_key = None
    if out is not None:
        check_tensors(out=out)
        out_key = out.shape, out.stride(), out.dtype
    views = q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype
    key: tuple[Any, ...] = (views, out_key, options)
    if scores is not None:
        if isinstance(scores, ScoreOptions):
            scores = scored(scores, q, k, v, options, offsets)
        spec, scoring = scores
        key += spec.program, spec.sinks, spec.dropout
    call = lookup(key)
    if call is None:
        check_untraced()
        call = prepare(key, q, k, v, out, Options(*options), spec)
    report = None if progress is None else reporter(progress)
    target, lse = out, None
    if target is None:  # empty_like takes half the time
        target = torch.empty_like(q) if call.o_like_q else torch.empty(call.o_shape, dtype=q.dtype, device="cpu")
        if type(target) is not Tensor:
            raise wrong("out", f"a new {type(target).__name__} from a mode of torch that is on", "a call outside of it")
    if return_lse:
        accumulator = torch.float64 if q.dtype is torch.float64 else torch.float32
        lse = torch.empty(call.lse_shape, dtype=accumulator, device="cpu")
    q_at, k_at, v_at, o_at = addresses(q, k, v, target)
    lse_at = 0 if lse is None else address("lse", lse)
    offsets_at = 0 if offsets is None or call.spec.offset is not None else offsets.ctypes.data
    if out is not None:
        check_apart(call, o_at, q_at, k_at, v_at)
    params = call.pack(q_at, k_at, v_at, o_at, lse_at, offsets_at, scoring)
    call.run(params, report)
    return target if lse is None else (target, lse)


def scored(
    scores: ScoreOptions, q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...], offsets: np.ndarray | None
) -> Scored:
    """What the options mean, once their tensors are found to be ordinary; `is_recorded` sees what functions read."""
    check_scores(scores)
    return Scored(*Options(*options).scored(scores, q, k, v, offsets))


def is_recorded(scoring: Scoring, sinks: Any) -> bool:
    """Whether a derivative of sinks, or of what the program reads, is asked for. Raises: as `check_tensors`."""
    recording = torch.is_grad_enabled()
    found = recording and getattr(sinks, "requires_grad", False)
    if scoring.program is not None and (recording or in_forward_mode()):
        for x in scoring.program.captures:
            source = x.source if isinstance(x, ArrayCapture) else None
            if isinstance(source, Tensor) and (source.requires_grad or has_tangent(source)):
                check_tensors(**{x.name: source})
                found = found or has_tangent(source) or recording and source.requires_grad
    return bool(found)


def attend_on_device(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: tuple[Any, ...],
    scores: ScoreOptions | None,
    offsets: np.ndarray | None = None,
    return_lse: bool = False,
    progress: Any = None,
    out: Tensor | None = None,
) -> Any:
    """`attend` of tensors that do not all lie on the CPU."""
    from flashtile import devices

    if out is not None:
        check_tensors(out=out)
        devices.one_library(q, k, v, out)
    if scores is not None:
        check_scores(scores)
    owner = devices.owner_of("torch")
    call = (q, k, v), Options(*options), scores, offsets, return_lse, progress, out

    def check(scoring: Scoring) -> None:
        if is_recorded(scoring, None if scores is None else scores.sinks):
            raise Recorded

    o, lse = devices.attend(owner, *call, check=check)
    return (o, lse) if return_lse else o


class Recorded(Exception):
    """An option of a call on a device, or a tensor that a function reads, has a gradient that is recorded."""


def check_scores(scores: ScoreOptions) -> None:
    """`check_tensors` of those that came as options; `is_recorded` sees what functions read."""
    check_tensors(**{name: x for name, x in vars(scores).items() if isinstance(x, Tensor)})
