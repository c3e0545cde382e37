"""torch's flex_attention and varlen_attn by signature, against torch's own and against what they mean."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from flashtile.errors import SpecError, UnavailableError

torch = pytest.importorskip("torch")
flex = pytest.importorskip("torch.nn.attention.flex_attention")
import flashtile.torch as door  # noqa: E402  (after torch is known to be there)

B, H, KV, L, S, D = 2, 4, 2, 37, 50, 8
BLOCK = 16


def draw(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves() -> list[Any]:
    shapes = (B, H, L, D), (B, H, S, D), (B, H, S, D)
    return [draw(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


LENGTHS = torch.tensor([30, 11])
TABLE = draw(H, L, seed=7).requires_grad_()
MASKS: dict[str, Callable[..., Any]] = {
    "causal": causal,
    "prefix": lambda b, h, q_idx, kv_idx: (kv_idx < LENGTHS[b]) | causal(b, h, q_idx, kv_idx),
    "heads": lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % (h + 2) == 0,
}
SCORES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "table": lambda score, b, h, q_idx, kv_idx: score * 0.7 + TABLE[h, q_idx],
}


def blocks_of(mask: Callable[..., Any], size: int = BLOCK) -> Any:
    return flex.create_block_mask(mask, B, H, L, S, device="cpu", BLOCK_SIZE=size)


def near(got: Any, want: Any) -> None:
    """The same mathematics in fp64."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def written_out(q: Any, k: Any, v: Any, score: Any, mask: Any, scale: float) -> Any:
    """The definition, on S x S scores: torch's flex_attention has no backward on the CPU."""
    b, h, i, j = torch.meshgrid(*map(torch.arange, (B, H, L, S)), indexing="ij")
    scores = scale * (q @ k.mT)
    scores = torch.where(mask(b, h, i, j), scores if score is None else score(scores, b, h, i, j), -torch.inf)
    seen = scores.isfinite().any(-1, keepdim=True)
    p = torch.where(seen, torch.where(seen, scores, 0.0).softmax(-1), 0.0)
    return p @ v, scores.logsumexp(-1)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", SCORES)
def test_flex_attention_is_torchs_with_its_gradients(mask: str, score: str) -> None:
    block_mask, learned = blocks_of(MASKS[mask]), [*leaves(), *([TABLE] if SCORES[score] else [])]

    def run(attend: Callable[..., Any], *options: Any, **keywords: Any) -> list[Any]:
        o, lse = attend(*learned[:3], SCORES[score], *options, scale=0.4, **keywords)
        finite = torch.where(lse.isfinite(), lse, 0)
        return [o, lse, *torch.autograd.grad(o.square().sum() + finite.sum(), learned)]

    got = run(door.flex_attention, block_mask, return_lse=True)
    near(got, run(written_out, MASKS[mask]))
    plain = (x.detach() for x in learned[:3])
    with torch.no_grad():
        near(got[:1], [flex.flex_attention(*plain, SCORES[score], block_mask, scale=0.4)])


def test_grouped_heads_and_one_batch_of_keys() -> None:
    q, k, v = draw(B, H, L, D), draw(1, KV, S, D, seed=1), draw(1, KV, S, D, seed=2)
    whole = [x.repeat(B, 1, 1, 1).repeat_interleave(H // KV, 1) for x in (k, v)]
    near([door.flex_attention(q, k, v, enable_gqa=True)], [door.flex_attention(q, *whole)])
    with pytest.raises(SpecError, match="^key: got 2 heads beside 4, expected as many as query, or enable_gqa"):
        door.flex_attention(q, k, v)


@pytest.mark.parametrize("rule", [None, causal])
def test_blocks_put_together_by_hand_are_honoured(rule: Any) -> None:
    """As torch's kernels do: mask_mod in partial blocks alone, full blocks whole, others not at all."""
    rows, columns = -(-L // BLOCK), -(-S // BLOCK)
    partial = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]]).bool()
    full = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert partial.shape == (rows, columns)

    def listed(blocks: Any) -> tuple[Any, Any]:
        order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True).int()
        return blocks.sum(1).int()[None, None], order[None, None]

    made = flex.BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(L, S)
    )
    i, j = torch.arange(L)[:, None], torch.arange(S)
    at = i // BLOCK, j // BLOCK
    seen = full[at] | (partial[at] & (torch.ones(L, S).bool() if rule is None else i >= j))
    q, k, v = (x.detach() for x in leaves())
    assert torch.equal(door.flex_attention(q, k, v, block_mask=made), door.attention(q, k, v, mask=seen))


