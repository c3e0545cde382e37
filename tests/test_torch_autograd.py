"""Autograd of the PyTorch door: gradcheck over the options, torch's own SDPA, what is saved, and what is refused."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flashtile
from flashtile.errors import UnavailableError
from flashtile.testing import assert_gradients_accurate

torch = pytest.importorskip("torch")
import flashtile.torch  # noqa: E402  (after torch is known to be there)

attention = flashtile.torch.attention
ours = flashtile.torch.scaled_dot_product_attention
sdpa = torch.nn.functional.scaled_dot_product_attention

B, H, KV, S, T, D, E = 2, 4, 2, 4, 6, 3, 2


def draw(*shape: int, seed: int = 0, dtype: Any = torch.float64) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(*tensors: Any) -> list[Any]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def inputs(dtype: Any = torch.float64) -> list[Any]:
    shapes = (B, H, S, D), (B, KV, T, D), (B, KV, T, E)
    return leaves(*(draw(*shape, seed=n, dtype=dtype) for n, shape in enumerate(shapes)))


def seen() -> Any:
    mask = draw(B, 1, S, T, seed=9) > -0.3
    mask[0, 0, 1] = False  # a row that sees nothing
    return mask


BIAS, SINKS, SLOPES = draw(1, H, 1, T, seed=5), draw(H, seed=6), draw(H, seed=7).abs()
TABLE, FACTOR, ONE = draw(H, S + T - 1, seed=8), draw(seed=10), draw(1, 1, 1, 1, seed=11)

# Options, and the tensors among them whose gradients are checked, by the names of the options.
Case = tuple[dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "plain": ({}, {}),
    "causal": ({"causal": True, "align": "bottom_right"}, {}),
    "window": ({"window": (2, 1), "align": np.array([1, -1])}, {}),
    "mask": ({"mask": seen()}, {}),
    "mask function": ({"mask": lambda b, h, i, j: (i + j + h) % 3 != 0}, {}),
    "bias": ({"scale": 0.7}, {"bias": BIAS}),
    "bias of one element": ({}, {"bias": ONE}),
    "softcap": ({"softcap": 1.5}, {}),
    "alibi": ({"align": 1}, {"alibi_slopes": SLOPES}),
    "alibi per batch": ({"align": 1}, {"alibi_slopes": torch.stack((SLOPES, 2 * SLOPES))}),
    "sinks": ({"mask": seen()}, {"sinks": SINKS}),
    "sinks per batch": ({}, {"sinks": torch.stack((SINKS, -SINKS))}),
    "dropout": ({"dropout_p": 0.3, "seed": 5}, {}),
    "together": (
        {"causal": True, "align": "bottom_right", "mask": seen(), "softcap": 2.0, "dropout_p": 0.2, "seed": 1},
        {"bias": BIAS, "sinks": SINKS, "alibi_slopes": SLOPES},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    """Differences in fp64, of the output and of lse where it is finite, to every tensor of the call."""
    options, learned = CASES[name]

    def call(q: Any, k: Any, v: Any, *others: Any) -> Any:
        o, lse = attention(q, k, v, return_lse=True, **options, **dict(zip(learned, others, strict=True)))
        return o, torch.where(lse.isfinite(), lse, 0)

    torch.autograd.gradcheck(call, (*inputs(), *leaves(*learned.values())))


SCORES: dict[str, Callable[..., Any]] = {
    "a table": lambda table, factor: lambda s, b, h, i, j: s + table[h, i - j + T - 1],
    "a table twice": lambda table, factor: lambda s, b, h, i, j: s * table[h, j] + torch.tanh(table[h, i]),
    "a number": lambda table, factor: lambda s, b, h, i, j: s * factor,
    "a row of a table": lambda table, factor: lambda s, b, h, i, j: s + table[1][i - j + T - 1] * factor,
    "a changed table": lambda table, factor: lambda s, b, h, i, j: s + (2 * table)[h, j],
    "a choice": lambda table, factor: lambda s, b, h, i, j: torch.where(i > j, s + table[h, j], s * factor),
}


@pytest.mark.parametrize("name", SCORES)
def test_gradcheck_of_what_a_score_function_captured(name: str) -> None:
    """The tensor itself, a view of it, or what torch computed from it while the function was traced."""

    def call(q: Any, k: Any, v: Any, table: Any, factor: Any) -> Any:
        return attention(q, k, v, score_mod=SCORES[name](table, factor), sinks=SINKS, return_lse=True)

    torch.autograd.gradcheck(call, (*inputs(), *leaves(TABLE, FACTOR)))


def test_one_tensor_in_several_places_has_the_sum() -> None:
    x, slopes = leaves(draw(1, 4, 4, 4), draw(4, seed=1))

    def call(x: Any, slopes: Any) -> Any:
        return attention(
            x, x, x, bias=x, sinks=slopes, alibi_slopes=slopes, score_mod=lambda s, b, h, i, j: s * x[b, h, i, j]
        )

    torch.autograd.gradcheck(call, (x, slopes))


@pytest.mark.parametrize("attn_mask", [None, draw(T, seed=5), draw(3, 1, H, S, T, seed=5), draw(B, 1, S, T, seed=5)])
def test_gradcheck_of_sdpa_as_torch_broadcasts(attn_mask: Any) -> None:
    q, k, v = leaves(draw(3, B, H, S, D), draw(1, B, KV, T, D, seed=1), draw(B, KV, T, E, seed=2))
    learned = [] if attn_mask is None else leaves(attn_mask)

    def call(q: Any, k: Any, v: Any, *mask: Any) -> Any:
        return ours(q, k, v, *mask, enable_gqa=True, return_lse=True, softcap=3.0)

    torch.autograd.gradcheck(call, (q, k, v, *learned))


def test_gradcheck_of_dropout_whose_seed_torch_draws() -> None:
    def call(q: Any, k: Any, v: Any) -> Any:
        torch.manual_seed(3)
        return ours(q, k, v, dropout_p=0.4, enable_gqa=True)

    torch.autograd.gradcheck(call, tuple(inputs()))
    torch.manual_seed(3)
    first, second = (ours(*inputs(), dropout_p=0.4, enable_gqa=True) for _ in range(2))
    assert torch.equal(first, call(*inputs())) and not torch.equal(first, second)


@pytest.mark.parametrize("attend", [ours, sdpa], ids=["ours", "torch's"])
@pytest.mark.parametrize("storage", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_gradients_of_sdpa_by_the_accuracy_rule(attend: Any, storage: Any, options: dict[str, Any]) -> None:
    """torch's own gradients, too, so that both compute the same thing."""
    q, k, v = leaves(*(draw(2, 3, 17, 8, seed=n, dtype=storage) for n in range(3)))
    do = draw(2, 3, 17, 8, seed=3, dtype=storage)
    attend(q, k, v, **options).backward(do)
    same = {"causal": options["is_causal"]} if "is_causal" in options else options
    got = flashtile.Gradients(q.grad, k.grad, v.grad)
    assert_gradients_accurate(got, do, *(x.detach() for x in (q, k, v)), **same)


