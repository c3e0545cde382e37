"""Peak memory of one long head beyond its inputs and output."""

from __future__ import annotations

from .overheads import run_snippet
from .report import Verdict

TARGET = 64.0  # MB


def long_head(threads: int, length: int) -> list[Verdict]:
    """One head of D = 64 in each dtype. The kernel is compiled before by a small call, which is told apart."""
    verdicts = []
    for dtype in ("f64", "f32", "f16", "bf16"):
        found = run_snippet("long_head", dtype, str(length), threads=threads)
        compiling = f"compiling took {found['compile_mb']:.0f} MB more" if "compile_mb" in found else ""
        note, name = found.get("error", compiling), f"one head, S = {length}, {dtype}"
        verdicts.append(Verdict(name, "MB beyond inputs and output", found.get("mb"), TARGET, note, at_most=True))
    return verdicts