def test_blocks_that_say_what_the_function_says_cost_nothing() -> None:
    """The function alone reaches the kernel."""
    from flashtile.torch.flex import mask_of

    assert mask_of(blocks_of(causal), (B, H, L, S)) is causal
    assert mask_of(blocks_of(flex.noop_mask), (B, H, L, S)) is None


def test_signatures_are_torchs() -> None:
    from torch.nn.attention.varlen import varlen_attn

    for ours, theirs in ((door.flex_attention, flex.flex_attention), (door.varlen_attn, varlen_attn)):
        got, want = (inspect.signature(f).parameters.values() for f in (ours, theirs))
        assert [(p.name, p.kind, p.default) for p in got] == [(p.name, p.kind, p.default) for p in want]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_mask": 3}, SpecError, "^block_mask: got 3, expected a BlockMask"),
        ({"block_mask": (L, L)}, SpecError, r"^block_mask: got one of lengths \(37, 37\), expected \(37, 50\)"),
        ({"kernel_options": {"BLOCK_M": 64}}, SpecError, "^kernel_options: got a dict, expected None"),
        ({"return_aux": flex.AuxRequest(max_scores=True)}, UnavailableError, "^return_aux: got max_scores"),
        ({"query": torch.ones(3, 4)}, SpecError, r"^query: got shape \(3, 4\), expected a tensor of four axes"),
        ({"scale": "x"}, SpecError, "^scale: got 'x'"),
    ],
)
def test_bad_input_of_flex(change: dict[str, Any], error: Any, message: str) -> None:
    given = dict(zip(("query", "key", "value"), leaves(), strict=True), **change)
    if isinstance(given.get("block_mask"), tuple):
        given["block_mask"] = flex.create_block_mask(causal, 1, 1, *given["block_mask"], device="cpu")
    with pytest.raises(error, match=message):
        door.flex_attention(**given)


ROWS, KEYS = [0, 3, 3, 10], [0, 5, 9, 16]
USED = torch.tensor([5, 1, 2])
PAGED = {"key": torch.ones(4, 4, 2, 8), "block_table": torch.tensor([[0, 1], [2, 3], [1, 0]]), "seqused_k": USED}


def packed() -> list[Any]:
    return [draw(n, h, D, seed=7 * n).requires_grad_() for n, h in ((10, H), (16, KV), (16, KV))]


def each(q: Any, k: Any, v: Any, window: Any, used: Any = None) -> list[Any]:
    """One sequence at a time."""
    parts = []
    for n, (a, b) in enumerate(zip(ROWS[:-1], ROWS[1:], strict=True)):
        c, d = KEYS[n], KEYS[n + 1] if used is None else KEYS[n] + int(used[n])
        one = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        o, lse = door.attention(*one, window=window, align="bottom_right", return_lse=True)
        parts.append((o.transpose(0, 1), lse.mT))
    return [torch.cat(x) for x in zip(*parts, strict=True)]


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 1)])
@pytest.mark.parametrize("used", [None, torch.tensor([4, 0, 7], dtype=torch.int32)], ids=["all", "some"])
def test_varlen_attn_is_one_sequence_at_a_time(window: Any, used: Any) -> None:
    from torch.nn.attention.varlen import AuxRequest

    given = packed()
    bounds = torch.tensor(ROWS), torch.tensor(KEYS)
    options = {"window_size": window, "enable_gqa": True, "seqused_k": used, "return_aux": AuxRequest(lse=True)}
    got, want = door.varlen_attn(*given, *bounds, 7, 7, **options), each(*given, window, used)
    near(got, want)
    near(*(torch.autograd.grad(o.square().sum(), given) for o in (got[0], want[0])))


