"""The contract of an engine, which runs the kernels of a family, and the choice of one.

An engine is a module in this folder that offers an `Engine` by the name ENGINE. It plans and compiles as it needs: one
runs the work items of a plan, another cuts the arrays into tiles of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from flashtile import rooms
from flashtile.errors import UnavailableError, wrong
from flashtile.kernels import ArrayShapes, BackwardLayout, Family, Keys, Layout, Template
from flashtile.progress import Report
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    import numpy as np

    from flashtile.score.options import Scoring

AUTO_FIRST = ("direct",)


class Run(Protocol):
    """Run one call to its end, or raise. The arrays behind `params` outlive the call."""

    def __call__(self, params: Any, report: Report | None = None) -> None: ...


class Pack(Protocol):
    """Turn the addresses of one call into its opaque parameters; see CompiledKernel.pack."""

    def __call__(
        self, q: int, k: int, v: int, o: int, lse: int, offsets: int, scoring: Scoring | None = None
    ) -> Any: ...


class Native(NamedTuple):
    """A call of native code, for those who make it without Python."""

    template: Callable[[Scoring | None], Template | None]  # of the kernel
    scratch_bytes: int  # of each thread, 64-byte aligned
    shared: bool  # whether it is worth several threads


class Bound(NamedTuple):
    """A forward call made ready. All of it may be called from any thread, many times at once."""

    pack: Pack
    run: Run
    native: Native | None = None  # None where it is more than that
    # The same call on other keys; None where these take another kernel. Without it, every length is bound by itself.
    at: Callable[[Keys], Bound | None] | None = None


class PackBackward(Protocol):
    """Likewise for a backward call; see CompiledBackward.pack."""

    def __call__(
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
    ) -> Any: ...


class BoundBackward(NamedTuple):
    """A backward call made ready; `totals` as CompiledBackward.totals."""

    pack: PackBackward
    run: Run
    totals: Callable[[Any], dict[int, np.ndarray]]
    native: Native | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine, as its module offers it. Each direction is a field of its own, since its operands are."""

    name: str  # the module's
    unavailable: Callable[[], str | None]  # why it cannot run on this machine, None if it can
    bind: Callable[[AttentionSpec, Layout, Family], Bound]  # called once for a call that may be repeated many times
    # None: forward only
    bind_backward: Callable[[AttentionSpec, BackwardLayout, Family, ArrayShapes], BoundBackward] | None = None
    # Rows of a query tile and keys of a key tile, in a direction, where tasks are pairs of them; None: work items.
    tiles: Callable[[AttentionSpec, str], tuple[int, int]] | None = None
    remark: Callable[[], str] = rooms.no_remark  # what `flashtile doctor` says of it where it is available


def engines() -> Iterator[tuple[str, Engine | str]]:
    """Every engine by name, in the order of preference, or why its module cannot be imported."""
    package = sys.modules[__name__]
    for name in rooms.names(package, AUTO_FIRST):
        engine = rooms.load(package, name, "ENGINE", Engine)
        if engine is not None:
            yield name, engine


def pick(requested: str) -> Engine:
    """The engine named `requested`; "auto" is the first that is available.

    Raises: SpecError for an unknown name, UnavailableError if the engine cannot run here.
    """
    known = ["auto"]
    reasons = []
    for name, engine in engines():
        known.append(name)
        if requested not in ("auto", name):
            continue
        reason = engine if isinstance(engine, str) else engine.unavailable()
        if reason is None and not isinstance(engine, str):
            return engine
        reasons.append(f"{name}: {reason}")
    if not reasons:
        raise wrong("engine", repr(requested), "one of " + ", ".join(map(repr, known)))
    raise UnavailableError(f"engine: got {requested!r}, expected an available one; " + "; ".join(reasons))


def survey() -> list[tuple[str, str, bool, str]]:
    """(room, name, available, reason if not, or a remark) of every engine."""
    rows = []
    for name, engine in engines():
        reason = engine if isinstance(engine, str) else engine.unavailable()
        remark = engine.remark() if reason is None and not isinstance(engine, str) else reason
        rows.append(("engine", name, reason is None, remark or ""))
    return rows
