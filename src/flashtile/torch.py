"""The door for PyTorch: the same attention on tensors, without a copy, and torch's own SDPA by signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import numpy as np
import torch
from torch.autograd import forward_ad

from flashtile import autograd
from flashtile.autograd import Scored
from flashtile.calls import Options, as_key, check_apart, lookup, prepare, split_align
from flashtile.checks import check_flag
from flashtile.errors import FlashtileError, UnavailableError, wrong
from flashtile.hints import check_keywords
from flashtile.progress import reporter
from flashtile.score.capture import ArrayCapture
from flashtile.score.keep import Keep, keep_of, threshold_of
from flashtile.score.options import ScoreOptions, Scoring
from flashtile.sdpa import causal_bias, like_torch, number, spell, under_autocast
from flashtile.signature import Align, Engine, Kernel, Precision, Progress, Window

__all__ = ["attention", "scaled_dot_product_attention"]

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashtile.signature import Keywords

Tensor = torch.Tensor
# What to give instead of tensors whose elements alone do not say what they mean, by the name of the class.
_PLAIN = {
    "NestedTensor": "a dense tensor: the sequences one after the other with mask=score.varlen(...), or padded with "
    "mask=score.padding(...)",
    "CausalBias": "causal=True with align=, or attn_mask= of scaled_dot_product_attention",
    "MaskedTensor": "a dense tensor, and which of its keys to see as mask=",
}
_STRIDED = torch.strided


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
              Both have gradients by autograd (first order, CPU) to q, k, v, bias, sinks, alibi_slopes, and tensors
              that a score function captured. Its backward is fused for a band alone, else so far unfused: one thread,
              S_q x S_kv scores of a head at a time.
    Raises:   as flashtile.attention; UnavailableError also on a GPU if a tensor requires grad while gradients are
              recorded, for tangents (forward mode), and in a backward with create_graph=True.

    >>> import torch, flashtile.torch
    >>> x = torch.ones(1, 8, 128, 64, dtype=torch.bfloat16)
    >>> flashtile.torch.attention(x, x, x, window=(16, 0)).shape
    torch.Size([1, 8, 128, 64])
    """
    if unknown:
        check_keywords(attention, unknown)
    attend = _attend
    q, k, v = under_autocast(q, k, v)
    if not _are_ready(q, k, v):
        attend = _checked(q=q, k=k, v=v)
    if type(return_lse) is not bool:
        check_flag("return_lse", return_lse)
    keep = None if seed is None and type(dropout_p) is float and dropout_p == 0 else _keep_of(dropout_p, seed)
    offsets = scores = None
    if align is not None:
        align, offsets = split_align(align, q.shape)
    if not (mask is bias is score_mod is softcap is alibi_slopes is sinks is keep is None):
        scores = ScoreOptions(mask, bias, score_mod, softcap, alibi_slopes, sinks, keep)
    options = causal, as_key(window), align, scale, precision, kernel, engine
    return attend(q, k, v, options, scores, offsets, return_lse, progress, out)


