"""The contract between the plan, the engines and the kernels, and the choice of a kernel.

A kernel family is a module in this folder with three functions:

    unavailable() -> str | None                      why it cannot run on this machine, None if it can
    capabilities(spec) -> Capabilities               what it does for this dtype and precision, as data
    compile(spec, plan, layout) -> CompiledKernel    cached inside on what it really depends on

It may also have

    refuses(spec) -> str | None    why it does not compute a spec that its capabilities cover, asked last: it may try
    remark() -> str                what `flashtile doctor` says of it where it is available
    backward(spec, inputs, offset, scoring, wanted, order=None) -> Sums
                                   the gradients, see kernels/backward.py; where Capabilities.directions has "backward"
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from flashtile import rooms
from flashtile.errors import UnavailableError, wrong
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    from flashtile.score.options import Scoring

# kernel="auto" takes the first family in this order that can do the call.
FASTEST_FIRST = ("cpu", "vanilla", "reference")

Strides = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a kernel family does for one dtype and precision. The planner and the choice read nothing else."""

    name: str
    dtypes: frozenset[str]
    precisions: frozenset[str]  # honoured as asked; any other is honoured at higher precision
    max_head_size: int | None  # of D and D_v; None: no limit
    query_block: int  # rows it computes together
    tile_q: tuple[int, ...]  # menu, ascending, multiples of query_block
    tile_k: tuple[int, ...]  # menu, ascending
    options: frozenset[str]  # "band", "lse", ...: see AttentionSpec.options
    native: bool  # runs without the GIL
    isa: str = ""  # the instruction set in use, for explain and doctor
    variant: str = ""  # which of the family's kernels computes this spec, for explain
    head_block: int = 1  # query heads of a work item; divides spec.heads
    part_keys: int | None = None  # fewest keys worth a work item of their own; None: keys are never split
    longest_part: int | None = None  # keys over which a work item sums accurately; None: any number
    devices: frozenset[str] = frozenset(("cpu",))  # whose memory it reads: "cpu", "cuda"
    enough_items: int | None = None  # work items that keep all of a device busy; None: as many as threads may need
    directions: frozenset[str] = frozenset(("forward",))  # and "backward"
    at_once: bool = False  # one call computes every work item, on a device's own threads


@dataclass(frozen=True, slots=True)
class Layout:
    """Byte strides of the four arrays along (B, H, S, D); any sign, 0 included. The innermost may be non-unit."""

    q: Strides
    k: Strides
    v: Strides
    o: Strides


class Stage(NamedTuple):
    """Work that follows the items of a plan: the merge of their partial results."""

    items: int
    run: Callable[[Any, int, int, int], int]  # as CompiledKernel.run
    work: int  # operations, by which an engine decides whether sharing pays
    workspace_bytes: int  # of the partial results; pack allocates them, the parameters own them


class CompiledKernel(Protocol):
    """A kernel for one spec, plan and layout. Safe to run from many threads at once, each with its own scratch."""

    scratch_bytes: int  # needed by each thread; the engine gives a 64-byte aligned address
    merge_stage: Stage | None  # to be run when every item of the plan is done, if plan.splits > 1

    def pack(self, q: int, k: int, v: int, o: int, lse: int, offsets: int, scoring: Scoring | None = None) -> Any:
        """Turn addresses into the opaque, immutable parameters of one call.

        lse is the address of a contiguous (B, H, S_q) buffer of the accumulator's dtype, 0 if it is not wanted;
        offsets that of B int64 numbers, 0 where spec.offset is a scalar; scoring has the values of the spec's
        program and sinks.
        """
        ...

    def run(self, params: Any, begin: int, end: int, scratch: int) -> int:
        """Compute work items [begin, end) of the plan. Returns 0, or an error code of the kernel."""
        ...


def families() -> Iterator[tuple[str, ModuleType | str]]:
    """Every kernel family by name, in the order of preference: its module, or why it cannot be imported."""
    package = sys.modules[__name__]
    for name in rooms.names(package, FASTEST_FIRST):
        module = rooms.load(package, name, "unavailable", "capabilities", "compile")
        if module is not None:
            yield name, module


def objection(family: ModuleType | str, spec: AttentionSpec, direction: str = "forward") -> str | None:
    """Why a family cannot do a call, None if it can."""
    if isinstance(family, str):
        return family
    reason: str | None = family.unavailable()
    if reason is not None:
        return reason
    able: Capabilities = family.capabilities(spec)
    if spec.device_kind not in able.devices:
        return f"runs on {', '.join(sorted(able.devices))}, not on {spec.device_kind}"
    if direction not in able.directions:
        return f"has no {direction}"
    if spec.dtype not in able.dtypes:
        return f"computes {', '.join(sorted(able.dtypes))}, not {spec.dtype}"
    largest = max(spec.head_size, spec.value_size)
    if able.max_head_size is not None and largest > able.max_head_size:
        return f"head sizes up to {able.max_head_size}, not {largest}"
    if missing := spec.options - able.options:
        return "does not know " + ", ".join(sorted(missing))
    refusal: str | None = family.refuses(spec) if hasattr(family, "refuses") else None
    return refusal


def pick(spec: AttentionSpec, requested: str, direction: str = "forward") -> ModuleType:
    """The family named `requested`, or for "auto" the first that can do the call. In its place, where a call has no
    heads or head sizes of 0, one that computes it in NumPy: such a call never reaches compiled code on the CPU.

    Raises: SpecError for an unknown name; UnavailableError with each family's reason if none can.
    """
    reasons = []
    known = ["auto"]
    for name, family in families():
        known.append(name)
        if requested not in ("auto", name):
            continue
        reason = objection(family, spec.filled, direction)
        if reason is None and isinstance(family, ModuleType):
            if not spec.empty or spec.device != "cpu":
                return family
            from flashtile.kernels import reference

            return reference
        reasons.append(f"{name}: {reason}")
    if not reasons and requested != "auto":
        raise wrong("kernel", repr(requested), "one of " + ", ".join(map(repr, known)))
    raise UnavailableError(f"kernel: got {requested!r}, expected one that can do this call; " + "; ".join(reasons))


def survey() -> list[tuple[str, str, bool, str]]:
    """(room, name, available, reason if not, or a remark) of every kernel family."""
    rows = []
    for name, family in families():
        reason = family if isinstance(family, str) else family.unavailable()
        remark = family.remark() if reason is None and hasattr(family, "remark") else ""
        rows.append(("kernel", name, reason is None, reason or remark))
    return rows
