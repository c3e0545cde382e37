"""Fixed costs: a tiny call, and what the first call of a process takes beyond the run itself."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from . import machine
from . import xla_entry as xla
from .gpu.host import OPTIONS
from .report import Verdict

DOORS = (
    "flashtile.attention",
    "flashtile.torch.scaled_dot_product_attention",
    "torch.nn.functional.scaled_dot_product_attention",
)
TINY_TARGET = 10.0  # microseconds; with a mask, and with a backward behind it, the time is recorded
TINY: dict[tuple[str, ...], tuple[str, ...]] = {(): DOORS} | dict.fromkeys(
    (("mask",), ("step",), ("mask", "step")), DOORS[1:]
)
# Microseconds; with options; beside the time of the trace, where there is a function.
GPU_HOST_TARGETS = {"plain": 30.0, "causal": 30.0, "mask function": 40.0}
GPU_HOST_OPTIONS = 60.0
XLA_TARGET = 30.0  # microseconds
STEP_TARGET = 20.0  # microseconds, where one thread computes the step
STEPS = {100: STEP_TARGET, 400: STEP_TARGET, 1100: None}  # by the first number of keys
FIRST_TARGETS = {"cold": 1.0, "warm": 0.060}  # seconds
FIRST_ON_TILES = {"cold": 0.7, "warm": 0.060}  # of kernels for matrix registers, in every dtype that they compute


def run_snippet(name: str, *arguments: str, threads: int, cache: str | None = None) -> dict[str, Any]:
    """Run a function of this package's snippets.py in a fresh, pinned process and return what it found."""
    env = machine.child_environment(threads)
    if cache is not None:
        env["FLASHTILE_CACHE_DIR"] = cache
    cpus = machine.pick_cpus(threads)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.snippets", name, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def tiny_call(threads: int) -> list[Verdict]:
    """Whole calls at (1, 1, 16, 64) fp32, second and later, and steps of training; torch's own beside them where it is
    installed."""
    verdicts = []
    for how, doors in TINY.items():
        for door in doors:
            found = run_snippet("tiny_call", door, *how, threads=threads)
            target = TINY_TARGET if door.startswith("flashtile") and not how else None
            note = found.get("error", "" if door.startswith("flashtile") else "for comparison")
            measure = ", ".join(("us", door.replace("scaled_dot_product_attention", "sdpa"), *how))
            verdicts.append(Verdict("tiny call", measure, found.get("microseconds"), target, note, at_most=True))
    return verdicts


def new_length(threads: int) -> list[Verdict]:
    """A decoder's step, one key more than the last, beyond the same call again; the cache allocated once or anew."""
    verdicts = []
    for begin, target in STEPS.items():
        for layout in ("part", "own"):
            found = run_snippet("new_length", str(begin), layout, threads=threads)
            note = found.get("error", f"the repeat: {found.get('repeat', 0.0):.0f} us")
            measure = (
                f"us beyond a repeat, {layout} of the cache" if layout == "part" else "us beyond a repeat, own arrays"
            )
            subject = f"a step at {begin} to {begin + 300} keys"
            verdicts.append(Verdict(subject, measure, found.get("microseconds"), target, note, at_most=True))
    return verdicts


def gpu_host(threads: int) -> list[Verdict]:
    """The host's part of a GPU call, with a driver that does nothing; a tiny call of torch's on the CPU beside it."""
    verdicts = []
    for option in OPTIONS:
        found = run_snippet("gpu_host", option, threads=threads)
        target = GPU_HOST_TARGETS.get(option, GPU_HOST_OPTIONS) + found.get("trace", 0.0)
        note = found.get("error", f"torch's CPU SDPA, tiny: {found.get('torch', 0.0):.1f} us")
        measure = f"us before a launch, {option}"
        verdicts.append(Verdict("gpu call", measure, found.get("microseconds"), target, note, at_most=True))
    return verdicts


def xla_entry(threads: int) -> list[Verdict]:
    """From XLA's call of the JAX door to its kernel, of a call for several threads, and of its gradient's."""
    verdicts = []
    for option in xla.OPTIONS:
        found = run_snippet("xla_entry", option, threads=threads)
        for direction in ("forward", "gradient"):
            how = "in Python" if found.get(f"python {direction}") else "in machine code"
            note = found.get("error", how + (", its part of the results cleared" if direction == "gradient" else ""))
            measure = f"us to the kernel, {direction}"
            verdicts.append(Verdict(f"jax, {option}", measure, found.get(direction), XLA_TARGET, note, at_most=True))
    return verdicts


def first_call(
    threads: int, repeats: int, dtype: str = "f32", targets: Mapping[str, float] = FIRST_TARGETS
) -> list[Verdict]:
    """First minus second call at (1, 8, 1024, 64) with an empty and with a filled disk cache, imports aside."""
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    error = ""
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="flashtile-cache-") as cache:
            for state in found:
                answer = run_snippet("first_call", dtype, threads=threads, cache=cache)
                error = answer.get("error", error)
                found[state] += [answer["seconds"]] if "seconds" in answer else []
    verdicts = []
    for state, times in found.items():
        value, target = statistics.median(times) if times else None, targets[state]
        measure = "seconds beyond the run, no imports"
        subject = f"first call, {state} disk cache" + (f", {dtype}" if dtype != "f32" else "")
        verdicts.append(Verdict(subject, measure, value, target, error, at_most=True))
    return verdicts