@pytest.mark.parametrize("needed", range(1, 8))
def test_a_call_with_options_alone_goes_straight_to_its_kernel(needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever came from above: of any strides, negated where it is read, or for derivatives of its own. The last two
    go the longer way, which gives the same bits."""
    from flashtile.torch import operator

    q, k, v = given = inputs(torch.float32)
    for n, x in enumerate(given):
        x.requires_grad_(bool(needed >> n & 1))
    longer: list[int] = []
    whole = operator._differentiate
    monkeypatch.setattr(operator, "_differentiate", lambda *a: longer.append(len(wanted)) or whole(*a))
    do = draw(B, H, S, E, seed=4, dtype=torch.float32)
    wide, negated = do.repeat_interleave(2, -1)[..., ::2], torch.complex(do, -do).conj().imag
    assert not wide.is_contiguous() and negated.is_neg() and torch.equal(negated, do)
    wanted: list[Any] = []
    for come, recorded in ((do, False), (do, False), (wide, False), (negated, False), (do, True)):
        targets = [x for x in given if x.requires_grad]
        wanted.append(torch.autograd.grad(attention(q, k, v, scale=0.4), targets, come, create_graph=recorded))
    assert longer == [3, 4]
    for gradients in wanted[1:]:
        assert len(gradients) == needed.bit_count() and all(map(torch.equal, gradients, wanted[0]))


@pytest.mark.parametrize("needed", range(1, 8))
def test_only_what_is_needed_is_computed(needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashtile.torch import gradients

    wanted: list[Any] = []
    run = gradients.run_backward

    def noting(*call: Any) -> Any:
        arrays, names = call[4], call[7]
        wanted.append(names)
        assert {name for name in ("dq", "dk", "dv") if name in arrays} == {
            f"d{n}" for n in names if n in ("q", "k", "v")
        }
        return run(*call)

    differentiate = flashtile.calls.differentiate

    def noting_qkv(*call: Any) -> Any:
        found = differentiate(*call)
        assert [x is not None for x in found] == list(call[-1])
        wanted.append({name for name, asked in zip("qkv", call[-1], strict=True) if asked})
        return found

    monkeypatch.setattr(gradients, "run_backward", noting)
    monkeypatch.setattr(flashtile.calls, "differentiate", noting_qkv)
    q, k, table = draw(1, 2, 4, 3), draw(1, 2, 4, 3, seed=1), draw(2, 4, seed=2)
    given = [x.requires_grad_(bool(needed >> n & 1)) for n, x in enumerate((q, k, table))]
    bias = draw(4, 4, seed=3)
    attention(q, k, k.detach(), bias=bias, score_mod=lambda s, b, h, i, j: s + table[h, j]).sum().backward()
    assert [x.grad is not None for x in given] == [x.requires_grad for x in given]
    names = {name for name, x in zip("qk", given, strict=False) if x.requires_grad}
    assert wanted[0] - names == ({n for n in wanted[0] if isinstance(n, int)}) and names <= wanted[0]
    assert len(wanted[0]) == sum(x.requires_grad for x in given)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_have_their_tensors_dtypes(storage: Any) -> None:
    q, k, v = inputs(storage)
    bias, sinks, slopes = leaves(BIAS.float(), SINKS, SLOPES.bfloat16())
    attention(q, k, v, bias=bias, sinks=sinks, alibi_slopes=slopes, align=0).float().square().sum().backward()
    for x in (q, k, v, bias, sinks, slopes):
        assert x.grad.dtype is x.dtype and x.grad.shape == x.shape and x.grad.isfinite().all() and x.grad.any()


def test_what_overflows_is_infinite() -> None:
    """As torch's GradScaler looks for it."""
    x = draw(1, 1, 4, 8, dtype=torch.float16)
    v = x.clone().requires_grad_()
    attention(x, x, v).backward(torch.full_like(v, 60000.0))
    assert v.grad.isinf().any() and not v.grad.isnan().any()


def test_rows_that_see_nothing_have_zero_gradients() -> None:
    q, k, v = inputs()
    mask = torch.zeros(S, T, dtype=torch.bool)
    o, lse = attention(q, k, v, mask=mask, return_lse=True)
    (o.sum() + torch.where(lse.isfinite(), lse, 0).sum()).backward()
    assert not any(x.grad.any() for x in (q, k, v))


def test_lse_alone_and_nothing_at_all() -> None:
    q, k, v = inputs()
    _, lse = attention(q, k, v, return_lse=True)
    lse.sum().backward()
    whole = (q @ k.repeat_interleave(2, 1).mT / D**0.5).logsumexp(-1).sum()
    torch.testing.assert_close(q.grad, torch.autograd.grad(whole, q)[0])
    assert not v.grad.any()


def test_gradients_accumulate_and_the_graph_is_kept_if_asked() -> None:
    q, k, v = inputs()
    o = attention(q, k, v)
    o.sum().backward(retain_graph=True)
    once = [x.grad.clone() for x in (q, k, v)]
    o.sum().backward()
    for x, one in zip((q, k, v), once, strict=True):
        assert torch.equal(x.grad, 2 * one)
    with pytest.raises(RuntimeError, match="second time"):
        o.sum().backward()


@pytest.mark.parametrize("place", range(7))
def test_changes_in_place_are_noticed(place: int) -> None:
    q, k, v, table, sinks = (*inputs(), *leaves(TABLE, SINKS))
    mask, given = seen(), [q, k, v, table, sinks]
    o = attention(q, k, v, score_mod=lambda s, b, h, i, j: s + table[h, j], sinks=sinks, mask=mask)
    with torch.no_grad():
        [*given, mask, o][place].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_hooks_on_saved_tensors_and_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    table = leaves(TABLE)[0]

    def call(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, score_mod=lambda s, b, h, i, j: s + table[h, j], dropout_p=0.3)

    def gradients(run: Callable[..., Any]) -> list[Any]:
        torch.manual_seed(4)
        given = inputs()
        table.grad = None
        run(*given).square().sum().backward()
        return [*(x.grad for x in given), table.grad]

    want, packed = gradients(call), []

    def pack(x: Any) -> Any:
        packed.append(x.shape)
        return x.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.clone()):
        hooked = gradients(call)
    rerun = [gradients(lambda *a, r=r: checkpoint(call, *a, use_reentrant=r)) for r in (False, True)]
    for got in (hooked, *rerun):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    sizes = {(B, H, S, D), (B, KV, T, D), (B, KV, T, E), (B, H, S, E), (B, H, S), tuple(TABLE.shape), ()}  # () the seed
    assert {tuple(x) for x in packed} == sizes  # the last by square


