"""Who is timed on a GPU. Each takes a case and q, k, v (B, H, S, D) on the device, and gives what is timed: a whole
call, whose result is (B, H, S, D) again. `Refused` says that a peer cannot do it here, and why.

What a user pays once, compiling and changes of layout, happens before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cases import Case
from ..options import document_ids

Run = Callable[[], Any]


FLEX_LENGTHS = (1024, 4096, 8192)


class Refused(Exception):
    """The peer is not here, or cannot do the case."""


def differentiated(case: Case, peer: Callable[..., Run], q: Any, k: Any, v: Any, do: Any) -> Run:
    """The gradients of q, k and v alone: the peer's forward has run, and what it keeps for them stays."""
    import torch

    if peer is triton_vanilla:
        raise Refused("has no backward")
    if peer is flex_attention and not q.is_cuda:
        raise Refused("has no backward on CPUs")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = peer(case, *leaves)()
    return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)


def _keywords(case: Case, like: Any) -> dict[str, Any]:
    """Of flashtile's door; arrays on the device of `like`."""
    band = {"window": (case.window - 1, 0), "align": "bottom_right"} if case.window else {"causal": case.causal}
    if case.causal and case.queries != case.keys:
        band["align"] = "bottom_right"
    return band | case.options.keywords(case)


def _plain(case: Case) -> None:
    """Refuse, for a peer that has no kernel for it, all but causal or nothing."""
    if case.window or case.option:
        raise Refused("has no kernel for it")


def flashtile(case: Case, q: Any, k: Any, v: Any) -> Run:
    import flashtile.torch as door

    return lambda: door.attention(q, k, v, kernel="triton", **_keywords(case, q))


def flashtile_cudnn(case: Case, q: Any, k: Any, v: Any) -> Run:
    """cuDNN by flashtile's door: what that adds to cuDNN alone, a copy of the output above all."""
    import flashtile.torch as door

    _plain(case)
    if not q.is_cuda:
        raise Refused("on GPUs only")
    return lambda: door.attention(q, k, v, kernel="cudnn", **_keywords(case, q))


def triton_vanilla(case: Case, q: Any, k: Any, v: Any) -> Run:
    import flashtile.torch as door

    if case.score_bytes > 4 << 30:
        raise Refused("its scores would take more than 4 GiB")
    return lambda: door.attention(q, k, v, kernel="triton_vanilla", **_keywords(case, q))


def torch_sdpa(case: Case, q: Any, k: Any, v: Any) -> Run:
    """As torch chooses."""
    from torch.nn.functional import scaled_dot_product_attention

    _plain(case)
    shared = case.heads != case.kv_heads
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=shared)


def _backend(name: str, case: Case, q: Any, k: Any, v: Any) -> Run:
    """One of torch's own backends, by its name in torch.nn.attention.SDPBackend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    run = torch_sdpa(case, q, k, v)
    if not q.is_cuda:
        raise Refused("on GPUs only")

    def forced() -> Any:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return run()

    return forced


def torch_flash(case: Case, q: Any, k: Any, v: Any) -> Run:
    return _backend("FLASH_ATTENTION", case, q, k, v)


def torch_efficient(case: Case, q: Any, k: Any, v: Any) -> Run:
    return _backend("EFFICIENT_ATTENTION", case, q, k, v)


def cudnn(case: Case, q: Any, k: Any, v: Any) -> Run:
    """cuDNN's, by the door that torch has to it."""
    import torch

    if not q.is_cuda or not torch.backends.cudnn.is_available():
        raise Refused("no cuDNN here")
    return _backend("CUDNN_ATTENTION", case, q, k, v)


def flash_attn(case: Case, q: Any, k: Any, v: Any) -> Run:
    """Version 3 where it is installed (flash_attn_interface, on Hopper), else version 2."""
    try:
        try:
            from flash_attn_interface import flash_attn_func
        except ImportError:
            from flash_attn import flash_attn_func
    except ImportError as missing:
        raise Refused(str(missing)) from missing
    _plain(case)
    rows_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]

    def run() -> Any:
        out = flash_attn_func(*rows_first, causal=case.causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def flex_attention(case: Case, q: Any, k: Any, v: Any) -> Run:
    """PyTorch's FlexAttention: compiled for the shape on a GPU, as it is meant to be; as it stands on a CPU."""
    import torch
    from torch.nn.attention import flex_attention as flex

    attend = flex.flex_attention
    if case.queries not in (1, *FLEX_LENGTHS) and q.is_cuda:
        raise Refused("takes seconds to compile for each shape: some lengths alone")
    if q.is_cuda:
        torch._dynamo.reset()  # a case is compiled for itself
        attend = torch.compile(attend, dynamic=False, fullgraph=True)
    mask, score = _flex_mask(case, q), None
    if case.options.softcap:
        cap = case.options.softcap

        def capped(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return cap * torch.tanh(s / cap)

        score = capped
    if mask is not None:
        mask = flex.create_block_mask(mask, None, None, case.queries, case.keys, device=q.device.type)
    shared = case.heads != case.kv_heads
    return lambda: attend(q, k, v, block_mask=mask, score_mod=score, enable_gqa=shared)


def _flex_mask(case: Case, like: Any) -> Any:
    import torch

    offset, window = case.keys - case.queries, case.window
    if window:
        return lambda b, h, i, j: (j <= i + offset) & (i + offset - j < window)
    if case.causal:
        return lambda b, h, i, j: i + offset >= j
    if case.option == "documents":
        ids = torch.from_numpy(document_ids(case)).to(like.device)
        return lambda b, h, i, j: ids[i] == ids[j]
    return None


PEERS = (
    flashtile,
    torch_sdpa,
    torch_flash,
    torch_efficient,
    cudnn,
    flashtile_cudnn,
    flash_attn,
    flex_attention,
    triton_vanilla,
)
