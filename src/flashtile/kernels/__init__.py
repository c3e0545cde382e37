"""The contract between the plan, the engines and the kernels, and the choice of a kernel.

A kernel family is a module in this folder that offers a `Family` by the name FAMILY. What it offers to engines that
hold the arrays as tiles is a second contract, in tiles.py.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from flashtile import rooms
from flashtile.errors import UnavailableError, wrong
from flashtile.kernels.gradients import Backward
from flashtile.kernels.tiles import TileKernels
from flashtile.plan import Capabilities, Plan
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    import numpy as np

    from flashtile.score.options import Scoring

__all__ = [
    "ArrayShapes",
    "BackwardLayout",
    "Capabilities",
    "CompiledBackward",
    "CompiledKernel",
    "Family",
    "Inside",
    "Keys",
    "Layout",
    "Runnable",
    "Stage",
    "Step",
    "Strides",
    "Template",
    "complete",
    "families",
    "objection",
    "pick",
    "reserved",
    "stacked",
    "survey",
    "tile_kernels",
]

# kernel="auto" takes the first family in this order that can do the call; the last one can do any.
FASTEST_FIRST = ("cpu", "vanilla", "reference")

Strides = tuple[int, int, int, int]
# Captured arrays whose gradients are wanted: the numbers of their slots, ascending, and their shapes.
ArrayShapes: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Byte strides of the four arrays along (B, H, S, D); any sign, 0 included. The innermost may be non-unit."""

    q: Strides
    k: Strides
    v: Strides
    o: Strides

    def stacked(self, group: int) -> Layout:
        """That of a call whose heads, `group` to a key/value head, become rows (AttentionSpec.stacked)."""
        q, o = ((b, h * group, h, d) for b, h, _, d in (self.q, self.o))
        return Layout(q, self.k, self.v, o)


class Keys(NamedTuple):
    """In what a decoder's next call differs from its last: how many keys there are, and where row 0 stands among them
    (as in AttentionSpec), and the byte strides of K and V."""

    kv_len: int
    offset: int | None
    k: Strides
    v: Strides


@dataclass(frozen=True, slots=True)
class NativeRun:
    """`Runnable.run` in native code, on one of the blocks that a call's parameters are made of."""

    function: Any  # of ctypes
    block: int

    def __call__(self, params: Any, begin: int, end: int, scratch: int) -> int:
        status: int = self.function(params[self.block], begin, end, scratch)
        return status


class Stage(NamedTuple):
    """Work that follows the items of a plan: the merge of their partial results."""

    items: int
    run: Callable[[Any, int, int, int], int]  # as CompiledKernel.run
    work: int  # operations, by which an engine decides whether sharing pays
    workspace_bytes: int  # of the partial results; pack allocates them, the parameters own them


class Inside(NamedTuple):
    """A place within a template's own memory, in bytes."""

    offset: int


class Step(NamedTuple):
    """One native call, of all of its items: function(parameters, 0, items, scratch)."""

    function: Any  # of ctypes
    items: int
    offset: int = 0  # of its parameters within a template's memory


class Area(NamedTuple):
    """Rows of memory: of an operand by its name, or inside of a template's memory; offset, size and stride in bytes."""

    of: str | Inside
    offset: int
    rows: int
    size: int
    stride: int


class Template(NamedTuple):
    """The parameters of a call whose arrays come later, for those who make it without Python: a copy of `memory`, with
    so many bytes of `room` behind it, has addresses stored in its places; then the steps are called, one after the
    other, each on its work items as `Runnable.run` is, by as many threads as like.

    places   (offset of a word, what it points to): an operand by its name, as in `pack`, the array of a score program's
             slot by its number, or a place inside the memory
    kept     what other words point to, which must live as long as the template is used
    kernel   which of the steps is the kernel; one before it finds what that reads
    fresh    of each work item of the kernel what it adds to, which must hold zeros when it begins; no other one adds to
             it in that step
    blind    whether it computes tiles that a look at arrays may skip: those that a mask hides by their elements
    """

    memory: bytes
    places: tuple[tuple[int, str | int | Inside], ...]
    steps: tuple[Step, ...]
    kept: object
    room: int = 0
    kernel: int = 0
    fresh: tuple[tuple[Area, ...], ...] = ()
    blind: bool = False


