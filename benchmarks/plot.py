"""The picture of a run for the docs: every peer's rate in every case, with targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .driver import CaseResult
from .report import OWN, judge


def draw(path: Path, results: Sequence[CaseResult], peers: Sequence[str], threads: int, heading: Sequence[str]) -> None:
    """Left: how many times faster flashtile is than each peer. Right: its share of the measured limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(12, 1.8 + 0.36 * len(results)), width_ratios=(3, 2), layout="constrained"
    )
    rows = {result.case.name: len(results) - 1 - index for index, result in enumerate(results)}
    _draw_ratios(left, results, peers, threads, rows)
    _draw_shares(right, results, threads, rows)
    left.set_yticks(list(rows.values()), [f"{r.case.name}  {r.case.shape}" for r in results], fontsize=8)
    figure.legend(loc="outside lower center", ncols=len(peers) + 1, fontsize=8)
    figure.suptitle("\n".join(heading), fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_ratios(
    axes: Any, results: Sequence[CaseResult], peers: Sequence[str], threads: int, rows: dict[str, int]
) -> None:
    for color, peer in enumerate(peer for peer in peers if not peer.startswith(OWN)):
        points = [
            (m.median / own.median, rows[r.case.name])
            for r in results
            if (own := r.of(OWN, threads)) and (m := r.of(peer, threads))
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), label=peer, color=f"C{color}", s=30, zorder=3)
    targets = [(r.case.ratio, rows[r.case.name]) for r in results if r.case.ratio]
    if targets:
        axes.scatter(*zip(*targets, strict=True), marker="|", color="black", s=160, label="target", zorder=2)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_xlabel(f"peer's time / flashtile's, {threads} threads (right of 1: flashtile is faster)", fontsize=9)
    axes.grid(axis="both", linewidth=0.3)


def _draw_shares(axes: Any, results: Sequence[CaseResult], threads: int, rows: dict[str, int]) -> None:
    for result in results:
        for verdict in judge(result, threads):
            if verdict.measure.startswith("%") and verdict.value is not None:
                axes.barh(rows[result.case.name], verdict.value, height=0.6, color="C9" if result.case.reads else "C0")
                if verdict.target:
                    axes.scatter(verdict.target, rows[result.case.name], marker="|", color="black", s=160, zorder=3)
    axes.set_xlim(0, 110)
    axes.set_xlabel("flashtile: % of one core's peak (dark), of bandwidth (light)", fontsize=9)
    axes.grid(axis="x", linewidth=0.3)
