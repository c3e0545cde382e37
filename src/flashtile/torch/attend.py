"""`flashtile.attention` on tensors: by its own keywords, down the eager way or to the dispatcher's operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch

from flashtile.calls import as_key, split_align
from flashtile.checks import check_flag
from flashtile.errors import UnavailableError
from flashtile.hints import check_keywords
from flashtile.score.keep import Keep, keep_of, threshold_of
from flashtile.score.options import ScoreOptions
from flashtile.signature import Align, Engine, Kernel, Precision, Progress, Window
from flashtile.torch import eager, operator
from flashtile.torch.arguments import arguments_of
from flashtile.torch.compiled import attention as attention_in_a_graph
from flashtile.torch.operator import draw
from flashtile.torch.tensors import (
    RECORDED,
    check_tensors,
    compiling,
    in_forward_mode,
    is_watched,
    kind_of,
    under_autocast,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashtile.signature import Keywords

Tensor = torch.Tensor


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[Keywords]
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[True], **options: Unpack[Keywords]
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool, **options: Unpack[Keywords]
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    kernel: Kernel = "auto",
    engine: Engine = "auto",
    progress: Progress = None,
    out: Tensor | None = None,
    **unknown: Any,
) -> Any:
    """`flashtile.attention` on tensors, all on the CPU or all on one GPU: the same keywords, shapes, numerics and
    errors; no copy of q, k, v. Dropout without a seed draws one from torch's generator, as `torch.manual_seed` set it.
    On a GPU it runs on the current stream and returns before the kernels have run. Under torch.autocast q, k and v are
    cast as for torch's SDPA (not float64), and nothing else is.

    Returns:  a tensor of q's dtype; with return_lse=True also lse, float32 (float64 for float64).
              Both have derivatives, by autograd, to q, k, v, bias, sinks, alibi_slopes, and tensors that a score
              function captured; on the CPU also second ones, and in forward mode. The backward is fused.
    Raises:   as flashtile.attention; UnavailableError also for third derivatives, and on a GPU for second ones and if a
              tensor has a tangent.

    >>> import torch, flashtile.torch
    >>> x = torch.ones(1, 8, 128, 64, dtype=torch.bfloat16)
    >>> flashtile.torch.attention(x, x, x, window=(16, 0)).shape
    torch.Size([1, 8, 128, 64])
    """
    if unknown:
        check_keywords(attention, unknown)
    if compiling():
        return attention_in_a_graph(**locals())
    attend: Callable[..., Any] = eager.attend
    q, k, v = under_autocast(q, k, v)
    if kind := kind_of(q, k, v):
        attend = operate if kind == RECORDED else way(q=q, k=k, v=v)
    if type(return_lse) is not bool:
        check_flag("return_lse", return_lse)
    keep = None if seed is None and type(dropout_p) is float and dropout_p == 0 else drawn(dropout_p, seed)
    offsets = scores = None
    if align is not None:
        align, offsets = split_align(align, q.shape)
    if not (mask is bias is score_mod is softcap is alibi_slopes is sinks is keep is None):
        scores = ScoreOptions(mask, bias, score_mod, softcap, alibi_slopes, sinks, keep)
        attend = attend_scored if attend is eager.attend else attend
    options = causal, as_key(window), align, scale, precision, kernel, engine
    return attend(q, k, v, options, scores, offsets, return_lse, progress, out)


def drawn(dropout_p: Any, seed: Any) -> Keep | None:
    """`keep_of`, with a seed of torch's generator where one is needed and none came. Raises: as `keep_of`."""
    if seed is None and (threshold := threshold_of(dropout_p)):
        found = draw()
        if is_watched():  # vmap says whether its samples share one; in a graph it has no value yet
            return Keep(threshold, found)  # type: ignore[arg-type]
        seed = int(found)
    return keep_of(dropout_p, seed)


def way(**tensors: Tensor) -> Callable[..., Any]:
    """How these tensors are attended, by where they lie and who looks on. Raises: as `check_tensors`."""
    check_tensors(**tensors)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())
    if recorded or is_watched() or in_forward_mode():
        return operate
    return eager.attend if all(x.is_cpu for x in tensors.values()) else attend_on_device


def attend_on_device(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> Any:
    """`eager.attend_on_device`, or the operator where an option's gradient is recorded."""
    try:
        return eager.attend_on_device(q, k, v, *call)
    except eager.Recorded:  # found once functions have been traced
        return operate(q, k, v, *call)


def attend_scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: tuple[Any, ...],
    scores: ScoreOptions,
    offsets: np.ndarray | None,
    return_lse: bool,
    *rest: Any,
) -> Any:
    """`eager.attend`, or the operator where an option's gradient is recorded."""
    scored = eager.scored(scores, q, k, v, options, offsets)
    if eager.is_recorded(scored.scoring, scores.sinks):
        return operate(q, k, v, options, scores, offsets, return_lse, *rest)
    return eager.attend(q, k, v, options, scored, offsets, return_lse, *rest)


def operate(
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
    """The call as one operator, whose gradients are recorded, and which transforms and modes of torch can see."""
    if out is not None:
        raise UnavailableError("out: got a tensor while gradients are recorded, expected None, or torch.no_grad()")
    if scores is offsets is progress is None and not (is_watched() or in_forward_mode()):
        o, lse = operator.recorded_plainly(q, k, v, options)
        return (o, lse) if return_lse else o
    if scores is not None:
        eager.check_scores(scores)
    given = arguments_of(q, k, v, options, scores or ScoreOptions(), offsets)
    with operator.reporting(progress):
        o, lse = operator.recorded(q, k, v, given)
    return (o, lse) if return_lse else o
