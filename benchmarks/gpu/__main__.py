"""The command: `python -m benchmarks.gpu` runs every step within its budget; `--step NAME` is one of them.

First every option in every dtype is held against the reference, then what only a device shows; then flashtile is timed
beside torch's backends, flash-attn, cuDNN and FlexAttention, each checked on sampled rows before. CSV files, a picture,
a log and a summary go into docs/benchmarks/gpu (or --output). With --dry the same runs on Triton's interpreter, without
a GPU, at tiny sizes: its numbers mean nothing, it shows that the script works.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import machine, report
from . import checks, habits, peers, precompile, timing
from .steps import Run, Step, out_of_time

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "llvmlite",
    "jax",
    "cupy",
    "flash-attn",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)
COLUMNS = ("check", "dtype", "verdict", "why")
STEPS = ("versions", "precompile", "checks", "habits", "timing", "sanitizer")
SECONDS = {"versions": 75, "precompile": 400, "checks": 165, "habits": 60, "timing": 160, "sanitizer": 60}
BUDGET = 470  # seconds of all of it
SLACK = 12  # seconds that a check may go on when time is up
CHECKERS = 10  # processes that compile and check side by side, where there are CPUs for them
# JAX would take three quarters of the device's memory at its first array, beside what torch holds.
QUIET = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# Of each checker: the references of all of them run on the host's CPUs at the same time.
FEW_THREADS = {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
REFUSED = "Device not supported"  # what compute-sanitizer says where it is not let at the device

JUDGING = ("checks", "habits", "timing")  # steps that judge, or time, themselves what kernels give


def take_the_table() -> None:
    """From now on this process takes the tables' rows: it has no time for self-tests and timed choices beside."""
    from flashtile.kernels import triton as family

    replaced = "_trials"
    getattr(family, replaced)  # what no one reads any more would not be replaced
    setattr(family, replaced, lambda spec: (None, None))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on Triton's interpreter, at tiny sizes: no GPU is needed")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="S", help="seconds for all of it (default 470)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "f16", "f32", "f64"), help="default bf16 f16; dry: bf16")
    known = [peer.__name__ for peer in peers.PEERS]
    parser.add_argument("--peers", nargs="+", choices=known, default=known)
    output = machine.ROOT / "docs" / "benchmarks" / "gpu"
    parser.add_argument("--output", type=Path, default=output, help="folder for the results (default %(default)s)")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # inside of one
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)  # of the checks: number, of how many
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ["bf16", "f16"][: 1 if options.dry else 2]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run every step, or be one. Returns 1 if a step failed or an answer of flashtile's own is wrong."""
    options = parse(arguments)
    if options.step:
        if options.step in JUDGING:
            take_the_table()
        try:
            return int(globals()[f"step_{options.step}"](options))
        except KeyboardInterrupt:
            return 130  # what it has said so far is what counts, not where it was
    if not options.dry:
        import torch

        if not torch.cuda.is_available():
            print("python -m benchmarks.gpu: error: torch finds no GPU; --dry runs without one", file=sys.stderr)
            return 2
    options.output.mkdir(parents=True, exist_ok=True)
    run = Run(options.output, options.budget)
    given = sys.argv[1:] if arguments is None else arguments
    # A dry run interprets; only a compiler can compile ahead.
    interpreter = {"TRITON_INTERPRET": "1"} if options.dry else {}
    try:
        for name in options.steps:
            command = ("-m", "benchmarks.gpu", *given, "--step", name)
            environment = QUIET | (interpreter if name != "precompile" else {})
            # An interpreter on a busy core takes its time; a larger budget is for more of each step.
            seconds = options.budget if options.dry else SECONDS[name] * max(1.0, options.budget / BUDGET)
            run.step(Step(name, seconds, command, environment, beside=name == "precompile" and not options.dry))
    finally:
        run.end()
    for what, names in (("failed", run.failed), ("out of time", run.late)):
        if names:
            run.say(f"{what}: {', '.join(names)}")
    if not run.failed:
        run.say("everything of flashtile's is right" + ", as far as time allowed" * bool(run.late))
    return int(bool(run.failed or run.late))


def step_versions(options: argparse.Namespace) -> int:
    """Device and versions, and how long a first call takes: compiling, the self-test, and a timed choice."""
    import torch

    import flashtile.torch
    from flashtile.kernels import triton as family

    print(*heading(options.dry), sep="\n")
    q = torch.randn(1, 2, 64, 64, dtype=torch.float16, device="cpu" if options.dry else "cuda")
    began = time.monotonic()
    flashtile.torch.attention(q, q, q, kernel="triton")
    if not options.dry:
        torch.cuda.synchronize()
    print(f"first call: {time.monotonic() - began:.1f} s; {family.FAMILY.remark()}")
    return 0