def test_varlen_attn_of_pages() -> None:
    q, k, v = packed()
    pages = torch.tensor([[3, 1], [0, 0], [2, 1]], dtype=torch.int32)
    used = torch.tensor([5, 4, 8], dtype=torch.int32)
    got = door.varlen_attn(
        q, *(x.unflatten(0, (4, 4)) for x in (k, v)), torch.tensor(ROWS), None, 7, 8,
        enable_gqa=True, seqused_k=used, block_table=pages,
    )  # fmt: skip
    places = torch.tensor([12, 13, 14, 15, 4, 0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7])
    bounds = torch.tensor(ROWS), torch.tensor([0, 5, 9, 17])
    assert torch.equal(got, door.varlen_attn(q, k[places], v[places], *bounds, 7, 8, enable_gqa=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seq_q": torch.tensor([0, 4, 3, 10])}, "^cu_seq_q: got 3 after 4"),
        (
            {"cu_seq_k": torch.tensor([0, 5, 9, 17])},
            "^cu_seq_k: got boundaries up to 17, expected up to the length, 16",
        ),
        ({"cu_seq_k": None}, "^cu_seq_k: got None, expected where the keys"),
        ({"max_q": 6}, "^max_q: got 6, expected an integer, at least 7"),
        ({"enable_gqa": False}, "^key: got 2 heads beside 4"),
        ({"num_splits": 1}, "^num_splits: got 1, expected None"),
        ({"window_size": None}, r"^window_size: got None, expected \(left, right\)"),
        ({"seqused_k": torch.tensor([6, 1, 1])}, r"^seqused_k: got .*expected \(3,\) integers, at most \[5, 4, 7\]"),
        ({"block_table": torch.tensor([[0]])}, "^seqused_k: got None with a block_table"),
        ({"seqused_k": USED, "value": torch.ones(9, 2, 8)}, r"^value: got shape \(9, 2, 8\), expected \(16, \.\.\.\)"),
        ({"seqused_k": USED, "value": torch.ones(20, 2, 8)}, r"^value: got shape \(20, 2, 8\), expected \(16, "),
        ({"seqused_k": USED, "cu_seq_k": torch.tensor([0, 5, 9, 17])}, "^cu_seq_k: got boundaries up to 17, expected"),
        ({"seqused_k": USED, "cu_seq_k": torch.tensor([2, 5, 9, 16])}, "^cu_seq_k: got 2 first, expected integers"),
        ({"seqused_k": USED, "cu_seq_k": torch.tensor(16)}, "^cu_seq_k: got int64 of shape"),
        (
            {**PAGED, "value": torch.ones(2, 8, 2, 8)},
            r"^value: got shape \(2, 8, 2, 8\), expected \(4, 4, \.\.\.\), as",
        ),
        ({**PAGED, "value": torch.ones(4, 4, 2, 8), "block_table": torch.tensor([[4], [0], [1]])}, "^block_table: got"),
        (
            {**PAGED, "key": torch.ones(4, 0, 2, 8), "value": torch.ones(4, 0, 2, 8)},
            r"^seqused_k: got .*most \[0, 0, 0",
        ),
        ({"query": torch.ones(3, 4)}, "^query: got shape"),
        ({"return_aux": True}, "^return_aux: got True, expected an AuxRequest"),
        ({"return_aux": torch.ones(2)}, "^return_aux: got a Tensor, expected an AuxRequest"),
    ],
)
def test_bad_input_of_varlen(change: dict[str, Any], message: str) -> None:
    q, k, v = packed()
    given = {"query": q, "key": k, "value": v, "cu_seq_q": torch.tensor(ROWS), "cu_seq_k": torch.tensor(KEYS)}
    with pytest.raises(SpecError, match=message):
        door.varlen_attn(**{**given, "max_q": 7, "max_k": 7, "enable_gqa": True, **change})
