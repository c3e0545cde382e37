"""Arrays of the host that kernels read at many calls, coverage tables above all, kept on the device between them.

They are known by their contents, so values that have changed are other arrays. Each is kept for the stream that copied
it: what is launched there later finds the copy done, and memory that is given up is not used again before the kernels
that read it have run. Calls that a CUDA graph captures take what is there, and from then on it stays, since the graph
reads it at every replay; what is not there is copied within the graph, and not kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from flashtile.current import Here
from flashtile.kernels.triton.device import Pointer

MOST_BYTES = 32 << 20  # of all that is kept, but for what graphs read
MOST_ARRAY_BYTES = 1 << 20  # of one: larger ones are copied at every call, since comparing takes time as well

_lock = threading.Lock()
_arrays: OrderedDict[tuple[Any, ...], Pointer] = OrderedDict()  # those that were not read for longest first
_of_graphs: dict[tuple[Any, ...], Pointer] = {}
_bytes = 0


def find(here: Here, array: np.ndarray, element: str) -> Pointer:
    """A copy of a row-major array for launches on the stream of the call in progress."""
    if not 0 < array.nbytes <= MOST_ARRAY_BYTES:
        return _copy(here, array, element)
    key = here.owner.name, here.number, here.stream, element, array.tobytes()
    captured = here.owner.capturing()
    with _lock:
        found = _arrays.get(key)
        if found is not None:
            _arrays.move_to_end(key)
            if captured:
                _of_graphs[key] = found
            return found
    found = _copy(here, array, element)
    if not captured:
        _keep(key, found)
    return found


def forget() -> None:
    """Keep nothing but what graphs read."""
    global _bytes
    with _lock:
        _arrays.clear()
        _bytes = 0


def _copy(here: Here, array: np.ndarray, element: str) -> Pointer:
    memory = here.upload(array, "an array of the host") if array.size else here.empty((1,), "uint8", "workspace")
    return Pointer(here.owner.address(memory), element, memory)


def _keep(key: tuple[Any, ...], found: Pointer) -> None:
    global _bytes
    with _lock:
        if key not in _arrays:  # another thread may have been faster
            _bytes += len(key[-1])
        _arrays[key] = found
        while _bytes > MOST_BYTES:
            old, _ = _arrays.popitem(last=False)
            _bytes -= len(old[-1])
