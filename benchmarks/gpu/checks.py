"""Every option of attention on a device, held against the reference on the host by the accuracy rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

DTYPES = ("float64", "float32", "float16", "bfloat16")

To = Callable[[Any], Any]  # moves a tensor to where the call runs


@dataclass(frozen=True)
class Check:
    """One way to call attention. options: from a function that moves tensors, and the sizes, to keywords."""

    name: str
    heads: int = 4
    kv_heads: int = 2
    batch: int = 2
    q_len: int | None = None  # None: those of the run
    kv_len: int | None = None
    size: int = 64
    value_size: int = 64
    options: Callable[[To, tuple[int, ...]], dict[str, Any]] = field(default=lambda to, shape: {})
    prepare: Callable[[Any, Any, Any], tuple[Any, Any, Any]] = field(default=lambda q, k, v: (q, k, v))
    dtypes: tuple[str, ...] = DTYPES


def _random(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _documents(to: To, shape: tuple[int, ...]) -> dict[str, Any]:
    import torch

    longest = max(shape[2:])
    ids = to(torch.arange(longest) // 13)
    return {"mask": lambda b, h, i, j: ids[i] == ids[j]}


def _user_function(to: To, shape: tuple[int, ...]) -> dict[str, Any]:
    table, half = to(_random(shape[1], shape[3])), 0.5
    return {"score_mod": lambda s, b, h, i, j: s * half + table[h, j].tanh()}


def _mask(to: To, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"mask": to(_random(shape[0], 1, *shape[2:]) > 0)}


def _per_batch(to: To, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"causal": True, "align": [5 * b for b in range(shape[0])]}


def _hidden_nan(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    k[:, :, -1], v[:, :, -3] = float("nan"), float("inf")
    return q, k, v


def _rows_first(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """The same shapes, stored as (B, S, H, D)."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return q, k, v


