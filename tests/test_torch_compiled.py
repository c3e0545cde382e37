"""Masks and scores of `flashtile.score`, and torch's BlockMasks, within one graph of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flashtile import score
from flashtile.errors import SpecError

torch = pytest.importorskip("torch")
flex = pytest.importorskip("torch.nn.attention.flex_attention")
pytest.importorskip("flashtile.torch.followed")
import flashtile.torch as door  # noqa: E402

B, H, S, D = 2, 4, 24, 8
GENERATOR = torch.Generator().manual_seed(0)
Q, K, V, BIAS, TABLE = (
    torch.randn(x, generator=GENERATOR, dtype=torch.float64, requires_grad=True)
    for x in [(B, H, S, D)] * 3 + [(H, S, S), (8, H)]
)
IDS, LENGTHS, SEEN = torch.arange(S) // 5, torch.tensor([20, 9]), torch.rand(S, S, generator=GENERATOR) > 0.3
SLOPES = torch.rand(H, generator=GENERATOR, dtype=torch.float64, requires_grad=True)
LEAVES = [Q, K, V, BIAS, TABLE, SLOPES]

MASKS: dict[str, Callable[[], Any]] = {
    "window": lambda: score.window(3, None),
    "list": lambda: score.document([0] * 10 + [1] * 14),
    "dense": lambda: score.dense(SEEN) & (lambda b, h, i, j: (i + j) % 3 > 0),
    "composed": lambda: (score.causal() & score.document(IDS)) | score.padding(LENGTHS.numpy()),
    "softcap": lambda: score.softcap(2.0),
}
SCORES: dict[str, Callable[[], Any]] = {
    "alibi": lambda: score.alibi(SLOPES),
    "relative": lambda: score.relative(TABLE, max_distance=12),
    "bias": lambda: score.bias(BIAS),
}


@pytest.fixture(autouse=True)
def _new_graphs() -> None:
    torch._dynamo.reset()


def one_graph(call: Callable[..., Any], backend: Any = "eager") -> Any:
    return torch.compile(call, backend=backend, fullgraph=True)


def with_gradients(o: Any) -> list[Any]:
    return [o, *torch.autograd.grad(o.square().sum(), LEAVES, allow_unused=True)]


def same(got: Any, want: Any) -> bool:
    found = zip(with_gradients(got), with_gradients(want), strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in found)


def attend(rule: Any, **options: Any) -> Any:
    kind = "mask" if isinstance(rule, score.Mask) else "score_mod"
    return door.attention(Q, K, V, **{kind: rule}, **options)


def test_rules_of_the_package() -> None:
    """Made inside of the compiled function and outside, in one graph: the same bits as eager calls."""
    made = [make() for make in MASKS.values()]

    def call() -> Any:
        return [attend(rule) for rule in made] + [attend(make()) for make in MASKS.values()]

    assert all(map(torch.equal, one_graph(call)(), call()))


def test_gradients_of_what_scores_read() -> None:
    def call() -> Any:
        return sum(attend(make()) for make in SCORES.values())

    assert same(one_graph(call, "aot_eager")(), call())


def test_rules_that_are_made_outside_alone() -> None:
    """Boundaries are read as numbers; a rule that was frozen before may be a part of another."""
    packed, frozen = score.varlen([0, 9, S], [0, 9, S]), score.freeze(score.document(IDS.numpy()))
    rule = packed & ~(frozen & score.window(None, -1))
    assert torch.equal(one_graph(attend)(rule), attend(rule))
    for make in (lambda: score.varlen([0, S], [0, S]), lambda: score.freeze(score.causal())):
        with pytest.raises(Exception, match="got a call in a compiled function, expected (the mask made|one) outside"):
            one_graph(lambda: attend(make()))()  # noqa: B023  (it runs here)


def test_alignment_and_fit_are_those_of_eager_calls() -> None:
    def call(rule: Any, align: Any) -> Any:
        return door.attention(Q[:, :, :7], K, V, mask=rule, align=align)

    rule = score.causal() & score.padding(LENGTHS)
    for align in ("bottom_right", 3, torch.tensor([2, 8])):
        assert torch.equal(one_graph(call)(rule, align), call(rule, align))
    for wrong, align in ((rule, None), (score.document(IDS[:5]), 0), (score.padding(IDS), 0)):
        with pytest.raises(SpecError) as eager:
            call(wrong, align)
        with pytest.raises(Exception, match="SpecError") as compiled:
            one_graph(call)(wrong, align)
        assert str(eager.value)[:60] in str(compiled.value)


def counted(call: Callable[..., Any]) -> tuple[Any, Any]:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    return one_graph(call, counter), counter


def test_later_lengths_and_values_make_no_graph() -> None:
    def call(q: Any, k: Any, mask: Any, blocks: Any) -> Any:
        o = door.attention(q, k, k, mask=mask, align="bottom_right")
        return door.flex_attention(o, k, k, block_mask=blocks)

    compiled, counter = counted(call)
    counts = []
    for rows, keys in ((12, 24), (13, 31), (9, 17), (15, 40), (10, 19)):
        q, k = Q[:, :, :rows].detach(), K[:, :, :1].detach() * torch.arange(keys)[:, None]
        mask = score.causal() & score.document(torch.zeros(rows).int(), torch.arange(keys) // (keys - 2))
        given = q, k, mask, block_mask(lambda b, h, i, j: j - i < LENGTHS[b], rows, keys)
        torch.testing.assert_close(compiled(*given), call(*given), rtol=1e-12, atol=1e-12)
        counts.append(counter.frame_count)
    assert counts[2:] == counts[2:3] * 3


def test_what_a_mask_reads_may_change_in_place() -> None:
    ids, holder = IDS.clone(), [score.causal()]
    mask = score.document(ids)
    compiled, counter = counted(lambda: attend(holder[0] & mask))
    for _ in range(3):
        assert torch.equal(compiled(), attend(holder[0] & mask))
        ids.add_(torch.arange(S) // 12)
    assert counter.frame_count == 1
    holder[0] = score.window(4, 2)
    assert torch.equal(compiled(), attend(holder[0] & mask))


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j <= i


def block_mask(rule: Any, rows: int = S, keys: int = S, heads: int | None = None, size: int = 8) -> Any:
    return flex.create_block_mask(rule, B, heads, rows, keys, device="cpu", BLOCK_SIZE=size)


def padding(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (j < LENGTHS[b]) & (i // 3 >= h)


def test_block_masks() -> None:
    """Given, closed over and made inside, several in one graph; with a score function, and gradients."""
    held, given = (block_mask(padding, heads=H) for _ in range(2))

    def call(given: Any) -> Any:
        o = door.flex_attention(Q, K, V, block_mask=given) + door.flex_attention(Q, V, K, block_mask=held)
        made = block_mask(flex.and_masks(padding, causal), heads=H)
        return door.flex_attention(o, V, V, lambda s, b, h, i, j: s - SLOPES[h] * abs(i - j), made)

    assert same(one_graph(call)(given), call(given))


def test_blocks_put_together_by_hand() -> None:
    """What their lists say is honoured, and read again at every call."""
    order = torch.arange(3).expand(1, 1, 3, 3).int().clone()
    counts = torch.tensor([[[1, 2, 3]]]).int()

    def call() -> Any:
        made = flex.BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=8, mask_mod=causal, seq_lengths=(S, S))
        return door.flex_attention(Q, K, V, block_mask=made)

    compiled, counter = counted(call)
    for _ in range(3):
        seen = (torch.arange(S)[:, None] >= torch.arange(S)) & (torch.arange(S)[:, None] // 8 >= 0)
        listed = torch.zeros(3, 3).bool()
        for row in range(3):
            listed[row, order[0, 0, row, : counts[0, 0, row]].long()] = True
        seen &= listed.repeat_interleave(8, 0).repeat_interleave(8, 1)
        torch.testing.assert_close(compiled(), door.attention(Q, K, V, mask=seen), rtol=1e-12, atol=1e-12)
        counts.copy_(counts.roll(1, -1))
        order.copy_(order.flip(-1))
    assert counter.frame_count == 1


def test_block_masks_that_do_not_fit() -> None:
    for made in (block_mask(causal, S + 1), 3):
        with pytest.raises(Exception, match="block_mask: got"):
            one_graph(lambda: door.flex_attention(Q, K, V, block_mask=made))()  # noqa: B023
