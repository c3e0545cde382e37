"""What a tensor must be to be read where it lies: checks of the PyTorch door, and addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from flashtile.errors import UnavailableError, described, owned, wrong

Tensor = torch.Tensor
# What to give instead of tensors whose elements alone do not say what they mean, by the name of the class.
_PLAIN = {
    "NestedTensor": "a dense tensor: the sequences one after the other with mask=score.varlen(...), or padded with "
    "mask=score.padding(...)",
    "CausalBias": "causal=True with align=, or attn_mask= of scaled_dot_product_attention",
    "MaskedTensor": "a dense tensor, and which of its keys to see as mask=",
}
# Tensors that only stand for others while a graph is made: the operator's fake kernel takes them.
_STAND_INS = ("FakeTensor", "FunctionalTensor")
_DEVICES = ("cpu", "cuda")
_STRIDED = torch.strided
READY, RECORDED, WATCHED, ON_GPU, OTHER = range(5)
compiling = torch.compiler.is_dynamo_compiling  # whether torch.compile reads the call, which then does not run
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_grad_enabled = torch.is_grad_enabled
autocast_anywhere = torch._C._is_any_autocast_enabled


def kind_of(*tensors: Tensor) -> int:
    """READY for plain dense CPU tensors, RECORDED if autograd records a gradient of one, OTHER for whatever else, which
    must be looked at closely. In so many words since small calls wait for it."""
    recorded = False
    for x in tensors:
        if not (type(x) is Tensor and x.is_cpu and x.layout is _STRIDED) or x.is_neg() or x.is_nested:
            return OTHER
        if x.requires_grad:
            recorded = True
    if in_forward_mode() or _transforms_active() or _dispatch_modes():
        return OTHER
    return RECORDED if recorded and _is_grad_enabled() else READY


def kind_of_others(**tensors: Tensor) -> int:
    """READY, RECORDED or ON_GPU, of tensors that were looked at closely; WATCHED where a transform or forward mode must
    see the call. Raises: as `check_tensors`."""
    check_tensors(**tensors)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())
    kind = WATCHED if is_watched() or in_forward_mode() else RECORDED if recorded else READY
    if not all(x.is_cpu for x in tensors.values()):
        (first, q), *others = tensors.items()
        for name, x in others if q.is_cpu else ():  # nothing could be asked of q's GPU; other GPUs are told apart later
            if not x.is_cpu:
                raise wrong(name, f"an array on {x.device}", f"one on cpu as {first}")
        return ON_GPU if kind == READY else kind
    return kind


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents: torch.autograd.forward_ad counts its levels from 0."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def is_watched() -> bool:
    """Whether a transform of torch.func or a mode of torch looks at every operator: the call must then be one."""
    return _transforms_active() or _dispatch_modes() > 0


def is_jagged(x: Any) -> bool:
    """Whether it is a nested tensor whose sequences lie one after the other."""
    return isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged


def is_stand_in(x: Tensor) -> bool:
    """Whether a tensor stands for others, without memory of its own, for whoever makes a graph."""
    return type(x).__name__ in _STAND_INS


def check_untraced() -> None:
    """Raise under torch.jit.trace, in which sizes are tensors: no two calls are then alike, so each one comes here."""
    if torch.jit.is_tracing():
        raise UnavailableError("q: got a tensor that torch.jit.trace records, expected one of an ordinary call")


def address(name: str, x: Tensor) -> int:
    """The address of one tensor's elements, 0 if there are none. Raises: SpecError for one that has some, but
    not in memory."""
    try:
        found = x.data_ptr()
    except RuntimeError:
        found = 0
    if found == 0 and x.numel():
        expected = "one in memory (not fake, nor with its storage freed)"
        raise wrong(name, f"a {type(x).__qualname__} without memory", expected)
    return found


def check_tensors(**tensors: Tensor) -> None:
    """Raise unless each is a plain dense tensor, on the CPU or on a GPU, there without a tangent."""
    for name, x in tensors.items():
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter and not is_stand_in(x):
            raise wrong(name, owned(x), _expected(x))
        if not (x.is_cpu or x.is_cuda):
            raise wrong(name, f"a tensor on {x.device}", "a tensor on the CPU or a GPU of CUDA or ROCm")
        if x.layout is not torch.strided:
            raise wrong(name, f"layout {x.layout}", "a dense tensor")
        if x.is_nested:
            raise wrong(name, "a nested tensor", _PLAIN["NestedTensor"])
        if x.is_neg():
            raise wrong(name, "a lazily negated view", "a tensor in memory (x.resolve_neg())")
        if not x.is_cpu and has_tangent(x):
            raise UnavailableError(
                f"{name}: got a tensor on {x.device} with a tangent, expected one without: forward mode is not "
                "available there yet"
            )


def _expected(x: object) -> str:
    """What to give instead of something that is no tensor proper."""
    if not isinstance(x, Tensor):
        return "a torch.Tensor"
    return _PLAIN.get(type(x).__name__, "a torch.Tensor itself: what a subclass means is unknown")


def has_tangent(x: Any) -> bool:
    """Whether forward mode follows a tensor."""
    return in_forward_mode() and isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in the dtype of torch.autocast where it is on for their device, as torch's SDPA has them: float64
    stays. What is no tensor is left to the checks that follow."""
    if not autocast_anywhere():
        return tensors
    lower = {d: torch.get_autocast_dtype(d) for d in _DEVICES if torch.is_autocast_enabled(d)}
    if not lower:
        return tensors
    return tuple(x.to(lower[x.device.type]) if _is_cast(x, lower) else x for x in tensors)


def _is_cast(x: Any, lower: dict[str, torch.dtype]) -> bool:
    return (
        isinstance(x, Tensor)
        and x.device.type in lower
        and x.is_floating_point()
        and x.dtype not in (torch.float64, lower[x.device.type])
    )


def check_ranks(rank: int, layout: str, **tensors: Any) -> None:
    """Raise SpecError unless each is a tensor of so many axes, which a nested one is to look at alone."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise wrong(name, described(x), f"a torch tensor {layout}")
        if x.is_nested:
            raise wrong(name, "a nested tensor", f"a plain one {layout}")
        if x.ndim != rank:
            raise wrong(name, f"shape {tuple(x.shape)}", layout)
