"""The eager way of a call on tensors that records nothing: `calls.attend`, and what it must know of torch."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch

from flashtile import calls, devices
from flashtile.arrays import View, view_of
from flashtile.calls import Call, Request
from flashtile.errors import wrong
from flashtile.score.capture import ArrayCapture
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec
from flashtile.torch.tensors import address, check_tensors, check_untraced, has_tangent, in_forward_mode

Tensor = torch.Tensor
_empty_like = torch.empty_like


class _Tensors:
    """Tensors on the CPU; see `calls.Arrays`."""

    address, strides = staticmethod(Tensor.data_ptr), staticmethod(Tensor.stride)

    def key(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Hashable:
        views = q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype
        return views if out is None else (views, out.shape, out.stride(), out.dtype)

    def view(self, x: Tensor) -> View:
        check_untraced()
        return view_of(x)

    def output(self, call: Call, q: Tensor) -> Tensor:
        found = _empty_like(q if call.o_like_q else _model(call.o_shape, q.dtype))
        if type(found) is not Tensor:
            _refuse_mode(found)
        return found

    def lse(self, call: Call, q: Tensor) -> Tensor:
        return _empty_like(_model(call.lse_shape, torch.float64 if q.dtype is torch.float64 else torch.float32))

    def addresses(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> tuple[int, int, int, int]:
        try:
            found = q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr()
        except RuntimeError:
            found = 0, 0, 0, 0
        if 0 in found:  # an empty tensor, or one that only stands for others
            found = address("q", q), address("k", k), address("v", v), address("out", o)
        return found

    def zeros(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)

    def reach(self, spec: AttentionSpec, offsets: Any, scoring: Scoring | None) -> tuple[int, Scoring | None]:
        return calls.NUMPY.reach(spec, offsets, scoring)


TENSORS = _Tensors()


@functools.lru_cache(maxsize=calls.CACHE_ENTRIES)
def _model(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One element that looks like a row-major tensor: torch makes a new one like it in half of the time of a new one by
    its shape, whatever the default device."""
    found = torch.empty(1, dtype=dtype, device="cpu").expand(shape)
    if type(found) is not Tensor:
        _refuse_mode(found)
    return found


def _refuse_mode(found: Any) -> None:
    raise wrong("out", f"a new {type(found).__name__} from a mode of torch that is on", "a call outside of it")


def attend_on_gpu(
    q: Tensor, k: Tensor, v: Tensor, request: Request, return_lse: bool, progress: Any, out: Tensor | None
) -> Any:
    """`calls.attend` of tensors on GPUs, all of them checked; that it is one GPU is seen when they are validated."""
    return devices.attend(devices.owner_of("torch"), q, k, v, request, return_lse, progress, out)


def traced_on_gpu(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Request:
    """`calls.traced` of such tensors."""
    return devices.traced(devices.owner_of("torch"), q, k, v, request)


def is_recorded(scoring: Scoring, sinks: Any) -> bool:
    """Whether a derivative of sinks, or of what the program reads, is asked for. Raises: as `check_tensors`."""
    recording = torch.is_grad_enabled()
    found = recording and getattr(sinks, "requires_grad", False)
    if scoring.program is not None and (recording or in_forward_mode()):
        for x in scoring.program.captures:
            source = x.source if isinstance(x, ArrayCapture) else None
            if isinstance(source, Tensor) and (source.requires_grad or has_tangent(source)):
                check_tensors(**{x.name: source})
                found = found or has_tangent(source) or recording and source.requires_grad
    return bool(found)


def check_scores(scores: Any) -> None:
    """`check_tensors` of those that came as options; `is_recorded` sees what functions read."""
    for name, x in vars(scores).items():
        if x is not None and isinstance(x, Tensor):
            check_tensors(**{name: x})
