"""One key tile added to the state of a query tile, all heads in one task: NNTile's calling convention (nntile.py)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flashtile.engines.starpu import cuda
from flashtile.engines.starpu.coverage import BandCoverage
from flashtile.engines.starpu.flow import COMMUTE, ORDERED
from flashtile.engines.starpu.footprint import footprints
from flashtile.engines.starpu.jobs import TASK
from flashtile.engines.starpu.launches import ANCHOR, HEADS, KEYS, ROWS
from flashtile.engines.starpu.programs import Program
from flashtile.engines.starpu.session import Session, current
from flashtile.errors import wrong
from flashtile.kernels import tile_kernels
from flashtile.spec import AttentionSpec

# NNTile's arguments, and what each sets in the parameter block. The mask comes last because it may be missing.
ARGUMENTS = ("K", "Q", "logsumexp", "V", "A", "mask")
WORDS = ("k", "q", "lse", "v", "o", "mask")


def submit(
    spec: AttentionSpec,
    offset: int,
    mask: str | None,
    handles: dict[str, int],
    firsts: tuple[int, int],
    accumulate: str,
) -> int:
    """Submit the task on handles by the names of ARGUMENTS; offset anchors the band. Returns 1. Raises: SpecError."""
    if accumulate not in (ORDERED, COMMUTE):
        raise wrong("accumulate", repr(accumulate), f"{ORDERED!r} or {COMMUTE!r}")
    session = current()
    now = session.runtime
    program = _program(session, spec, mask)
    names = [name for name in ARGUMENTS if name in handles]
    r, rw, commute = (now.constant(name) for name in ("R", "RW", "COMMUTE"))
    state = rw | commute if accumulate == COMMUTE else rw
    modes = np.array([[state if name in ("A", "logsumexp") else r for name in names]])
    task = np.zeros(1, TASK)
    task["end"] = program.kernel.items
    task["values"][0, 0] = offset
    sizes = {ROWS: spec.q_len, KEYS: spec.kv_len, ANCHOR: offset, HEADS: spec.heads}
    for place, number in sizes.items():
        task["sizes"][0, place] = number
    task["tile"][0, :2] = firsts
    zero = np.zeros(1, np.int64)
    anchored = replace(spec, offset=offset)
    pairs, cases = BandCoverage(anchored, spec.q_len, spec.kv_len, np.array([offset])).amount(zero, zero, zero, zero)
    task["flops"] = 2.0 * (spec.head_size + spec.value_size) * spec.heads * pairs
    task["footprint"] = footprints(f"{program.kernel.identity} {spec.heads}", cases)
    program.submit(session.door_job(), session.codelet("accumulate", spec.dtype), _row(names, handles), modes, task)
    return 1


def _row(names: list[str], handles: dict[str, int]) -> np.ndarray:
    return np.array([[handles[name] for name in names]], np.uint64)


def _program(session: Session, spec: AttentionSpec, mask: str | None) -> Program:
    """Kept for the next call with tiles of the same sizes."""

    def make() -> Program:
        count = len(WORDS) - (mask is None)
        bindings = tuple((n, word, None) for n, word in enumerate(WORDS[:count]))
        gpu = cuda.accumulate(session.runtime, spec, mask)
        return Program(session.runtime, tile_kernels().accumulating(spec, mask), bindings, ("offset",), cuda=gpu)

    return session.flow(("accumulate", spec, mask), make)
