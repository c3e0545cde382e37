"""flashtile.onnx: ONNX's own cases of its operator Attention, by its own tolerances; errors; exports from torch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
import flashtile  # noqa: E402  (after onnx is known to be there)
import flashtile.onnx as door  # noqa: E402
from flashtile.errors import SpecError, UnavailableError  # noqa: E402
from flashtile.testing import assert_accurate  # noqa: E402


@functools.cache
def cases() -> dict[str, Any]:
    """ONNX's node tests of Attention, with the outputs of its reference. Those spelled out are left out."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases("Attention")
    return {case.name: case for case in found if "expanded" not in case.name}


def run(case: Any, given: list[Any]) -> list[np.ndarray]:
    """A case's outputs by the reference evaluator with flashtile's operator."""
    evaluator = onnx.reference.ReferenceEvaluator(case.model, new_ops=[door.Attention])
    return evaluator.run(None, dict(zip((x.name for x in case.model.graph.input), given, strict=True)))


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.float64) - other).max(initial=0))


def test_cases_of_onnx() -> None:
    """93 in onnx 1.23. Its reference rounds to bf16 after each step, which its own tolerance does not allow for: there
    nothing may be further from the result in float64 than what the reference found."""
    assert len(cases()) >= 60
    wrong = []
    for name, case in cases().items():
        for given, expected in case.data_sets:
            for n, (found, theirs) in enumerate(zip(run(case, given), expected, strict=True)):
                assert found.dtype == theirs.dtype and found.shape == theirs.shape, (name, n)
                if found.dtype.name == "bfloat16":
                    wide = [x.astype(np.float64) if x.dtype.name == "bfloat16" else x for x in given]
                    exact = run(case, wide)[n]
                    right = distance(found, exact) <= distance(theirs, exact)
                else:
                    right = np.allclose(found, theirs, rtol=case.rtol, atol=case.atol)
                wrong += [] if right else [(name, n)]
    assert not wrong


def test_every_attribute_of_the_schema() -> None:
    """A new attribute or input of ONNX's operator is noticed here."""
    import inspect

    schema = onnx.defs.get_schema("Attention")
    parameters = inspect.signature(door.attention).parameters.values()
    assert [x.name for x in schema.inputs] == [p.name for p in parameters if p.kind != p.KEYWORD_ONLY]
    assert set(schema.attributes) == {p.name for p in parameters if p.kind == p.KEYWORD_ONLY}
    assert list(door.Outputs._fields) == [x.name for x in schema.outputs]


