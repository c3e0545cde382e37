"""ONNX Runtime's Attention, the operator of the ONNX standard (opset 23)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from ..cases import Case
from ..data import additive, has_mask, visible_mask


def refuses(case: Case) -> str | None:
    if case.dtype not in ("f32", "f16"):
        return f"no {case.dtype} kernel on CPUs"
    if case.causal and case.queries != case.keys:
        return "is_causal aligns top left"
    return "no sinks" if case.options.sinks is not None else None


def versions() -> dict[str, str]:
    return {"onnxruntime": version("onnxruntime"), "onnx": version("onnx")}


def make_session(model: Any, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def prepare(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> tuple[Callable, Callable]:
    from onnx import TensorProto, helper

    element = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16}[case.dtype]
    feeds = {"Q": q, "K": k, "V": v}
    inputs = [helper.make_tensor_value_info(name, element, x.shape) for name, x in feeds.items()]
    if case.options.bias is not None:
        feeds["mask"] = np.ascontiguousarray(additive(case))
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, feeds["mask"].shape))
    elif has_mask(case):
        mask = visible_mask(case)  # every query spelled out: a single row does not broadcast
        feeds["mask"] = np.ascontiguousarray(np.broadcast_to(mask, (*mask.shape[:-2], case.queries, case.keys)))
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, feeds["mask"].shape))
    causal = int(case.causal and not has_mask(case))  # the mask already says it
    node = helper.make_node("Attention", list(feeds), ["Y"], is_causal=causal, softcap=case.options.softcap)
    output = helper.make_tensor_value_info("Y", element, q.shape)
    graph = helper.make_graph([node], "attention", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = make_session(model, threads)

    def run() -> np.ndarray:
        return session.run(None, feeds)[0]

    def to_numpy(out: Any) -> np.ndarray:
        return out

    return run, to_numpy
