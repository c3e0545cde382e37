"""OpenVINO's ScaledDotProductAttention on its CPU plugin. Shared key/value heads are broadcast in the graph."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from ..cases import Case
from ..data import additive, has_mask, visible_mask


def refuses(case: Case) -> str | None:
    if case.dtype == "f64":
        return "computes fp64 in fp32"
    if case.causal and case.queries != case.keys:
        return "causal aligns top left"
    return "no softcap, no sinks" if case.options.rescores else None


def versions() -> dict[str, str]:
    return {"openvino": version("openvino")}


def _expand(node: Any, case: Case) -> Any:
    """(B, H_kv, S, D) -> (B, H, S, D), as exported models do it."""
    from openvino import opset13 as op

    if case.heads == case.kv_heads:
        return node
    group = case.heads // case.kv_heads
    tail = [case.keys, case.head_size]
    split = op.reshape(node, [case.batch, case.kv_heads, 1, *tail], False)
    repeated = op.broadcast(split, [case.batch, case.kv_heads, group, *tail])
    return op.reshape(repeated, [case.batch, case.heads, *tail], False)


def _tensor(x: np.ndarray, element: Any) -> Any:
    """An OpenVINO tensor with the bits of x, whose dtype NumPy may not know."""
    import openvino

    tensor = openvino.Tensor(element, openvino.Shape(x.shape))
    tensor.data.view(np.uint8).reshape(-1)[:] = x.reshape(-1).view(np.uint8)
    return tensor


def _mask(case: Case, kinds: Any) -> Any:
    """Mask or bias as a tensor; None if there is neither."""
    if case.options.bias is not None:
        return _tensor(np.ascontiguousarray(additive(case)), kinds.f32)
    return _tensor(np.ascontiguousarray(visible_mask(case)), kinds.boolean) if has_mask(case) else None


def _model(case: Case, shapes: list[tuple[int, ...]], element: Any, mask: Any) -> Any:
    import openvino
    from openvino import opset13 as op

    parameters = [op.parameter(list(shape), element) for shape in shapes]
    if mask is not None:
        parameters.append(op.parameter(list(mask.shape), mask.element_type))
    q, k, v, *rest = parameters
    out = op.scaled_dot_product_attention(
        q, _expand(k, case), _expand(v, case), *rest, causal=case.causal and mask is None
    )
    return openvino.Model([op.result(out)], parameters)


def prepare(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> tuple[Callable, Callable]:
    import openvino

    core, kinds = openvino.Core(), openvino.Type
    element = {"f32": kinds.f32, "bf16": kinds.bf16, "f16": kinds.f16}[case.dtype]
    # asked for a 16-bit type that the processor does not compute in, the plugin is a hundred times slower
    native = {"bf16": "BF16", "f16": "FP16"}.get(case.dtype) in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = case.dtype if native else "f32"
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    mask = _mask(case, kinds)
    compiled = core.compile_model(_model(case, [x.shape for x in (q, k, v)], element, mask), "CPU", options)
    request = compiled.create_infer_request()
    tensors = [_tensor(x, element) for x in (q, k, v)]
    if mask is not None:
        tensors.append(mask)
    for index, tensor in enumerate(tensors):
        request.set_input_tensor(index, tensor)

    def run() -> Any:
        request.infer()
        return request

    def to_numpy(out: Any) -> np.ndarray:
        data = out.get_output_tensor(0).data
        return (data.view(q.dtype) if data.dtype.itemsize == q.dtype.itemsize else data).reshape(q.shape)

    return run, to_numpy
