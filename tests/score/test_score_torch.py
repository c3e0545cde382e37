"""mask_mod and score_mod functions as they are written for torch's flex_attention, unchanged, against torch itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flashtile.errors import SpecError
from flashtile.score import Program

torch = pytest.importorskip("torch")
flex = pytest.importorskip("torch.nn.attention.flex_attention")

SHAPE = (2, 4, 24, 24)
KEEP, KIND = torch.arange(48).reshape(2, 24) % 5 < 2, torch.arange(24, dtype=torch.int8) % 3
SEVEN, QUARTER, BRAIN = torch.tensor(7), torch.tensor(0.25), torch.linspace(-3, 3, 24).bfloat16()


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def sliding_window(size):
    def mask(b, h, q_idx, kv_idx):
        causal_mask = q_idx >= kv_idx
        window_mask = q_idx - kv_idx <= size
        return causal_mask & window_mask

    return mask


def prefix_lm(lengths):
    def prefix(b, h, q_idx, kv_idx):
        return kv_idx < lengths[b]

    return flex.or_masks(prefix, causal)


def documents(inner, offsets):
    counts = offsets[1:] - offsets[:-1]
    ids = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), counts)

    def mask(b, h, q_idx, kv_idx):
        same = ids[q_idx] == ids[kv_idx]
        return same & inner(b, h, q_idx - offsets[ids[q_idx]], kv_idx - offsets[ids[kv_idx]])

    return mask


def neighbourhood(width, height, kernel):
    def where(index):
        return index // width, index % width

    def mask(b, h, q_idx, kv_idx):
        q_x, q_y = where(q_idx)
        kv_x, kv_y = where(kv_idx)
        centre_x = q_x.clamp(kernel // 2, (height - 1) - kernel // 2)
        centre_y = torch.clamp(q_y, kernel // 2, (width - 1) - kernel // 2)
        return ((centre_x - kv_x).abs() <= kernel // 2) & (torch.abs(centre_y - kv_y) <= kernel // 2)

    return mask


def dilated(step):
    return lambda b, h, q, kv: torch.logical_and(q >= kv, (q - kv) % step == 0)


def paged(table, lengths):
    def mask(b, h, q_idx, kv_idx):
        logical = table[b, kv_idx // 4]
        live = logical >= 0
        return torch.where(live, causal(b, h, q_idx, logical * 4 + kv_idx % 4) & (kv_idx < lengths[b]), False)

    return mask


MASKS = {
    "causal": causal,
    "noop": flex.noop_mask,
    "window": sliding_window(5),
    "prefix": prefix_lm(torch.tensor([3, 20])),
    "documents": documents(causal, torch.tensor([0, 5, 6, 17, 24])),
    "neighbourhood": neighbourhood(6, 4, 3),
    "dilated": dilated(3),
    "and": flex.and_masks(causal, sliding_window(9), dilated(2)),
    "or": flex.or_masks(causal, dilated(5)),
    "paged": paged(torch.tensor([[3, 1, -1, 0, 2, 5], [0, 1, 2, 3, -1, -1]]), torch.tensor([24, 11])),
    "bool tensor": lambda b, h, q, kv, keep=KEEP: keep[b, kv],
    "int8": lambda b, h, q, kv, kind=KIND: kind[q] != kind[kv],
    "0-d": lambda b, h, q, kv, n=SEVEN: (kv < n) | (q.eq(kv)),
    "invert": lambda b, h, q, kv: ~(q.lt(kv)),
    "new": lambda b, h, q, kv: torch.zeros_like(b, dtype=torch.bool) | (q == kv) | q.new_zeros((), dtype=torch.bool),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    want = flex.create_mask(MASKS[name], *SHAPE, device="cpu").numpy()
    program = Program.of(SHAPE, mask=MASKS[name])
    np.testing.assert_array_equal(program.visible(*np.ix_(*(np.arange(n) for n in SHAPE))), want)


def alibi(heads):
    def score(score, b, h, q_idx, kv_idx):
        scale = torch.exp2(-((h + 1) * 8.0 / heads))
        return score + (kv_idx - q_idx) * scale

    return score


def softcap(cap):
    return lambda score, b, h, q_idx, kv_idx: torch.tanh(score / cap) * cap


def relative_bias(table):
    def score(score, b, h, q_idx, kv_idx):
        return score + table[h, (q_idx - kv_idx) + 23]

    return score


class Learned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.scale = torch.nn.Parameter(torch.rand(4, generator=generator) + 0.5)
        self.table = torch.nn.Parameter(torch.randn(4, 24, generator=generator))
        self.register_buffer("ids", torch.arange(24) // 7)

    def forward(self, score, b, h, q_idx, kv_idx):
        near = (q_idx - kv_idx).abs() < 5
        return (
            torch.where(near & (self.ids[q_idx] == self.ids[kv_idx]), score * self.scale[h], score.sigmoid())
            + self.table[h][q_idx]
        )


BIAS = torch.randn(2, 4, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SCORES = {
    "identity": flex._identity,
    "alibi": alibi(4),
    "softcap": softcap(20.0),
    "relative": relative_bias(torch.randn(4, 47)),
    "module": Learned(),
    "causal by inf": lambda s, b, h, q, kv: torch.where(q >= kv, s, -float("inf")),
    "causal by finfo": lambda s, b, h, q, kv: torch.where(q >= kv, s, -1e30),
    "bias": lambda s, b, h, q, kv: s + BIAS[b, h, q, kv],
    "bias by steps": lambda s, b, h, q, kv: s + BIAS[b][h][q][kv],
    "distance": lambda s, b, h, q, kv: s - torch.sqrt((q - kv).abs().to(torch.float64)),
    "relu": lambda s, b, h, q, kv: (
        torch.relu(s - 1) ** 2 + torch.maximum(s, -s) * 0.5 + s.square() + torch.nn.functional.relu(s)
    ),
    "div modes": lambda s, b, h, q, kv: (
        s + torch.div(q - kv, 3, rounding_mode="trunc") + torch.div(q - kv, 3, rounding_mode="floor")
    ),
    "methods": lambda s, b, h, q, kv: (
        s.mul(2).add(q, alpha=3).sub(kv).clamp(min=-5, max=30).exp2().rsqrt().type_as(s).float()
    ),
    "math": lambda s, b, h, q, kv: s * math.log(BIAS.shape[-1]) + torch.full_like(s, 2.0) - torch.ones_like(s),
    "scalar tensor": lambda s, b, h, q, kv, t=QUARTER: s * t + torch.tensor(1.0),
    "bfloat16": lambda s, b, h, q, kv, t=BRAIN: s + t[kv],
    "ints": lambda s, b, h, q, kv: s + ((q & 3) << 2) + (kv ^ 1),
}


def torch_scores(function, s):
    """The function over all elements, by torch's own vmap."""
    at = [torch.arange(n) for n in SHAPE]
    for axis in (3, 2, 1, 0):
        dims = [0 if a == axis else None for a in range(4)]
        function = torch.vmap(function, in_dims=(0, *dims))
    return function(s, *at)