def _loose(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Innermost strides of 2."""
    q, k, v = (x.repeat_interleave(2, dim=-1)[..., ::2] for x in (q, k, v))
    return q, k, v


def _always(**options: Any) -> Callable[[To, tuple[int, ...]], dict[str, Any]]:
    return lambda to, shape: options


CHECKS = (
    Check("plain"),
    Check("causal, square", q_len=150, kv_len=150, options=_always(causal=True)),
    Check("causal, bottom right", options=_always(causal=True, align="bottom_right")),
    Check("rows that see nothing", options=_always(causal=True, align=-50)),
    Check("window", options=_always(window=(17, 4), align="top_left")),
    Check("one offset per batch", options=_per_batch),
    Check("one key/value head", kv_heads=1),
    Check("as many key/value heads", kv_heads=4),
    Check("head size 1", size=1, value_size=1),
    Check("head sizes 40 and 72", size=40, value_size=72),
    Check("head size 128", size=128, value_size=128, options=_always(causal=True, align="bottom_right")),
    Check("head size 256", size=256, value_size=256, batch=1),
    Check("one query, split over keys", batch=1, heads=8, q_len=1, kv_len=5000),
    Check(
        "few queries, split over keys", batch=1, heads=8, q_len=3, kv_len=3000, options=_always(causal=True, align=2990)
    ),
    Check("no key", kv_len=0),
    Check("no query", q_len=0),
    Check("rows before heads in memory", prepare=_rows_first),
    Check("innermost strides", prepare=_loose),
    Check("softcap", options=_always(softcap=5.0)),
    Check("dropout", options=_always(dropout_p=0.25, seed=0xF23456789ABCDEF1, causal=True, align="bottom_right")),
    Check("negative scale", options=_always(scale=-0.3)),
    Check("ALiBi", options=lambda to, s: {"alibi_slopes": to(_random(s[1]).abs()), "align": "bottom_right"}),
    Check("sinks", options=lambda to, s: {"sinks": to(_random(s[0], s[1]))}),
    Check("bias", options=lambda to, s: {"bias": to(_random(1, s[1], *s[2:]))}),
    Check("bias of one row", options=lambda to, s: {"bias": to(_random(s[3]))}),
    Check("boolean mask", options=_mask),
    Check("documents", options=_documents),
    Check("a function of the user's", options=_user_function),
    Check(
        "sinks, split over keys",
        batch=1,
        heads=8,
        q_len=1,
        kv_len=5000,
        options=lambda to, s: {"sinks": to(_random(s[1]))},
    ),
    Check("hidden NaN and inf", options=_always(causal=True, align=-20), prepare=_hidden_nan),
    *(
        Check(f"precision {name}", options=_always(precision=name), dtypes=("float32",))
        for name in ("tf32", "bf16", "fp16")
    ),
)

# Of those, what cuDNN can do (in 16 bits), and where it has rows of its own.
CUDNN = (
    "plain",
    "causal, square",
    "one key/value head",
    "as many key/value heads",
    "head sizes 40 and 72",
    "head size 128",
    "rows before heads in memory",
    "innermost strides",
)
BY_CUDNN = tuple(
    replace(c, options=_always(causal=True, align="top_left") if c.name == "head size 128" else c.options)
    for c in CHECKS
    if c.name in CUDNN
)


def problem(check: Check, dtype: str, lengths: tuple[int, int]) -> tuple[tuple[Any, Any, Any], tuple[int, ...]]:
    """q, k, v of a check on the host, and (B, H, S_q, S_kv)."""
    import torch

    q_len = lengths[0] if check.q_len is None else check.q_len
    kv_len = lengths[1] if check.kv_len is None else check.kv_len
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(check.batch, heads, n, size, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))
        for heads, n, size in (
            (check.heads, q_len, check.size),
            (check.kv_heads, kv_len, check.size),
            (check.kv_heads, kv_len, check.value_size),
        )
    )
    return check.prepare(q, k, v), (check.batch, check.heads, q_len, kv_len)


# Checks whose gradients are held against the reference, too; of a dry run, whose interpreter takes seconds for each,
# DRY_BACKWARD.
BACKWARD = frozenset(("window", "dropout", "bias", "documents", "sinks", "one key/value head"))
# These compile more, so in two dtypes alone.
BACKWARD_IN_TWO = frozenset(
    ("ALiBi", "softcap", "head size 128", "head size 256", "few queries, split over keys", "a function of the user's")
)
TWO = ("bfloat16", "float32")
DRY_BACKWARD = frozenset(("dropout", "bias"))


def run(
    check: Check,
    dtype: str,
    kernel: str,
    to: To,
    lengths: tuple[int, int],
    gradients: frozenset[str] = BACKWARD,
) -> str | None:
    """What is wrong with a check's answer, None if nothing is."""
    import flashtile.torch
    from flashtile.testing import expect

    (q, k, v), shape = problem(check, dtype, lengths)
    o, lse = expect(q, k, v, **check.options(lambda x: x, shape))
    try:
        here = [to(x) for x in (q, k, v)]
        options = check.options(to, shape)
        got = flashtile.torch.attention(*here, kernel=kernel, return_lse=True, **options)
        again = flashtile.torch.attention(*here, kernel=kernel, **options)
        o.check(got[0].cpu(), "output")
        lse.check(got[1].cpu(), "lse")
    except (AssertionError, flashtile.FlashtileError, RuntimeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    first, second = (x.cpu().contiguous().view(-1).view(dtype=_bits(dtype)) for x in (got[0], again))
    if not first.equal(second):
        return "the second call gave other bits"
    wanted = gradients | (BACKWARD_IN_TWO if dtype in TWO and gradients is BACKWARD else frozenset())
    return differentiate(check, dtype, kernel, to, lengths) if check.name in wanted else None


def differentiate(check: Check, dtype: str, kernel: str, to: To, lengths: tuple[int, int]) -> str | None:
    """What is wrong with a check's gradients, or their second computation, None if nothing is."""
    import torch

    import flashtile.torch
    from flashtile.testing import expect_gradients

    inputs, shape = problem(check, dtype, lengths)
    arrays, leaves = [], []  # that the options have, on the host and on the device

    def on_host(x: Any) -> Any:
        arrays.append(x)
        return x

    def on_device(x: Any) -> Any:
        leaves.append(to(x).detach())
        return leaves[-1].requires_grad_() if x.is_floating_point() else leaves[-1]

    host = check.options(on_host, shape)
    names = [name for name in ("bias", "sinks", "alibi_slopes") if name in host]
    captured = [x for x in arrays if x.is_floating_point() and not any(x is host[name] for name in names)]
    wrt = ["q", "k", "v", *names, *["captured"] * bool(captured)]
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(*shape[:3], check.value_size, generator=generator, dtype=torch.float64).to(inputs[0].dtype)
    expected = expect_gradients(do, *inputs, wrt=wrt, **host)
    try:
        options = check.options(on_device, shape)
        given = [to(x).detach().requires_grad_() for x in inputs]
        own = [options[name] for name in names]
        given += own + [x for x in leaves if x.requires_grad and not any(x is y for y in own)]
        first, second = (
            torch.autograd.grad(flashtile.torch.attention(*given[:3], kernel=kernel, **options), given, to(do))
            for _ in range(2)
        )
        right = [
            *(getattr(expected, name) for name in wrt[: 3 + len(names)]),
            *(expected.captured[x] for x in captured),
        ]
        for name, want, x, y in zip(wrt, right, first, second, strict=True):
            want.check(x.cpu(), f"gradient of {name}")
            if not x.equal(y):
                return f"the second gradient of {name} has other bits"
    except (AssertionError, flashtile.FlashtileError, RuntimeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return None


def _bits(dtype: str) -> Any:
    import torch

    return {8: torch.int64, 4: torch.int32, 2: torch.int16}[getattr(torch, dtype).itemsize]


def every(
    kernel: str, to: To, lengths: tuple[int, int], dtypes: tuple[str, ...] = DTYPES, checks: tuple[Check, ...] = CHECKS
) -> Iterator[tuple[str, str, str | None]]:
    """(check, dtype, what is wrong) of each."""
    for check in checks:
        for dtype in dtypes:
            if dtype in check.dtypes:
                yield check.name, dtype, run(check, dtype, kernel, to, lengths)