def step_precompile(options: argparse.Namespace) -> int:
    """What will be timed, compiled beside the checks; of a dry run one kernel."""
    if options.dry:
        precompile.run("sm_90", 1, only=1)
        return 0
    import torch

    major, minor = torch.cuda.get_device_capability()
    precompile.run(f"sm_{major}{minor}", max(1, (os.cpu_count() or 2) // 3))
    return 0


def step_checks(options: argparse.Namespace) -> int:
    """Every option in every dtype, shared over processes; how many are wrong."""
    if options.share is not None:
        return _share_of_checks(options)
    shares = 1 if options.dry else max(1, min(CHECKERS, (os.cpu_count() or 2) - 2))
    command = [sys.executable, "-m", "benchmarks.gpu", "--step", "checks", "--output", str(options.output)]
    command += ["--dry"] if options.dry else []
    environment = os.environ | FEW_THREADS
    workers = [subprocess.Popen([*command, "--share", str(n), str(shares)], env=environment) for n in range(shares)]
    rows = []
    for n, worker in enumerate(workers):
        code, part = _end_of(worker), options.output / f"checks-{n}.csv"
        if code is None:
            rows.append(dict(zip(COLUMNS, (f"process {n}", "", "not run", "the rest, out of time"), strict=True)))
        elif code not in (0, 1) or not part.exists():
            rows.append(dict(zip(COLUMNS, (f"process {n}", "", "WRONG", f"ended with {code}"), strict=True)))
        if part.exists():
            with part.open() as file:
                rows += csv.DictReader(file)
            part.unlink()
    return _summary(options, "checks", rows)


def _end_of(worker: subprocess.Popen[bytes]) -> int | None:
    """Its status; None if it was stopped some seconds after it should have begun nothing more."""
    left = float(os.environ.get("UNTIL", "inf")) + SLACK - time.time()
    try:
        return worker.wait(None if left == float("inf") else max(left, 0.1))
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        return None


def _share_of_checks(options: argparse.Namespace) -> int:
    """Every share-th check; written as they come, so that none is lost when the time ends."""
    from flashtile.kernels import cudnn

    share, shares = options.share
    small = [c for c in checks.CHECKS if (c.kv_len or 0) < 1000 and c.size <= 128]
    jobs = [(c, d, "triton") for d in reversed(checks.DTYPES) for c in checks.CHECKS if d in c.dtypes]
    jobs += [(c, d, "cudnn") for d in ("bfloat16", "float16") for c in checks.BY_CUDNN]
    if options.dry:
        jobs = [(c, "bfloat16" if "bfloat16" in c.dtypes else c.dtypes[0], "triton") for c in small]
    absent = {"cudnn": cudnn.unavailable()}
    lengths, to = ((20, 33), lambda x: x) if options.dry else ((200, 333), lambda x: x.cuda())
    wrong = 0
    with (options.output / f"checks-{share}.csv").open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for check, dtype, kernel in jobs[share::shares]:
            verdict, why = "not run", absent.get(kernel) or "out of time"
            if not absent.get(kernel) and not out_of_time():
                began = time.monotonic()
                gradients = checks.DRY_BACKWARD if options.dry else checks.BACKWARD
                found = checks.run(check, dtype, kernel, to, lengths, gradients)
                verdict = "ok" if found is None else "WRONG"
                why = found or f"{time.monotonic() - began:.1f} s"
            wrong += verdict == "WRONG"
            name = check.name if kernel == "triton" else f"{kernel}: {check.name}"
            writer.writerow(dict(zip(COLUMNS, (name, dtype, verdict, why), strict=True)))
    return int(wrong > 0)


def step_habits(options: argparse.Namespace) -> int:
    rows: list[dict[str, str]] = []
    for name, verdict, why in habits.every(options.dry):
        rows.append({"check": name, "dtype": "", "verdict": verdict, "why": why})
        report.write_rows(options.output / "habits.csv", COLUMNS, rows, heading(options.dry))
    return _summary(options, "habits", rows)


def _summary(options: argparse.Namespace, name: str, rows: list[dict[str, str]]) -> int:
    """Write the rows; print what is wrong, and counts. Returns 1 if anything is, or if nothing was looked at."""
    report.write_rows(options.output / f"{name}.csv", COLUMNS, rows, heading(options.dry))
    for row in rows:
        if row["verdict"] == "WRONG":
            print("WRONG", row["dtype"], row["check"] + ":", row["why"])
    count = {v: sum(row["verdict"] == v for row in rows) for v in ("ok", "WRONG", "not run")}
    print(f"{name}:", ", ".join(f"{n} {v}" for v, n in count.items()))
    return int(count["WRONG"] > 0 or not count["ok"])


def step_timing(options: argparse.Namespace) -> int:
    lines = heading(options.dry)
    return int(timing.run(options.dtype, options.peers, options.dry, options.output, lines) > 0)


def step_sanitizer(options: argparse.Namespace) -> int:
    """NVIDIA's checker of memory accesses over small calls, where it is installed, and let at the device: some virtual
    machines keep it out."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not here")
        return 0
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", TINY]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout)
    if REFUSED in done.stdout:
        print("compute-sanitizer cannot look at this device: nothing was checked")
        return 0
    return done.returncode


TINY = """
import torch, flashtile.torch as door
from benchmarks.gpu.__main__ import take_the_table
take_the_table()
for dtype in (torch.float16, torch.float32):
    q, k, v = (torch.randn(1, h, n, 40, device="cuda").to(dtype) for h, n in ((2, 137), (1, 200), (1, 200)))
    door.attention(q, k, v, causal=True, align="bottom_right", kernel="triton")
    door.attention(q[:, :, :1], k, v, kernel="triton")
    v[:, :, -1] = float("nan")
    door.attention(q, k, v, mask=lambda b, h, i, j: (i + j) % 3 > 0, kernel="triton")
torch.cuda.synchronize()
"""


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


if __name__ == "__main__":
    sys.exit(main())
