"""Where the kernel in Gluon (gluon_forward.py) stands: it is off.

It compiles for Hopper without a spill, and that is all that a machine without a GPU can tell: nothing of Gluon runs in
Triton's interpreter. So no call takes it. `FLASHTILE_GLUON=1` lets `attend` launch it, which the run on hardware
(`python -m benchmarks.gpu`) does, to hold it against the reference. A hidden key that is not finite is not contained:
for that it would have to share its tiles with the second launch of forward.py.
"""

from __future__ import annotations

import os
from typing import Any

from flashtile.errors import UnavailableError
from flashtile.kernels import Layout
from flashtile.kernels.triton import installed_version, release
from flashtile.kernels.triton.device import Device
from flashtile.kernels.triton.host import Elements, bits
from flashtile.kernels.triton.specialisation import ELEMENTS, Specialisation
from flashtile.spec import AttentionSpec

VARIABLE = "FLASHTILE_GLUON"
KERNEL = "gluon_forward"
ROWS = 64  # of a group of warps; a program has two groups
KEYS = 128
STAGES = {64: 3, 128: 2}  # tiles of keys and of values in shared memory, by head size
NEEDS = (3, 9)  # the first Triton whose Gluon has all that the kernel is written in
_POINTERS, _TENSORS = ("q", "k", "v", "o"), "qkvo"


def refusal(spec: AttentionSpec, arch: str) -> str | None:
    """Why the kernel does not compute a call on an architecture; None if it does, as far as is known."""
    band = spec.band
    if arch != "sm_90":
        return f"is for sm_90, not for {arch}"
    if (release() or NEEDS) < NEEDS:
        return f"wants Triton {'.'.join(map(str, NEEDS))}, this is {installed_version()}"
    if spec.dtype not in ("bfloat16", "float16") or spec.head_size != spec.value_size or spec.head_size not in STAGES:
        return f"takes 16 bits and head sizes 64 and 128, not {spec.dtype} and {spec.head_size}, {spec.value_size}"
    if spec.program is not None or spec.sinks or spec.dropout or spec.offset is None:
        return "takes no scores that change, no sinks, no dropout, and one alignment for all batches"
    if band is not None and (band.left is not None or band.right is None):
        return "takes no window"
    if os.environ.get(VARIABLE) != "1":
        return f"has never run on a GPU; {VARIABLE}=1 tries it"
    return None


def specialised(spec: AttentionSpec) -> Specialisation:
    """What the kernel of a call is compiled for."""
    element, strides = ELEMENTS[spec.dtype], tuple(f"{t}_{a}" for t in _TENSORS for a in "bhs")
    sizes = ("heads", "group", "q_len", "kv_len", "query_tiles", "right")
    signature = {
        **dict.fromkeys(_POINTERS, f"*{element}"),
        "lse": "*fp32",
        **dict.fromkeys(strides, "i64"),
        **dict.fromkeys(sizes, "i32"),
        "scale": "i64",
    }
    constants = {
        "M": ROWS,
        "N": KEYS,
        "D": spec.head_size,
        "STAGES": STAGES[spec.head_size],
        "CAUSAL": spec.band is not None,
    }
    # Four warps of the first group; Triton adds those of the others.
    return Specialisation(KERNEL, tuple(signature.items()), tuple(constants.items()), (*_POINTERS, *strides), 4, 1)


def attend(
    spec: AttentionSpec, layout: Layout, q: int, k: int, v: int, o: int, lse: int, device: Device, arch: str
) -> None:
    """Launch the kernel on a device: addresses of q, k, v, o and lse there, lse (B, H, S_q) without gaps.

    Raises: UnavailableError for what `refusal` refuses, and for arrays that the memory unit cannot cut tiles out of.
    """
    elements = Elements.of(layout, spec)
    memory, reason = elements.memory((q, k, v, o)), refusal(spec, arch)
    if reason is None and not (memory.contiguous and memory.aligned and elements.can_be_described()):
        reason = "takes arrays aligned to 16 bytes, strides of 16 elements, rows without gaps"
    if reason is not None:
        raise UnavailableError(f"the kernel in Gluon {reason}")
    right = 0 if spec.band is None else (spec.band.right or 0) + (spec.offset or 0)
    tiles = -(-spec.q_len // (2 * ROWS))
    values: dict[str, Any] = {
        **{"q": q, "k": k, "v": v, "o": o, "lse": lse},
        **elements.values(_TENSORS),
        **{"heads": spec.heads, "group": spec.group, "q_len": spec.q_len, "kv_len": spec.kv_len},
        **{"query_tiles": tiles, "right": max(-(2**30), min(right, 2**30)), "scale": bits(spec.scale)},
    }
    if grid := spec.batch * spec.heads * tiles:
        device.bind(specialised(spec), {})(grid, values)
