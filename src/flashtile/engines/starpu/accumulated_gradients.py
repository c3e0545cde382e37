"""The gradients of one key tile and a query tile, all heads in one task: NNTile's calling convention (nntile.py)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flashtile.dtypes import DTYPES
from flashtile.engines.starpu import cuda_gradients
from flashtile.engines.starpu.coverage import BandCoverage
from flashtile.engines.starpu.footprint import footprints
from flashtile.engines.starpu.jobs import TASK
from flashtile.engines.starpu.launches import ANCHOR, HEADS, KEYS, KV_HEADS, ROWS, Launches
from flashtile.engines.starpu.programs import Program
from flashtile.engines.starpu.session import Session, current
from flashtile.engines.starpu.tiles import DROP_LATER, TiledTensor
from flashtile.kernels import tile_kernels
from flashtile.score.options import masked_by_tile
from flashtile.spec import AttentionSpec

# Handles in the order of a task's buffers, and what each sets in the parameter block. The mask comes last because it
# may be missing.
DELTA = {"dA": "do", "A": "o", "logsumexp": "lse", "delta": "delta"}
BACKWARD = {"K": "k", "Q": "q", "logsumexp": "lse", "V": "v", "dA": "do", "delta": "delta"}
BACKWARD |= {"dK": "dk", "dQ": "dq", "dV": "dv", "mask": "mask"}
GRADIENTS = ("dK", "dQ", "dV")


def submit(
    spec: AttentionSpec,
    offset: int,
    mask: str | None,
    handles: dict[str, int],
    narrow: tuple[str, ...],
    firsts: tuple[int, int],
) -> int:
    """Submit the tasks on handles by NNTile's names; offset anchors the band; narrow: the gradients that are rounded to
    16 bits once their sums are there. Returns the number of tasks. Raises: SpecError."""
    session = current()
    accumulator, job = DTYPES[DTYPES[spec.dtype].accumulator], session.door_job()
    delta = TiledTensor((1, 1, spec.heads * spec.q_len), accumulator, spec.heads * spec.q_len)
    sums: dict[str, TiledTensor] = {}
    programs = _programs(session, spec, mask)
    try:
        for name in narrow:
            length, size = (spec.q_len if name == "dQ" else spec.kv_len), _columns(spec, name)
            memory = np.zeros(spec.heads * length * size, accumulator.numpy)
            job.hold(memory)  # which outlives the tensor
            at, step = memory.ctypes.data, accumulator.itemsize
            sums[name] = TiledTensor((1, 1, memory.size), accumulator, memory.size, address=at, strides=(step,) * 3)
        given = handles | {"delta": delta[0, 0, 0].address} | {n: x[0, 0, 0].address for n, x in sums.items()}
        task = np.zeros(1, TASK)
        task["tile"][0, :2] = firsts
        task["end"] = spec.heads
        sizes = {ROWS: spec.q_len, KEYS: spec.kv_len, ANCHOR: offset, HEADS: spec.heads, KV_HEADS: spec.kv_heads}
        for place, number in sizes.items():
            task["sizes"][0, place] = number
        task["footprint"] = footprints(programs["delta"].kernel.identity, np.array([[spec.heads, spec.q_len]]))
        _submit(session, "accumulate_delta", spec, programs["delta"], DELTA, given, ("delta",), task)
        task["values"][0, 0] = offset
        _add_cost(task, spec, offset, programs["backward"])
        _submit(session, "accumulate_backward", spec, programs["backward"], BACKWARD, given, GRADIENTS, task)
        for name, tensor in sums.items():
            program = programs[f"add_{_columns(spec, name)}"]
            rows = spec.heads * (spec.q_len if name == "dQ" else spec.kv_len)
            task["end"], task["flops"], task["sizes"] = rows, 0, 0
            task["sizes"][0, ROWS] = rows
            task["footprint"] = footprints(program.kernel.identity, np.array([[rows]]))
            pair = {"sums": tensor[0, 0, 0].address, "gradient": handles[name]}
            _submit(session, "accumulate_add", spec, program, dict.fromkeys(pair, ""), pair, ("gradient",), task)
    finally:
        for tensor in (delta, *sums.values()):
            tensor.unregister(DROP_LATER)
    return 2 + len(sums)


def _columns(spec: AttentionSpec, gradient: str) -> int:
    return spec.value_size if gradient == "dV" else spec.head_size


def _add_cost(task: np.ndarray, spec: AttentionSpec, offset: int, program: Program) -> None:
    zero, anchored = np.zeros(1, np.int64), replace(spec, offset=offset)
    pairs, cases = BandCoverage(anchored, spec.q_len, spec.kv_len, np.array([offset])).amount(zero, zero, zero, zero)
    task["flops"] = 2.0 * (3 * spec.head_size + 2 * spec.value_size) * spec.heads * pairs
    task["footprint"] = footprints(f"{program.kernel.identity} {spec.heads}", cases)


def _submit(
    session: Session,
    operation: str,
    spec: AttentionSpec,
    program: Program,
    words: dict[str, str],
    given: dict[str, int],
    written: tuple[str, ...],
    task: np.ndarray,
) -> None:
    """One task; of what it writes, delta anew."""
    now, names = session.runtime, [name for name in words if name in given]
    modes = ["R" if name not in written else "W" if name == "delta" else "RW" for name in names]
    handles = np.array([[given[name] for name in names]], np.uint64)
    numbers = np.array([[now.constant(mode) for mode in modes]])
    program.submit(session.door_job(), session.codelet(operation, spec.dtype), handles, numbers, task.copy())


def _programs(session: Session, spec: AttentionSpec, mask: str | None) -> dict[str, Program]:
    """Kept for the next call with tiles of the same sizes."""

    def make() -> dict[str, Program]:
        kernels = tile_kernels().differentiating(spec, mask)
        words = {"delta": list(DELTA.values()), "backward": list(BACKWARD.values())[: None if mask else -1]}
        made, now = {}, session.runtime
        for name, kernel in kernels.items():
            bound = words.get(name, ["parts", "dq"])
            at = {word: n for n, word in enumerate(bound)}
            bindings = tuple((n, word, None) for word, n in at.items())
            gpu: Launches | str
            if name == "delta":
                gpu = cuda_gradients.delta(now, spec, at, spec.heads, whole=True)
            elif name == "backward":
                masked, scoring = masked_by_tile(spec, mask) if mask else (spec, None)
                sizes = spec.heads, spec.q_len, spec.kv_len
                gpu = cuda_gradients.backward(now, masked, at, *sizes, whole=True, scoring=scoring)
            else:
                gpu = cuda_gradients.add(now, spec.dtype, int(name.removeprefix("add_")))
            made[name] = Program(now, kernel, bindings, ("offset",) if name == "backward" else (), cuda=gpu)
        return made

    return session.flow(("accumulated gradients", spec, mask), make)
