"""The door for ONNX: its operator Attention (opset 23 to 25) by the kernels of flashtile, on NumPy arrays.

`attention` is the operator as a function; `Attention` is the same for ONNX's reference evaluator, so that a model
runs with it: ``onnx.reference.ReferenceEvaluator(model, new_ops=[flashtile.onnx.Attention])``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx.reference.op_run import OpRun

from flashtile import api, score
from flashtile.dtypes import DTYPES, dtype_of
from flashtile.errors import FlashtileError, described, rename, wrong
from flashtile.onnx.export import translations

__all__ = ["Attention", "attention", "translations"]
__dir__ = __all__.copy  # the public names, and not what stands beside them

_SCORES, _CAPPED, _BIASED, _WEIGHTS = range(4)  # qk_matmul_output_mode
# What our signature calls otherwise, for the first word of an error's message.
_SPELLINGS = {"q": "Q", "k": "K", "v": "V", "mask": "attn_mask", "bias": "attn_mask", "window": "left_window_size"}


class Outputs(NamedTuple):
    """The operator's outputs by name; what a call has not asked for is None."""

    Y: np.ndarray
    present_key: np.ndarray
    present_value: np.ndarray
    qk_matmul_output: np.ndarray | None


def attention(
    Q: np.ndarray,
    K: np.ndarray,
    V: np.ndarray,
    attn_mask: np.ndarray | None = None,
    past_key: np.ndarray | None = None,
    past_value: np.ndarray | None = None,
    nonpad_kv_seqlen: np.ndarray | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int | None = None,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> Outputs:
    """ONNX's Attention of opset 25; opsets 23 and 24 are it without windows and nonpad_kv_seqlen.

    Shapes:   Q (B, H, S_q, D), K (B, H_kv, S_kv, D), V (B, H_kv, S_kv, D_v) -> Y (B, H, S_q, D_v); or, with
              q_num_heads and kv_num_heads, Q (B, S_q, H * D), K and V alike -> Y (B, S_q, H * D_v). past_key,
              past_value (B, H_kv, S_past, D or D_v) come before K and V; together they are present_key, present_value.
    Options:  attn_mask boolean (True: attend) or floats to be added, broadcast to (B, H, S_q, S); where its last axis
              is shorter than S, later keys are hidden. is_causal and the windows are anchored at S_past, at
              nonpad_kv_seqlen - S_q, else at 0: row i stands at key i + that. nonpad_kv_seqlen (B,): later keys are
              hidden. softmax_precision is that of at least which the softmax is (16 bits: 32; 11: float64).
              qk_matmul_output_mode None leaves out the fourth output, which alone is of size S_q x S and is computed
              apart, by NumPy.
    Returns:  Outputs, Y and qk_matmul_output in Q's dtype.
    Numerics: as `flashtile.attention`, so 16 bits are summed in 32. A row that sees no key gives 0.
    Raises:   SpecError, by this signature's names.
    Source:   onnx.ai/onnx/operators/onnx__Attention.html.

    >>> q = np.ones((1, 4, 16), np.float32)
    >>> attention(q, q, q, q_num_heads=2, kv_num_heads=2, is_causal=1).Y.shape
    (1, 4, 16)
    """
    q, k, v = (_heads_first(*x) for x in (("Q", Q, q_num_heads), ("K", K, kv_num_heads), ("V", V, kv_num_heads)))
    k, v, past = _with_past(k, v, past_key, past_value, nonpad_kv_seqlen)
    keys = _keys_of(q, k, attn_mask, nonpad_kv_seqlen)
    options = _options(q, keys, attn_mask, nonpad_kv_seqlen, past, is_causal, left_window_size, right_window_size)
    options |= {"scale": scale, "softcap": softcap}
    wide = _compute_dtype(q, v, softmax_precision)
    mode = _mode(qk_matmul_output_mode)
    try:
        o = _attend(q, k[:, :, :keys], v[:, :, :keys], Q.ndim == 3, wide, options)
    except FlashtileError as e:
        rename(e, _SPELLINGS)
        raise
    if mode is None:
        return Outputs(o, k, v, None)
    scores = _scores(q, k, mode, options)
    if mode >= _BIASED:
        seen = _visible(scores.shape, keys, attn_mask, nonpad_kv_seqlen, options)
        scores = _biased(scores, keys, seen, options["bias"])
    if mode == _WEIGHTS:
        scores = _softmax(scores)
    with np.errstate(over="ignore"):
        return Outputs(o, k, v, scores.astype(q.dtype))


class Attention(OpRun):
    """The operator for `onnx.reference.ReferenceEvaluator(model, new_ops=[Attention])`, whatever the model's opset."""

    op_domain = ""

    def _run(self, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
        asked = len(self.onnx_node.output) > 3 and self.onnx_node.output[3]
        attributes["qk_matmul_output_mode"] = (attributes.get("qk_matmul_output_mode") or 0) if asked else None
        sizes = {name: -1 for name in ("left_window_size", "right_window_size") if attributes.get(name) is None}
        given = {name: value for name, value in attributes.items() if value is not None}
        return tuple(attention(*inputs, **given | sizes))[: len(self.onnx_node.output)]


def _heads_first(name: str, x: Any, heads: Any) -> np.ndarray:
    """(B, heads, S, D), a view, of either layout."""
    if not isinstance(x, np.ndarray) or x.ndim not in (3, 4):
        got = f"shape {x.shape}" if isinstance(x, np.ndarray) else described(x)
        raise wrong(name, got, "a NumPy array (B, heads, S, D) or (B, S, heads * D)")
    attribute = ("q" if name == "Q" else "kv") + "_num_heads"
    if x.ndim == 4:
        if heads is not None and heads != x.shape[1]:
            raise wrong(attribute, described(heads), f"{x.shape[1]}, as {name} of four axes has, or None")
        return x
    if not isinstance(heads, (int, np.integer)) or heads < 1 or x.shape[2] % heads:
        raise wrong(attribute, described(heads), f"a divisor of {x.shape[2]}, the last axis of {name}, which has three")
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(0, 2, 1, 3)


def _with_past(
    k: np.ndarray, v: np.ndarray, past_key: Any, past_value: Any, lengths: Any
) -> tuple[np.ndarray, np.ndarray, int]:
    """The keys and values to attend, and how many of them come before the rows."""
    if (past_key is None) != (past_value is None):
        missing = "past_key" if past_key is None else "past_value"
        raise wrong(missing, "None", "an array: both of past_key and past_value, or none")
    if past_key is None:
        return k, v, 0
    if lengths is not None:
        raise wrong("nonpad_kv_seqlen", "lengths with past_key", "one of both: the past has no padding")
    for name, past, new in (("past_key", past_key, k), ("past_value", past_value, v)):
        fits = (
            isinstance(past, np.ndarray)
            and past.ndim == 4
            and past.shape == (*new.shape[:2], past.shape[2], new.shape[3])
        )
        if not fits:
            got = f"shape {past.shape}" if isinstance(past, np.ndarray) else described(past)
            raise wrong(name, got, f"an array ({new.shape[0]}, {new.shape[1]}, S_past, {new.shape[3]})")
        if past.dtype != new.dtype:
            raise wrong(name, f"dtype {past.dtype}", f"{new.dtype}")
    if past_key.shape[2] != past_value.shape[2]:
        raise wrong("past_value", f"{past_value.shape[2]} keys", f"{past_key.shape[2]}, as past_key has")
    return np.concatenate((past_key, k), 2), np.concatenate((past_value, v), 2), past_key.shape[2]


def _keys_of(q: np.ndarray, k: np.ndarray, mask: Any, lengths: Any) -> int:
    """How many of the keys any row may see: a mask may end before they do, at no length's cost."""
    if lengths is not None:
        found = lengths if isinstance(lengths, np.ndarray) else np.zeros(())
        if found.shape != (len(q),) or found.dtype.kind not in "iu" or (found < 0).any() or (found > k.shape[2]).any():
            got = described(lengths) if found.shape != (len(q),) else str(lengths)
            raise wrong("nonpad_kv_seqlen", got, f"integers of shape ({len(q)},) from 0 to {k.shape[2]}")
    if mask is None:
        return k.shape[2]
    if not isinstance(mask, np.ndarray) or not 1 <= mask.ndim <= 4:
        raise wrong("attn_mask", described(mask), "an array of one to four axes, of booleans or of Q's dtype")
    last = mask.shape[-1]
    if last > k.shape[2]:
        raise wrong("attn_mask", f"a last axis of {last}", f"at most {k.shape[2]}, the number of keys")
    if lengths is not None and len(lengths) and last not in (1, k.shape[2]) and last < lengths.max():
        raise wrong("attn_mask", f"a last axis of {last}", f"at least {lengths.max()}, the largest of nonpad_kv_seqlen")
    return last


def _options(
    q: np.ndarray, keys: int, mask: Any, lengths: Any, past: int, causal: Any, left: Any, right: Any
) -> dict[str, Any]:
    """The masks of a call, as flashtile.attention calls them."""
    for name, size in (("left_window_size", left), ("right_window_size", right)):
        if not isinstance(size, (int, np.integer)) or size < -1:
            raise wrong(name, described(size), "an integer of at least -1, which leaves the side open")
    if causal not in (0, 1):
        raise wrong("is_causal", described(causal), "0 or 1")
    align = past if lengths is None else lengths.astype(np.int64) - q.shape[2]
    window = None if left == right == -1 else (int(left), int(right))
    found: dict[str, Any] = {"causal": bool(causal), "window": window, "bias": None}
    if found["causal"] or found["window"]:
        found["align"] = align
    seen = None if lengths is None else score.padding(np.minimum(lengths, keys))
    if mask is not None and mask.dtype == np.bool_:
        seen = mask if seen is None else seen & mask
    elif mask is not None:
        if mask.dtype != q.dtype:
            raise wrong("attn_mask", f"dtype {mask.dtype}", f"bool or {q.dtype}, as Q's")
        found["bias"] = mask
    return found | {"mask": seen}


def _compute_dtype(q: np.ndarray, v: np.ndarray, softmax_precision: Any) -> np.dtype:
    """The dtype of a call: Q's, or wider where V is, or where the softmax is asked for in more bits than it has."""
    names = dtype_of(q.dtype, "Q").name, dtype_of(v.dtype, "V").name
    if softmax_precision is None:
        asked = np.dtype(np.float32)
    elif softmax_precision in (1, 10, 11, 16):
        asked = onnx.helper.tensor_dtype_to_np_dtype(softmax_precision)
    else:
        raise wrong("softmax_precision", described(softmax_precision), "1, 10, 11 or 16")
    if asked == np.float64 or "float64" in names:
        return np.dtype(np.float64)
    return q.dtype if names[0] == names[1] else np.dtype(np.float32)


def _attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, packed: bool, dtype: np.dtype, options: dict[str, Any]
) -> np.ndarray:
    """Y: (B, H, S_q, D_v), or (B, S_q, H * D_v) which the kernel writes in place."""
    if (bias := options["bias"]) is not None:
        options = {**options, "bias": bias.astype(dtype, copy=False)}
    batch, heads, rows, size = *q.shape[:3], v.shape[3]
    y = np.empty((batch, rows, heads, size) if packed else (batch, heads, rows, size), dtype)
    out = y.transpose(0, 2, 1, 3) if packed else y
    api.attention(*(x.astype(dtype, copy=False) for x in (q, k, v)), out=out, **options)
    y = y.reshape(batch, rows, heads * size) if packed else y
    with np.errstate(over="ignore"):
        return y.astype(q.dtype, copy=False)


def _mode(mode: Any) -> int | None:
    if mode is not None and mode not in range(4):
        raise wrong("qk_matmul_output_mode", described(mode), "0, 1, 2, 3, or None")
    return mode


def _scores(q: np.ndarray, k: np.ndarray, mode: int, options: dict[str, Any]) -> np.ndarray:
    """The fourth output before masks: (B, H, S_q, S), in the accumulator's dtype."""
    wide = np.dtype(DTYPES[dtype_of(q.dtype).name].accumulator)
    scale, cap = options["scale"], options["softcap"]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    grouped = np.repeat(k.astype(wide), q.shape[1] // k.shape[1], axis=1)
    s = q.astype(wide) @ grouped.swapaxes(2, 3) * wide.type(scale)
    return wide.type(cap) * np.tanh(s / wide.type(cap)) if mode >= _CAPPED and cap else s


def _biased(s: np.ndarray, keys: int, seen: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    if bias is not None:
        s[..., :keys] += bias.astype(s.dtype)
    return np.where(seen, s, -np.inf)


def _softmax(s: np.ndarray) -> np.ndarray:
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    empty = np.isneginf(top)
    p = np.exp(s - np.where(empty, 0, top))
    return p / np.where(empty, 1, p.sum(axis=-1, keepdims=True))


def _visible(shape: tuple[int, ...], keys: int, mask: Any, lengths: Any, options: dict[str, Any]) -> np.ndarray:
    """Which keys each row sees, as booleans (B, H, S_q, S)."""
    b, _, i, j = np.ogrid[tuple(slice(n) for n in shape)]
    align = np.asarray(options.get("align", 0))
    at = i + (align[b] if align.ndim else align)
    left, right = options["window"] or (-1, -1)
    right = 0 if options["causal"] else right
    seen = np.broadcast_to(j < keys, shape).copy()
    if left >= 0:
        seen &= j >= at - left
    if right >= 0:
        seen &= j <= at + right
    if lengths is not None:
        seen &= j < lengths[b]
    if mask is not None and mask.dtype == np.bool_:
        seen[..., :keys] &= mask
    return seen
