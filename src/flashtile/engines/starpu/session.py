"""What flashtile keeps for one start of StarPU: its codelets, the door's job, and the flows that calls come back to."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from flashtile.engines.starpu import runtime
from flashtile.engines.starpu.codelets import Codelet, name_of
from flashtile.engines.starpu.jobs import Job
from flashtile.engines.starpu.runtime import Runtime

KEPT_FLOWS = 64

T = TypeVar("T")


class Session:
    """Of one `Runtime`; see `current`."""

    def __init__(self, now: Runtime) -> None:
        self.runtime = now
        self.codelets: dict[str, Codelet] = {}
        self.flows: dict[Hashable, Any] = {}  # by what they depend on, the oldest first
        self._door: Job | None = None
        now.stopped.append(self._free)

    def codelet(self, operation: str, dtype: str) -> Codelet:
        """The codelet of an operation, made at first use; it lives until StarPU's shutdown."""
        name = name_of(operation, dtype)
        if name not in self.codelets:
            self.codelets.setdefault(name, Codelet(operation, dtype))
        return self.codelets[name]

    def door_job(self) -> Job:
        """The job of every task that programs submit themselves: what flashtile.starpu.wait waits for.

        Where attention(engine="starpu") has started StarPU, its workers stay awake from now on.
        """
        self.runtime.stay_awake()
        if self._door is None:
            self._door = Job()
        return self._door

    def flow(self, key: Hashable, make: Callable[[], T]) -> T:
        """The flow, or program, of a key: made at first use, kept until KEPT_FLOWS newer ones are."""
        if key not in self.flows:
            if len(self.flows) >= KEPT_FLOWS:
                del self.flows[next(iter(self.flows))]
            self.flows[key] = make()
        found: T = self.flows[key]
        return found

    def _free(self) -> None:
        for one in self.codelets.values():
            one.free()


def current() -> Session:
    """The session of the running StarPU. Raises: UnavailableError as `runtime.current`."""
    return runtime.current().once(Session)


def codelet(operation: str, dtype: str) -> Codelet:
    """The session's codelet of an operation."""
    return current().codelet(operation, dtype)
