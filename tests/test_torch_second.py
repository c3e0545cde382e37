"""Forward mode and second derivatives of the PyTorch door: differences in fp64, and torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from test_torch_autograd import CASES, FACTOR, SCORES, SINKS, TABLE, draw, inputs, leaves  # noqa: E402

import flashtile.torch  # noqa: E402  (after torch is known to be there)

attention = flashtile.torch.attention


def check(call: Callable[..., Any], given: tuple[Any, ...]) -> None:
    """Forward mode, backward over backward, and forward over backward."""
    torch.autograd.gradcheck(call, given, check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    torch.autograd.gradgradcheck(call, given, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_options(name: str) -> None:
    options, learned = CASES[name]

    def call(q: Any, k: Any, v: Any, *others: Any) -> Any:
        o, lse = attention(q, k, v, return_lse=True, **options, **dict(zip(learned, others, strict=True)))
        return o, torch.where(lse.isfinite(), lse, 0)

    check(call, (*inputs(), *leaves(*learned.values())))


CURVED = {
    **SCORES,
    "loads that meet": lambda table, factor: (
        lambda s, b, h, i, j: torch.tanh(s * table[h, j]) * table[h, i + 1] * factor
    ),
}


@pytest.mark.parametrize("name", CURVED)
def test_what_a_score_function_captured(name: str) -> None:
    def call(q: Any, k: Any, v: Any, table: Any, factor: Any) -> Any:
        return attention(q, k, v, score_mod=CURVED[name](table, factor), sinks=SINKS, return_lse=True)

    check(call, (*inputs(), *leaves(TABLE, FACTOR)))


Q, K, V = (draw(1, 2, 5, 4, seed=n) for n in range(3))
BIAS = draw(2, 5, 5, seed=3)


def ours(q: Any, bias: Any) -> Any:
    return attention(q, K, V, score_mod=lambda s, b, h, i, j: s + bias[h, i, j], causal=True).square().sum()


def written_out(q: Any, bias: Any) -> Any:
    s = q @ K.mT / 2 + bias
    return (s.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1) @ V).square().sum()


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jvp": lambda f: torch.func.jvp(f, (Q, BIAS), (K, BIAS))[1],
    "a Hessian times a vector": lambda f: torch.func.jvp(torch.func.grad(f), (Q, BIAS), (K, BIAS))[1],
    "hessian": lambda f: torch.func.hessian(f, 1)(Q, BIAS),
    "reverse over reverse": lambda f: torch.func.jacrev(torch.func.grad(f, 1))(Q, BIAS),
    "reverse over forward": lambda f: torch.func.grad(lambda q: torch.func.jvp(lambda x: f(x, BIAS), (q,), (q,))[1])(Q),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name: str) -> None:
    torch.testing.assert_close(TRANSFORMS[name](ours), TRANSFORMS[name](written_out), rtol=1e-9, atol=1e-11)


def test_what_is_hidden_reaches_no_second_derivative() -> None:
    """NaN and infinities behind a mask: the same bits as without them."""

    def results(poison: float) -> list[Any]:
        q, k, v = leaves(Q, K, V)
        with torch.no_grad():
            k[..., 4, :], v[..., 3:, :] = poison, poison
        seen = torch.ones(5, 5, dtype=torch.bool)
        seen[:, 3:] = False
        first = torch.autograd.grad(attention(q, k, v, mask=seen).square().sum(), (q, k, v), create_graph=True)
        return list(torch.autograd.grad(sum(x[..., :3, :].square().sum() for x in first), (q, k, v)))

    for poison in (torch.nan, torch.inf):
        for got, want in zip(results(poison), results(1.0), strict=True):
            assert torch.equal(got[..., :3, :], want[..., :3, :]) and got.isfinite().all()


def test_blocks_of_rows_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashtile.kernels import second

    def product(f: Callable[..., Any]) -> Any:
        return torch.func.jvp(torch.func.grad(f), (Q, BIAS), (K, BIAS))[1]

    want = product(ours)
    monkeypatch.setattr(second, "BLOCK_SCORES", 11)
    torch.testing.assert_close(product(ours), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(storage: Any) -> None:
    q, k, v = leaves(*(x.to(storage) for x in (Q, K, V)))
    (first,) = torch.autograd.grad(attention(q, k, v).float().square().sum(), q, create_graph=True)
    second = torch.autograd.grad(first.float().square().sum(), (q, k, v))
    assert all(x.dtype is storage and x.isfinite().all() and x.any() for x in (first, *second))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_the_backward() -> None:
    q, k, v = leaves(Q, K, V)
    o, lse = torch.ops.flashtile.attention.default(Q, K, V)
    given = o.clone().requires_grad_(), None, q, k, v, o, lse, [True, True, True, False, False, False]
    torch.library.opcheck(torch.ops.flashtile.attention_backward.default, given)
