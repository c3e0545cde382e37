"""flashtile.flash_attn: flash-attn's functions by its signatures, each sequence held to the accuracy rule by itself."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import flashtile
from flashtile.errors import SpecError, UnavailableError

torch = pytest.importorskip("torch")
from flashtile import flash_attn  # noqa: E402  (after torch is known to be there)
from flashtile.testing import assert_accurate, assert_gradients_accurate  # noqa: E402

OPTIONS = (
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", (-1, -1)),
    ("softcap", 0.0),
    ("alibi_slopes", None),
    ("deterministic", False),
    ("return_attn_probs", False),
)
CUMULATIVE = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
NEW = ("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table")

# Of flash-attn 2.8.3: every parameter, in its order; those with a default as (name, default).
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "flash_attn_func": ("q", "k", "v", *OPTIONS),
    "flash_attn_qkvpacked_func": ("qkv", *OPTIONS),
    "flash_attn_kvpacked_func": ("q", "kv", *OPTIONS),
    "flash_attn_varlen_func": ("q", "k", "v", *CUMULATIVE, *OPTIONS, ("block_table", None)),
    "flash_attn_varlen_qkvpacked_func": ("qkv", "cu_seqlens", "max_seqlen", *OPTIONS),
    "flash_attn_varlen_kvpacked_func": ("q", "kv", *CUMULATIVE, *OPTIONS),
    "flash_attn_with_kvcache": (
        *("q", "k_cache", "v_cache"),
        *((name, None) for name in NEW),
        *OPTIONS[1:5],
        ("rotary_interleaved", True),
        ("alibi_slopes", None),
        ("num_splits", 0),
        ("return_softmax_lse", False),
    ),
}

# Of queries and of keys: more of one, of the other, one new token, a sequence without queries, one without keys.
ROWS, KEYS = [5, 70, 1, 0, 3, 12], [90, 33, 40, 7, 0, 12]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 4)},
    "causal window": {"causal": True, "window_size": (20, -1)},
    "softcap": {"softcap": 0.7, "softmax_scale": 0.9},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05]), "causal": True},
    "slopes a sequence": {"alibi_slopes": torch.linspace(0, 1, 4 * len(ROWS)).reshape(-1, 4), "window_size": (30, 30)},
}


def draw(*shape: int, dtype: str = "float32", seed: int = 0, grad: bool = False) -> Any:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    return x.to(getattr(torch, dtype)).requires_grad_(grad)


def here(options: dict[str, Any]) -> dict[str, Any]:
    """The same options as flashtile.attention calls them."""
    names = {"window_size": "window", "softmax_scale": "scale"}
    return {**{names.get(name, name): value for name, value in options.items()}, "align": "bottom_right"}


def numpy(x: Any) -> Any:
    """A tensor as an array, bfloat16 as ml_dtypes has it."""
    import ml_dtypes

    x = x.detach().contiguous()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype is torch.bfloat16 else x.numpy()


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    found = [p for p in inspect.signature(getattr(flash_attn, name)).parameters.values() if p.kind != p.KEYWORD_ONLY]
    assert tuple(p.name if p.default is p.empty else (p.name, p.default) for p in found) == SIGNATURES[name]
    assert sorted([*SIGNATURES, "flash_attn_combine", "install", "uninstall"]) == flash_attn.__all__


@pytest.mark.parametrize("case", CASES)
def test_every_option(case: str, dtype: str) -> None:
    """Forward and backward, of grouped heads, in flash-attn's layout."""
    options = dict(CASES[case])
    if case == "slopes a sequence":
        options["alibi_slopes"] = options["alibi_slopes"][:2]
    q, k, v = (draw(2, n, h, 8, dtype=dtype, seed=n + h, grad=True) for n, h in ((7, 4), (11, 2), (11, 2)))
    o, lse, weights = flash_attn.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert o.shape == q.shape and o.is_contiguous() and weights is None
    do, dlse = draw(*o.shape, dtype=dtype, seed=5), draw(*lse.shape, dtype=str(lse.dtype)[6:], seed=6)
    torch.autograd.backward((o, lse), (do, dlse))
    arrays = [numpy(x.transpose(1, 2)) for x in (q, k, v)]
    assert_accurate(numpy(o.transpose(1, 2)), *arrays, **here(options))
    assert_accurate(numpy(lse), *arrays, kind="lse", **here(options))
    found = flashtile.Gradients(*(numpy(x.grad.transpose(1, 2)) for x in (q, k, v)))
    assert_gradients_accurate(found, numpy(do.transpose(1, 2)), *arrays, dlse=numpy(dlse), **here(options))


