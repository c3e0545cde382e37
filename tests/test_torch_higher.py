"""Third derivatives and beyond: differences in fp64, torch.func and attention written out, what is hidden, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from test_torch_autograd import CASES, FACTOR, SCORES, SINKS, TABLE, inputs, leaves  # noqa: E402
from test_torch_second import BIAS, CURVED, K, Q, V, ours, written_out  # noqa: E402

import flashtile.torch  # noqa: E402  (after torch is known to be there)

attention = flashtile.torch.attention
HARD = ["window", "mask", "bias of one element", "alibi per batch", "sinks", "dropout", "together"]


def gradients_of(call: Callable[..., Any]) -> Callable[..., Any]:
    """First derivatives of a sum of everything, as a function of its own."""

    def first(*given: Any) -> Any:
        outputs = call(*given)
        total = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in outputs)
        found = torch.autograd.grad(total, given, create_graph=True, materialize_grads=True)
        return tuple(x for x in found if x.requires_grad)

    return first


def check(call: Callable[..., Any], given: tuple[Any, ...]) -> None:
    """Backward over backward over backward, and forward over backward over backward."""
    torch.autograd.gradgradcheck(gradients_of(call), given, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", [x if x in HARD else pytest.param(x, marks=pytest.mark.slow) for x in CASES])
def test_options(name: str) -> None:
    options, learned = CASES[name]

    def call(q: Any, k: Any, v: Any, *others: Any) -> Any:
        o, lse = attention(q, k, v, return_lse=True, **options, **dict(zip(learned, others, strict=True)))
        return o, torch.where(lse.isfinite(), lse, 0)

    check(call, (*inputs(), *leaves(*learned.values())))


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x not in SCORES or x == "a choice" else pytest.mark.slow) for x in CURVED]
)
def test_what_a_score_function_captured(name: str) -> None:
    def call(q: Any, k: Any, v: Any, table: Any, factor: Any) -> Any:
        return attention(q, k, v, score_mod=CURVED[name](table, factor), sinks=SINKS, return_lse=True)

    check(call, (*inputs(), *leaves(TABLE, FACTOR)))


def along(f: Callable[..., Any], order: int) -> Callable[[Any], Any]:
    """The derivative of this order of x -> f(x, BIAS) along K, forward mode over itself."""
    if order == 0:
        return lambda x: f(x, BIAS)
    return lambda x: torch.func.jvp(along(f, order - 1), (x,), (K,))[1]


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "forward over forward": lambda f: along(f, 2)(Q),
    "forward, four times": lambda f: along(f, 4)(Q),
    "reverse over forward over forward": lambda f: torch.func.grad(along(f, 2))(Q),
    "forward over reverse over forward": lambda f: torch.func.jvp(torch.func.grad(along(f, 1)), (Q,), (K,))[1],
    "forward over forward over reverse": lambda f: torch.func.jvp(
        lambda x: torch.func.jvp(torch.func.grad(f, (0, 1)), (x, BIAS), (K, BIAS))[1], (Q,), (K,)
    )[1],
    "reverse, three times": lambda f: torch.func.grad(
        lambda bias: torch.func.grad(lambda x: (torch.func.grad(f)(x, bias) ** 2).sum())(Q).sin().sum()
    )(BIAS),
    "a Hessian's gradient": lambda f: torch.func.jacrev(lambda x: torch.func.hessian(f, 1)(x, BIAS)[0, 0].sum())(Q),
    "of samples": lambda f: torch.func.vmap(lambda t: torch.func.jvp(along(f, 1), (Q,), (t,))[1])(torch.stack((K, V))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name: str) -> None:
    torch.testing.assert_close(TRANSFORMS[name](ours), TRANSFORMS[name](written_out), rtol=1e-8, atol=1e-9)


def third(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Third derivatives of a sum, of q, k and v."""
    total = attention(q, k, v, **options).float().square().sum()
    first = torch.autograd.grad(total, (q, k, v), create_graph=True)
    second = torch.autograd.grad(sum(x[..., :3, :].square().sum() for x in first), (q, k, v), create_graph=True)
    return torch.autograd.grad(sum(x[..., :3, :].sin().sum() for x in second), (q, k, v))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_hidden_reaches_no_third_derivative(poison: float) -> None:
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen[:, 3:] = False
    seen[1] = False

    def results(hidden: float) -> Any:
        q, k, v = leaves(Q, K, V)
        with torch.no_grad():
            q[..., 1, :], k[..., 4, :], v[..., 3:, :] = hidden, hidden, hidden
        return third(q, k, v, mask=seen)

    for got, want in zip(results(poison), results(1.0), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got[..., :3, :], want[..., :3, :], rtol=1e-12, atol=1e-12)


def test_tiles_hold_few_scores_and_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory beyond inputs and outputs is in proportion to a tile, which does not grow with S x S."""
    from flashtile.torch import tiles

    shapes = []
    attend = tiles.Tile.attend

    def noting(tile: Any, given: Any) -> Any:
        shapes.append(tile.shape)
        return attend(tile, given)

    monkeypatch.setattr(tiles.Tile, "attend", noting)
    want = along(ours, 3)(Q)
    monkeypatch.setattr(tiles, "BLOCK_SCORES", 11)
    shapes.clear()
    torch.testing.assert_close(along(ours, 3)(Q), want, rtol=1e-11, atol=1e-12)
    assert set(shapes) == {(1, 1, 2, 5), (1, 1, 1, 5)}


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_shapes(storage: Any) -> None:
    for x in ((Q, K, V), (Q[0], K[0, :1], V[0, :1]), (Q[0, 0], K[0, 0], V[0, 0])):
        given = leaves(*(y.to(storage) for y in x))
        found = third(*given, causal=True)
        assert all(y.dtype is storage and y.shape == z.shape for y, z in zip(found, given, strict=True))
        assert all(y.isfinite().all() and y.any() for y in found)


@pytest.mark.filterwarnings("ignore")
def test_opcheck() -> None:
    q, k, v = leaves(Q, K, V)
    given = q, k, v, [K.clone().requires_grad_(), None, V, Q, None], "fr"
    torch.library.opcheck(torch.ops.flashtile.attention_higher.default, given)
