"""flash-attn's `flash_attn_combine`: attention over parts of the keys becomes attention over all of them."""

from __future__ import annotations

import torch

from flashtile.checks import check_flag
from flashtile.errors import described, wrong
from flashtile.merge import merge

Tensor = torch.Tensor


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """flash-attn's `flash_attn_combine`: partial results over disjoint keys, the first axis telling them apart.

    Shapes:   out_partial (parts, B, S, H, D) or (parts, total, H, D), lse_partial (parts, B, S, H) or (parts, total,
              H): the heads last, as this function alone has them. lse of `flash_attn_func`, (B, H, S), is transposed
              for it. Not for cu_seqlens: rows are merged one by one, whatever sequence they are of.
    Options:  out is written to and returned; out_dtype (or out's) is what o is cast to, else out_partial's. Units of
              lse: nats; -inf for a part of which a row sees nothing.
    Returns:  (o, lse), o (B, S, H, D), lse (B, S, H) or None with return_lse=False. Differentiable without out.
    Numerics: `flashtile.merge`, sums in float32 (float64 if one of both is).
    Raises:   SpecError for other shapes and dtypes.
    Source:   flash-attn 4, cute/interface.py.
    """
    check_flag("return_lse", return_lse)
    for name, x in (("out_partial", out_partial), ("lse_partial", lse_partial)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise wrong(name, described(x), "a tensor of floats")
    if out_partial.ndim not in (4, 5):
        raise wrong("out_partial", f"shape {tuple(out_partial.shape)}", "(parts, B, S, H, D) or (parts, total, H, D)")
    if not len(out_partial):
        raise wrong("out_partial", "no parts", "one at least")
    if lse_partial.shape != out_partial.shape[:-1]:
        raise wrong("lse_partial", f"shape {tuple(lse_partial.shape)}", f"{tuple(out_partial.shape[:-1])}")
    if out_dtype is not None and (not isinstance(out_dtype, torch.dtype) or not out_dtype.is_floating_point):
        raise wrong("out_dtype", described(out_dtype), "a torch dtype of floats")
    if out is not None:
        _check_out(out, out_partial, lse_partial, out_dtype)
    dtype = out.dtype if out is not None else out_dtype or out_partial.dtype
    wide = torch.promote_types(out_partial.dtype, dtype)  # no rounding but the last
    o, lse = merge(list(zip(out_partial.to(wide), lse_partial, strict=True)))
    found = o.to(dtype) if out is None else out.copy_(o)
    return found, lse if return_lse else None


def _check_out(out: Tensor, out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None) -> None:
    if not isinstance(out, Tensor) or out.shape != out_partial.shape[1:]:
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else described(out)
        raise wrong("out", got, f"a tensor of shape {tuple(out_partial.shape[1:])}")
    if out_dtype is not None and out.dtype != out_dtype:
        raise wrong("out", f"dtype {out.dtype}", f"{out_dtype}, as out_dtype says")
    if torch.is_grad_enabled() and (out_partial.requires_grad or lse_partial.requires_grad):
        raise wrong("out", "a tensor, with gradients to be recorded", "None: autograd does not see what is written")
