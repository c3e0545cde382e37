"""`python -m benchmarks.gpu`: for whoever has a GPU, the one command: is it right there, and how fast is it.

First every option in every dtype is held against the reference (gpu_checks.py); then flashtile is timed beside torch's
SDPA, flash-attn, cuDNN and FlexAttention, each checked on sampled rows before it is timed; CSV files and a picture go
into docs/benchmarks/gpu (or --output). With --dry the same runs on Triton's interpreter, without a GPU, at tiny sizes:
its numbers mean nothing, it shows that the script works.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from . import check, gpu_checks, gpu_peers, machine, report
from .cases import Case
from .data import make_inputs, sampled
from .driver import CaseResult, Measurement

TOKENS = 16384  # in a batch, whatever its length
WIDTH = 2048  # heads times head size
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_SIZES = (64, 128)
PACKAGES = ("torch", "triton", "flash-attn", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
MILLISECONDS = 200  # of repetitions, for each peer and case


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on Triton's interpreter, at tiny sizes: no GPU is needed")
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "f16", "f32", "f64"), default=["bf16"])
    known = [peer.__name__ for peer in gpu_peers.PEERS]
    parser.add_argument("--peers", nargs="+", choices=known, default=known)
    parser.add_argument("--skip-checks", action="store_true", help="time only")
    parser.add_argument("--skip-timing", action="store_true", help="check only")
    output = machine.ROOT / "docs" / "benchmarks" / "gpu"
    parser.add_argument("--output", type=Path, default=output, help="folder for CSV and PNG (default %(default)s)")
    return parser.parse_args(arguments)


def cases(dtypes: Iterable[str], dry: bool) -> list[Case]:
    """Head sizes, causal and not, lengths at a constant number of tokens; one tiny case of each kind in a dry run."""
    found = []
    for dtype in dtypes:
        for size in HEAD_SIZES:
            for causal in (False, True):
                for length in (24,) if dry else LENGTHS:
                    batch, heads = (1, 2) if dry else (TOKENS // length, WIDTH // size)
                    name = f"{dtype}-d{size}{'-causal' * causal}-{length}"
                    found.append(Case(name, dtype, batch, heads, heads, length, length, size, causal=causal))
    return found


def to_device(x: np.ndarray, device: str) -> Any:
    """As a tensor; bf16 by its bits."""
    import torch

    if x.dtype.kind == "f":
        return torch.from_numpy(x).to(device)
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(device)


def measure(case: Case, peers: Sequence[Any], device: str) -> CaseResult:
    """Check each peer on sampled rows, then time it."""
    arrays = make_inputs(case)
    rows = check.sample_rows(case)
    reference, rounded = (check.expected_rows(case, arrays, rows, rounded=r) for r in (False, True))
    [allowed] = check.allowed_error(case, reference, rounded)
    tensors = [to_device(x, device) for x in arrays]
    found = []
    for peer in peers:
        m = Measurement(case, peer.__name__, 1, allowed=float(allowed))
        found.append(m)
        try:
            run = peer(case, *tensors)
            began = time.perf_counter()
            sample = sampled([run().double().cpu().numpy()], rows)
            m.first_seconds = time.perf_counter() - began
            m.error, _ = check.worst(sample, reference, np.array([allowed]))
            if complaint := check.complaint(m.error, allowed):
                m.status, m.why = "failed", complaint
            else:
                m.seconds = timed(run, device)
        except gpu_peers.Refused as refusal:
            m.status, m.why = "refused", str(refusal)
        except Exception as error:  # a peer may fail in any way; the others go on
            m.status, m.why = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return CaseResult(case, found, [])


def timed(run: gpu_peers.Run, device: str) -> list[float]:
    """Seconds of repeated calls, by the device's own clock, with a cold second-level cache."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return [time.perf_counter() - began]
    from triton.testing import do_bench

    return [ms / 1e3 for ms in do_bench(run, warmup=MILLISECONDS // 4, rep=MILLISECONDS, return_mode="all")]


def check_options(dry: bool) -> Iterator[tuple[str, str, str | None]]:
    """Every option; a dry run takes those whose tensors are small, each in one dtype."""
    if not dry:
        yield from gpu_checks.every("triton", lambda x: x.cuda(), (200, 333))
        yield from device_habits()
        return
    small = tuple(c for c in gpu_checks.CHECKS if (c.kv_len or 0) < 1000 and c.size <= 128)
    for c in small:
        dtype = "bfloat16" if "bfloat16" in c.dtypes else c.dtypes[0]
        yield from gpu_checks.every("triton", lambda x: x, (20, 33), (dtype,), (c,))


def device_habits() -> Iterator[tuple[str, str, str | None]]:
    """What cannot be seen without a device: the caller's stream, and that nothing waits."""
    import torch

    import flashtile.torch

    q = torch.randn(2, 8, 512, 64, device="cuda", dtype=torch.bfloat16)
    slopes = torch.rand(8, device="cuda")
    want = flashtile.torch.attention(q, q, q, causal=True, alibi_slopes=slopes, kernel="triton")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with torch.cuda.stream(side):
            got = flashtile.torch.attention(q, q, q, causal=True, alibi_slopes=slopes, kernel="triton")
        waits = None
    except RuntimeError as error:
        got, waits = want, f"the call waited: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side.synchronize()
    yield "nothing waits", "bfloat16", waits
    yield "another stream", "bfloat16", None if torch.equal(got, want) else "other bits than on the default stream"
    try:
        flashtile.torch.attention(q, q.cpu(), q.cpu())
        mixed: str | None = "no error"
    except flashtile.SpecError:
        mixed = None
    yield "tensors on two devices", "bfloat16", mixed


def heading(dry: bool) -> list[str]:
    """Device, date and versions."""
    import torch

    device = "Triton's interpreter: a dry run, the numbers mean nothing"
    if not dry:
        p = torch.cuda.get_device_properties(0)
        device = f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} processors"
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return [device, f"{date}; medians; {machine.describe()}", ", ".join(map(_version, PACKAGES))]


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} -"


