"""The demo: denoise a real photograph by exact non-local means, one attention call over all of its pixels.

photo.py    the photograph, noise, pictures on disk     nlm.py     non-local means as attention
measure.py  memory of the call                          report.py  what was found
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

import flashtile
from flashtile.demo.measure import cpu_name, peak_growth
from flashtile.demo.nlm import Tokens, reweigh_self, tokens
from flashtile.demo.photo import add_noise, photograph, psnr, save, save_comparison
from flashtile.demo.report import Report
from flashtile.errors import wrong
from flashtile.progress import reporter
from flashtile.testing import expect

SIZE = 352  # side of the default crop: 123,904 tokens, about 20 s on two cores
SIGMA = 0.1
SAMPLE_ROWS = 32
FILES = ("clean.png", "noisy.png", "denoised.png", "comparison.png", "report.txt", "report.json")


def run(folder: Path, *, size: int | None = SIZE, sigma: float = SIGMA, seed: int = 0, progress: Any = None) -> Report:
    """Denoise the photograph; write the pictures and the report (see FILES) into a folder, made if need be.

    Units:    size is the side of a square crop in pixels, None for the whole picture; sigma the noise's standard
              deviation where white is 1; progress as in flashtile.attention.
    Numerics: float32; the filter width h is sigma. The largest error is that of `o` on a fixed sample of rows,
              against the reference kernel in float64.
    Raises:   SpecError for a size or sigma out of range, UnavailableError without matplotlib; OSError.
    """
    if not (math.isfinite(sigma) and 0 < sigma <= 1):
        raise wrong("sigma", sigma, "a number above 0, at most 1")
    clean = photograph(size)
    folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made must not cost the whole run
    noisy = add_noise(clean, sigma, seed)
    t = tokens(noisy, h=sigma)
    o, lse, found = _attend(t, progress)
    denoised = reweigh_self(o, lse, t, weight=math.exp(-6)).reshape(clean.shape)
    report = Report(
        photo="grace_hopper.jpg of matplotlib",
        rows=clean.shape[0],
        columns=clean.shape[1],
        sigma=sigma,
        seed=seed,
        psnr_noisy=psnr(noisy, clean),
        psnr_denoised=psnr(denoised, clean),
        **found,
        **_largest_error(o, t),
    )
    _write(folder, report, clean, noisy, denoised)
    return report


def _attend(t: Tokens, progress: Any) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """The attention call, timed and measured: o (pixels, 3), lse (pixels,), and fields of the report."""
    start = time.perf_counter()
    call = flashtile.explain(*t.arrays, **t.scores)  # compiles the kernel
    flashtile.attention(t.patches[:1], *t.arrays[1:], **t.scores)
    first_call = time.perf_counter() - start
    report = reporter(progress)  # a bar's own memory is not the call's
    o = np.full_like(t.colours, np.nan)  # written, so that its pages are there before the call
    start = time.perf_counter()
    with peak_growth() as growth:
        _, lse = t.attend(return_lse=True, out=o, progress=report)
        seconds = time.perf_counter() - start
    gflop = call.flops / 1e9
    facts = {
        "tokens": len(t.patches),
        "head_size": t.patches.shape[1],
        "value_size": t.colours.shape[1],
        "cpu": cpu_name(),
        "threads": call.threads,
        "kernel": call.kernel,
        "isa": call.isa,
        "first_call_seconds": first_call,
        "seconds": seconds,
        "gflop": gflop,
        "gflop_per_second": gflop / seconds,
        "extra_bytes": None if growth.bytes is None else max(growth.bytes - lse.nbytes, 0),
        "scratch_bytes": call.scratch_bytes * call.threads,
        "unfused_bytes": call.unfused_bytes,
    }
    return o, lse, facts


def _largest_error(o: np.ndarray, t: Tokens) -> dict[str, Any]:
    """Fields of the report: the error of a sample of the rows of o against float64, and what the rule allows."""
    rows = np.sort(np.random.default_rng(0).choice(len(o), min(SAMPLE_ROWS, len(o)), replace=False))
    exact, _ = expect(t.patches[rows], *t.arrays[1:], **t.scores)
    error = float(np.max(np.abs(o[rows] - exact.value)))
    return {"sample_rows": len(rows), "largest_error": error, "allowed_error": float(exact.allowed)}


def _write(folder: Path, report: Report, clean: np.ndarray, noisy: np.ndarray, denoised: np.ndarray) -> None:
    save(clean, folder / "clean.png")
    save(noisy, folder / "noisy.png")
    save(denoised, folder / "denoised.png")
    panels = {
        "photograph": clean,
        f"with noise: {report.psnr_noisy:.1f} dB": noisy,
        f"denoised: {report.psnr_denoised:.1f} dB": denoised,
    }
    save_comparison(panels, folder / "comparison.png")
    (folder / "report.txt").write_text(str(report))
    (folder / "report.json").write_text(report.json())