@pytest.mark.parametrize("case", CASES)
def test_sequences_one_after_the_other(case: str) -> None:
    """Each is what it is alone, forward and backward, whatever its lengths."""
    options, (cu_q, cu_k) = CASES[case], (np.cumsum([0, *n]) for n in (ROWS, KEYS))
    total_q, total_k = sum(ROWS), sum(KEYS)
    q, k, v = (draw(n, h, 8, seed=n + h, grad=True) for n, h in ((total_q, 4), (total_k, 2), (total_k, 2)))
    bounds = torch.from_numpy(cu_q).int(), torch.from_numpy(cu_k).int()
    o, lse, _ = flash_attn.flash_attn_varlen_func(
        q, k, v, *bounds, max(ROWS), max(KEYS), **options, return_attn_probs=True
    )
    assert o.shape == q.shape and lse.shape == (4, total_q) and o.is_contiguous()
    do = draw(*o.shape, seed=5)
    o.backward(do)
    for n, (rows, keys) in enumerate(zip(*(map(slice, cu, cu[1:]) for cu in (cu_q, cu_k)), strict=True)):
        arrays = [numpy(x[part].transpose(0, 1)) for x, part in ((q, rows), (k, keys), (v, keys))]
        alone = here(options)
        if case == "slopes a sequence":
            alone["alibi_slopes"] = options["alibi_slopes"][n]
        assert_accurate(numpy(o[rows].transpose(0, 1)), *arrays, **alone)
        assert_accurate(numpy(lse[:, rows]), *arrays, kind="lse", **alone)
        parts = (q.grad[rows], k.grad[keys], v.grad[keys])
        found = flashtile.Gradients(*(numpy(x.transpose(0, 1)) for x in parts))
        assert_gradients_accurate(found, numpy(do[rows].transpose(0, 1)), *arrays, **alone)


def test_packed_tensors_are_read_in_place() -> None:
    qkv = draw(2, 9, 3, 4, 8, grad=True)
    q, k, v = (x.detach().contiguous().requires_grad_() for x in qkv.unbind(2))
    do = draw(2, 9, 4, 8, seed=1)
    want = flash_attn.flash_attn_func(q, k, v, causal=True)
    want.backward(do)
    got = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    got.backward(do)
    assert torch.equal(got, want) and torch.equal(qkv.grad, torch.stack([q.grad, k.grad, v.grad], 2))
    kv = qkv.detach()[:, :, 1:]
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, kv, causal=True), want)
    packed, cu = qkv.detach()[0], torch.tensor([0, 4, 9], dtype=torch.int32)
    one, two = (
        flash_attn.flash_attn_varlen_qkvpacked_func(packed, cu, 5, causal=True),
        flash_attn.flash_attn_varlen_kvpacked_func(packed[:, 0], packed[:, 1:], cu, cu, 5, 5, causal=True),
    )
    assert torch.equal(one, two) and torch.equal(one[:4], flash_attn.flash_attn_func(q, k, v, causal=True)[0, :4])


@pytest.mark.parametrize("case", ["causal", "slopes a sequence"])
def test_dropout_counts_within_a_sequence(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which weights are dropped depends on the sequence's number and on positions within it, as in a batch."""
    options = dict(CASES[case])
    lengths = [5, 8, 3]
    if "alibi_slopes" in options:
        options["alibi_slopes"] = options["alibi_slopes"][:3]
    cu = torch.tensor([0, 5, 13, 16])
    qkv = draw(16, 3, 4, 8, grad=True)
    torch.manual_seed(7)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    torch.manual_seed(7)
    o, lse, _ = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 8, 0.3, **options, return_attn_probs=True)
    without = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 8, 0.0, **options, return_attn_probs=True)[1]
    torch.testing.assert_close(lse, without)
    kept = flashtile.score.dropout_keep((3, 4, 8, 8), 0.3, seed)
    share = 1 - round(0.3 * 2**16) / 2**16
    total = 0
    for n, (part, length) in enumerate(zip(qkv.split(lengths), lengths, strict=True)):
        q, k, v = (x.transpose(0, 1).double() for x in part.unbind(1))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        scores = q @ k.mT / 8**0.5
        if "alibi_slopes" in options:
            scores = scores - options["alibi_slopes"][n].double()[:, None, None] * distance.abs()
        hidden = distance < 0 if options.get("causal") else distance.abs() > 30
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        total = total + (weights * torch.from_numpy(kept[n, :, :length, :length]) / share @ v).sum()
        want = (weights * torch.from_numpy(kept[n, :, :length, :length]) / share) @ v
        torch.testing.assert_close(o[cu[n] : cu[n + 1]].transpose(0, 1).double(), want, rtol=1e-5, atol=1e-5)
    (got,), (want,) = (torch.autograd.grad(x, qkv) for x in (o.sum(), total))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_dropout_of_one_batch() -> None:
    q = draw(2, 6, 2, 8)
    torch.manual_seed(3)
    got = flash_attn.flash_attn_func(q, q, q, 0.5)
    torch.manual_seed(3)
    want = flashtile.torch.attention(*(q.transpose(1, 2),) * 3, dropout_p=0.5).transpose(1, 2)
    assert torch.equal(got, want) and not torch.equal(got, flash_attn.flash_attn_func(q, q, q))


