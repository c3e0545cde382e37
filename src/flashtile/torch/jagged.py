"""Nested tensors of torch's jagged layout: sequences that lie one after the other, attended to without padding."""

from __future__ import annotations

from typing import Any

import torch

from flashtile.errors import wrong
from flashtile.torch import packed
from flashtile.torch.dispatch import outside_of_graphs
from flashtile.torch.packed import Lengths
from flashtile.torch.tensors import is_jagged

Tensor = torch.Tensor
_EXPECTED = "nested tensors of layout torch.jagged and shape (B, H, ragged, E), without holes"


@outside_of_graphs("query: got a nested tensor in a compiled function: where its sequences begin is looked at")
def attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """`scaled_dot_product_attention` of nested tensors (B, H, ragged, E), by its own keywords; the result is one.

    Raises: SpecError for other tensors beside them, attn_mask, and is_causal or window of sequences that have not as
            many keys as rows: torch's own kernels do not agree on where those are anchored.
    """
    given = {"query": query, "key": key, "value": value}
    q, k, v = (_values(name, x) for name, x in given.items())
    if options.pop("attn_mask") is not None:
        raise wrong("attn_mask", "one beside nested tensors", "None")
    if not torch.equal(key.offsets(), value.offsets()):
        raise wrong("value", "sequences of other lengths than key's", "as many rows as key in each")
    enable_gqa, is_causal, window = (options.pop(x) for x in ("enable_gqa", "is_causal", "window"))
    if not enable_gqa and q.shape[1] != k.shape[1]:
        raise wrong("key", f"{k.shape[1]} heads beside {q.shape[1]}", "as many as query, or enable_gqa=True")
    rows, keys = query.offsets(), key.offsets()
    anchored = is_causal or window is not None
    if anchored and not torch.equal(rows, keys):
        name = "is_causal" if is_causal else "window"
        raise wrong(name, "sequences that have not as many keys as rows", "as many, or varlen_attn")
    return_lse = options.pop("return_lse")
    lengths = Lengths(rows, _longest(rows), "query", "query"), Lengths(keys, _longest(keys), "key", "key")
    o, lse = packed.attend(q, k, v, *lengths, causal=is_causal, window=window, **options)
    o = torch.nested.nested_tensor_from_jagged(o, rows).transpose(1, 2)
    return (o, torch.nested.nested_tensor_from_jagged(lse.T, rows).transpose(1, 2)) if return_lse else o


def _values(name: str, x: Any) -> Tensor:
    """The rows of all sequences (rows, H, E), one after the other."""
    if not is_jagged(x) or x.dim() != 4 or isinstance(x.shape[1], torch.SymInt) or x.lengths() is not None:
        got = f"a nested tensor of {x.dim()} axes" if is_jagged(x) else f"a {type(x).__name__}"
        raise wrong(name, got, _EXPECTED)
    return x.transpose(1, 2).values()


def _longest(bounds: Tensor) -> int:
    return int(bounds.diff().max()) if bounds.numel() > 1 else 0
