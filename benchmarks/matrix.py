"""`python -m benchmarks.matrix`: all that waits for a machine with matrix registers (AMX), in one command.

    machine   whether the system grants them; the products that are chosen, and why
    bits      the tests of tiles, instruction by instruction and kernel by kernel: the real ones against the emulated
    compile   seconds that LLVM takes for each module
    overlap   what mixing products with weights gives: of a strip, and of whole kernels with and without (overlap.py)
    few       the kernel of few queries beside that of tiles, by the number of rows: which one should be taken (few.py)
    vectors   the fp32 kernel without tiles, beside forms of it that might suit Intel's caches better (variants.py)
    table     forward, options, gradients and first calls beside their targets (python -m benchmarks)
    starpu    the StarPU engine beside the direct one, in bf16
    suites    the kernels' suites on the real machine, of every dtype, those that run at night included: the longest

Each of several steps is a process of its own: one that fails, ends by a signal or takes longer than ``--limit`` seconds
does not stop the next one. But where the registers are not there, or refused, no other is begun: an instruction on them
would end any process. What they print is added to matrix.txt in the folder of this kind of machine: a step that is
repeated, or run alone, takes nothing from what an earlier run found.
Elsewhere ``--dry`` goes through every step on the emulated machine, with a few tiny cases: no number means anything.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from flashtile.llvm import machines

from . import kinds, machine, variants

STEPS = ("machine", "bits", "compile", "overlap", "few", "vectors", "table", "starpu", "suites")
PROGRAM = (sys.executable, "-m", "benchmarks.matrix")
COMPILE_TARGET = 0.7  # seconds of a kernel, with an empty cache
BITS = ("tests/llvm/test_amx.py", "tests/llvm/test_products.py", "tests/cpu/test_cpu_tiles.py")
BITS = (*BITS, "tests/cpu/test_cpu_tiles_backward.py", "tests/cpu/test_cpu_tiles_bits.py")
SUITES = ("tests/test_grid.py", "tests/test_adversarial.py", "tests/test_properties.py", "tests/test_many_keys.py")
SUITES = (*SUITES, "tests/test_determinism.py", "tests/options", "tests/cpu", "tests/starpu/test_starpu_engine.py")
ON_TILES = "amx and not emulated"


@dataclass(frozen=True)
class Run:
    """What was asked for; ``isa``: the machine that has the tiles."""

    isa: str
    dry: bool
    threads: int
    output: Path

    @property
    def folder(self) -> Path:
        return kinds.folder_here(self.output)


def command(run: Run, *arguments: str, isa: str = "") -> Iterator[str]:
    """The lines that a Python program of this checkout prints; at last how it ended, if not well."""
    env = machine.child_environment(run.threads) | ({"FLASHTILE_ISA": isa} if isa else {})
    env = {**env, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=machine.ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield from (line.rstrip("\n") for line in process.stdout)
    if process.returncode:
        yield f"FAILED: {' '.join(arguments)} ended with status {process.returncode}"


def on_machine(run: Run) -> Iterator[str]:
    from flashtile import doctor
    from flashtile.llvm import processors

    yield f"{machine.describe()}; kind: {kind.name if (kind := kinds.here()) else 'none with targets'}"
    yield f"processor: {processors.here().name} ({processors.here().measured})"
    yield from (f"{room:8} {name:16} {why}" for room, name, _, why in doctor.survey() if room in ("isa", "product"))
    if reason := machines.unavailable(machines.known()[run.isa]):
        yield f"FAILED: {run.isa}: {reason}"


def on_bits(run: Run) -> Iterator[str]:
    few = ("-k", "rule or parts_add_up") if run.dry else ()
    yield from command(run, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *BITS, *few)


def on_suites(run: Run) -> Iterator[str]:
    chosen = ("tests/test_determinism.py",) if run.dry else SUITES
    which = "amx_emulated and bfloat16" if run.dry else ON_TILES
    yield from command(run, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *chosen, "-k", which)


def on_compile(run: Run) -> Iterator[str]:
    """For the real machine, wherever this runs; processor time."""
    from flashtile.kernels.cpu.config import Config
    from flashtile.kernels.cpu.passes.backward import backward_text
    from flashtile.kernels.cpu.passes.forward import forward_text
    from flashtile.llvm import jit, products

    isa = machines.known()["amx"]
    plain = {"bf16": ("bfloat", products.TILES), "fp16": ("half", products.TILES2), "fp32": ("float", products.TILES3)}
    for name, (storage, product) in list(plain.items())[: 1 if run.dry else None]:
        for dropout in (False, True):
            c = replace(Config(isa, storage, product), dropout=dropout)
            for direction, text in (("forward", forward_text), ("backward", backward_text)):
                times = []
                for _ in range(1 if run.dry else 3):
                    start = time.process_time()
                    jit.object_code(text(c), isa)
                    times.append(time.process_time() - start)
                met = "met" if min(times) <= COMPILE_TARGET else "NOT MET"
                what = f"{direction}, {name}{', dropout' if dropout else ''}"
                yield f"{what:32} {min(times):6.2f} s  <= {COMPILE_TARGET} {met}"


def on_overlap(run: Run) -> Iterator[str]:
    from . import overlap

    isa = machines.known()[run.isa]
    if isa.name == "amx":
        yield from overlap.report(isa)
    else:
        yield "strips are not measured: emulated tiles branch, and nothing can be mixed with them"
    yield from variants.run("tiles", run.isa, small=run.dry)


def on_few(run: Run) -> Iterator[str]:
    yield from command(run, "-m", "benchmarks.few", *(("--small",) if run.dry else ()), isa=run.isa)


def on_vectors(run: Run) -> Iterator[str]:
    yield from variants.run("vectors", small=run.dry)


def on_table(run: Run) -> Iterator[str]:
    few = ("--case", "bf16-512", "--rounds", "1", "--peers", "flashtile", "numpy") if run.dry else ()
    parts = () if run.dry else ("--parts", "table", "backward", "overheads")
    where = ("--output", str(run.output), "--threads", str(run.threads))
    yield from command(run, "-m", "benchmarks", *parts, *few, *where, isa=run.isa if run.dry else "")


def on_starpu(run: Run) -> Iterator[str]:
    few = ("--rounds", "1", "--parts", "submission") if run.dry else ("--parts", "engines", "tiles")
    yield from command(run, "-m", "benchmarks.starpu", "--case", "bf16-4k64", "--threads", str(run.threads), *few)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps. 1 where one failed; a missed target is no failure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=3600, help="seconds that one of several steps may take")
    parser.add_argument("--dry", action="store_true", help="on the emulated machine, a little of each step")
    parser.add_argument("--output", type=Path, default=machine.ROOT / "docs" / "benchmarks")
    options = parser.parse_args(arguments)
    run = Run("amx_emulated" if options.dry else "amx", options.dry, options.threads, options.output)
    os.environ.pop("FLASHTILE_ISA", None)
    reason = machines.unavailable(machines.known()[run.isa])  # asks for permission, whichever steps there are
    steps = ("machine",) if reason else options.steps
    run.folder.mkdir(parents=True, exist_ok=True)
    if len(steps) == 1:
        failed = steps if not _here(steps[0], run) else ()
    else:
        failed = tuple(name for name in steps if not _apart(name, run, options.limit))
    if reason:
        print(f"nothing else was begun: {reason}; --dry goes through every step without it")
    if len(options.steps) > 1:
        print(f"failed: {', '.join(failed)}" if failed else "no step failed")
    return int(bool(failed))


def _here(name: str, run: Run) -> bool:
    """A step in this process, printed and added to the file; whether it went well."""
    step: Callable[[Run], Iterator[str]] = globals()[f"on_{name}"]
    well = True
    begun = (f"# {run.isa}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}", f"== {name}")
    for line in itertools.chain(begun, _guarded(step, run), [""]):
        well = well and not line.startswith("FAILED")
        _say(line, run)
    return well


def _guarded(step: Callable[[Run], Iterator[str]], run: Run) -> Iterator[str]:
    """A step's lines; what it raises is a line as well."""
    try:
        yield from step(run)
    except Exception as error:
        yield f"FAILED: {type(error).__name__}: {error}"


def _apart(name: str, run: Run, limit: float) -> bool:
    """A step in a process of its own, and all that it starts in its group; whether it went well."""
    dry = ("--dry",) if run.dry else ()
    where = ("--threads", str(run.threads), "--output", str(run.output.absolute()))
    with subprocess.Popen(
        [*PROGRAM, "--steps", name, *dry, *where],
        cwd=machine.ROOT,
        start_new_session=True,
    ) as process:
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            _say(f"FAILED: {name}: stopped after {limit:g} seconds", run)
            return False
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    if status < 0:
        _say(f"FAILED: {name}: ended by {signal.Signals(-status).name}", run)
    return status == 0


def _say(line: str, run: Run) -> None:
    print(line, flush=True)
    with (run.folder / "matrix.txt").open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
