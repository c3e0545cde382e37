"""cuDNN's attention on NVIDIA's GPUs, by torch's own operator for it: fp16 and bf16, all keys or causal, gradients.

The operator takes and gives tensors. They are made here over the addresses that the contract has, so arrays of any
library can come; what the operator allocates for its results is copied to where they are wanted.

It is never chosen by "auto": no run on a GPU has yet shown where it is faster, nor that it keeps the accuracy rule.
What it does with NaN and infinities that a mask hides is cuDNN's matter, and its gradients need not be the same bits
twice.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flashtile import current
from flashtile.errors import KernelError, UnavailableError, wrong
from flashtile.kernels import (
    ArrayShapes,
    BackwardLayout,
    Capabilities,
    CompiledBackward,
    CompiledKernel,
    Family,
    Layout,
)
from flashtile.kernels.triton import driver
from flashtile.plan import Plan, make_plan
from flashtile.spec import AttentionSpec, Band

if TYPE_CHECKING:
    import numpy as np
    import torch

    from flashtile.score.options import Scoring

INSTEAD = "kernel='triton' can"
NOT_PROVEN = "no run on a GPU has shown yet where it is faster, or that it is accurate; kernel='cudnn' takes it"
# What torch itself checks before it hands a call to cuDNN: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
LARGEST_HEAD, HEAD_MULTIPLE, MOST_HEADS, FEWEST_KEYS = 128, 8, 65535, 2
ALIGNMENT = 16  # bytes, of addresses and rows

# The arguments of the two operators in order, those by keyword behind the star.
FORWARD = "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask * scale"
BACKWARD = (
    "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k "
    "dropout_p is_causal * scale"
)


class Operators(NamedTuple):
    """aten::_scaled_dot_product_cudnn_attention and its backward, or what stands in for them."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def unavailable() -> str | None:
    """Why cuDNN cannot be used in this process, None if it can. torch is not imported to find out."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "torch, whose operator this is, is not installed: pip install torch"
    version = Path(found.origin).with_name("version.py")
    if not version.exists() or not re.search(r"^cuda\b[^=]*= *'", version.read_text(), re.MULTILINE):
        return f"torch {importlib.metadata.version('torch')} was built without CUDA: pip install a torch with it"
    return driver.missing()


def remark() -> str:
    """For `flashtile doctor`."""
    return f"by torch {importlib.metadata.version('torch')}, when asked for by name: {NOT_PROVEN}"


def capabilities(spec: AttentionSpec) -> Capabilities:
    """What torch lets cuDNN compute. A work item is a head; one call computes them all."""
    return Capabilities(
        name="cudnn",
        dtypes=frozenset(("float16", "bfloat16")),
        precisions=frozenset(("ieee",)),
        max_head_size=LARGEST_HEAD,
        query_block=1,
        tile_q=(max(1, spec.q_len),),
        tile_k=(max(1, spec.kv_len),),
        options=frozenset(("band",)),
        native=False,
        devices=frozenset(("cuda",)),
        directions=frozenset(("forward", "backward")),
        at_once=True,
    )


def refuses(spec: AttentionSpec) -> str | None:
    """What cuDNN cannot do of a call."""
    for holds, cannot in _limits(spec):
        if not holds:
            return cannot
    arch = driver.device(int(spec.device.partition(":")[2] or 0)).arch
    if not arch.startswith("sm_"):
        return f"runs on NVIDIA's GPUs, not on {arch}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.are_deterministic_algorithms_enabled():
        return "need not give the same bits twice, which torch.use_deterministic_algorithms asks for"
    return None


def _limits(spec: AttentionSpec) -> Iterator[tuple[bool, str]]:
    """(whether it holds, what cannot be done where it does not)."""
    plain = spec.band is None or (spec.band == Band(None, 0) and spec.offset == 0)
    yield plain, 'hides no keys but those after each row, aligned "top_left": no window, no other align'
    sizes = spec.head_size, spec.value_size
    yield not any(n % HEAD_MULTIPLE for n in sizes), f"takes head sizes that are multiples of {HEAD_MULTIPLE}"
    yield spec.scale > 0, f"takes a scale above 0, not {spec.scale:g}"
    yield spec.kv_len >= FEWEST_KEYS, f"takes {FEWEST_KEYS} keys or more, not {spec.kv_len}"
    yield min(spec.q_len, spec.batch) > 0, "takes no empty call"
    yield max(spec.batch, spec.heads) <= MOST_HEADS, f"takes {MOST_HEADS} batches and heads at most"


def operators() -> Operators:
    """torch's. Raises: UnavailableError for a torch whose operators take other arguments."""
    import torch

    found: list[Any] = []
    names = "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"
    for name, known in zip(names, (FORWARD, BACKWARD), strict=True):
        operator = getattr(getattr(torch.ops.aten, name, None), "default", None)
        got = [] if operator is None else operator._schema.arguments
        plain, keyword = ([x.name for x in got if x.kwarg_only is by] for by in (False, True))
        if [*plain, "*", *keyword] != known.split():
            raise UnavailableError(f"cudnn: torch {torch.__version__} has no {name} of known arguments; {INSTEAD}")
        found.append(operator)
    return Operators(*found)


