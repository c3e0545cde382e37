"""None in the place of an array, and numbers in another machine's byte order: every door names the argument."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import flashtile
from flashtile.errors import SpecError

SHAPE, ROWS = (1, 2, 6, 8), (1, 2, 6)
Made = Callable[..., Any]  # an array of a shape


def numpy(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def torch(*shape: int) -> Any:
    return pytest.importorskip("torch").ones(shape)


def dask(*shape: int) -> Any:
    return pytest.importorskip("dask.array").ones(shape, dtype="float32")


def jax(*shape: int) -> Any:
    return pytest.importorskip("jax.numpy").ones(shape, dtype="float32")


def forward(made: Made) -> dict[str, Any]:
    return {name: made(*SHAPE) for name in "qkv"}


def backward(made: Made) -> dict[str, Any]:
    return {name: made(*(ROWS if name == "lse" else SHAPE)) for name in ("do", "q", "k", "v", "o", "lse")}


def spelled_out(made: Made) -> dict[str, Any]:
    return {name: made(*SHAPE) for name in ("query", "key", "value")}


def pairs(made: Made) -> dict[str, Any]:
    return {"o_lse_pairs": [(made(*SHAPE), made(*ROWS))]}


def limited(given: Callable[[Made], dict[str, Any]]) -> Callable[[Made], dict[str, Any]]:
    """Within a limit of memory, where StarPU is there to keep it."""

    def call(made: Made) -> dict[str, Any]:
        from flashtile import engines

        try:
            engines.pick("starpu")
        except flashtile.UnavailableError as e:
            pytest.skip(str(e))
        return {**given(made), "memory_limit": 2**30}

    return call


def sequences(made: Made) -> dict[str, Any]:
    import torch

    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    packed = {name: made(6, 2, 8) for name in ("query", "key", "value")}
    return {**packed, "cu_seq_q": bounds, "cu_seq_k": bounds, "max_q": 4, "max_k": 4}


# The function, by its module; whose arrays; how they are given.
CALLS: list[tuple[str, Made, Callable[[Made], dict[str, Any]]]] = [
    *(("flashtile.attention", made, forward) for made in (numpy, torch, dask, jax)),
    *(("flashtile.attention_backward", made, backward) for made in (numpy, dask)),
    ("flashtile.attention", numpy, limited(forward)),
    ("flashtile.attention_backward", numpy, limited(backward)),
    ("flashtile.merge", numpy, pairs),
    ("flashtile.merge_backward", numpy, lambda made: {"do": made(*SHAPE), **pairs(made)}),
    ("flashtile.explain", numpy, lambda made: {"q": made(*SHAPE)}),
    ("flashtile.plot_coverage", numpy, lambda made: {"q": made(*SHAPE)}),
    ("flashtile.torch.attention", torch, forward),
    ("flashtile.torch.scaled_dot_product_attention", torch, spelled_out),
    ("flashtile.torch.flex_attention", torch, spelled_out),
    ("flashtile.torch.varlen_attn", torch, sequences),
    ("flashtile.flash_attn.flash_attn_func", torch, forward),
    ("flashtile.jax.dot_product_attention", jax, spelled_out),
]


@pytest.mark.parametrize(("name", "made", "given"), CALLS)
def test_none_in_the_place_of_an_array(name: str, made: Made, given: Callable[[Made], dict[str, Any]]) -> None:
    right = given(made)
    function = find(name)
    function(**right)  # nothing else is wrong
    for argument in required(function):
        with pytest.raises(SpecError, match=f"^{argument}: got None, expected .*"):
            function(**{**right, argument: None})


@pytest.mark.parametrize("name", ["seqused_k", "block_table"])
@pytest.mark.parametrize("value", ["text", [[1], [2, 3]], 1.5])
def test_what_is_no_tensor_of_integers(name: str, value: Any) -> None:
    given = sequences(torch)
    if name == "block_table":
        given |= {"key": torch(3, 4, 2, 8), "value": torch(3, 4, 2, 8), "seqused_k": given["cu_seq_q"][1:]}
    with pytest.raises(SpecError, match=f"^{name}: got .*, expected a tensor of integers"):
        find("flashtile.torch.varlen_attn")(**given, **{name: value})


def foreign(x: np.ndarray) -> np.ndarray:
    """The same numbers as the other kind of machine would write them."""
    return x.astype(x.dtype.newbyteorder())


IN_ORDER = r"got dtype \w+ in foreign byte order \([<>]\w\d\), expected this machine's byte order"


@pytest.mark.parametrize(
    ("name", "given"), [(name, given) for name, made, given in CALLS if made is numpy and "merge" not in name]
)
def test_inputs_in_foreign_byte_order(name: str, given: Callable[[Made], dict[str, Any]]) -> None:
    function, right = find(name), given(numpy)
    for argument in required(function):
        with pytest.raises(SpecError, match=f"^{argument}: {IN_ORDER}"):
            function(**{**right, argument: foreign(right[argument])})


def read_beside(floats: Any = foreign, integers: Any = foreign) -> dict[str, dict[str, Any]]:
    """Options whose arrays are read beside q, k and v, by the name that an error gives them."""
    table, texts = floats(np.zeros(6, np.float32)), integers(np.arange(6) // 3)
    return {
        "bias": {"bias": floats(np.zeros((6, 6), np.float32))},
        "bias ": {"bias": floats(np.zeros((6, 6), pytest.importorskip("ml_dtypes").bfloat16))},
        "sinks": {"sinks": floats(np.zeros(2))},
        "alibi_slopes": {"alibi_slopes": floats(np.zeros(2, np.float16))},
        "score_mod: table": {"score_mod": lambda s, b, h, i, j: s + table[j]},
        "mask: texts": {"mask": lambda b, h, i, j: texts[i] == texts[j]},
    }


@pytest.mark.parametrize(("made", "limit"), [(numpy, False), (numpy, True), (dask, False), (torch, False)])
def test_what_is_read_beside_in_foreign_byte_order(made: Made, limit: bool) -> None:
    right = (limited(forward) if limit else forward)(made)
    for name, options in read_beside().items():
        with pytest.raises(SpecError, match=f"^{name.strip()}: {IN_ORDER}"):
            flashtile.attention(**right, **options)


def test_what_jax_would_not_take_in_foreign_byte_order() -> None:
    attention, right = find("flashtile.jax.dot_product_attention"), spelled_out(jax)
    wrong = {name: foreign(np.ones(SHAPE, np.float32)) for name in right} | {"sinks": foreign(np.zeros(6))}
    for name, x in wrong.items():
        with pytest.raises(SpecError, match=f"^{name}: {IN_ORDER}"):
            attention(**{**right, name: x})


def test_small_integers_are_copied_in_any_byte_order() -> None:
    bounds, given = np.array([0, 2, 6]), forward(numpy)
    given["q"] = np.arange(96, dtype=np.float32).reshape(SHAPE) / 96
    for options in (
        lambda order: {"align": order(np.array([1])), "causal": True},
        lambda order: {"mask": flashtile.score.varlen(order(bounds), order(bounds))},
    ):
        want, got = (flashtile.attention(**given, **options(order)) for order in (np.array, foreign))
        np.testing.assert_array_equal(got, want)


def test_texts_and_programs() -> None:
    with pytest.raises(SpecError, match="^text: got None, expected a text that flashtile.score.freeze wrote"):
        flashtile.score.thaw(None)
    with pytest.raises(SpecError, match="^program: got None, expected a flashtile.score.Program"):
        flashtile.score.coverage(None, 16, 16)
    with pytest.raises(SpecError, match="^cu_seqlens_q: got None, expected integers that rise from 0"):
        flashtile.score.varlen(None, [0, 2])


def test_every_function_of_the_package_is_called() -> None:
    """So that one that is added is thought of."""
    functions = {n for n in flashtile.__all__ if isinstance(getattr(flashtile, n), types.FunctionType)}
    takes = {n for n in functions if any(True for _ in required(getattr(flashtile, n)))} - {"set_num_threads"}
    assert takes == {name.partition(".")[2] for name, *_ in CALLS if name.count(".") == 1}


def find(name: str) -> Any:
    module, _, function = name.rpartition(".")
    return getattr(pytest.importorskip(module), function)


def required(function: Callable[..., Any]) -> Iterator[str]:
    """The names of the arguments that have no default."""
    for name, one in inspect.signature(function).parameters.items():
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD:
            yield name
