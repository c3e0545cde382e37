"""What of torch.cuda a dry run stands in for, so that the same lines run on Triton's interpreter: streams, which order
nothing since everything waits there, events, by the host's clock, and graphs, which hold back the launches of a capture
and make them at a replay.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock


class Stream:
    """A stream whose work is done when it is put there."""

    def synchronize(self) -> None:
        pass


class Event:
    """A moment in a stream, by the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.timing, self.at = enable_timing, 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        assert self.timing and end.timing
        return 1e3 * (end.at - self.at)


class Graph:
    """The launches of a capture, and the memory that they use."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []
        self.memory: list[Any] = []

    def replay(self) -> None:
        for launch in self.launches:
            launch()


@contextlib.contextmanager
def capture(graph: Graph) -> Iterator[None]:
    """Within it, launches go into the graph, and nothing runs."""
    from flashtile.kernels.triton.interpreter import Interpreter

    empty, launch = Interpreter.empty, Interpreter.launch

    def kept(device: Interpreter, count: int, element: str) -> Any:
        graph.memory.append(found := empty(device, count, element))
        return found

    def recorded(device: Interpreter, *arguments: Any) -> None:
        graph.launches.append(functools.partial(launch, device, *arguments))

    with mock.patch.object(Interpreter, "empty", kept), mock.patch.object(Interpreter, "launch", recorded):
        yield


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Within it, these names of torch.cuda are stand-ins."""
    import torch

    names: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "stream": contextlib.nullcontext,
        "synchronize": lambda: None,
        "set_sync_debug_mode": lambda mode: None,
        "_sleep": lambda cycles: None,
        "CUDAGraph": Graph,
        "graph": capture,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in names.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))  # one that is not there is an error
        yield
