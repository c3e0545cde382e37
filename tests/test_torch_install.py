"""Routing torch's own scaled_dot_product_attention: what is taken, what is handed back, and that it can be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flashtile.errors import SpecError

torch = pytest.importorskip("torch")
import flashtile.torch as door  # noqa: E402  (after torch is known to be there)

sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    yield
    if torch.backends.mha.get_fastpath_enabled() is False:
        door.uninstall()


def leaves(n: int = 3, *shape: int) -> list[Any]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(shape or (2, 4, 9, 8), generator=generator, requires_grad=True) for _ in range(n)]


def results(call: Callable[..., Any], *given: Any) -> list[Any]:
    o = call(*given)
    learned = [x for x in given if x.requires_grad]
    return [o, *torch.autograd.grad(o.square().sum(), learned)]


def near(got: list[Any], want: list[Any]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}, {"attn_mask": True}], ids=str
)
def test_calls_are_taken_with_their_gradients(options: dict[str, Any]) -> None:
    """Masks that need theirs, too; all as torch's own function has them, and again torch's own afterwards."""
    q, k, v = leaves()
    learned = leaves(1, 9, 9) if options.pop("attn_mask", False) else []
    if options.get("enable_gqa"):
        k, v = (x.detach()[:, :2].clone().requires_grad_() for x in (k, v))

    def call(q: Any, k: Any, v: Any, *mask: Any) -> Any:
        return sdpa(q, k, v, *mask, **options)

    want = results(call, q, k, v, *learned)
    with door.install():
        got = results(call, q, k, v, *learned)
        with torch.no_grad():
            again = call(q, k, v, *learned)
        assert door.calls() == door.Calls(2, {})
    near(got, want)
    near([again], want[:1])
    assert torch.equal(call(q, k, v, *learned), want[0]) and door.calls().taken == 2


def test_dropout_is_that_of_the_door() -> None:
    q, k, v = leaves()
    torch.manual_seed(3)
    want = door.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    with door.install():
        torch.manual_seed(3)
        assert torch.equal(sdpa(q, k, v, dropout_p=0.4), want)
        assert door.calls() == (1, {})


def test_compiled_graphs() -> None:
    """As they are made, they are counted; the operator is in them, and dropout is the eager call's."""
    q, k, v = leaves()
    (mask,) = leaves(1, 9, 9)

    def call(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return sdpa(q, k, v, attn_mask=mask, dropout_p=0.2)

    torch._dynamo.reset()
    with door.install():
        found = []
        for run in (torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True), call):
            torch.manual_seed(5)
            found.append(results(run, q, k, v, mask))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert door.calls().taken > 1 and not door.calls().handed_back
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
def test_modules_follow(training: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16)
    heads = torch.nn.MultiheadAttention(16, 4, batch_first=True).train(training)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).train(training)
    hidden = torch.zeros(2, 9, dtype=torch.bool)
    hidden[:, 7:] = True

    def run() -> list[Any]:
        out = heads(x, x, x, need_weights=False)[0], layer(x), layer(x, src_key_padding_mask=hidden)[:, :7]
        loss = sum(o.square().sum() for o in out)
        with torch.no_grad():
            quiet = layer(x)
        return [*out, *torch.autograd.grad(loss, [*heads.parameters(), *layer.parameters()]), quiet]

    want = run()
    with door.install():
        got = run()
        assert door.calls() == (4, {})
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_what_is_handed_back_is_counted_with_its_reason() -> None:
    q, k, v = (x.detach() for x in leaves())
    with door.install():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                sdpa(q, k[:, :3], v)
        sdpa(q, k, v)
        taken, handed_back = door.calls()
    assert taken == 1 and list(handed_back.values()) == [2]
    assert "leading axes that broadcast" in next(iter(handed_back))


def test_transforms_of_torch_func() -> None:
    q, k, v = (x.detach() for x in leaves())
    want = torch.func.grad(lambda q: sdpa(q, k, v).square().sum())(q)
    with door.install():
        got = torch.func.grad(lambda q: sdpa(q, k, v).square().sum())(q)
        assert door.calls().taken == 1
    near([got], [want])


def test_install_and_uninstall_in_pairs() -> None:
    with pytest.raises(SpecError, match="^uninstall: got a call while nothing is installed"):
        door.uninstall()
    door.install()
    with pytest.raises(SpecError, match="^install: got a second call, expected one uninstall"):
        door.install()
    assert sdpa(*leaves()).shape == (2, 4, 9, 8) and door.calls().taken == 1
    door.uninstall()
    with door.install():
        assert door.calls() == (0, {})
        door.uninstall()
    assert torch.backends.mha.get_fastpath_enabled()