def compile(spec: AttentionSpec, plan: Plan, layout: Layout) -> CompiledKernel:
    """The operator bound to one spec and layout. Raises: SpecError for negative strides, UnavailableError."""
    return Forward(spec, _strides(layout, "qkvo"), operators())


def compile_backward(spec: AttentionSpec, layout: BackwardLayout, arrays: ArrayShapes) -> CompiledBackward:
    """The same of the backward operator."""
    names = ("q", "k", "v", "o", "do", "dq", "dk", "dv")
    plan = make_plan(spec, capabilities(spec))
    return Backward(spec, plan, _strides(layout, names), operators())


def _strides(layout: Layout, names: Any) -> dict[str, tuple[int, ...]]:
    """In bytes, by name. Raises: SpecError."""
    found = {name: getattr(layout, name) for name in names}
    for name, strides in found.items():
        if min(strides) < 0:  # which torch has not
            raise wrong(name, f"strides of {strides} bytes", f"none below 0 with kernel='cudnn' ({INSTEAD})")
    return found


class Addresses(NamedTuple):
    """The parameters of a forward call."""

    q: int
    k: int
    v: int
    o: int
    lse: int


@dataclass(frozen=True)
class Forward:
    """A `kernels.CompiledKernel`."""

    spec: AttentionSpec
    strides: dict[str, tuple[int, ...]]
    operators: Operators
    scratch_bytes: int = 0
    merge_stage: None = None

    def pack(self, q: int, k: int, v: int, o: int, lse: int, offsets: int, scoring: Scoring | None = None) -> Addresses:
        return Addresses(q, k, v, o, lse)

    def run(self, params: Addresses, begin: int, end: int, scratch: int) -> int:
        """All work items, in the call's stream. Raises: KernelError."""
        if begin >= end:
            return 0
        spec = self.spec
        with _call() as at:
            q, k, v, o = (at(getattr(params, x), shape_of(spec, x), self.strides[x], spec.dtype) for x in "qkvo")
            wanted = params.lse != 0
            given = (as_cudnn_reads(q), as_cudnn_reads(k), as_cudnn_reads(v))
            result = attend(self.operators, spec, given, wanted)
            o.copy_(result[0])
            if wanted:
                lse = at(params.lse, shape_of(spec, "lse"), dense(shape_of(spec, "lse"), 4), "float32")
                lse.copy_(result[1].reshape(lse.shape))
        return 0


@dataclass(frozen=True)
class Backward:
    """A `kernels.CompiledBackward`."""

    spec: AttentionSpec
    plan: Plan
    strides: dict[str, tuple[int, ...]]
    operators: Operators
    scratch_bytes: int = 0
    merge_stage: None = None

    def pack(
        self,
        q: int,
        k: int,
        v: int,
        o: int,
        lse: int,
        do: int,
        dlse: int,
        dq: int,
        dk: int,
        dv: int,
        offsets: int,
        scoring: Scoring | None = None,
        dsinks: int = 0,
    ) -> dict[str, int]:
        """Raises: UnavailableError for a gradient of lse, which cuDNN's backward has no term for."""
        if dlse:
            raise UnavailableError(f"lse: got a gradient of it, which kernel='cudnn' cannot pass on; {INSTEAD}")
        return {"q": q, "k": k, "v": v, "o": o, "lse": lse, "do": do, "dq": dq, "dk": dk, "dv": dv}

    def run(self, params: dict[str, int], begin: int, end: int, scratch: int) -> int:
        """All work items, in the call's stream. Raises: KernelError."""
        if begin >= end:
            return 0
        spec = self.spec
        strides = self.strides | {"lse": dense(shape_of(spec, "lse"), 4)}
        with _call() as at:

            def tensor(name: str) -> torch.Tensor:
                dtype = "float32" if name == "lse" else spec.dtype
                return at(params[name], shape_of(spec, name.removeprefix("d")), strides[name], dtype)

            q, k, v, o, do = (as_cudnn_reads(tensor(name)) for name in ("q", "k", "v", "o", "do"))
            found = differentiate(self.operators, spec, (do, q, k, v, o, tensor("lse")))
            for name, gradient in zip(("dq", "dk", "dv"), found, strict=True):
                if params[name]:
                    tensor(name).add_(gradient)
        return 0

    def totals(self, params: Any) -> dict[int, np.ndarray]:
        return {}


