"""Functions as people write them for torch's flex_attention, unchanged through both doors, against torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flashtile
from flashtile.testing import allowed_error

torch = pytest.importorskip("torch")
flex = pytest.importorskip("torch.nn.attention.flex_attention")

import flashtile.torch  # noqa: E402

B, H, S, D = 2, 4, 96, 16
BLOCK = 16  # a module's global, as people have them
DOC = torch.arange(S) // 23


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def sliding_window(size: int) -> Callable[..., Any]:
    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & (q_idx - kv_idx <= size)

    return mask


def prefix_lm(lengths: Any) -> Callable[..., Any]:
    return flex.or_masks(lambda b, h, q_idx, kv_idx: kv_idx < lengths[b], causal)


def documents(ids: Any) -> Callable[..., Any]:
    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (ids[q_idx] == ids[kv_idx]) & causal(b, h, q_idx, kv_idx)

    return mask


def neighbourhood(width: int, kernel: int) -> Callable[..., Any]:
    """NATTEN's, in two dimensions."""

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        q_x, q_y = q_idx // width, q_idx % width
        kv_x, kv_y = kv_idx // width, kv_idx % width
        x = q_x.clamp(kernel // 2, (S // width - 1) - kernel // 2)
        y = q_y.clamp(kernel // 2, (width - 1) - kernel // 2)
        return ((x - kv_x).abs() <= kernel // 2) & ((y - kv_y).abs() <= kernel // 2)

    return mask


def blocks(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx // BLOCK >= kv_idx // BLOCK


def dilated(step: int) -> Callable[..., Any]:
    return lambda b, h, q, kv: (q >= kv) & ((q - kv) % step == 0)


MASKS: dict[str, Callable[..., Any]] = {
    "causal": causal,
    "window": sliding_window(20),
    "prefix-LM": prefix_lm(torch.tensor([7, 50])),
    "documents": documents(DOC),
    "neighbourhood": neighbourhood(8, 5),
    "blocks": blocks,
    "dilated": dilated(3),
    "by head": lambda b, h, q, kv: torch.where(h % 2 == 0, q >= kv, (q - kv).abs() < 9),
}


def alibi(heads: int) -> Callable[..., Any]:
    def score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + (kv_idx - q_idx) * torch.exp2(-((h + 1) * 8.0 / heads))

    return score


def softcap(cap: float) -> Callable[..., Any]:
    return lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap)


def relative(table: Any) -> Callable[..., Any]:
    return lambda score, b, h, q_idx, kv_idx: score + table[h, (q_idx - kv_idx) + S - 1]


TABLE = torch.randn(H, 2 * S - 1, generator=torch.Generator().manual_seed(2))
SCORES: dict[str, Callable[..., Any]] = {
    "alibi": alibi(H),
    "softcap": softcap(2.0),
    "relative": relative(TABLE),
    "relative, bf16": relative(TABLE.bfloat16()),
    "causal by -inf": lambda score, b, h, q, kv: torch.where(q >= kv, score, -float("inf")),
    "distance": lambda score, b, h, q, kv: score - (q - kv).abs() / 8,  # a power of 2: torch divides integers in fp32
}


def tensors(dtype: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, heads, S, D, generator=generator).to(dtype) for heads in (H, 2, 2)]


def check(dtype: Any, *, mask: Any = None, score_mod: Any = None) -> None:
    """Torch's eager flex_attention in fp64 is the reference, the accuracy rule says how near."""
    q, k, v = tensors(dtype)
    block_mask = None if mask is None else flex.create_block_mask(mask, B, H, S, S, device="cpu")
    wide = [x.double() for x in (q, k, v)]
    want = flex.flex_attention(*wide, score_mod=score_mod, block_mask=block_mask, enable_gqa=True).numpy()
    got = flashtile.torch.attention(q, k, v, mask=mask, score_mod=score_mod)
    allowed = allowed_error(q, k, v, mask=mask, score_mod=score_mod)
    assert got.dtype == dtype and np.abs(got.double().numpy() - want).max() <= allowed
    if dtype == torch.float32:  # the same bits through the door of NumPy
        arrays = flashtile.attention(*(x.numpy() for x in (q, k, v)), mask=mask, score_mod=score_mod)
        np.testing.assert_array_equal(arrays, got.numpy())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("element", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, element: Any) -> None:
    check(element, mask=MASKS[name])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("element", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str, element: Any) -> None:
    check(element, score_mod=SCORES[name], mask=sliding_window(30) if name == "alibi" else None)


def test_numpy_closures_do_as_well() -> None:
    """The same functions over arrays of NumPy: the same bits."""
    q, k, v = tensors(torch.float32)
    table, ids = TABLE.numpy(), DOC.numpy()
    got = flashtile.torch.attention(q, k, v, mask=documents(ids), score_mod=relative(table))
    want = flashtile.torch.attention(q, k, v, mask=documents(DOC), score_mod=relative(TABLE))
    assert torch.equal(got, want)