def read_alone() -> dict[str, Any]:
    """Options of which no gradient is recorded."""
    return {"mask": seen(), "bias": BIAS.clone(), "alibi_slopes": SLOPES.clone(), "sinks": SINKS.clone(), "align": 1}


@pytest.mark.parametrize("name", ["mask", "bias", "alibi_slopes", "sinks"])
def test_changes_of_what_is_read_alone_are_noticed(name: str) -> None:
    options = read_alone()
    o = attention(*inputs(), **options)
    options[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_what_is_read_alone_is_saved_as_tensors() -> None:
    """A graph keeps nothing that hooks do not see: they may put it elsewhere and bring a copy back."""
    options, given, packed = read_alone(), inputs(), []
    want = torch.autograd.grad(attention(*given, **options, softcap=3.0).sum(), given)

    def pack(x: Any) -> Any:
        packed.append(tuple(x.shape))
        return x.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.clone()):
        o = attention(*given, **options, softcap=3.0)
    kept = [weakref.ref(options[name]) for name in ("mask", "bias", "alibi_slopes", "sinks")]
    shapes = [tuple(x.shape) for x in options.values() if isinstance(x, torch.Tensor)]
    options.clear()
    gc.collect()
    assert not any(x() is not None for x in kept)
    assert sorted(packed) == sorted([*(tuple(x.shape) for x in (*given, o, o[..., 0])), *shapes])
    assert all(map(torch.equal, torch.autograd.grad(o.sum(), given), want))


