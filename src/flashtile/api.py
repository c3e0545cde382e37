"""`flashtile.attention`: described here, looked up, prepared and run by `calls`, which shows the flow in one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from flashtile.arrays import device_of, is_lazy, is_torch, plain
from flashtile.calls import NUMPY, attend, clear_cache, describe
from flashtile.checks import check_flag
from flashtile.errors import wrong
from flashtile.hints import check_keywords
from flashtile.score.keep import keep_of
from flashtile.signature import Align, Engine, Kernel, Precision, Progress, Window

__all__ = ["attention", "clear_cache"]

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashtile.signature import D, Keywords, Lse, Other, Plain, S

ndarray = np.ndarray


@overload
def attention(
    q: Plain[S, D], k: Plain[Any, D], v: Plain[Any, D], *, return_lse: Literal[False] = ..., **options: Unpack[Keywords]
) -> Plain[S, D]: ...
@overload
def attention(
    q: Plain[S, D], k: Plain[Any, D], v: Plain[Any, D], *, return_lse: Literal[True], **options: Unpack[Keywords]
) -> tuple[Plain[S, D], Lse]: ...
@overload
def attention(
    q: Plain[S, D], k: Plain[Any, D], v: Plain[Any, D], *, return_lse: bool, **options: Unpack[Keywords]
) -> Plain[S, D] | tuple[Plain[S, D], Lse]: ...
@overload
def attention(
    q: Other, k: Other, v: Other, *, return_lse: Literal[False] = ..., **options: Unpack[Keywords]
) -> Other: ...
@overload
def attention(
    q: Other, k: Other, v: Other, *, return_lse: Literal[True], **options: Unpack[Keywords]
) -> tuple[Other, Other]: ...
@overload
def attention(
    q: Other, k: Other, v: Other, *, return_lse: bool, **options: Unpack[Keywords]
) -> Other | tuple[Other, Other]: ...
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
    kernel: Kernel = "auto",
    engine: Engine = "auto",
    progress: Progress = None,
    out: Any = None,
    memory_limit: int | None = None,
    **unknown: Any,
) -> Any:
    """Exact attention: softmax(scale * q k^T) v, without storing the scores.

    Shapes:   q (B, H, S_q, D), k (B, H_kv, S_kv, D), v (B, H_kv, S_kv, D_v) -> o (B, H, S_q, D_v); query head h reads
              key/value head h // (H / H_kv). Or without B, or without B and H. NumPy arrays, or torch tensors
              (which `flashtile.torch.attention` then takes), of one dtype: float64, float32, float16, bfloat16;
              any strides and alignment. The inputs are never written.
    Options:  causal    row i sees key j only if j <= i + offset.
              window    (left, right): only if -left <= j - (i + offset) <= right; -1 or None is open on that side.
              align     the offset: "top_left" (0), "bottom_right" (S_kv - S_q), an integer, or an integer array (B,);
                        needed where S_q != S_kv and causal or window is used.
              scale     by default 1 / sqrt(D).
              precision of the two products on float32 inputs: "ieee", "tf32", "bf16", "fp16"; honoured at higher
                        precision where the hardware has no such unit.
              kernel, engine  a name, or "auto" for the fastest that can do the call; see `flashtile.explain`.
              progress  a function (done, total) called on this thread about ten times a second; True shows a bar.
              out       an array for o, that shares no memory with the inputs.
              memory_limit  bytes that a call on arrays in files may take (docs, "Larger than memory"), by
                        engine="starpu"; out is then also the name of an .npy or a
                        .zarr file, or an array in storage.
              mask      which keys a row may see: a boolean array that broadcasts to (B, H, S_q, S_kv), True = attend;
                        a mask of `flashtile.score`, composed with & | ~; or a function (b, h, i, j) -> bool.
              bias      a float array that broadcasts to (B, H, S_q, S_kv), added to the scores; -inf hides.
              score_mod a function (s, b, h, i, j) -> a new score, s being scaled and capped.
              softcap   scores become softcap * tanh(score / softcap), finite; None or 0 is off.
              alibi_slopes  (H,) or (B, H): scores lose slope * abs(i + offset - j). An infinite or NaN slope makes rows
                        of its head NaN, but for +inf at distances above 0, which hides.
              sinks     (H,) or (B, H): a logit a head that joins the denominator only; of any float dtype, as slopes.
                        -inf is none; +inf and NaN make the rows of their head NaN.
              dropout_p the share of the weights that is dropped after the softmax, in [0, 1), rounded to 2^-16; those
                        kept are divided by 1 - dropout_p. lse is without it.
              seed      an integer in [0, 2^64) that decides, with b, h, i and j alone, which weights are dropped
                        (`flashtile.score.dropout_keep`); needed with dropout; torch's generator draws it for tensors.
    Returns:  o in q's dtype; with return_lse=True (o, lse), lse (B, H, S_q) being log sum exp of the scores, natural
              logarithm, float32 (float64 for float64).
    Numerics: sums and softmax in float32 (float64 for float64). A row that sees no key gives o = 0, lse = -inf. What a
              hidden key holds never matters. The bits do not depend on the number of threads.
    Raises:   SpecError, UnavailableError before any memory is touched; KernelError.
    Source:   Dao 2023, FlashAttention-2, section 3.1.

    >>> import numpy as np, flashtile
    >>> x = np.random.default_rng(0).standard_normal((1, 8, 512, 64), dtype=np.float32)
    >>> flashtile.attention(x, x, x, causal=True).shape
    (1, 8, 512, 64)
    """
    if unknown or memory_limit is not None or not (type(q) is type(k) is type(v) is ndarray):
        return _attend_others(**locals())
    if type(return_lse) is not bool:
        check_flag("return_lse", return_lse)
    if out is not None and not plain(out, "out").flags.writeable:
        raise wrong("out", "a read-only array", "a writable one")
    scores = mask, bias, score_mod, softcap, alibi_slopes, sinks, keep_of(dropout_p, seed)
    options = causal, window, align, scale, precision, kernel, engine
    return attend(NUMPY, q, k, v, describe(q, scores, options), return_lse, progress, out)


def _attend_others(q: Any, k: Any, v: Any, *, unknown: dict[str, Any], memory_limit: Any, **keywords: Any) -> Any:
    """Refuse unknown keywords; hand torch tensors to their door, arrays on a GPU to its own call, Dask's and stored
    ones to the graph's, JAX's to be lent, and subclasses of ndarray back to attention as plain arrays."""
    check_keywords(attention, unknown)
    if memory_limit is not None:
        from flashtile import outofcore

        return outofcore.attention(q, k, v, memory_limit=memory_limit, **keywords)
    if any(map(is_torch, (q, k, v))):
        import flashtile.torch

        return flashtile.torch.attention(q, k, v, **keywords)
    if any(device_of(x) != "cpu" for x in (q, k, v)):
        from flashtile import devices

        return devices.attention(q, k, v, **keywords)
    if any(map(is_lazy, (q, k, v))):
        from flashtile import lazy

        return lazy.attention(q, k, v, **keywords)
    if type(q).__module__.partition(".")[0] in ("jax", "jaxlib"):
        import jax

        from flashtile import devices

        return jax.device_put(attention(*devices.lent(q, k, v, keywords.pop("out")), **keywords))
    return attention(plain(q, "q"), plain(k, "k"), plain(v, "v"), **keywords)
