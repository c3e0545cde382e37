"""A PyTorch model's attention on flashtile: one name changes, the tensors are not copied.

$ python examples/torch_drop_in.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import flashtile.torch


class SelfAttention(torch.nn.Module):
    """Causal multi-head self-attention over x (batch, rows, width), with any function that has torch's signature."""

    def __init__(self, width: int, heads: int, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, rows, width = x.shape
        split = self.qkv(x).view(batch, rows, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # views: (batch, heads, rows, head size) with strides of their own
        o = self.attend(q, k, v, is_causal=True)
        return self.out(o.transpose(1, 2).reshape(batch, rows, width))


def main() -> None:
    torch.manual_seed(0)
    model = SelfAttention(256, 4, torch.nn.functional.scaled_dot_product_attention).eval()
    x = torch.randn(2, 200, 256)
    with torch.no_grad():
        before = model(x)
        model.attend = flashtile.torch.scaled_dot_product_attention
        after = model(x)
    print(f"largest difference: {(after - before).abs().max():.1e}")
    torch.testing.assert_close(after, before)


if __name__ == "__main__":
    main()
