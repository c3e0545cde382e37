"""Nested tensors of torch's jagged layout: by the door, under install, with gradients; what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from flashtile.errors import SpecError

torch = pytest.importorskip("torch")

import flashtile.torch  # noqa: E402
from flashtile.testing import expect, expect_gradients  # noqa: E402

ROWS, KEYS = [0, 5, 5, 22, 25], [0, 2, 9, 9, 30]  # a sequence without rows, and one without keys
sdpa = flashtile.torch.scaled_dot_product_attention


def tensors(bounds: list[int], *sizes: tuple[int, int]) -> tuple[Any, list[Any]]:
    """Where sequences begin, and for each size (heads, head size) the rows of all of them."""
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(bounds), [torch.randn(bounds[-1], *x, generator=generator, requires_grad=True) for x in sizes]


def nested(bounds: Any, values: Any) -> Any:
    return torch.nested.nested_tensor_from_jagged(values, bounds).transpose(1, 2)


def rows_of(x: Any) -> Any:
    return x.transpose(1, 2).contiguous().values()


def checked(run: Any, rows: list[int], keys: list[int], heads: int = 4, **options: Any) -> None:
    """The output and gradients of each sequence, by the accuracy rule."""
    at_rows, [q, do] = tensors(rows, (4, 8), (4, 6))
    at_keys = at_rows if keys == rows else torch.tensor(keys)
    _, [k, v] = tensors(keys, (heads, 8), (heads, 6))
    o = run(nested(at_rows, q), nested(at_keys, k), nested(at_keys, v))
    assert o.is_nested and o.layout is torch.jagged and o.shape[:2] == (len(rows) - 1, 4) and o.shape[3] == 6
    found = torch.autograd.grad(rows_of(o), (q, k, v), do.detach())
    for n in range(len(rows) - 1):
        mine = [x.detach()[a[n] : a[n + 1]].transpose(0, 1) for x, a in ((q, rows), (k, keys), (v, keys), (do, rows))]
        if not (mine[0].shape[1] and mine[1].shape[1]):
            continue
        expect(*mine[:3], **options)[0].check(rows_of(o).detach()[rows[n] : rows[n + 1]].transpose(0, 1))
        want = expect_gradients(mine[3], *mine[:3], **options)
        for name, x, a in zip("qkv", found, (rows, keys, keys), strict=True):
            getattr(want, name).check(x[a[n] : a[n + 1]].transpose(0, 1))


@pytest.mark.parametrize("installed", [False, True])
def test_each_sequence_alone(installed: bool) -> None:
    if not installed:
        checked(lambda *x: sdpa(*x, scale=0.5), ROWS, KEYS, scale=0.5)
        return
    with flashtile.torch.install():
        checked(torch.nn.functional.scaled_dot_product_attention, ROWS, KEYS)
    assert flashtile.torch.calls() == (1, {})


def test_options() -> None:
    """Causal calls, which torch's own kernels on a CPU do not take, and shared heads."""
    run = lambda *x: sdpa(*x, is_causal=True, window=(6, None), softcap=3.0, enable_gqa=True)  # noqa: E731
    checked(run, ROWS, ROWS, heads=2, causal=True, window=(6, None), softcap=3.0, align="top_left")
    bounds, [q] = tensors(ROWS, (4, 8))
    x = nested(bounds, q)
    o, lse = sdpa(x, x, x, return_lse=True)
    assert lse.shape == o.shape[:3] and torch.equal(rows_of(o), rows_of(sdpa(x, x, x)))


def test_what_is_refused() -> None:
    bounds, [q, wide] = tensors(ROWS, (4, 8), (2, 8))
    elsewhere, [k] = tensors(KEYS, (4, 8))
    x, fewer, other = nested(bounds, q), nested(bounds, wide), nested(elsewhere, k)
    for message, arguments, options in (
        ("attn_mask: got one beside nested", (x, x, x), {"attn_mask": torch.ones(3, 3)}),
        ("key: got a Tensor, expected nested tensors of layout", (x, torch.ones(1, 4, 5, 8), x), {}),
        ("query: got a nested tensor of 3 axes", (x.transpose(1, 2).flatten(2), x, x), {}),
        ("query: got a nested tensor of 4 axes", (x.transpose(1, 2), x, x), {}),
        ("value: got sequences of other lengths", (x, x, other), {}),
        ("key: got 2 heads beside 4", (x, fewer, fewer), {}),
        ("is_causal: got sequences that have not as many keys", (x, other, other), {"is_causal": True}),
        ("scale: got 'wide'", (x, x, x), {"scale": "wide"}),  # by the names of this signature
        ("sinks: got", (x, x, x), {"sinks": torch.zeros(3)}),
        ("window: got", (x, x, x), {"window": (1, 2, 3)}),
        ("softcap: got", (x, x, x), {"softcap": -1.0}),
    ):
        with pytest.raises(SpecError, match="^" + message):
            sdpa(*arguments, **options)


def test_what_is_handed_back_is_counted() -> None:
    bounds, [q, wide] = tensors([0, 3, 9], (4, 8), (2, 8))
    before = torch.nested._internal.ops.jagged_scaled_dot_product_attention
    with flashtile.torch.install(), pytest.raises((RuntimeError, ValueError)):
        x = nested(bounds, q)
        torch.nn.functional.scaled_dot_product_attention(x, nested(bounds, wide), x)
    assert flashtile.torch.calls().taken == 0 and len(flashtile.torch.calls().handed_back) == 1
    assert torch.nested._internal.ops.jagged_scaled_dot_product_attention is before


def test_a_compiled_function_breaks_its_graph_there() -> None:
    """And says so where it may not."""

    def call(q: Any, bounds: Any) -> Any:
        x = nested(bounds, q)
        return rows_of(sdpa(x, x, x)) * 2

    bounds, [q] = tensors(ROWS, (4, 8))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, backend="eager")(q, bounds), call(q, bounds))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="query: got a nested tensor in a compiled function: where its sequences begin"):
        torch.compile(call, backend="eager", fullgraph=True)(q, bounds)