def test_nothing_to_attend() -> None:
    empty, none = torch.zeros(0, 2, 8), torch.zeros(1, dtype=torch.int32)
    for dropout_p in (0.0, 0.5):
        for cu in (none, torch.zeros(3, dtype=torch.int32)):
            o, lse, _ = flash_attn.flash_attn_varlen_func(
                empty, empty, empty, cu, cu, 0, 0, dropout_p, return_attn_probs=True
            )
            assert o.shape == (0, 2, 8) and lse.shape == (2, 0)


Q = torch.ones(1, 4, 2, 8)
T = torch.ones(6, 2, 8)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)


def varlen(cu_q: Any = CU, cu_k: Any = CU, max_q: Any = 4, max_k: Any = 4, **options: Any) -> Any:
    return flash_attn.flash_attn_varlen_func(T, T, T, cu_q, cu_k, max_q, max_k, **options)


def integers(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32)


WRONG: dict[str, Any] = {
    r"q: got shape \(4, 2, 8\), expected \(B, S, H, D\)": lambda: flash_attn.flash_attn_func(Q[0], Q, Q),
    r"v: got a ndarray, expected a torch tensor \(B, S, H, D\)": lambda: flash_attn.flash_attn_func(Q, Q, Q.numpy()),
    r"v: got a nested tensor, expected a plain one \(total, H, D\)": lambda: flash_attn.flash_attn_varlen_func(
        T, T, torch.nested.nested_tensor([T[:2, 0], T[2:, 0]], layout=torch.jagged), CU, CU, 4, 4
    ),
    r"k: got batch 2, expected 1 as in q": lambda: flash_attn.flash_attn_func(Q, Q.repeat(2, 1, 1, 1), Q),
    r"window_size: got 5, expected \(left, right\)": lambda: flash_attn.flash_attn_func(Q, Q, Q, window_size=5),
    r"window_size: got \(-3, 0\), expected a pair": lambda: flash_attn.flash_attn_func(Q, Q, Q, window_size=(-3, 0)),
    "window_size: got left -3, expected a distance": lambda: varlen(window_size=(-3, 0)),
    r"softmax_scale: got 'x'": lambda: flash_attn.flash_attn_func(Q, Q, Q, softmax_scale="x"),
    r"causal: got 1, expected True or False": lambda: flash_attn.flash_attn_func(Q, Q, Q, causal=1),
    r"alibi_slopes: got shape \(3,\)": lambda: flash_attn.flash_attn_func(Q, Q, Q, alibi_slopes=torch.ones(3)),
    r"dropout_p: got 1.0": lambda: flash_attn.flash_attn_func(Q, Q, Q, dropout_p=1.0),
    r"qkv: got shape \(1, 4, 2, 2, 8\), expected \(B, S, 3, H, D\)": lambda: flash_attn.flash_attn_qkvpacked_func(
        torch.ones(1, 4, 2, 2, 8)
    ),
    r"kv: got shape \(6, 3, 2, 8\), expected \(total, 2, H, D\)": lambda: flash_attn.flash_attn_varlen_kvpacked_func(
        T, torch.ones(6, 3, 2, 8), CU, CU, 4, 4
    ),
    "cu_seqlens_q: got 2 after 4, expected integers that rise from 0": lambda: varlen(integers(0, 4, 2, 6)),
    "cu_seqlens_k: got boundaries up to 9, expected up to the length, 6": lambda: varlen(cu_k=integers(0, 2, 9)),
    "cu_seqlens_k: got boundaries up to 5, expected up to the length, 6": lambda: varlen(cu_k=integers(0, 2, 5)),
    "cu_seqlens_q: got 1 first, expected integers that rise from 0": lambda: varlen(integers(1, 2, 6)),
    "cu_seqlens_k: got 2 boundaries, expected 3 as in cu_seqlens_q": lambda: varlen(cu_k=integers(0, 6)),
    "cu_seqlens_q: got float32 of shape": lambda: varlen(CU.float()),
    "max_seqlen_k: got 3, expected an integer, at least 4, the longest of cu_seqlens_k": lambda: varlen(max_k=3),
    "dropout_p: got array.*, expected a real number": lambda: varlen(dropout_p=np.zeros(2)),
    r"mask_mod: got .*\(b, i, j\), expected a function of 4 arguments": lambda: varlen(mask_mod=lambda b, i, j: i > j),
    r"score_mod: got .*\(s, h\), expected a function of 5 arguments": lambda: varlen(score_mod=lambda s, h: s),
    "max_seqlen: got 2.5, expected an integer": lambda: flash_attn.flash_attn_varlen_qkvpacked_func(
        torch.ones(6, 3, 2, 8), CU, 2.5
    ),
    "cu_seqlens: got boundaries up to 7": lambda: flash_attn.flash_attn_varlen_qkvpacked_func(
        torch.ones(6, 3, 2, 8), integers(0, 7), 7
    ),
    r"alibi_slopes: got shape \(3, 2\), expected floats of shape \(H,\) = \(2,\) or \(B, H\) = \(2, 2\)": lambda: (
        varlen(alibi_slopes=torch.ones(3, 2))
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_one_clear_error(message: str) -> None:
    with pytest.raises(SpecError, match="^" + message):
        WRONG[message]()


def test_what_is_not_there_says_what_to_use() -> None:
    with pytest.raises(UnavailableError, match="^k_cache: .*flash_attn_func on what is filled; or, .*score.padding"):
        flash_attn.flash_attn_with_kvcache(Q, Q, Q, cache_seqlens=2)
    with pytest.raises(UnavailableError, match="^block_table: got pages"):
        varlen(block_table=torch.zeros(1, 1))
    # What the first message says is true.
    lengths, new = torch.tensor([4, 3]), draw(2, 2, 1, 8)
    cache = draw(2, 1, 6, 8, seed=1)
    got = flashtile.torch.attention(
        new.transpose(1, 2), cache, cache, mask=flashtile.score.padding(lengths), causal=True, align=lengths - 2
    )
    for n, length in enumerate(lengths):
        keys = cache[n : n + 1, :, :length].transpose(1, 2)
        want = flash_attn.flash_attn_func(new[n : n + 1], keys, keys, causal=True)
        torch.testing.assert_close(got[n : n + 1].transpose(1, 2), want)


# What flash-attn 4 added: keywords of two functions, and the merge of parts.

ADDED = ("learnable_sink", "score_mod", "mask_mod", "return_lse")


@pytest.mark.parametrize("function", [flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func])
def test_keywords_of_version_4(function: Any) -> None:
    assert tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind == p.KEYWORD_ONLY) == ADDED


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_functions_and_sinks_count_within_sequences(dropout_p: float) -> None:
    """score_mod and mask_mod see positions within a sequence, and its number: as each sequence alone has it."""
    table = draw(len(ROWS), seed=8, grad=True)
    sink = draw(4, seed=9, grad=True)
    (cu_q, cu_k), total_q, total_k = (np.cumsum([0, *n]) for n in (ROWS, KEYS)), sum(ROWS), sum(KEYS)
    q, k, v = (draw(n, h, 8, seed=n + h) for n, h in ((total_q, 4), (total_k, 2), (total_k, 2)))

    def score_mod(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s * table[b] + (2 * i - j) * 0.01

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i + j + h) % 3 != b % 3

    options: dict[str, Any] = {"causal": True, "learnable_sink": sink, "return_lse": True, "dropout_p": dropout_p}
    options["alibi_slopes"] = draw(4, seed=3)
    torch.manual_seed(0)
    bounds = torch.from_numpy(cu_q), torch.from_numpy(cu_k)
    together = {"score_mod": score_mod, "mask_mod": mask_mod, **options}
    o, lse = flash_attn.flash_attn_varlen_func(q, k, v, *bounds, max(ROWS), max(KEYS), **together)
    assert o.shape == q.shape and lse.shape == (4, total_q)
    for n, (a, b, c, d) in enumerate(zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)):
        alone = {
            "score_mod": lambda s, _, h, i, j, n=n: score_mod(s, n, h, i, j),
            "mask_mod": lambda _, h, i, j, n=n: mask_mod(n, h, i, j),
        }
        o1, lse1 = flash_attn.flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **options, **alone)
        torch.testing.assert_close(lse[:, a:b], lse1[0])
        if not dropout_p:  # alone a sequence is number 0, which dropout depends on
            torch.testing.assert_close(o[a:b], o1[0])
    o.sum().backward()
    assert bool((table.grad[[0, 1, 5]] != 0).all()) and bool((sink.grad != 0).all())