def _attend(
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
    """`attention` of tensors on the CPU that were checked; `options` as in `Options`.

    No gradient of q, k, v is recorded, and none at all where the options came scored.
    """
    spec = scoring = out_key = None
    if out is not None:
        _check_tensors(out=out)
        out_key = out.shape, out.stride(), out.dtype
    views = q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype
    key: tuple[Any, ...] = (views, out_key, options)
    if scores is not None:
        if isinstance(scores, ScoreOptions):
            scored = _scored(scores, q, k, v, options, offsets)
            if _is_recorded(scored.scoring, scores.sinks):
                return _record(q, k, v, options, scored, scores.sinks, offsets, return_lse, progress, out)
            scores = scored
        spec, scoring = scores
        key += spec.program, spec.sinks, spec.dropout
    call = lookup(key)
    if call is None:
        _check_untraced()
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
    q_at, k_at, v_at, o_at = _addresses(q, k, v, target)
    lse_at = 0 if lse is None else _address("lse", lse)
    offsets_at = 0 if offsets is None or call.spec.offset is not None else offsets.ctypes.data
    if out is not None:
        check_apart(call, o_at, q_at, k_at, v_at)
    params = call.pack(q_at, k_at, v_at, o_at, lse_at, offsets_at, scoring)
    call.run(params, report)
    return target if lse is None else (target, lse)


def _attend_recorded(
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
    """`_attend` where a gradient of q, k or v is recorded."""
    given = ScoreOptions() if scores is None else scores
    scored = _scored(given, q, k, v, options, offsets)
    _is_recorded(scored.scoring, None)  # for its checks
    return _record(q, k, v, options, scored, given.sinks, offsets, return_lse, progress, out)


def _scored(
    scores: ScoreOptions, q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...], offsets: np.ndarray | None
) -> Scored:
    """What the options mean, once their tensors are found to be ordinary; `_is_recorded` sees what functions read."""
    _check_scores(scores)
    return Scored(*Options(*options).scored(scores, q, k, v, offsets))


def _is_recorded(scoring: Scoring, sinks: Any) -> bool:
    """Whether a gradient of sinks, or of a tensor that the program reads, is recorded.

    Raises: as `_check_tensors`, for one whose derivative would be lost without a word.
    """
    recording, forward = torch.is_grad_enabled(), _in_forward_mode()
    found = recording and getattr(sinks, "requires_grad", False)
    if scoring.program is not None and (recording or forward):
        for x in scoring.program.captures:
            source = x.source if isinstance(x, ArrayCapture) else None
            if isinstance(source, Tensor) and (forward or source.requires_grad):
                _check_tensors(**{x.name: source})
                found = found or recording and source.requires_grad
    return bool(found)


def _record(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: tuple[Any, ...],
    scored: Scored,
    sinks: Any,
    offsets: np.ndarray | None,
    return_lse: bool,
    progress: Any,
    out: Tensor | None,
) -> Any:
    """`_attend` with a backward."""
    if out is not None:
        raise UnavailableError("out: got a tensor while gradients are recorded, expected None, or torch.no_grad()")
    _check_untraced()
    _addresses(q, k, v, q)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return _attend(q, k, v, options, scored, offsets, True, progress)

    o, lse = autograd.attend(forward, (q, k, v), scored, sinks, offsets, Options(*options).kernel)
    return (o, lse) if return_lse else o


def _attend_on_device(
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
    """`_attend` of tensors that do not all lie on the CPU."""
    from flashtile import devices

    if out is not None:
        _check_tensors(out=out)
        devices.one_library(q, k, v, out)
    if scores is not None:
        _check_scores(scores)
    owner = devices.owner_of("torch")
    call = (q, k, v), Options(*options), scores, offsets, return_lse, progress, out
    o, lse = devices.attend(owner, *call, check=_refuse_recorded)
    return (o, lse) if return_lse else o


def _refuse_recorded(scoring: Scoring) -> None:
    """Raise where a function reads a tensor whose gradient is recorded: on a GPU it would be lost without a word."""
    if _is_recorded(scoring, None):
        raise UnavailableError(
            "score_mod, mask: got a function that reads a tensor that requires grad, expected one that does not, or "
            "torch.no_grad(): gradients are not available on a GPU yet"
        )


def _keep_of(dropout_p: Any, seed: Any) -> Keep | None:
    """`keep_of`, with a seed of torch's generator where one is needed and none came. Raises: as `keep_of`."""
    if seed is None and threshold_of(dropout_p):
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
    return keep_of(dropout_p, seed)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    **unknown: NoReturn,  # checkers refuse it, as calls do
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention` by its own signature and defaults, and a few options more.

    Shapes:   query (..., H, L, E), key (..., H_kv, S, E), value (..., H_kv, S, E_v) -> (..., H, L, E_v). Leading axes
              broadcast. Heads broadcast too unless enable_gqa, with which query head h reads head h // (H / H_kv);
              H_kv may then differ between key and value.
    Options:  is_causal and window are aligned top_left, as torch aligns is_causal: row i stands at key i.
              attn_mask broadcasts to (..., H, L, S): boolean, True = attend, or of a float dtype, added to the scores;
              or a causal_upper_left or causal_lower_right of torch.nn.attention.bias, which aligns window as well.
              softcap, alibi_slopes, sinks as attention. dropout_p draws a seed from torch's generator; the mask is
              that of `flashtile.attention` with this seed, not torch's.
    Numerics: a row that sees no key gives 0, where torch may give NaN.
    Raises:   as attention.
    Source:   PyTorch 2.13, torch.nn.functional.scaled_dot_product_attention.
    """
    if unknown:
        check_keywords(scaled_dot_product_attention, unknown)
    if attn_mask is not None and is_causal:
        raise wrong("attn_mask", "a mask together with is_causal=True", "one of the two, as in torch")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa), ("return_lse", return_lse)):
        if type(flag) is not bool:
            check_flag(name, flag)
    keep = None if type(dropout_p) is float and dropout_p == 0 else _keep_of(dropout_p, None)
    attend = _attend
    query, key, value = under_autocast(query, key, value)
    if not _are_ready(query, key, value):
        attend = _checked(query=query, key=key, value=value)
    axes = scores = mask = bias = None
    align = "top_left"
    if not query.shape == key.shape == value.shape or query.ndim > 4:
        query, key, value, axes = like_torch(query, key, value, enable_gqa)
    if attn_mask is not None:
        if (found := causal_bias(attn_mask, query, key)) is not None:
            is_causal, align = True, found
        else:
            mask, bias = _mask_like_torch(attn_mask, query, key, axes)
    if not (mask is bias is softcap is alibi_slopes is sinks is keep is None):
        scores = ScoreOptions(mask, bias, None, softcap, alibi_slopes, sinks, keep)
    options = is_causal, as_key(window), align, number("scale", scale), "ieee", "auto", "auto"
    try:
        result = attend(query, key, value, options, scores, None, return_lse)
    except FlashtileError as e:
        spell(e)
        raise
    if axes is None:
        return result
    results = tuple(x.reshape(*axes, *x.shape[1:]) for x in (result if return_lse else (result,)))
    return results if return_lse else results[0]


def _mask_like_torch(
    attn_mask: Tensor, query: Tensor, key: Tensor, axes: torch.Size | None
) -> tuple[Tensor | None, Tensor | None]:
    """`attn_mask` as a mask or as a bias, by its dtype; `axes` are those that the batch of query stands for, if any."""
    _check_tensors(attn_mask=attn_mask)
    if attn_mask.dtype is not torch.bool and not attn_mask.is_floating_point():
        raise wrong("attn_mask", f"dtype {attn_mask.dtype}", "torch.bool (True = attend) or a float dtype")
    full = (*(query.shape[:-2] if axes is None else (*axes, query.shape[1])), query.shape[-2], key.shape[-2])
    try:
        attn_mask.expand(full)
    except RuntimeError as cause:
        raise wrong("attn_mask", f"shape {tuple(attn_mask.shape)}", f"one that broadcasts to {tuple(full)}") from cause
    if axes is not None:  # as one axis; a copy only where those that broadcast stand among others
        whole = attn_mask.reshape((1,) * (len(full) - attn_mask.ndim) + attn_mask.shape)
        last = whole.shape[-3:]
        attn_mask = (whole if whole.shape[:-3].numel() == 1 else whole.expand(*axes, *last)).reshape(-1, *last)
    return (attn_mask, None) if attn_mask.dtype is torch.bool else (None, attn_mask)


def _are_ready(*tensors: Tensor) -> bool:
    """True for plain dense CPU tensors that no gradient is recorded for: whatever else must be looked at closely."""
    for x in tensors:
        if not (type(x) is Tensor and x.is_cpu and x.layout is _STRIDED) or x.requires_grad:
            return False
        if x.is_neg() or x.is_nested:
            return False
    return not _in_forward_mode()


def _in_forward_mode() -> bool:
    """Whether tensors may carry tangents: torch.autograd.forward_ad counts its levels from 0."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def _check_untraced() -> None:
    """Raise under torch.jit.trace, in which sizes are tensors: no two calls are then alike, so each one comes here."""
    if torch.jit.is_tracing():
        raise UnavailableError("q: got a tensor that torch.jit.trace records, expected one of an ordinary call")


def _addresses(*tensors: Tensor) -> tuple[int, ...]:
    """Where the elements of q, k, v and out lie. Raises: SpecError for a tensor that has some, but not in memory."""
    try:
        found = tuple([x.data_ptr() for x in tensors])
    except RuntimeError:
        found = (0,)
    if 0 in found:  # an empty tensor, or one that only stands for others
        found = tuple(map(_address, ("q", "k", "v", "out"), tensors))
    return found


def _address(name: str, x: Tensor) -> int:
    """The address of one tensor's elements, 0 if there are none. Raises: as `_addresses`."""
    try:
        found = x.data_ptr()
    except RuntimeError:
        found = 0
    if found == 0 and x.numel():
        expected = "one in memory (not of a transform of torch.func, nor fake, nor with its storage freed)"
        raise wrong(name, f"a {type(x).__qualname__} without memory", expected)
    return found


def _checked(**tensors: Tensor) -> Callable[..., Any]:
    """The way to attend these tensors, by where they lie. Raises: as `_check_tensors`."""
    _check_tensors(**tensors)
    if not all(x.is_cpu for x in tensors.values()):
        return _attend_on_device
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())
    return _attend_recorded if recorded else _attend


def _check_scores(scores: ScoreOptions) -> None:
    """`_check_tensors` of those that came as options; `_is_recorded` sees what functions read."""
    _check_tensors(**{name: x for name, x in vars(scores).items() if isinstance(x, Tensor)})


def _check_tensors(**tensors: Tensor) -> None:
    """Raise unless each is a plain dense tensor without a tangent, on the CPU, or on a GPU if no gradient is
    recorded for it."""
    recording, forward = torch.is_grad_enabled(), _in_forward_mode()
    for name, x in tensors.items():
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
            got = f"a {type(x).__module__}.{type(x).__qualname__}"
            raise wrong(
                name, got, _PLAIN.get(type(x).__name__, "a torch.Tensor itself: what a subclass means is unknown")
            )
        if not (x.is_cpu or x.is_cuda):
            raise wrong(name, f"a tensor on {x.device}", "a tensor on the CPU or a GPU of CUDA or ROCm")
        if x.layout is not torch.strided:
            raise wrong(name, f"layout {x.layout}", "a dense tensor")
        if x.is_nested:
            raise wrong(name, "a nested tensor", _PLAIN["NestedTensor"])
        if x.is_neg():
            raise wrong(name, "a lazily negated view", "a tensor in memory (x.resolve_neg())")
        if recording and x.requires_grad and not x.is_cpu:
            raise UnavailableError(
                f"{name}: got a tensor on {x.device} that requires grad, expected one that does not, or "
                "torch.no_grad(): gradients are not available there yet"
            )
        if forward and forward_ad.unpack_dual(x).tangent is not None:
            raise UnavailableError(
                f"{name}: got a tensor with a tangent, expected one without: "
                "forward-mode gradients are not available yet"
            )
