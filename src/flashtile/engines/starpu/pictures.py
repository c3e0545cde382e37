"""A profile as pictures: a Gantt chart of the workers, and the task graph. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from flashtile.engines.starpu.records import Records, TaskRecord
from flashtile.errors import UnavailableError, wrong

# Told apart with any colour vision (Okabe and Ito 2008), light enough for black text.
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#999999")
FAILED = "#d55e00"
NARROW = 4e-3  # of the whole time; no gap is drawn before a bar below it, else nothing would be left of it


def dot(profile: Records) -> str:
    """The task graph in Graphviz' language."""
    colours = colours_of(profile.tasks)
    lines = ["digraph tasks {", '  node [shape=box, style="filled,rounded", fontname="sans-serif", fontsize=10]']
    for task in profile.tasks:
        colour = FAILED if task.outcome == "failed" else colours[task.codelet]
        text = f"{short(task.codelet)}\\n{task.tile.replace(', ', chr(92) + 'n')}"
        lines.append(f'  t{task.number} [label="{text}", fillcolor="{colour}"]')
    lines += [f"  t{earlier} -> t{later}" for earlier, later in profile.dependencies]
    return "\n".join([*lines, "}", ""])


def gantt(profile: Records, path: Path) -> None:
    """See Profile.gantt."""
    if path.suffix.lower() != ".png":
        raise wrong("path", repr(str(path)), "a name that ends in .png")
    tasks = [task for task in profile.tasks if task.outcome != "skipped"]
    if not tasks:
        raise wrong("gantt", "a profile without a task that ran", "tasks submitted inside the `with` block")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as cause:
        raise UnavailableError(f"gantt: got {cause}, expected matplotlib: pip install matplotlib") from cause
    rows = len(profile.workers)
    figure = Figure(figsize=(10, 1.6 + 0.45 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    end = 1e3 * max(task.end for task in tasks)
    for colour, row, bars in _bars(tasks):
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolor=colour, linewidth=0, snap=False)
        gaps = [start for start, length in bars if length > NARROW * end]
        axes.vlines(gaps, row - 0.4, row + 0.4, color="white", linewidth=0.8)
        if colour == FAILED:
            axes.plot([start for start, _ in bars], [row - 0.5] * len(bars), "v", color=colour, clip_on=False)
    axes.set(xlabel="time since the first submission (ms)", xlim=(0, end), ylim=(rows - 0.4, -0.6))
    axes.set_yticks(range(rows), profile.workers)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _busy_shares(axes, tasks, rows, end)
    axes.set_title(f"{len(tasks):,} tasks in {end:.4g} ms", fontsize=10, loc="left")
    legend = [Patch(facecolor=colour, label=label) for label, colour in _legend(tasks)]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)


def colours_of(tasks: Any) -> dict[str, str]:
    """A colour for each codelet, in the order in which they first appear."""
    names = list(dict.fromkeys(task.codelet for task in tasks))
    return {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}


def short(codelet: str) -> str:
    """Its name without the prefix that all have."""
    return codelet.removeprefix("flashtile_")


def _bars(tasks: list[TaskRecord]) -> list[tuple[str, int, list[tuple[float, float]]]]:
    """(colour, worker, [(start, length)] in ms), so that each colour of a row is one collection."""
    colours = colours_of(tasks)
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for task in tasks:
        colour = FAILED if task.outcome == "failed" else colours[task.codelet]
        found[colour, task.worker].append((1e3 * task.start, 1e3 * (task.end - task.start)))
    return [(colour, row, bars) for (colour, row), bars in found.items()]


def _busy_shares(axes: Any, tasks: list[TaskRecord], rows: int, end: float) -> None:
    """Right of each row, the part of the time that its worker spent in tasks."""
    for row in range(rows):
        busy = 1e3 * sum(task.end - task.start for task in tasks if task.worker == row)
        axes.annotate(f" {busy / end:.0%} busy", (end, row), va="center", fontsize=9, annotation_clip=False)


def _legend(tasks: list[TaskRecord]) -> list[tuple[str, str]]:
    rows = []
    for codelet, colour in colours_of(tasks).items():
        lengths = [1e3 * (task.end - task.start) for task in tasks if task.codelet == codelet]
        mean = sum(lengths) / len(lengths)
        each = f"{mean:.3g} ms" if mean >= 0.1 else f"{1e3 * mean:.3g} us"
        rows.append((f"{short(codelet)}: {len(lengths):,} tasks of {each}", colour))
    if any(task.outcome == "failed" for task in tasks):
        rows.append(("failed", FAILED))
    return rows