def test_numbers_are_those_of_the_forward() -> None:
    """What a function closed over may have changed before the backward."""
    factor = 2.0

    def gradient(then: float) -> Any:
        nonlocal factor
        factor = 2.0
        q, k, v = inputs()
        o = attention(q, k, v, score_mod=lambda s, b, h, i, j: s * factor)
        factor = then
        o.sum().backward()
        return q.grad

    assert torch.equal(gradient(2.0), gradient(100.0))


def test_backward_from_many_threads() -> None:
    losses, results = [], []
    for n in range(6):
        q, k, v = leaves(*(draw(1, 2, 33, 8, seed=3 * n + m) for m in range(3)))
        results.append((q, torch.autograd.grad(attention(q, k, v, causal=True).square().sum(), q)[0]))
        losses.append(attention(q, k, v, causal=True).square().sum())
    threads = [threading.Thread(target=loss.backward) for loss in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(q.grad, want) for q, want in results)


def test_autocast_and_modules() -> None:
    layer = torch.nn.Linear(8, 8)
    x = draw(2, 5, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours(*[layer(x)] * 3).float().sum().backward()
    assert layer.weight.grad.dtype is torch.float32 and layer.weight.grad.any()


def test_without_grad_nothing_is_recorded() -> None:
    q, k, v = inputs()
    want = attention(q, k, v).detach()
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            o = attention(q, k, v)
            assert not o.requires_grad and torch.equal(o, want)
    assert attention(q.detach(), k.detach(), v.detach()).grad_fn is None


def test_what_cannot_be_recorded_is_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(UnavailableError, match="^out: got a tensor while gradients are recorded"):
        attention(q, k, v, out=torch.empty(B, H, S, E, dtype=torch.float64))
    with pytest.raises(UnavailableError, match="^kernel: got 'triton'"):
        attention(q, k, v, kernel="triton")
    o = attention(q, k, v)
    with pytest.raises(UnavailableError, match="^is_grads_batched: got True"):
        o = attention(q, k, v)
        torch.autograd.grad(o, q, torch.ones(3, *o.shape, dtype=o.dtype), is_grads_batched=True)
