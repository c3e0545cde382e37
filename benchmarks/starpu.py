"""`python -m benchmarks.starpu`: the StarPU engine beside the direct one, its own baseline and its schedulers.

Every contestant is a process of its own with the same number of workers, checked before it is timed, taking turns.
"""

from __future__ import annotations

import argparse
import sys

from . import driver, kinds, machine, overheads
from .cases import ALL_CASES, AMX
from .report import Verdict, verdict_lines

CASE = "f32-4k64"
PEERS = ("flashtile", "starpu", "starpu_dmda", "starpu_tasks", "starpu_vanilla", "numpy")
PARTS = ("engines", "tiles", "submission", "files")
# subject, the faster, the slower, least ratio of their times
RATIOS = (
    ("engine starpu", "starpu", "flashtile", 0.95, "direct / starpu"),  # on tiles AMX_TARGET
    ("calibrated dmda", "starpu_dmda", "starpu", 0.97, "lws / dmda (noise: 3%)"),
    ("tasks one by one", "starpu_tasks", "starpu", 0.85, "batched / one by one"),
    ("fused against unfused", "starpu", "starpu_vanilla", 2.0, "vanilla codelets / starpu"),
    ("fused against NumPy's unfused", "starpu", "numpy", None, "numpy / starpu"),
)
AMX_TARGET = 0.9  # of "engine starpu", in bf16 on matrix registers
SUBMISSION_TARGET = 12.0  # microseconds a task
# (queries, keys): one whose queries fit in the limit, one whose queries do not
LARGER = ((1024, 98304), (8192, 24576))
FILES_TARGET = 0.7  # of the rate in memory


def main(arguments: list[str] | None = None) -> int:
    """Print the rows. A missed target is reported, not an error; a wrong result is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.starpu", description=__doc__)
    parser.add_argument("--case", default=CASE, choices=[case.name for case in ALL_CASES])
    parser.add_argument("--threads", type=int, default=2, help="workers (default 2)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    options = parser.parse_args(arguments)
    (case,) = [case for case in ALL_CASES if case.name == options.case]
    parts = options.parts or PARTS
    print(machine.describe())
    verdicts: list[Verdict] = []
    wrong = False
    if "engines" in parts:
        wanted = [(peer, options.threads) for peer in PEERS]
        settings = driver.Settings(rounds=options.rounds, sample_seconds=0.3)
        (result,) = driver.run_cases([case], wanted, settings)
        print(f"{case.name} {case.shape}, {options.threads} workers, {options.rounds} rounds")
        for m in result.measurements:
            if m.status == "timed":
                print(f"  {m.peer:16} {m.median * 1e3:9.2f} ms  spread {m.spread:5.1%}  {m.rate:7.1f} GFLOP/s")
            else:
                print(f"  {m.peer:16} {m.status}: {m.why}")
            wrong |= m.status == "failed"
        for subject, fast, slow, target, measure in RATIOS:
            ours, theirs = (result.of(peer, options.threads) for peer in (fast, slow))
            ratio = theirs.median / ours.median if ours and theirs else None
            if subject == RATIOS[0][0] and case.dtype == "bf16" and (kind := kinds.here()) and kind.name == AMX:
                target = AMX_TARGET
            verdicts.append(Verdict(subject, measure, ratio, target))
    if "tiles" in parts:
        found = overheads.run_snippet("starpu_tiles", case.name, threads=options.threads)
        print("milliseconds by tile (queries x keys):", found)
    if "submission" in parts:
        found = overheads.run_snippet("starpu_submission", threads=options.threads)
        value = found.get("microseconds")
        print("submission of 10,000 empty tasks:", found)
        verdicts.append(Verdict("submission and execution", "us a task", value, SUBMISSION_TARGET, at_most=True))
    if "files" in parts:
        for queries, keys in LARGER:
            sizes = f"{queries} queries, {keys} keys"
            found = overheads.run_snippet("larger", *map(str, (queries, keys, options.rounds)), threads=options.threads)
            print(f"files, a fourth of K and V in memory, {sizes}:", found)
            for what in ("forward", "backward"):
                ratio = found[f"{what}_memory"] / found[f"{what}_files"] if f"{what}_files" in found else None
                verdicts.append(Verdict(f"{what}, {sizes}", "in memory / from files", ratio, FILES_TARGET))
    print(*verdict_lines(verdicts), sep="\n")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
