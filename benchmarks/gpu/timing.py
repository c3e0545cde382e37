"""How fast: flashtile beside torch's backends, flash-attn and FlexAttention, each checked on sampled rows before."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import check, report
from ..cases import Case
from ..data import make_inputs, sampled
from ..driver import CaseResult, Measurement
from . import peers as known
from . import stand_ins
from .steps import out_of_time

TOKENS = 16384  # in a batch, whatever its length
WIDTH = 2048  # heads times head size
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_SIZES = (64, 128)
FIRST_LENGTHS = (4096, 16384)
DECODE = (8192, 65536)  # keys
GRADIENTS = (1024, 4096, 8192)  # of longer ones the reference on the host takes a minute
MILLISECONDS = 200  # of repetitions, for each peer and case
MOST_CALLS = 1000
LARGEST_CACHE = 256 << 20  # bytes, more than any device's


def cases(dtypes: Iterable[str], dry: bool) -> list[Case]:
    """Head sizes, causal and not, lengths at a constant number of tokens; one tiny case of each kind in a dry run.

    In the order of `_later`. The first dtype also decodes, takes what FlexAttention is for: a window, documents,
    softcap; and is differentiated.
    """
    dtypes = tuple(dtypes)
    found = []
    for dtype in dtypes:
        for size in reversed(HEAD_SIZES):
            for causal in (False, True):
                if not dry or causal == (size == HEAD_SIZES[0]):
                    found += [_square(dtype, size, causal, length, dry) for length in ((24,) if dry else LENGTHS)]
    first, size = dtypes[0], HEAD_SIZES[0]
    batch, heads, length, window = (1, 2, 40, 8) if dry else (2, WIDTH // size, 8192, 512)
    common = (first, batch, heads, heads, length, length, size)
    found.append(Case(f"{first}-window", *common, causal=True, window=window))
    found += [Case(f"{first}-{option}", *common, option=option) for option in ("documents", "softcap")]
    for keys in (40,) if dry else DECODE:
        batch, heads, shared = (1, 2, 1) if dry else (8, 32, 8)
        found.append(Case(f"{first}-decode-{keys}", first, batch, heads, shared, 1, keys, HEAD_SIZES[-1]))
    for size in HEAD_SIZES[:1] if dry else reversed(HEAD_SIZES):
        for causal, lengths in ((True, GRADIENTS), (False, GRADIENTS[1:2])):
            some = lengths if not dry else (24,) * causal
            found += [_square(first, size, causal, length, dry, "backward") for length in some]
    return sorted(found, key=lambda case: _later(case, first))


def _later(case: Case, first: str) -> int:
    """When a case has its turn, since time may end before all had: what the others follow from comes first."""
    usual = case.queries in FIRST_LENGTHS and case.head_size == HEAD_SIZES[-1]
    if case.reads or case.dtype == first and usual and not (case.option or case.window):
        return 0
    return 1 if case.option or case.window or case.direction == "backward" else 2 if case.dtype == first else 3


def _square(dtype: str, size: int, causal: bool, length: int, dry: bool, direction: str = "forward") -> Case:
    """As many rows as keys; heads and batches so that tokens and width are the same at every length and head size."""
    batch, heads = (1, 2) if dry else (TOKENS // length, WIDTH // size)
    name = f"{dtype}-d{size}{'-causal' * causal}-{length}" + "-backward" * (direction == "backward")
    return Case(name, dtype, batch, heads, heads, length, length, size, causal=causal, direction=direction)


def to_device(x: np.ndarray, device: str) -> Any:
    """As a tensor; bf16 by its bits."""
    import torch

    if x.dtype.kind == "f":
        return torch.from_numpy(x).to(device)
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(device)


def measure(case: Case, peers: Sequence[Any], device: str) -> CaseResult:
    """Check each peer on sampled rows, then time it."""
    try:
        arrays = make_inputs(case)
        rows = check.sample_rows(case)
        reference, rounded = (check.expected_rows(case, arrays, rows, rounded=r) for r in (False, True))
        allowed = check.allowed_error(case, reference, rounded)
        tensors = [to_device(x, device) for x in arrays]
    except Exception as error:  # want of memory, such as another's: the next case goes on
        why = f"inputs: {_said(error)}"
        return CaseResult(case, [Measurement(case, p.__name__, 1, status="failed", why=why) for p in peers], [])
    found = []
    for peer in peers:
        m = Measurement(case, peer.__name__, 1, allowed=float(allowed.max()))
        found.append(m)
        if out_of_time():
            m.status, m.why = "refused", "out of time"
            continue
        try:
            forward = case.direction == "forward"
            run = peer(case, *tensors) if forward else known.differentiated(case, peer, *tensors)
            began = time.perf_counter()
            given = (run(),) if forward else run()
            sample = sampled([x.double().cpu().numpy() for x in given], rows)
            m.first_seconds = time.perf_counter() - began
            m.error, m.allowed = check.worst(sample, reference, allowed)
            if complaint := check.complaint(m.error, m.allowed):
                m.status, m.why = "failed", complaint
            else:
                m.seconds = timed(run, device)
                found += graphed(case, peer.__name__, run, device) if forward else []
        except known.Refused as refusal:
            m.status, m.why = "refused", str(refusal)
        except Exception as error:  # a peer may fail in any way; the others go on
            m.status, m.why = "failed", _said(error)
    return CaseResult(case, found, [])


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def timed(run: known.Run, device: str) -> list[float]:
    """Seconds of repeated calls, by the device's own clock, with a cold second-level cache.

    By events alone: what measures for others (triton.testing) compiles a launcher, and wants a C compiler.
    """
    import torch

    other = torch.empty(LARGEST_CACHE if device == "cuda" else 1, dtype=torch.int8, device=device)
    milliseconds = MILLISECONDS if device == "cuda" else 0
    again = int(milliseconds / 1e3 / max(_spent(run, other, 1)[0], 1e-6))
    _spent(run, other, min(again, MOST_CALLS) // 4)
    return _spent(run, other, max(min(again, MOST_CALLS), 1))


def _spent(run: known.Run, other: Any, calls: int) -> list[float]:
    """Seconds of each of some calls. other: memory that takes the place of all others in the cache between them."""
    import torch

    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for begin, end in events:
        other.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def graphed(case: Case, peer: str, run: known.Run, device: str) -> list[Measurement]:
    """The same calls without their cost on the host: captured in a CUDA graph, where the peer can be."""
    import torch

    calls = 4 if device == "cuda" else 1
    m = Measurement(case, f"{peer}, graph", 1)
    try:
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [run() for _ in range(calls)]  # which a stand-in's replay writes to
        m.seconds = [seconds / calls for seconds in timed(graph.replay, device)]
        del results
    except Exception as error:  # not everything can be captured
        torch.cuda.synchronize()
        m.status, m.why = "failed", _said(error)
    return [m]


def draw(path: Path, results: Sequence[CaseResult], lines: Sequence[str]) -> None:
    """TFLOP/s over length: a panel for each direction, dtype, head size and mask."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str, int, bool], list[CaseResult]] = {}
    for result in results:
        case = result.case
        panels.setdefault((case.direction, case.dtype, case.head_size, case.causal), []).append(result)
    figure, axes = pyplot.subplots(
        -(-len(panels) // 2), 2, figsize=(11, 3.2 * -(-len(panels) // 2)), squeeze=False, layout="constrained"
    )
    peers = list(dict.fromkeys(m.peer for result in results for m in result.measurements))
    for axis, ((direction, dtype, size, causal), group) in zip(axes.flat, panels.items(), strict=False):
        for color, peer in enumerate(peers):
            points = [(r.case.queries, m.rate / 1e3) for r in group if (m := r.of(peer, 1))]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=peer, color=f"C{color}")
        axis.set_title(f"{direction}, {dtype}, head size {size}{', causal' * causal}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_ylabel("TFLOP/s", fontsize=8)
        axis.grid(linewidth=0.3)
    axes.flat[0].legend(fontsize=7)
    figure.suptitle("\n".join(lines), fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _tell(result: CaseResult, results: list[CaseResult]) -> None:
    """Print a case's line, and enter it."""
    case = result.case
    results.append(result)
    unit = 1 if case.reads else 1e3
    cells = (
        f"{m.peer} {m.rate / unit:.1f}" if m.status == "timed" else f"{m.peer} {m.status}" for m in result.measurements
    )
    print(f"{case.name:20} {'GB/s' if case.reads else 'TFLOP/s'}: {', '.join(cells)}", flush=True)


def run(dtypes: Sequence[str], names: Sequence[str], dry: bool, output: Path, lines: Sequence[str]) -> int:
    """Print, write and draw every case; how many of flashtile's own answers were wrong."""
    chosen = [peer for peer in known.PEERS if peer.__name__ in names]
    results: list[CaseResult] = []
    try:
        with stand_ins.installed() if dry else contextlib.nullcontext():
            for case in cases(dtypes, dry):
                if out_of_time():
                    print(f"{case.name}: out of time", flush=True)
                    continue
                _tell(measure(case, chosen, "cpu" if dry else "cuda"), results)
                report.write_measurements(output / "gpu.csv", results, lines)  # what is there if the time ends
    except KeyboardInterrupt:
        print("out of time", flush=True)
    print(*report.refusals(results), sep="\n")
    try:
        draw(output / "gpu.png", [r for r in results if not (r.case.reads or r.case.option or r.case.window)], lines)
    except ImportError as error:
        print(f"no picture: {error}")
    return sum(m.peer == report.OWN and m.status == "failed" for r in results for m in r.measurements)