@dataclass(frozen=True, slots=True)
class BackwardLayout(Layout):
    """Byte strides of the arrays of a backward call: those of the forward one, do, and the gradients."""

    do: Strides
    dq: Strides
    dk: Strides
    dv: Strides


class Runnable(Protocol):
    """Work items that can be run from many threads at once, each with its own scratch."""

    @property
    def scratch_bytes(self) -> int:
        """Needed by each thread; the engine gives a 64-byte aligned address."""
        ...

    @property
    def merge_stage(self) -> Stage | None:
        """To be run when every item of the plan is done, if plan.splits > 1."""
        ...

    def run(self, params: Any, begin: int, end: int, scratch: int) -> int:
        """Compute work items [begin, end) of the plan. Returns 0, or an error code of the kernel."""
        ...

    # And maybe `template(scoring)`: a Template of a call, None if it is more than steps of native code.
    # The arrays that scoring captured may be unread (score.capture.Unread).


class CompiledKernel(Runnable, Protocol):
    """A kernel for one spec, plan and layout."""

    def pack(self, q: int, k: int, v: int, o: int, lse: int, offsets: int, scoring: Scoring | None = None) -> Any:
        """Turn addresses into the opaque, immutable parameters of one call.

        lse is the address of a contiguous (B, H, S_q) buffer of the accumulator's dtype, 0 if it is not wanted;
        offsets that of B int64 numbers, 0 where spec.offset is a scalar; scoring has the values of the spec's
        program and sinks.
        """
        ...


class CompiledBackward(Runnable, Protocol):
    """A backward kernel for one spec and layout, and how it cuts a call into work items."""

    @property
    def plan(self) -> Plan: ...

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
    ) -> Any:
        """Turn addresses into the opaque, immutable parameters of one call.

        o and lse are read, and so are do and dlse, like o and lse; a dlse of 0 is one of zeros. The gradients are added
        to what dq, dk and dv hold; each of them may be 0: not wanted, and then not computed. dsinks is a contiguous
        (B, H) array of zeros of the accumulator's dtype, or 0.
        """
        ...

    def totals(self, params: Any) -> dict[int, np.ndarray]:
        """When the call is done: the gradients of the captured arrays that it was compiled for, by slot, in the
        accumulator's dtype."""
        ...


def _never(spec: AttentionSpec) -> None:
    """Refuse nothing."""


@dataclass(frozen=True, slots=True)
class Family:
    """A kernel family, as its module offers it."""

    name: str  # the module's
    # Why it cannot run on this machine, None if it can. Raises: UnavailableError for a wrong setting of the user's.
    unavailable: Callable[[], str | None]
    capabilities: Callable[[AttentionSpec], Capabilities]  # what it does for this dtype and precision, as data
    compile: Callable[[AttentionSpec, Plan, Layout], CompiledKernel]  # cached inside on what it really depends on
    refuses: Callable[[AttentionSpec], str | None] = _never  # a spec that it is capable of, and why; asked last
    remark: Callable[[], str] = rooms.no_remark  # what `flashtile doctor` says of it where it is available
    # Where Capabilities.directions has "backward", one of these: of NumPy arrays, or as work items for an engine.
    backward: Backward | None = None
    compile_backward: Callable[[AttentionSpec, BackwardLayout, ArrayShapes], CompiledBackward] | None = None
    tiles: Callable[[], TileKernels] | None = None  # for engines that hold tiles; imported when they are needed
    # A kernel that it compiled, for other keys, as many parts of them, and so many keys a part (0: all); None where
    # these take another kernel. Without it, each is compiled by itself.
    at: Callable[[Any, Keys, int], CompiledKernel | None] | None = None
    only_by_name: str | None = None  # why "auto" does not take it; None: it does


def families() -> Iterator[tuple[str, Family | str]]:
    """Every kernel family by name, in the order of preference, or why its module cannot be imported."""
    package = sys.modules[__name__]
    for name in rooms.names(package, FASTEST_FIRST):
        family = rooms.load(package, name, "FAMILY", Family)
        if family is not None:
            yield name, family


