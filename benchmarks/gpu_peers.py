"""Who is timed on a GPU. Each takes a case and q, k, v (B, H, S, D) on the device, and gives what is timed: a whole
call, whose result is (B, H, S, D) again. `Refused` says that a peer cannot do it here, and why.

What a user pays once, compiling and changes of layout, happens before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .cases import Case

Run = Callable[[], Any]


class Refused(Exception):
    """The peer is not here, or cannot do the case."""


def flashtile(case: Case, q: Any, k: Any, v: Any) -> Run:
    import flashtile.torch as door

    return lambda: door.attention(q, k, v, causal=case.causal, kernel="triton")


def triton_vanilla(case: Case, q: Any, k: Any, v: Any) -> Run:
    import flashtile.torch as door

    if case.score_bytes > 4 << 30:
        raise Refused("its scores would take more than 4 GiB")
    return lambda: door.attention(q, k, v, causal=case.causal, kernel="triton_vanilla")


def torch_sdpa(case: Case, q: Any, k: Any, v: Any) -> Run:
    from torch.nn.functional import scaled_dot_product_attention

    return lambda: scaled_dot_product_attention(q, k, v, is_causal=case.causal)


def cudnn(case: Case, q: Any, k: Any, v: Any) -> Run:
    """cuDNN's, by the door that torch has to it."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    if not q.is_cuda or not torch.backends.cudnn.is_available():
        raise Refused("no cuDNN here")

    def run() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=case.causal)

    return run


def flash_attn(case: Case, q: Any, k: Any, v: Any) -> Run:
    """Version 3 where it is installed (flash_attn_interface, on Hopper), else version 2."""
    try:
        try:
            from flash_attn_interface import flash_attn_func
        except ImportError:
            from flash_attn import flash_attn_func
    except ImportError as missing:
        raise Refused(str(missing)) from missing
    rows_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]

    def run() -> Any:
        out = flash_attn_func(*rows_first, causal=case.causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def flex_attention(case: Case, q: Any, k: Any, v: Any) -> Run:
    """PyTorch's FlexAttention: compiled on a GPU, as it is meant to be; as it stands on a CPU."""
    import torch
    from torch.nn.attention import flex_attention as flex

    attend = torch.compile(flex.flex_attention) if q.is_cuda else flex.flex_attention
    mask = None
    if case.causal:

        def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
            return i >= j

        mask = flex.create_block_mask(causal, None, None, case.queries, case.keys, device=q.device.type)
    return lambda: attend(q, k, v, block_mask=mask)


PEERS = (flashtile, torch_sdpa, flash_attn, cudnn, flex_attention, triton_vanilla)