def attend(operators: Operators, spec: AttentionSpec, inputs: tuple[Any, Any, Any], want_lse: bool) -> tuple[Any, Any]:
    """o (B, H, S_q, D_v), and lse (B, H, S_q, 1) where it is wanted."""
    found = operators.forward(*inputs, None, want_lse, 0.0, spec.band is not None, False, scale=spec.scale)
    return found[0], found[1]


def differentiate(operators: Operators, spec: AttentionSpec, inputs: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """dq, dk, dv of (do, q, k, v, o, lse (B, H, S_q)). Without dropout nobody reads the state of a generator."""
    do, q, k, v, o, lse = inputs
    seed = q.new_zeros((), dtype=_torch().int64)
    none = (None, None, None)
    sizes = spec.q_len, spec.kv_len, 0.0, spec.band is not None
    stats = lse.unsqueeze(-1)
    dq, dk, dv = operators.backward(do, q, k, v, o, stats, seed, seed, *none, *sizes, scale=spec.scale)
    return dq, dk, dv


def as_cudnn_reads(x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy: rows without gaps between elements, all aligned, no axis repeated."""
    long = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    unit = ALIGNMENT // x.element_size()
    inner = x.stride(-1) == 1 or x.shape[-1] == 1
    if inner and not x.data_ptr() % ALIGNMENT and all(stride and not stride % unit for stride in long):
        return x
    return x.clone(memory_format=_torch().contiguous_format)


def shape_of(spec: AttentionSpec, name: str) -> tuple[int, ...]:
    """Of q, k, v, o and lse."""
    heads, length = (spec.kv_heads, spec.kv_len) if name in "kv" else (spec.heads, spec.q_len)
    if name == "lse":
        return spec.batch, heads, length
    return spec.batch, heads, length, spec.head_size if name in "qk" else spec.value_size


def dense(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides of a row-major array, bytes."""
    strides = [itemsize]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    return tuple(strides)


Tensors = Callable[[int, tuple[int, ...], tuple[int, ...], str], Any]


@contextlib.contextmanager
def _call() -> Iterator[Tensors]:
    """Within it, torch works in the stream of the call in progress; gives what makes tensors of its arrays.

    Raises: KernelError for torch's own errors.
    """
    here = current.here()
    with in_stream(here), _torch().no_grad():
        try:
            yield functools.partial(tensor_at, number=here.number)
        except RuntimeError as cause:
            text = " ".join(str(cause).split())[:300]
            raise KernelError(f"cudnn: torch's operator: {text}; {INSTEAD}") from cause


def in_stream(here: current.Here) -> AbstractContextManager[Any]:
    """Makes the call's stream torch's current one, which it is already where the arrays are torch's."""
    if here.owner.name == "torch":
        return contextlib.nullcontext()
    cuda = _torch().cuda
    device = f"cuda:{here.number}"
    stream = cuda.ExternalStream(here.stream, device) if here.stream else cuda.default_stream(device)
    found: AbstractContextManager[Any] = cuda.stream(stream)
    return found


def tensor_at(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, *, number: int
) -> torch.Tensor:
    """A tensor over memory of a device. Strides in bytes. torch takes an address by the interface that array libraries
    share, which has no bfloat16: those come as integers."""
    torch = _torch()
    kind = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}[dtype]
    what = {"shape": shape, "strides": strides, "typestr": kind, "data": (address, False), "version": 2}
    found = torch.as_tensor(_Memory(what), device=f"cuda:{number}")
    return found.view(torch.bfloat16) if dtype == "bfloat16" else found


class _Memory:
    def __init__(self, interface: dict[str, Any]) -> None:
        self.__cuda_array_interface__ = interface


def _torch() -> Any:
    import torch

    return torch


FAMILY = Family(
    "cudnn",
    unavailable,
    capabilities,
    compile,
    refuses,
    remark,
    compile_backward=compile_backward,
    only_by_name=NOT_PROVEN,
)
