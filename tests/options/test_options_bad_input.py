"""Every wrong option has one error, from both doors, before any memory is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from inputs import uniform
from option_cases import SHAPE

import flashtile
from flashtile.errors import FlashtileError, SpecError
from flashtile.score import varlen

FULL = (SHAPE.batch, SHAPE.heads, SHAPE.q_len, SHAPE.kv_len)
COMPLEX, FAR, SHORT = np.zeros(150, complex), np.full(150, 2**40), np.zeros(9)

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mask that does not broadcast": ({"mask": np.ones((3, 150), bool)}, r"^mask: got shape \(3, 150\), expected"),
    "mask of rank 5": ({"mask": np.ones((1, *FULL), bool)}, r"^mask: got shape \(1, 2, 4, 70, 150\)"),
    "bias that does not broadcast": ({"bias": np.ones((70, 149), np.float32)}, r"^bias: got shape \(70, 149\), exp"),
    "mask of floats": ({"mask": np.ones((70, 150), np.float32)}, "^mask: got .*float32"),
    "bias of integers": ({"bias": np.ones((70, 150), int)}, "^bias: got .*int64"),
    "captured complex": ({"mask": lambda b, h, i, j: COMPLEX[j] == 0}, "COMPLEX: got dtype complex128"),
    "captured integers too large": ({"mask": lambda b, h, i, j: FAR[j] > i}, "FAR: got integers from 1099511627776"),
    "captured array too short": ({"mask": lambda b, h, i, j: SHORT[j] == 0}, r"SHORT: got index \(75,\) at"),
    "mask_mod of three": ({"mask": lambda b, i, j: i >= j}, "^mask: got .* expected a function of 4 arguments"),
    "score_mod of four": ({"score_mod": lambda s, b, i, j: s}, "^score_mod: got .* expected a function of 5 arguments"),
    "mask_mod that gives floats": ({"mask": lambda b, h, i, j: i * 0.5}, "^mask: got a function that returns a float"),
    "score_mod that gives bools": ({"score_mod": lambda s, b, h, i, j: i > j}, "^score_mod: got a function .* bool"),
    "slopes of wrong shape": ({"alibi_slopes": np.ones(3, np.float32)}, r"^alibi_slopes: got shape \(3,\), expected"),
    "slopes of integers": ({"alibi_slopes": np.ones(4, int)}, "^alibi_slopes: got .*int64"),
    "sinks of wrong shape": ({"sinks": np.ones((4, 1), np.float32)}, r"^sinks: got shape \(4, 1\), expected"),
    "sinks of integers": ({"sinks": np.ones(4, int)}, r"^sinks: got dtype (torch\.)?int64, expected floats"),
    "sinks that are a list": ({"sinks": [1.0] * 4}, "^sinks: got a list, expected"),
    "negative softcap": ({"softcap": -1.0}, "^softcap: got -1.0, expected"),
    "softcap that is no number": ({"softcap": "30"}, "^softcap: got '30', expected"),
    "operation outside": ({"score_mod": lambda s, b, h, i, j: np.sin(s)}, r"input\.py:\d+: numpy\.sin on a traced"),
}


def doors() -> list[Any]:
    """Both doors, each with arrays of its own."""

    def by_numpy(out: np.ndarray, **options: Any) -> Any:
        return flashtile.attention(*uniform(SHAPE, "float32"), out=out, align=0, **options)

    def by_torch(out: np.ndarray, **options: Any) -> Any:
        torch = pytest.importorskip("torch")
        import flashtile.torch

        tensors = (torch.from_numpy(x) for x in uniform(SHAPE, "float32"))
        given = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        return flashtile.torch.attention(*tensors, out=torch.from_numpy(out), align=0, **given)

    return [by_numpy, by_torch]


@pytest.mark.parametrize("door", doors(), ids=["numpy", "torch"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(door: Callable[..., Any], name: str) -> None:
    options, message = WRONG[name]
    out = np.full((2, 4, 70, 24), 7, np.float32)
    with pytest.raises(SpecError, match=f"(?s){message}") as caught:
        door(out, **options)
    assert isinstance(caught.value, FlashtileError) and (out == 7).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([0, 3], [0, 2, 4]), "cu_seqlens_k: got 3 boundaries, expected 2 as in cu_seqlens_q"),
        (([1, 3], [0, 4]), "cu_seqlens_q: got 1 first, expected integers that rise from 0"),
        (([0, 3], [0, 4, 2]), "cu_seqlens_k: got 2 after 4, expected"),
        (([0, 3.5], [0, 4]), r"cu_seqlens_q: got float64 of shape \(2,\), expected"),
        (([], []), "cu_seqlens_q: got float64 of shape"),
        (([0, 3], [0, 4], 1), "causal: got 1, expected True or False"),
        (([0, 3], [0, 4], True, (-2, 0)), "window: got left -2, expected"),
        (([0, 3], [0, 4], True, 5), "window: got 5, expected"),
        (([0, 3], [0, 4], True, None, "left"), "align: got 'left', expected"),
        (([0, 3], [0, 4], True, None, [1, 2]), r"align: got int64 of shape \(2,\), expected"),
        (([0, 3], [0, 4], True, None, [[1], [2, 3]]), "align: got a list, expected"),
        (([0, 3], [0, 4], True, None, 2**40), "align: got offsets from 1099511627776"),
    ],
)
def test_wrong_boundaries_of_packed_sequences(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SpecError, match=f"^{message}"):
        varlen(*arguments)


def test_boundaries_that_end_elsewhere_than_the_arrays() -> None:
    q, k, v = uniform(SHAPE, "float32")
    with pytest.raises(SpecError, match="^cu_seqlens_q: got boundaries up to 69, expected up to the length, 70"):
        flashtile.attention(q, k, v, mask=varlen([0, 69], [0, 150]))
    with pytest.raises(SpecError, match="^cu_seqlens_k: got boundaries up to 160, expected up to the length, 150"):
        flashtile.attention(q, k, v, mask=varlen([0, 70], [0, 160]))


def test_captured_tensors_of_another_device() -> None:
    torch = pytest.importorskip("torch")
    ids, q = torch.zeros(150, device="meta"), uniform(SHAPE, "float32")
    with pytest.raises(SpecError, match="ids: got a tensor on meta, expected one in CPU memory"):
        flashtile.attention(*q, mask=lambda b, h, i, j: ids[j] == 0)
