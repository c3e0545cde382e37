"""`python -m benchmarks.variants GROUP`: kernels as they are beside what might be faster on this machine.

A variant is a few fields of the configuration or of the machine, which this process changes for itself: nothing of it
can be chosen by a call. Each runs in a process of its own with an empty cache of kernels, taking turns; results are
held to the accuracy rule first. What wins belongs into the machine's own fields (llvm/machines) or the table of
processors (llvm/processors.py).

    tiles     products beside weights of other keys, against one step of a block after the other
    vectors   fp32 multiply-adds: blocks whose values fit the sets of the nearest cache, tiles that need less of it
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from . import machine, peak

SHAPES = ((2048, 128), (4096, 64))
SMALL = ((160, 32),)


@dataclass(frozen=True)
class Variant:
    """Fields of every `Config`, and of the machine of this name, or of the one that is chosen."""

    config: dict[str, Any] = field(default_factory=dict)
    isa: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    dtypes: tuple[Any, ...]
    variants: dict[str, Variant]
    isa: str = ""


GROUPS = {
    "tiles": Group(
        (ml_dtypes.bfloat16, np.float16, np.float32),
        {"products beside weights": Variant(), "one after the other": Variant({"interleaved": False})},
    ),
    "vectors": Group(
        (np.float32,),
        {
            "8 rows by 3, 128 keys": Variant(),
            "64 keys": Variant({"key_block": 64}),
            "unrolled 4 times": Variant({"unroll": 4}),
            "8 rows by 2": Variant(isa={"vectors": 2}),
            "12 rows by 2": Variant(isa={"vectors": 2, "rows": 12}),
            "12 rows by 2, 96 keys": Variant({"key_block": 96}, {"vectors": 2, "rows": 12}),
        },
        isa="avx512",
    ),
}


def apply(variant: Variant) -> None:
    """Change what this process generates kernels from."""
    from flashtile.kernels.cpu.config import Config
    from flashtile.llvm import machines

    init = Config.__init__

    def changed(self: Config, *args: Any, **named: Any) -> None:
        init(self, *args, **named)
        for name, value in variant.config.items():
            self.__dict__[name] = value

    if "interleaved" in variant.config:
        del Config.interleaved  # a property would come before the field
        Config.interleaved = variant.config["interleaved"]
    Config.__init__ = changed  # type: ignore[method-assign]  # in its place
    known = machines.known()
    for name in (os.environ.get("FLASHTILE_ISA") or machines.current().name,):
        known[name] = replace(known[name], **variant.isa)


def measure(group: Group, name: str, *, small: bool) -> Iterator[str]:
    """GFLOP/s of whole calls, one thread: the least time of nine."""
    import flashtile
    from flashtile.testing import assert_accurate

    apply(group.variants[name])
    flashtile.set_num_threads(1)
    random = np.random.default_rng(0)
    highest = peak.dot_peak("f32") if group.isa and not small else None
    if highest:
        yield f"peak {highest:.0f} GFLOP/s; by sums of 0.577 squared, {peak.dot_peak('f32', factor=0.577):.0f}"
    for dtype in group.dtypes:
        tried = [random.standard_normal((1, 2, 300, 48)).astype(dtype) for _ in range(3)]
        assert_accurate(flashtile.attention(*tried, kernel="cpu", causal=True), *tried, causal=True)
        for length, head_size in SMALL if small else SHAPES:
            q, k, v = (random.standard_normal((1, 2, length, head_size)).astype(dtype) for _ in range(3))
            times = []
            for _ in range(2 if small else 9):
                start = time.perf_counter()
                flashtile.attention(q, k, v, kernel="cpu")
                times.append(time.perf_counter() - start)
            rate = 4 * 2 * length**2 * head_size / min(times) / 1e9
            share = f", {rate / highest:.0%} of {highest:.0f}" if highest else ""
            what = f"{np.dtype(dtype).name}, (1, 2, {length}, {head_size}), {name}:"
            yield f"{what:60} {rate:6.0f} GFLOP/s{share}"


def run(name: str, isa: str = "", *, small: bool = False) -> Iterator[str]:
    """Every variant of a group, twice in turns; a line that begins with FAILED where one did not end well."""
    group = GROUPS[name]
    flags = ("--small",) if small else ()
    with tempfile.TemporaryDirectory(prefix="flashtile-variants-") as folder:
        for turn in range(1 if small else 2):
            for n, variant in enumerate(group.variants):
                cache = Path(folder, f"{turn}-{n}")
                cache.mkdir(mode=0o700)
                env = {**machine.child_environment(1), "FLASHTILE_CACHE_DIR": str(cache)}
                if chosen := isa or group.isa:
                    env["FLASHTILE_ISA"] = chosen
                command = [sys.executable, "-m", "benchmarks.variants", name, "--only", variant, *flags]
                done = subprocess.run(command, cwd=machine.ROOT, env=env, capture_output=True, text=True, check=False)
                yield from done.stdout.splitlines()
                if done.returncode:
                    said = (done.stderr.strip() or "nothing said").splitlines()[-1]
                    yield f"FAILED: {variant} ended with status {done.returncode}: {said}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.variants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--only", help="one variant, in this process")
    parser.add_argument("--small", action="store_true", help="of almost no size: to see that it runs")
    options = parser.parse_args()
    group = GROUPS[options.group]
    lines = (
        measure(group, options.only, small=options.small) if options.only else run(options.group, small=options.small)
    )
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
