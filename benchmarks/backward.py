"""Gradients: the same peers, checks, turns and kinds of machines as the table's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import driver, kinds, machine, records, report
from .cases import AMX, Case

PEERS = ("flashtile", "torch", "jax")
FILE = "backward.csv"


def _case(name: str, dtype: str, heads: int, length: int, size: int, ratio: float | None, **fields: Any) -> Case:
    """One sequence of as many queries as keys; fp16 is computed in fp32, and so is held to no peak of its own."""
    kv_heads = fields.pop("kv_heads", heads)
    known = {"direction": "backward", "unit": {"f16": "f32"}.get(dtype, dtype), **fields}
    return Case(name, dtype, 1, heads, kv_heads, length, length, size, ratio=ratio, **known)


CASES = (
    _case("f32-1k64-b", "f32", 8, 1024, 64, 1.25, percent=78, intel=1.0, amx=1.6),
    _case("f32-2k128-b", "f32", 8, 2048, 128, 1.05, percent=74, intel=1.0, amx=1.6),
    _case("f32-4k64-b", "f32", 8, 4096, 64, 1.15, percent=80, intel=1.0, amx=1.6),
    _case("f32-causal-1k64-b", "f32", 8, 1024, 64, 1.6, percent=66, intel=1.3, amx=1.7, causal=True),
    _case("f32-causal-2k128-b", "f32", 8, 2048, 128, 1.4, percent=74, intel=1.3, amx=1.7, causal=True),
    _case("f32-causal-4k64-b", "f32", 8, 4096, 64, 1.25, percent=78, intel=1.3, amx=1.7, causal=True),
    _case("bf16-2k128-b", "bf16", 8, 2048, 128, 1.6, percent=78, amx=2.8),
    _case("bf16-causal-2k128-b", "bf16", 8, 2048, 128, 1.7, percent=76, amx=2.8, causal=True),
    _case("bf16-4k64-b", "bf16", 8, 4096, 64, None, amx=4.0, only=AMX),
    _case("f16-causal-1k64-b", "f16", 4, 1024, 64, 5.0, intel=1.3, amx=3.0, causal=True),
    _case("f64-1k64-b", "f64", 8, 1024, 64, 1.5, percent=72, intel=1.1, amx=1.1),
    _case(
        "f32-window-fb",
        "f32",
        8,
        8192,
        64,
        8.0,
        intel=8.0,
        amx=8.0,
        causal=True,
        window=512,
        direction="both",
        rival="torch",
    ),
    _case(
        "own-score-fb",
        "f32",
        8,
        2048,
        64,
        4.0,
        intel=4.0,
        amx=4.0,
        causal=True,
        option="softcap, alibi by hand",
        direction="both",
        rival="torch",
    ),
    _case("f32-one-head-b", "f32", 1, 8192, 64, None, causal=True, scaling=1.8),
    _case("f32-gqa-b", "f32", 16, 2048, 128, 1.4, intel=1.3, amx=1.3, causal=True, kv_heads=4),
)
QUICK = ("f32-1k64-b", "f32-causal-1k64-b", "f16-causal-1k64-b", "f64-1k64-b")


def run(
    cases: Sequence[Case], peers: Sequence[str], threads: int, settings: driver.Settings, output: Path, begun: str
) -> list[report.Verdict]:
    """Check, time and judge the cases; write all measurements, and the file of this kind of machine.
    `begun` is the line that names the run in what it writes (records.py)."""
    kind = kinds.here()
    chosen = [peer for peer in peers if peer in PEERS]
    wanted = [(peer, threads) for peer in chosen]
    if threads > 1 and report.OWN in chosen:
        wanted.append((report.OWN, 1))
    print(f"\nGradients. This machine: {kind.name if kind else f'{machine.core_name()}, no kind with targets'}")
    print(report.table_header(chosen, threads), flush=True)
    results = []
    for result in driver.run_cases(kinds.targets_here(cases), wanted, settings, threads):
        results.append(result)
        print(report.table_row(result, chosen, threads), flush=True)
    print(*report.refusals(results), sep="\n")
    records.update_measurements(kinds.folder_here(output) / FILE, results, begun)
    verdicts = [v for result in results for v in report.judge(result, threads)]
    kinds.record(output, "backward", results, threads, CASES)
    print("", *kinds.columns(output, "backward", CASES), sep="\n")
    return verdicts
