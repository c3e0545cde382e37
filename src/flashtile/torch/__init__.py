"""The door for PyTorch: the same attention on tensors, without a copy, and torch's own SDPA by signature."""

from __future__ import annotations

from flashtile.torch.attend import attention
from flashtile.torch.sdpa import scaled_dot_product_attention

__all__ = ["attention", "scaled_dot_product_attention"]
