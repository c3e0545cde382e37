"""Models with flashtile's attention as ONNX graphs: how `torch.onnx.export` spells the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flashtile.errors import UnavailableError

# What ONNX's operator has no word for, by the operator's own argument and what a user calls it.
_FOREIGN = {
    "alibi_slopes": "alibi_slopes",
    "sinks": "sinks",
    "offsets": "align",
    "seed": "dropout_p",
    "score_mod": "score_mod",
    "mask_mod": "mask",
    "window": "window",
}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What to give `torch.onnx.export(..., dynamo=True, custom_translation_table=translations())`.

    A call of `flashtile.torch` in the model becomes ONNX's Attention (opset 23), which any runtime executes and
    `flashtile.onnx.Attention` does by these kernels. Boolean masks as tensors, bias, causal, scale, softcap and grouped
    heads are translated; lse as the logarithm of the sum of the operator's own scores, if the model uses it.

    Raises: UnavailableError without onnxscript; and at the export, naming the argument, for what ONNX's operator
            cannot say: functions, windows, sinks, ALiBi, dropout, an align that is not that of top left, a
            precision that is not "ieee".
    """
    try:
        import onnxscript
    except ImportError:
        raise UnavailableError("onnx: exports from torch need onnxscript: pip install 'flashtile[onnx]'") from None
    import torch

    import flashtile.torch  # noqa: F401  (defines the operator)

    opset: Any = onnxscript.opset23  # the first with Attention; its methods' types are not those of a graph's values

    def attention(
        q: Any,
        k: Any,
        v: Any,
        mask: Any = None,
        bias: Any = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        offsets: Any = None,
        seed: Any = None,
        captured: Any = None,
        score_mod: str = "",
        mask_mod: str = "",
        numbers: Any = None,
        causal: bool = False,
        window: Any = None,
        align: str | None = None,
        offset: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        dropout_p: float = 0.0,
        precision: str = "ieee",
        *where: Any,
        **which: Any,  # kernel and engine, which an ONNX runtime chooses for itself
    ) -> Any:
        given = {n: x for n, x in locals().items() if n in _FOREIGN}
        _check(given, causal, align, offset, q, k)
        if precision != "ieee":
            raise UnavailableError(f"precision: got {precision!r}, expected 'ieee', the only one that ONNX can say")
        added = _added(opset, q, mask, bias)
        attributes = {"is_causal": int(causal), "scale": scale, "softcap": softcap or 0.0, "qk_matmul_output_mode": 2}
        y, _, _, scores = opset.Attention(q, k, v, added, **attributes)
        wide = opset.Cast(scores, to=11 if q.dtype == _double() else 1)
        return y, opset.ReduceLogSumExp(wide, [-1], keepdims=0)

    return {torch.ops.flashtile.attention.default: attention}


def _double() -> Any:
    import onnx_ir

    return onnx_ir.DataType.DOUBLE


def _added(op: Any, q: Any, mask: Any, bias: Any) -> Any:
    """attn_mask: the one of both that there is, or what hides and adds."""
    if mask is None:
        return None if bias is None else op.CastLike(bias, q)
    if bias is None:
        return mask
    return op.Where(mask, op.CastLike(bias, q), op.CastLike(float("-inf"), q))


def _check(given: dict[str, Any], causal: bool, align: Any, offset: Any, q: Any, k: Any) -> None:
    for name, value in given.items():
        if value is not None and value != "":
            raise UnavailableError(f"{_FOREIGN[name]}: got a value, expected None: ONNX's Attention has no word for it")
    rows, keys = q.shape[2], k.shape[2]
    if causal and (offset or (align == "bottom_right" and rows != keys)):
        raise UnavailableError(
            f"align: got {align or offset!r} for {rows} rows and {keys} keys, expected 'top_left', the only one that "
            "ONNX's Attention has without a past"
        )
