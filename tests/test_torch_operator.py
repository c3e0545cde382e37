"""The dispatcher's operator: graphs of torch.compile, transforms of torch.func, modes, autocast, and opcheck."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashtile import score
from flashtile.errors import SpecError

torch = pytest.importorskip("torch")
import flashtile.torch  # noqa: E402  (after torch is known to be there)

attention = flashtile.torch.attention
OP = torch.ops.flashtile.attention.default
BACKWARD = torch.ops.flashtile.attention_backward.default

B, H, S, D = 2, 4, 8, 16


def draw(*shape: int, seed: int = 0, dtype: Any = torch.float64) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(*shape: int, seed: int = 0) -> Any:
    return draw(*shape, seed=seed).requires_grad_()


INPUTS = [leaf(B, H, S, D, seed=n) for n in range(3)]
Q, K, V = (x.detach() for x in INPUTS)
BIAS, SINKS, SLOPES, TABLE = leaf(H, S, S, seed=4), leaf(H, seed=5), leaf(H, seed=6), leaf(H, S, seed=7)
LEAVES = [*INPUTS, BIAS, SINKS, SLOPES, TABLE]
SEEN = draw(S, S, seed=8) > -0.3
FACTOR = 1.5
SCORE = score.freeze(lambda s, b, h, i, j: s * FACTOR + TABLE[h, j])
PACKED = score.freeze(score.varlen([0, 3, S], [0, 3, S], causal=True))

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": (2, None), "scale": 0.3},
    "mask": {"mask": SEEN},
    "bias": {"bias": BIAS, "softcap": 2.0},
    "alibi": {"alibi_slopes": SLOPES, "align": 1},
    "dropout": {"dropout_p": 0.3, "seed": 2**64 - 5, "sinks": SINKS},
    "offsets": {"causal": True, "align": torch.tensor([0, 1])},
    "together": {"score_mod": SCORE, "mask": PACKED, "bias": BIAS, "sinks": SINKS, "causal": True, "align": 0},
}


def results(call: Callable[..., Any]) -> list[Any]:
    o, lse = call(*INPUTS)
    loss = o.square().sum() + lse.sum()
    return [o, lse, *torch.autograd.grad(loss, LEAVES, allow_unused=True)]


def same(got: list[Any], want: list[Any]) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_compiled_is_eager(name: str) -> None:
    """In one graph, the same bits, forward and backward."""

    def call(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, return_lse=True, **CASES[name])

    torch._dynamo.reset()
    assert same(results(torch.compile(call, fullgraph=True, backend="aot_eager")), results(call))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled_by_inductor_is_eager(name: str) -> None:
    def call(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, return_lse=True, **CASES[name])

    torch._dynamo.reset()
    assert same(results(torch.compile(call, fullgraph=True)), results(call))


def test_compiled_sdpa_draws_dropout_and_takes_other_lengths() -> None:
    def call(q: Any, k: Any, v: Any) -> Any:
        return flashtile.torch.scaled_dot_product_attention(q, k, v, dropout_p=0.4, attn_mask=BIAS[:, : q.shape[2]])

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (S, 5, 3):
        found = []
        for run in (compiled, call):
            torch.manual_seed(3)
            found.append(run(Q[:, :, :rows], K, V))
        assert torch.equal(*found)


def below(b: Any, h: Any, i: Any, j: Any) -> Any:
    return torch.logical_and(j <= i, i - j < 4)


def test_a_function_that_reads_nothing_is_part_of_the_graph() -> None:
    """Written within or outside of the compiled function; each text is a constant of the graph."""

    def call(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, score_mod=lambda s, b, h, i, j: s - 0.5 * abs(i - j), mask=below, return_lse=True)

    def flex(q: Any) -> Any:
        return flashtile.torch.flex_attention(q, q, q, lambda s, b, h, i, j: s - 0.25 * abs(i - j))

    torch._dynamo.reset()
    assert same(results(torch.compile(call, fullgraph=True, backend="aot_eager")), results(call))
    assert torch.equal(torch.compile(flex, fullgraph=True, backend="aot_eager")(Q), flex(Q))


HALF, STEPS = 0.5, np.linspace(-1, 1, 2 * S)


class Reader(torch.nn.Module):
    """Functions of scores that read values, one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.reach = 3

    def by_slopes(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s - SLOPES[h] * abs(i - j)

    def forward(self, kind: str, q: Any, k: Any, v: Any) -> Any:
        half, total, doubled = HALF, q.mean(), SLOPES * 2

        def capped(s: Any) -> Any:
            return half * torch.tanh(s / half)

        rules: dict[str, Callable[..., Any]] = {
            "module": lambda s, b, h, i, j: s * HALF,
            "closure": lambda s, b, h, i, j: capped(s) if HALF else s,
            "default": lambda s, b, h, i, j, half=half: s * half,
            "tensor": lambda s, b, h, i, j: s + TABLE[h, j] * torch.where(j <= i, 1.0, -0.5),
            "made": lambda s, b, h, i, j: torch.where(j <= i, s * total + doubled.exp()[h], float("-inf")),
            "numpy": lambda s, b, h, i, j: s + STEPS[i - j + S],
            "method": self.by_slopes,
        }
        mask = (lambda b, h, i, j: i - j < self.reach) if kind == "module" else None
        return attention(q, k, v, score_mod=rules[kind], mask=mask, return_lse=True)


@pytest.mark.parametrize("kind", ["module", "closure", "default", "tensor", "made", "numpy", "method"])
def test_a_function_that_reads_values_is_followed(kind: str) -> None:
    """In one graph, the same bits, and gradients to tensors that it reads."""
    torch._dynamo.reset()
    learnt = kind in ("tensor", "made", "method")
    compiled = torch.compile(Reader(), fullgraph=True, backend="aot_eager" if learnt else "eager")
    runs = [lambda *x: compiled(kind, *x), lambda *x: Reader()(kind, *x)]
    if learnt:
        assert same(*map(results, runs))
    else:
        with torch.no_grad():
            assert same(*(list(run(*INPUTS)) for run in runs))


def test_a_value_that_was_followed_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second number makes another graph, the third and what is in arrays do not."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def call(q: Any, slope: float, reach: int, table: Any) -> Any:
        score_mod = lambda s, b, h, i, j: s * HALF + slope * (j - i) + table[h, j]  # noqa: E731
        return attention(q, q, q, score_mod=score_mod, mask=lambda b, h, i, j: abs(i - j) < reach)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for n in range(1, 5):
        given = Q, n / 3, n, n * TABLE.detach()
        assert torch.equal(compiled(*given), call(*given))
    assert counter.frame_count == 2
    monkeypatch.setattr(sys.modules[__name__], "HALF", 0.25)
    assert torch.equal(compiled(*given), call(*given))


def test_a_function_that_cannot_be_followed_breaks_the_graph_and_says_so() -> None:
    """Outside of the graph the call runs, or says what is wrong."""

    def call(q: Any, mask: Any) -> Any:
        return attention(q, q, q, mask=mask)

    torch._dynamo.reset()
    near = torch.compiler.disable(lambda i, j: i - j < 3)
    late = score.causal() & (lambda b, h, i, j: near(i, j))
    with pytest.raises(Exception, match="flashtile.score.freeze"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(Q, late)
    compiled = torch.compile(call, backend="aot_eager")
    assert torch.equal(compiled(Q, late), call(Q, late))
    with pytest.raises(SpecError, match="bool"):
        compiled(Q, lambda b, h, i, j: True if i > j else j == i)


class Exported(torch.nn.Module):
    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = mask
        self.slopes = torch.nn.Parameter(torch.linspace(0.1, 0.5, H))

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        o = attention(q, k, v, mask=self.mask, alibi_slopes=self.slopes, softcap=5.0)
        o = attention(o, k, v, score_mod=lambda s, b, h, i, j: s - 0.5 * abs(i - j), causal=True)
        return flashtile.torch.scaled_dot_product_attention(o, k, v, attn_mask=BIAS[:, : q.shape[2]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_computes_the_same(strict: bool) -> None:
    """Saved, loaded and run; each call is one node."""
    begins = torch.tensor([0, 0, 0, 3, 3, 3, 3, 3])
    mask = score.freeze(lambda b, h, i, j: (j <= i) & (begins[i] <= j)) if strict else PACKED
    module, file = Exported(mask), io.BytesIO()
    program = torch.export.export(module, (Q, K, V), strict=strict)
    assert sum(node.target is OP for node in program.graph.nodes) == 3
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        assert torch.equal(loaded(Q, K, V), module(Q, K, V))
        assert torch.equal(loaded(-Q, K, V), module(-Q, K, V))


@pytest.mark.filterwarnings("ignore")
def test_a_strict_export_would_lose_what_arrays_hold() -> None:
    with pytest.raises(Exception, match="rule: got one that reads NumPy arrays, expected tensors in a strict export"):
        torch.export.export(Exported(PACKED), (Q, K, V), strict=True)


@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_takes_other_lengths() -> None:
    class Causal(torch.nn.Module):
        def forward(self, q: Any) -> Any:
            return attention(q, q, q, causal=True)

    program = torch.export.export(Causal(), (Q,), dynamic_shapes=({2: torch.export.Dim("length", min=2, max=64)},))
    for length in (3, 17):
        q = torch.randn(B, H, length, Q.shape[-1])
        assert torch.equal(program.module()(q), Causal()(q))


def scored(q: Any, k: Any, v: Any, table: Any) -> Any:
    return attention(q, k, v, score_mod=lambda s, b, h, i, j: s + table[h, j], causal=True)


def test_gradients_by_torch_func() -> None:
    given = (Q, K, V, TABLE.detach())
    want = torch.autograd.grad(scored(*INPUTS, TABLE).square().sum(), [*INPUTS, TABLE])
    got = torch.func.grad(lambda *a: scored(*a).square().sum(), (0, 1, 2, 3))(*given)
    assert same(got, want)
    o, pull = torch.func.vjp(scored, *given)
    assert same(pull(2 * o), want)


def test_vmap_of_every_argument() -> None:
    qs, tables = torch.stack((Q, K), 1), torch.stack((TABLE.detach(), draw(H, S, seed=9)))
    got = torch.vmap(scored, (1, None, None, 0))(qs, K, V, tables)
    assert same(list(got), [scored(Q, K, V, tables[0]), scored(K, K, V, tables[1])])
    each = torch.vmap(torch.func.grad(lambda q: scored(q, K, V, tables[0]).square().sum()), 1)(qs)
    for n, q in enumerate((Q, K)):
        x = q.clone().requires_grad_()
        assert torch.equal(each[n], torch.autograd.grad(scored(x, K, V, tables[0]).square().sum(), x)[0])


@pytest.mark.parametrize(("randomness", "equal"), [("same", True), ("different", False)])
def test_vmap_of_dropout(randomness: str, equal: bool) -> None:
    call = torch.vmap(lambda q: attention(q, K, V, dropout_p=0.4), randomness=randomness)
    torch.manual_seed(0)
    first, second = call(torch.stack((Q, Q)))
    assert torch.equal(first, second) is equal
    with pytest.raises(RuntimeError, match="randomness error mode"):
        torch.vmap(lambda q: attention(q, K, V, dropout_p=0.4))(torch.stack((Q, Q)))


def test_modes_see_one_operator_each_way() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), keywords: Any = None) -> Any:
            names.append(str(function))
            return function(*args, **(keywords or {}))

    names: list[str] = []
    with Note():
        attention(*INPUTS).sum().backward()
    assert names.count("flashtile.attention.default") == names.count("flashtile.attention_backward.default") == 1
    assert "flashtile.attention.default" in make_fx(lambda q: attention(q, K, V))(Q).code


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, v = torch.empty(2, 4, 5, 8, dtype=torch.bfloat16), torch.empty(2, 2, 7, 6, dtype=torch.bfloat16)
        o, lse = attention(q, torch.empty(2, 2, 7, 8, dtype=torch.bfloat16), v, return_lse=True)
    assert (o.shape, o.dtype, lse.shape, lse.dtype) == ((2, 4, 5, 6), torch.bfloat16, (2, 4, 5), torch.float32)


def test_autocast_of_the_operator() -> None:
    q = Q.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert OP(q, q, q)[0].dtype is torch.bfloat16
        compiled = torch.compile(lambda q: attention(q, q, q), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(q), attention(q, q, q)) and compiled(q).dtype is torch.bfloat16


EVERYTHING = (
    None,
    BIAS,
    SLOPES,
    SINKS,
    None,
    torch.tensor(5),
    [TABLE],
    SCORE.text,
    "",
    [FACTOR],
    True,
    [2, -1],
    "top_left",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rest", [(), (*EVERYTHING, None, 0.3, 2.0, 0.25)], ids=["plain", "everything"])
def test_opcheck(rest: Any) -> None:
    torch.library.opcheck(OP, (*INPUTS, *rest))


def test_texts_read_back() -> None:
    """Into the very expression: the same program, by structure, in this process as in another."""
    for rule in (SCORE, PACKED, score.freeze(lambda s, b, h, i, j: s + (-np.inf if TABLE is None else 0.0))):
        again = score.thaw(rule.text, rule.arrays, rule.numbers)
        assert score.freeze(again) is again and again.text == rule.text
        assert score.Program.traced((B, H, S, S), **_traced(again)).structure == (
            score.Program.traced((B, H, S, S), **_traced(rule)).structure
        )


def _traced(rule: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("softcap", "alibi_slopes", "bias", "mask", "window", "score_mod"))
    kind = "mask" if isinstance(rule, score.FrozenMask) else "score_mod"
    return {**nothing, "causal": False, "offset": 0, kind: rule}


@pytest.mark.parametrize(
    ("text", "arrays", "numbers"),
    [
        ("s + 1", (), ()),
        ("score: return x", (), ()),
        ("mask: %0:bool = nothing j i; return %0", (), ()),
        (SCORE.text, (), ()),
        (SCORE.text, (TABLE,), (1.5, 2.0)),
    ],
)
def test_other_texts_are_refused(text: str, arrays: Any, numbers: Any) -> None:
    with pytest.raises(SpecError, match="^(text|arrays, numbers): got "):
        score.thaw(text, arrays, numbers)


def test_a_slot_is_filled_as_its_text_says() -> None:
    rule = score.thaw(SCORE.text, (TABLE.detach().float(),), (FACTOR,))
    with pytest.raises(SpecError, match="^score_mod: captured array 1: got float32 of 2 axes, expected what the text"):
        attention(Q, K, V, score_mod=rule)
