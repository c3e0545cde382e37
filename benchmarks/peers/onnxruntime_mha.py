"""ONNX Runtime's own MultiHeadAttention operator, which takes (batch, sequence, heads * head_size)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..cases import Case
from .onnxruntime import make_session, versions

__all__ = ["prepare", "refuses", "versions"]


def refuses(case: Case) -> str | None:
    if case.dtype != "f32":
        return f"no {case.dtype} kernel on CPUs"
    if case.heads != case.kv_heads:
        return "no grouped heads"
    if case.window:
        return "no window"
    if case.options.rescores or case.options.mask is not None:
        return "takes a bias, but no mask of its own for each query, no softcap, no sinks"
    return None


def _pack(x: np.ndarray) -> np.ndarray:
    batch, heads, length, size = x.shape
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(batch, length, heads * size)


def prepare(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> tuple[Callable, Callable]:
    from onnx import TensorProto, helper

    feeds = {"Q": _pack(q), "K": _pack(k), "V": _pack(v)}
    names = list(feeds)
    if case.options.bias is not None:
        feeds["bias"] = np.ascontiguousarray(case.options.bias(case))
        names += ["", "", "bias"]  # no bias of the projections, no padding mask
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in feeds.items()]
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, feeds["Q"].shape)
    options = {"num_heads": case.heads, "unidirectional": int(case.causal)}
    node = helper.make_node("MultiHeadAttention", names, ["Y"], domain="com.microsoft", **options)
    graph = helper.make_graph([node], "attention", inputs, [output])
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    session = make_session(helper.make_model(graph, opset_imports=domains, ir_version=8), threads)

    def run() -> np.ndarray:
        return session.run(None, feeds)[0]

    def to_numpy(out: Any) -> np.ndarray:
        return out.reshape(case.batch, case.queries, case.heads, case.head_size).swapaxes(1, 2)

    return run, to_numpy