@pytest.mark.parametrize("packed", [False, True])
def test_parts_combine(packed: bool) -> None:
    q, k, v = (draw(2, n, 4, 8, seed=n, dtype="float64", grad=True) for n in (5, 9, 9))
    whole, lse = flash_attn.flash_attn_func(q, k, v, return_lse=True)
    parts = [flash_attn.flash_attn_func(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 4), slice(4, 9))]
    out, its = (torch.stack(x) for x in zip(*((o, lse.mT) for o, lse in parts), strict=True))
    if packed:
        out, its, whole, lse = out.flatten(1, 2), its.flatten(1, 2), whole.flatten(0, 1), lse.mT.flatten(0, 1).mT
    o, merged = flash_attn.flash_attn_combine(out, its)
    torch.testing.assert_close(o, whole)
    torch.testing.assert_close(merged, lse.mT)
    do = draw(*o.shape, dtype="float64", seed=4)
    one, other = (torch.autograd.grad(x, (q, k, v), do, retain_graph=True) for x in (o, whole))
    torch.testing.assert_close(one, other)
    with torch.no_grad():
        target = torch.empty_like(o, dtype=torch.bfloat16)
        found, none = flash_attn.flash_attn_combine(out, its, target, return_lse=False)
        assert found is target and none is None
        torch.testing.assert_close(target, o.bfloat16())
        assert flash_attn.flash_attn_combine(out, its, out_dtype=torch.float16)[0].dtype is torch.float16


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.ones(2, 3, 4), torch.ones(2, 3)), "out_partial"),
        ((torch.ones(0, 1, 3, 4), torch.ones(0, 1, 3)), "out_partial"),
        ((torch.ones(2, 1, 3, 4), torch.ones(2, 3, 1)), "lse_partial"),
        ((torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3), torch.ones(1, 3, 5)), "out"),
        ((torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3), None, torch.int32), "out_dtype"),
        ((torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3), torch.ones(1, 3, 4), torch.float16), "out"),
        ((torch.ones(2, 1, 3, 4, requires_grad=True), torch.ones(2, 1, 3), torch.ones(1, 3, 4)), "out"),
    ],
)
def test_parts_that_do_not_combine(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(SpecError, match=rf"^{named}: got .* expected "):
        flash_attn.flash_attn_combine(*arguments)


@pytest.mark.parametrize("flag", [1, torch.ones(2), np.ones(2)])
def test_whether_lse_is_wanted_is_a_flag(flag: Any) -> None:
    with pytest.raises(SpecError, match="(?s)^return_lse: got .* expected True or False"):
        flash_attn.flash_attn_combine(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3), return_lse=flag)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"learnable_sink": torch.ones(3)}, "learnable_sink"),
        ({"mask_mod": 3}, "mask_mod"),
        ({"score_mod": torch.ones(3)}, "score_mod"),
        ({"return_lse": 1}, "return_lse"),
        ({"return_lse": True, "return_attn_probs": True}, "return_lse"),
    ],
)
def test_bad_keywords_of_version_4(options: dict[str, Any], named: str) -> None:
    q = torch.ones(1, 3, 2, 8)
    with pytest.raises(SpecError, match=rf"^{named}: got .* expected "):
        flash_attn.flash_attn_func(q, q, q, **options)


def test_installed_under_its_own_name() -> None:
    """What imports flash_attn gets these functions, until they are uninstalled; the real package is never hidden."""
    import importlib.util
    import sys
    import types

    assert importlib.util.find_spec("flash_attn") is None, "flash-attn is installed: this test needs a machine without"
    flash_attn.uninstall()  # nothing to forget
    flash_attn.install()
    flash_attn.install()
    try:
        import flash_attn as theirs  # type: ignore[import-not-found]
        from flash_attn.flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found]

        assert theirs.flash_attn_func is flash_attn.flash_attn_func and theirs.__version__.startswith("2.8")
        assert flash_attn_varlen_func is flash_attn.flash_attn_varlen_func and not hasattr(theirs, "install")
        assert importlib.util.find_spec("flash_attn") is not None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_attn.layers")
    finally:
        flash_attn.uninstall()
    assert importlib.util.find_spec("flash_attn") is None
    sys.modules["flash_attn"] = types.ModuleType("flash_attn")
    try:
        with pytest.raises(UnavailableError, match="^install: got"):
            flash_attn.install()
        flash_attn.uninstall()
        assert "flash_attn" in sys.modules
    finally:
        del sys.modules["flash_attn"]
