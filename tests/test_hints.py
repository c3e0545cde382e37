"""Keywords of other packages and mistyped ones: refused with what was meant, by every door."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import flashtile
from flashtile import hints
from flashtile.errors import KeywordError, SpecError, rename

pytestmark = pytest.mark.core

X = np.ones((1, 2, 3, 4), np.float32)
LSE = X[..., 0]


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ("softmax_scale", "did you mean scale=?"),
        ("is_causal", "did you mean causal=?"),
        (
            "attn_mask",
            "did you mean mask= for a boolean one (True = attend), bias= for one that is added to the scores?",
        ),
        ("window_size", "did you mean window=(left, right)?"),
        ("local_window_size", "did you mean window=(left, right)?"),
        ("dropout", "did you mean dropout_p= with a seed=?"),
        ("enable_gqa", "did you mean k and v with fewer heads than q, which need no keyword?"),
        ("logits_soft_cap", "did you mean softcap=?"),
        ("key_value_seq_lengths", "did you mean mask=flashtile.score.padding(lengths)?"),
        ("casual", "did you mean causal=?"),
        ("retrun_lse", "did you mean return_lse=?"),
        ("xyz", "expected one of q, k, v, mask, bias,"),
    ],
)
def test_a_keyword_of_another_package_is_answered_with_ours(keyword: str, hint: str) -> None:
    with pytest.raises(KeywordError) as caught:
        flashtile.attention(X, X, X, **{keyword: None})  # type: ignore[call-overload]
    assert str(caught.value).startswith(f"{keyword}: got a keyword that attention does not have, {hint}")
    assert isinstance(caught.value, TypeError) and isinstance(caught.value, SpecError)


def test_nothing_is_computed_before() -> None:
    out = np.full_like(X, 7)
    with pytest.raises(KeywordError):
        flashtile.attention(X, X, X, out=out, scael=1.0)  # type: ignore[call-overload]
    assert (out == 7).all()


def test_every_function_of_the_call_answers() -> None:
    with pytest.raises(KeywordError, match="attention_backward does not have, did you mean scale="):
        flashtile.attention_backward(X, X, X, X, X, LSE, softmax_scale=1.0)
    with pytest.raises(KeywordError, match="explain does not have, did you mean scale="):
        flashtile.explain(X, softmax_scale=1.0)


def test_the_doors_for_torch_answer_with_their_own_names() -> None:
    torch = pytest.importorskip("torch")
    import flashtile.torch as door

    x = torch.from_numpy(X)
    for call, keyword, hint in (
        (door.attention, "is_causal", "causal="),
        (flashtile.attention, "is_causal", "causal="),
        (door.scaled_dot_product_attention, "causal", "is_causal="),
        (door.scaled_dot_product_attention, "mask", "attn_mask="),
        (door.scaled_dot_product_attention, "softmax_scale", "scale="),
        (door.scaled_dot_product_attention, "generator", "torch.manual_seed, from which the seed is drawn"),
        (door.scaled_dot_product_attention, "score_mod", "score_mod= of flashtile.torch.attention"),
    ):
        with pytest.raises(KeywordError) as caught:
            call(x, x, x, **{keyword: None})
        assert str(caught.value).endswith(f"did you mean {hint}?" if "mask" not in hint else "did you mean attn_mask=?")


def _own(function: Any) -> set[str]:
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD}


def test_every_hint_names_keywords_that_exist() -> None:
    own = _own(flashtile.attention) | {"attn_mask", "is_causal", ""}
    assert {keyword for meant in hints._FOREIGN.values() for keyword in meant} <= own
    unanswered = [name for name, meant in hints._FOREIGN.items() if not own & {*meant}]
    assert not unanswered


def test_an_error_is_told_in_the_names_of_another_signature() -> None:
    names = {"q": "query", "mask": "attn_mask", "cu_seqlens_k": "cu_seq_k"}
    for message, told in (
        ("q: got q of (S_q, D), expected (S_q, 8)", "query: got query of (S_q, D), expected (S_q, 8)"),
        ("mask: got a mask, expected q's shape", "attn_mask: got a mask, expected query's shape"),
        ("scale: got 2, below the longest of cu_seqlens_k", "scale: got 2, below the longest of cu_seq_k"),
        ("nothing before a colon of q", "nothing before a colon of q"),
    ):
        error = SpecError(message)
        rename(error, names)
        assert str(error) == told
