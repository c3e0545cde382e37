"""The door for PyTorch: the same attention on tensors, without a copy, and torch's own SDPA by signature."""

from __future__ import annotations

from flashtile.torch import team
from flashtile.torch.attend import attention
from flashtile.torch.flex import flex_attention
from flashtile.torch.install import Calls, calls, install, uninstall
from flashtile.torch.sdpa import scaled_dot_product_attention
from flashtile.torch.varlen import varlen_attn

__all__ = [
    "Calls",
    "attention",
    "calls",
    "flex_attention",
    "install",
    "scaled_dot_product_attention",
    "uninstall",
    "varlen_attn",
]
__dir__ = __all__.copy  # the public names, and not what stands beside them

team.lend()