def draw(path: Path, results: Sequence[CaseResult], lines: Sequence[str]) -> None:
    """TFLOP/s over length: a panel for each dtype, head size and mask."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, int, bool], list[CaseResult]] = {}
    for result in results:
        panels.setdefault((result.case.dtype, result.case.head_size, result.case.causal), []).append(result)
    figure, axes = pyplot.subplots(
        -(-len(panels) // 2), 2, figsize=(11, 3.2 * -(-len(panels) // 2)), squeeze=False, layout="constrained"
    )
    peers = list(dict.fromkeys(m.peer for result in results for m in result.measurements))
    for axis, ((dtype, size, causal), group) in zip(axes.flat, panels.items(), strict=False):
        for color, peer in enumerate(peers):
            points = [(r.case.queries, m.rate / 1e3) for r in group if (m := r.of(peer, 1))]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=peer, color=f"C{color}")
        axis.set_title(f"{dtype}, head size {size}{', causal' * causal}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_ylabel("TFLOP/s", fontsize=8)
        axis.grid(linewidth=0.3)
    axes.flat[0].legend(fontsize=7)
    figure.suptitle("\n".join(lines), fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def run_checks(options: argparse.Namespace, lines: list[str]) -> int:
    """Print and write every check; how many found something wrong."""
    rows = []
    for name, dtype, problem in check_options(options.dry):
        rows.append({"check": name, "dtype": dtype, "problem": problem or ""})
        verdict = "ok   " if problem is None else "WRONG"
        print(f"{verdict} {dtype:9} {name}" + (f": {problem}" if problem else ""), flush=True)
    report.write_rows(options.output / "checks.csv", ("check", "dtype", "problem"), rows, lines)
    return sum(bool(row["problem"]) for row in rows)


def run_timing(options: argparse.Namespace, lines: list[str]) -> int:
    """Print, write and draw every case; how many of flashtile's own answers were wrong."""
    peers = [peer for peer in gpu_peers.PEERS if peer.__name__ in options.peers]
    results = []
    for case in cases(options.dtype, options.dry):
        result = measure(case, peers, "cpu" if options.dry else "cuda")
        results.append(result)
        cells = (
            f"{m.peer} {m.rate / 1e3:.1f}" if m.status == "timed" else f"{m.peer} {m.status}"
            for m in result.measurements
        )
        print(f"{case.name:20} TFLOP/s: {', '.join(cells)}", flush=True)
    print(*report.refusals(results), sep="\n")
    report.write_measurements(options.output / "gpu.csv", results, lines)
    try:
        draw(options.output / "gpu.png", results, lines)
    except ImportError as error:
        print(f"no picture: {error}")
    return sum(m.peer == report.OWN and m.status == "failed" for r in results for m in r.measurements)


def main(arguments: list[str] | None = None) -> int:
    """Check, time, write. Returns 1 if an answer of flashtile's own is wrong."""
    options = parse(arguments)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if not options.dry and not torch.cuda.is_available():
        print("python -m benchmarks.gpu: error: torch finds no GPU; --dry runs without one", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    lines = heading(options.dry)
    print(*lines, sep="\n", flush=True)
    wrong = 0
    if not options.skip_checks:
        wrong += run_checks(options, lines)
    if not options.skip_timing:
        wrong += run_timing(options, lines)
    print(f"{wrong} wrong" if wrong else "everything of flashtile's is right")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
