"""What changes scores, as launches on GPUs take it: captured numbers in the block, captured arrays as handles of tasks.

An array lies in the memory of the host. StarPU brings it to the device whole, once, as any handle that is only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flashtile.arrays import address_of
from flashtile.engines.starpu.launches import FIRSTS, KEYS, ROWS, Source, Value
from flashtile.kernels.triton.host import bits
from flashtile.score.capture import ArrayCapture, ScalarCapture

if TYPE_CHECKING:
    from flashtile.score.options import Scoring
    from flashtile.spec import AttentionSpec

HANDLES = 16  # FT_HANDLES of launch.h


class Captured(NamedTuple):
    """Arguments of a launch by name, and the arrays that are its task's further handles."""

    values: dict[str, Value]
    arrays: tuple[np.ndarray, ...]


def captured(
    spec: AttentionSpec, scoring: Scoring | None, first: int, itself: bool = False, more: int = 0
) -> Captured | str:
    """A program's captured values, its arrays as handles from number `first` on, and after them so many more; or why a
    GPU cannot have them.

    itself: the array is a tile as the others are, of rows and keys without gaps, and a handle already.
    """
    values: dict[str, Value] = {f"origin[{n}]": Source("SIZE", place) for n, place in enumerate(FIRSTS)}
    values["origin[4]"] = spec.heads
    arrays: list[np.ndarray] = []
    flat: list[Value] = []
    captures: Sequence[ScalarCapture | ArrayCapture] = ()
    if scoring is not None and scoring.program is not None:
        captures = scoring.program.captures
    for one in captures:
        if isinstance(one, ScalarCapture):
            flat.append(int(one.value) if one.type == "int" else bits(one.value))
            continue
        if one.place is not None:
            return "a captured array lies on a GPU already"
        if itself:
            flat += [Source("ADDRESS", first), Source("SIZE", ROWS), Source("SIZE", KEYS), Source("SIZE", KEYS), 1]
            continue
        array, strides = packed(one.array)
        flat.append(Source("ADDRESS", first + len(arrays)))
        flat += [n for axis in zip(one.array.shape, strides, strict=True) for n in axis]
        arrays.append(array)
    if first + len(arrays) + more > HANDLES:
        return f"{len(arrays)} captured arrays are more than a task has handles for"
    values |= {f"captures[{n}]": value for n, value in enumerate(flat)}
    return Captured(values, tuple(arrays))


def sinks_of(scoring: Scoring | None) -> np.ndarray | str:
    """Sinks (B, H) in accumulators, or why a GPU cannot have them."""
    if scoring is None or not isinstance(scoring.sinks, np.ndarray):
        return "sinks lie on a GPU already"
    return np.ascontiguousarray(scoring.sinks)


def packed(array: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """The elements that there are, without gaps, and the strides in elements by which the array has its own shape: 0
    along an axis that repeats one."""
    once = tuple(
        slice(0, 1) if step == 0 and n > 1 else slice(None) for n, step in zip(array.shape, array.strides, strict=True)
    )
    found = np.ascontiguousarray(array[once]).reshape(array[once].shape)
    strides = tuple(
        0 if there.stop == 1 else step // array.itemsize for there, step in zip(once, found.strides, strict=True)
    )
    return found, strides


def size_of(array: np.ndarray) -> tuple[int, int]:
    """Address and bytes; of an array without elements, of one that nobody reads."""
    return (address_of(array), array.nbytes) if array.nbytes else (address_of(_NOTHING), _NOTHING.nbytes)


_NOTHING = np.zeros(1)