@pytest.mark.parametrize("name", SCORES)
def test_scores_and_their_derivatives(name):
    """Values and d score / d s: torch and its autograd in fp64."""
    s = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    s.requires_grad_(True)
    want = torch_scores(SCORES[name], s)
    program = Program.of(SHAPE, score_mod=SCORES[name])
    at = np.ix_(*(np.arange(n) for n in SHAPE))
    scores = s.detach().numpy()
    np.testing.assert_allclose(program.evaluate(scores, *at), want.detach().numpy(), rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(want[torch.isfinite(want)].sum(), s, materialize_grads=True)
    visible = program.visible(*at)
    got = np.ones(SHAPE) if program.score is None else program.run([program.score_derivative], scores, *at)[0]
    np.testing.assert_allclose(np.where(visible, got, 0.0), slope.numpy(), rtol=1e-6, atol=1e-9)


def test_gradients_of_captured_parameters():
    """Scattered from the program's array gradients: torch's autograd of the module's parameters."""
    module = Learned().double()
    s = torch.randn(SHAPE, dtype=torch.float64)
    weight = torch.randn(SHAPE, dtype=torch.float64)
    (torch_scores(module, s) * weight).sum().backward()
    program = Program.of(SHAPE, score_mod=module)
    at = np.ix_(*(np.arange(n) for n in SHAPE))
    found = {}
    for gradient in program.array_gradients:
        *index, value = program.run([*gradient.index, gradient.value], s.numpy(), *at)
        source = program.captures[gradient.slot.number]
        total = found.setdefault(id(source.source), np.zeros(source.array.shape))
        index = np.broadcast_arrays(*index, np.empty(SHAPE))[:-1]
        np.add.at(total, tuple(index), np.broadcast_to(value, SHAPE) * weight.numpy())
    assert set(found) == {id(module.scale), id(module.table)}
    for parameter in (module.scale, module.table):
        np.testing.assert_allclose(found[id(parameter)], parameter.grad.numpy(), rtol=1e-9)


def test_torch_operations_outside_the_language():
    for function, name in (
        (lambda s, b, h, q, kv: torch.sin(s), "torch.sin"),
        (lambda s, b, h, q, kv: s.cumsum(0), ".cumsum"),
        (lambda s, b, h, q, kv: torch.nn.functional.gelu(s), "torch.gelu"),
    ):
        with pytest.raises(SpecError, match=name) as raised:
            Program.of(SHAPE, score_mod=function)
        assert __file__ in str(raised.value)


@pytest.mark.parametrize(
    "table, word",
    [
        (torch.zeros(24, dtype=torch.complex64), "complex64"),
        (torch.zeros(24).to_sparse(), "sparse"),
        (torch.zeros(24, device="meta"), "meta"),
        (torch.zeros(24, dtype=torch.float8_e4m3fn), "float8"),
    ],
)
def test_unusable_tensors(table, word):
    with pytest.raises(SpecError, match=word):
        Program.of(SHAPE, score_mod=lambda s, b, h, q, kv: s + table[kv])


def test_captured_tensors_are_read_in_place():
    bias = torch.zeros(24)
    program = Program.of(SHAPE, score_mod=lambda s, b, h, q, kv: s + bias[kv])
    bias[3] = 5.0
    assert program.captures[0].array.ctypes.data == bias.data_ptr() and program.evaluate(0.0, 0, 0, 0, 3) == 5.0