def draw(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def test_accurate(dtype: str) -> None:
    """Grouped heads, a cache with lengths of its own, a window, softcap and a mask, by the accuracy rule."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    q, k, v = draw(2, 4, 5, 16, dtype=kind), draw(2, 2, 9, 16, dtype=kind, seed=1), draw(2, 2, 9, 8, dtype=kind, seed=2)
    lengths, mask = np.array([9, 6]), draw(2, 1, 5, 9, seed=3) > -0.5
    given: dict[str, Any] = {"is_causal": 1, "left_window_size": 4, "softcap": 2.0, "scale": 0.5}
    y = door.attention(q, k, v, mask, nonpad_kv_seqlen=lengths, **given).Y
    seen = flashtile.score.padding(lengths) & mask
    options = {"causal": True, "window": (4, -1), "align": lengths - 5, "softcap": 2.0, "scale": 0.5}
    assert_accurate(y, q, k, v, mask=seen, **options)


def test_no_queries_and_no_batch() -> None:
    for shape in (1, 0, 16), (0, 3, 16):
        y, *_ = door.attention(*[np.ones(shape, np.float32)] * 3, q_num_heads=2, kv_num_heads=2)
        assert y.shape == shape


def test_dtypes_that_differ() -> None:
    """Values wider than keys, and a softmax in float64, are computed in the wider; Y has Q's dtype."""
    q, k, v = (draw(1, 2, 4, 8, dtype=np.float16, seed=n) for n in range(3))
    wide = door.attention(q, k, v.astype(np.float32)).Y
    assert wide.dtype == np.float16
    exact = flashtile.attention(*(x.astype(np.float64) for x in (q, k, v)))
    assert (exact.astype(np.float16) == door.attention(q, k, v, softmax_precision=11).Y).all()


Q, K = np.ones((2, 4, 3, 8), np.float32), np.ones((2, 2, 5, 8), np.float32)
FLAT = np.ones((2, 3, 32), np.float32)
WRONG: dict[str, Callable[[], Any]] = {
    "Q: got shape": lambda: door.attention(Q[0, 0], K, K),
    "K: got": lambda: door.attention(Q, K[..., :4], K),
    "V: got": lambda: door.attention(Q, K, K[:, :, :4]),
    "q_num_heads: got 5": lambda: door.attention(FLAT, FLAT, FLAT, q_num_heads=5, kv_num_heads=4),
    "q_num_heads: got None": lambda: door.attention(FLAT, FLAT, FLAT, kv_num_heads=4),
    "kv_num_heads: got 3": lambda: door.attention(Q, K, K, kv_num_heads=3),
    "past_value: got None": lambda: door.attention(Q, K, K, past_key=K),
    "past_key: got shape": lambda: door.attention(Q, K, K, past_key=K[:1], past_value=K),
    "past_value: got dtype": lambda: door.attention(Q, K, K, past_key=K, past_value=K.astype(np.float64)),
    "past_value: got 4 keys": lambda: door.attention(Q, K, K, past_key=K, past_value=K[:, :, :4]),
    "nonpad_kv_seqlen: got lengths": lambda: door.attention(
        Q, K, K, past_key=K, past_value=K, nonpad_kv_seqlen=np.array([1, 2])
    ),
    "nonpad_kv_seqlen: got": lambda: door.attention(Q, K, K, nonpad_kv_seqlen=np.array([6, 1])),
    "attn_mask: got a last axis of 6": lambda: door.attention(Q, K, K, np.ones(6, bool)),
    "attn_mask: got a last axis of 4": lambda: door.attention(
        Q, K, K, np.ones((3, 4), bool), nonpad_kv_seqlen=np.array([5, 1])
    ),
    "attn_mask: got dtype": lambda: door.attention(Q, K, K, np.ones(5)),
    "attn_mask: got": lambda: door.attention(Q, K, K, np.ones((2, 5), bool)),
    "left_window_size: got -2": lambda: door.attention(Q, K, K, left_window_size=-2),
    "is_causal: got 2": lambda: door.attention(Q, K, K, is_causal=2),
    "softmax_precision: got 3": lambda: door.attention(Q, K, K, softmax_precision=3),
    "qk_matmul_output_mode: got 4": lambda: door.attention(Q, K, K, qk_matmul_output_mode=4),
    "softcap: got": lambda: door.attention(Q, K, K, softcap=-1.0),
}


@pytest.mark.parametrize("message", WRONG)
def test_one_clear_error(message: str) -> None:
    with pytest.raises(SpecError, match=rf"^{message}.* expected "):
        WRONG[message]()


# Exports from torch.


def exported(options: dict[str, Any]) -> tuple[Any, tuple[Any, ...], Any]:
    """The ONNX model of a torch model that attends with these options, its inputs, and the model."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    import flashtile.torch

    class Model(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, b: Any, m: Any) -> Any:
            o, lse = flashtile.torch.attention(q, k, v, bias=b, mask=m, return_lse=True, **options)
            return (o + 1, lse) if "softcap" in options else o + 1

    generator = torch.Generator().manual_seed(0)
    q, k, v, b = (torch.randn(n, generator=generator) for n in ((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8), (6, 6)))
    inputs = q, k, v, b, torch.rand((6, 6), generator=generator) > 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Model().eval(),
            inputs,
            dynamo=True,
            custom_translation_table=door.translations(),
            opset_version=23,
            verbose=False,
        )
    return program.model_proto, inputs, Model()


@pytest.mark.parametrize("options", [{"causal": True}, {"softcap": 3.0, "scale": 0.4}])
def test_a_model_of_torch(options: dict[str, Any]) -> None:
    """Its graph has ONNX's operator, which ONNX's reference and these kernels run to the same result."""
    model, inputs, torch_model = exported(options)
    onnx.checker.check_model(model)
    attend = [node for node in model.graph.node if node.op_type == "Attention"]
    assert len(attend) == 1 and (len(attend[0].output) == 4) == ("softcap" in options)  # S_q x S for lse alone
    expected = torch_model(*inputs)
    for operators in ([], [door.Attention]):
        evaluator = onnx.reference.ReferenceEvaluator(model, new_ops=operators)
        names = [x.name for x in model.graph.input]
        found = evaluator.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
        for one, other in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-5)


def test_what_the_operator_cannot_say() -> None:
    translate = next(iter(door.translations().values())) if _exports() else pytest.skip("no onnxscript")
    for name, argument in {"window": "window", "sinks": "sinks", "mask_mod": "mask", "offsets": "align"}.items():
        with pytest.raises(UnavailableError, match=f"^{argument}: got a value, expected None"):
            translate(Q, K, K, **{name: "something"})
    with pytest.raises(UnavailableError, match=r"^align: got 'bottom_right' for 3 rows and 5 keys"):
        translate(Q, K, K, causal=True, align="bottom_right")
    with pytest.raises(UnavailableError, match="^precision: got 'bf16', expected 'ieee'"):
        translate(Q, K, K, precision="bf16")
    with pytest.raises(UnavailableError, match="^align: got 2"):
        translate(Q, K, K, causal=True, offset=2)


def _exports() -> bool:
    try:
        door.translations()
    except UnavailableError:
        return False
    return True