def objection(family: Family | str, spec: AttentionSpec, direction: str = "forward") -> str | None:
    """Why a family cannot do a call, None if it can."""
    if isinstance(family, str):
        return family
    reason = family.unavailable()
    if reason is not None:
        return reason
    able = family.capabilities(spec)
    if spec.device_kind not in able.devices:
        return f"runs on {', '.join(sorted(able.devices))}, not on {spec.device_kind}"
    if direction not in able.directions:
        return f"has no {direction}"
    if spec.dtype not in able.dtypes:
        return f"computes {', '.join(sorted(able.dtypes))}, not {spec.dtype}"
    largest = max(spec.head_size, spec.value_size)
    if able.max_head_size is not None and largest > able.max_head_size:
        return f"head sizes up to {able.max_head_size}, not {largest}"
    known = able.options if direction == "forward" or able.backward_options is None else able.backward_options
    if missing := spec.options - known:
        return "does not know " + ", ".join(sorted(missing))
    return family.refuses(spec)


def pick(spec: AttentionSpec, requested: str, direction: str = "forward") -> Family:
    """The family named `requested`, or for "auto" the first that can do the call. In its place, where a call has no
    heads or head sizes of 0, the complete one, in NumPy: such a call never reaches compiled code on the CPU.

    Raises: SpecError for an unknown name; UnavailableError with each family's reason if none can.
    """
    reasons = []
    known = ["auto"]
    for name, family in families():
        known.append(name)
        if requested not in ("auto", name):
            continue
        reason = objection(family, spec.filled, direction)
        if reason is None and requested == "auto":
            reason = reserved(family)
        if reason is None and not isinstance(family, str):
            return complete() if spec.empty and spec.device == "cpu" else family
        reasons.append(f"{name}: {reason}")
    if not reasons and requested != "auto":
        raise wrong("kernel", repr(requested), "one of " + ", ".join(map(repr, known)))
    why = "; ".join(reasons) + ("" if requested == "auto" else _instead(spec, direction))
    raise UnavailableError(f"kernel: got {requested!r}, expected one that can do this call; {why}")


def _instead(spec: AttentionSpec, direction: str) -> str:
    """Which families can do a call that the one asked for cannot."""
    able = [repr(name) for name, family in families() if objection(family, spec.filled, direction) is None]
    return f"; {' and '.join(able)} can" if able else ""


def stacked(spec: AttentionSpec, layout: Layout, family: Family) -> tuple[AttentionSpec, Layout]:
    """The call that an engine has a family compute in place of this one, of the same arrays: with heads as rows, where
    the family is faster so."""
    return (spec.stacked, layout.stacked(spec.group)) if family.capabilities(spec).stacked else (spec, layout)


def reserved(family: Family | str) -> str | None:
    """Why "auto" does not take a family that can do a call; None if it does."""
    return None if isinstance(family, str) else family.only_by_name


@functools.cache
def tile_kernels() -> TileKernels:
    """The kernels for engines that hold tiles, of the first family that has them.

    Raises: UnavailableError with each family's reason if none has.
    """
    reasons = []
    for name, family in families():
        reason = family if isinstance(family, str) else family.unavailable()
        if reason is None and not isinstance(family, str) and family.tiles is not None:
            return family.tiles()
        reasons.append(f"{name}: {reason or 'has no kernels for tiles'}")
    raise UnavailableError("kernel: got an engine that holds tiles, expected a family for it; " + "; ".join(reasons))


def complete() -> Family:
    """The family that computes whatever a spec says."""
    family = dict(families())[FASTEST_FIRST[-1]]
    assert not isinstance(family, str)
    return family


def survey() -> list[tuple[str, str, bool, str]]:
    """(room, name, available, reason if not, or a remark) of every kernel family."""
    rows = []
    for name, family in families():
        try:
            reason = family if isinstance(family, str) else family.unavailable()
        except UnavailableError as wrong_setting:  # which calls raise; a survey tells of the others, too
            reason = str(wrong_setting)
        remark = family.remark() if reason is None and not isinstance(family, str) else reason
        rows.append(("kernel", name, reason is None, remark or ""))
    return rows
