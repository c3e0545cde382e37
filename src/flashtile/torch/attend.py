"""`flashtile.attention` on tensors: by its own keywords, down the eager way or to the dispatcher's operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from flashtile import calls
from flashtile.calls import Request, describe
from flashtile.checks import check_flag
from flashtile.errors import UnavailableError
from flashtile.hints import check_keywords
from flashtile.score.keep import Keep, keep_of, threshold_of
from flashtile.signature import Align, Engine, Kernel, Precision, Progress, Window
from flashtile.torch import eager, operator
from flashtile.torch.eager import TENSORS
from flashtile.torch.operator import draw
from flashtile.torch.tensors import (
    ON_GPU,
    OTHER,
    READY,
    RECORDED,
    WATCHED,
    autocast_anywhere,
    check_tensors,
    compiling,
    is_watched,
    kind_of,
    kind_of_others,
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
              Both have derivatives, on the CPU of any order and in forward mode, too, to q, k, v, bias, sinks,
              alibi_slopes, and tensors that a score function captured. The first backward is fused, the others are
              not; memory is O(S).
    Raises:   as flashtile.attention; UnavailableError also on a GPU for second derivatives and forward mode.

    >>> import torch, flashtile.torch
    >>> x = torch.ones(1, 8, 128, 64, dtype=torch.bfloat16)
    >>> flashtile.torch.attention(x, x, x, window=(16, 0)).shape
    torch.Size([1, 8, 128, 64])
    """
    if unknown:
        check_keywords(attention, unknown)
    if compiling():
        given = locals()
        from flashtile.torch import compiled  # not before: it brings the compiler, longer to import than torch itself

        return compiled.attention(**given)
    if autocast_anywhere():
        q, k, v = under_autocast(q, k, v)
    kind = kind_of(q, k, v)
    if kind == OTHER:
        kind = kind_of_others(q=q, k=k, v=v)
    if type(return_lse) is not bool:
        check_flag("return_lse", return_lse)
    scores = mask, bias, score_mod, softcap, alibi_slopes, sinks, drawn(dropout_p, seed)
    options = causal, window, align, scale, precision, kernel, engine
    return attend(kind, q, k, v, describe(q, scores, options), return_lse, progress, out)


def drawn(dropout_p: Any, seed: Any = None) -> Keep | None:
    """`keep_of`, with a seed of torch's generator where one is needed and none came. Raises: as `keep_of`."""
    if seed is None and type(dropout_p) is float and dropout_p == 0:  # as in most calls
        return None
    if seed is None and (threshold := threshold_of(dropout_p)):
        found = draw()
        if is_watched():  # vmap says whether its samples share one; in a graph it has no value yet
            return Keep(threshold, found)  # type: ignore[arg-type]  # a tensor stands for the number
        seed = int(found)
    return keep_of(dropout_p, seed)


def attend(
    kind: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Request,
    return_lse: bool,
    progress: Any = None,
    out: Tensor | None = None,
) -> Any:
    """A call that was described, of tensors of this kind. All of them go through the operator where the derivative
    of an option is recorded, or of what a function reads. Raises: as `attention`."""
    if kind == READY and request.scores is out is None:  # in one step, since small calls wait for it
        return calls.attend(TENSORS, q, k, v, request, return_lse, progress)
    if out is not None:
        check_tensors(out=out)
    scores = request.scores
    if scores is not None and kind != RECORDED and kind != WATCHED:
        eager.check_scores(scores)
        traced = eager.traced_on_gpu(q, k, v, request) if kind == ON_GPU else calls.traced(TENSORS, q, k, v, request)
        found: Any = traced.scores
        if eager.is_recorded(found.scoring, scores.sinks):  # type: ignore[union-attr]  # not traced ones
            kind = RECORDED
        else:
            request = traced
    if kind == READY:
        return calls.attend(TENSORS, q, k, v, request, return_lse, progress, out)
    if kind == ON_GPU:
        return eager.attend_on_gpu(q, k, v, request, return_lse, progress, out)
    if out is not None:
        raise UnavailableError("out: got a tensor while gradients are recorded, expected None, or torch.no_grad()")
    return operator.attend(q, k, v, request, kind == WATCHED, return_lse, progress)
