"""The demo at a small size: the pictures and the report are there, and what they claim holds."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

import flashtile
from flashtile import demo
from flashtile.demo import measure, nlm
from flashtile.demo.report import Report

matplotlib = pytest.importorskip("matplotlib", reason="the demo's photograph is matplotlib's")

SIZE = 64
SIGMA = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "made" / "for it"


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return demo.run(folder, size=SIZE, sigma=SIGMA)


def test_report_describes_the_call(report: Report) -> None:
    assert (report.rows, report.columns, report.tokens) == (SIZE, SIZE, SIZE**2)
    assert (report.head_size, report.value_size) == (3 * 5 * 5, 3)
    assert report.gflop == 2 * SIZE**4 * (75 + 3) / 1e9
    assert report.gflop_per_second == pytest.approx(report.gflop / report.seconds)
    assert report.unfused_bytes == SIZE**4 * 4
    assert report.first_call_seconds > 0
    assert report.threads == flashtile.get_num_threads()
    assert report.kernel in ("cpu", "vanilla")


def test_error_is_measured_and_within_the_rule(report: Report) -> None:
    assert report.sample_rows == demo.SAMPLE_ROWS
    assert 0 < report.largest_error <= report.allowed_error < 1e-4


@pytest.mark.slow
def test_error_is_within_the_rule_at_the_default_size(tmp_path: Path) -> None:
    report = demo.run(tmp_path)
    assert report.tokens > 100_000
    assert report.largest_error <= report.allowed_error


def test_noise_goes_and_the_picture_stays(report: Report, folder: Path) -> None:
    # Clipping to 0 ... 1 takes a little of the noise off what -20 log10(sigma) says.
    assert report.psnr_noisy == pytest.approx(-20 * math.log10(SIGMA), abs=1.5)
    assert report.psnr_denoised > report.psnr_noisy + 5
    clean, denoised = (_png(folder / name) for name in ("clean.png", "denoised.png"))
    assert clean.shape == denoised.shape == (SIZE, SIZE, 3)
    # What was written is what the report speaks of, up to rounding to 8 bits.
    written = -10 * np.log10(np.mean((clean - denoised) ** 2))
    assert written == pytest.approx(report.psnr_denoised, abs=0.1)


def test_every_file_is_written(report: Report, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(demo.FILES)
    assert Report(**json.loads((folder / "report.json").read_text())) == report
    assert (folder / "report.txt").read_text() == str(report)
    assert f"{SIZE**2:,} queries" in str(report)
    assert _png(folder / "comparison.png").shape[1] > 3 * 200


def test_noise_has_a_seed(tmp_path: Path, report: Report) -> None:
    again, other = (demo.run(tmp_path, size=SIZE, sigma=SIGMA, seed=seed) for seed in (0, 1))
    assert again.psnr_denoised == report.psnr_denoised
    assert other.psnr_denoised != report.psnr_denoised


def test_progress_counts_up(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    demo.run(tmp_path, size=SIZE, progress=lambda *counts: calls.append(counts))
    done, totals = zip(*calls, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == sorted(done) and done[-1] == totals[0]


@pytest.mark.parametrize(("option", "value"), [("size", 31), ("size", 513), ("sigma", 0), ("sigma", math.nan)])
def test_bad_options_write_nothing(tmp_path: Path, option: str, value: float) -> None:
    with pytest.raises(flashtile.SpecError, match=f"^{option}: got {value}, expected "):
        demo.run(tmp_path / "new", **{option: value})
    assert not (tmp_path / "new").exists()


def test_missing_photograph_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("no sample data")

    monkeypatch.setattr("matplotlib.cbook.get_sample_data", missing)
    with pytest.raises(flashtile.UnavailableError, match=r"no sample data.*pip install 'flashtile\[demo\]'"):
        demo.run(tmp_path, size=SIZE)


def test_attention_of_tokens_is_non_local_means() -> None:
    """Against the definition: every pair of patches compared, and the weight of a pixel in itself set by hand."""
    noisy = np.random.default_rng(0).random((9, 7, 3))
    h, weight = 0.3, 0.25
    t = nlm.tokens(noisy, h)
    o, lse = t.attend(return_lse=True)
    p = nlm.patches(noisy).astype(np.float64)
    w = np.exp(-np.sum((p[:, None] - p) ** 2, axis=-1) / h**2)
    colours = noisy.reshape(-1, 3)
    np.testing.assert_allclose(o, w @ colours / w.sum(axis=1, keepdims=True), atol=1e-5)
    np.fill_diagonal(w, weight)
    expected = w @ colours / w.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(nlm.reweigh_self(o, lse, t, weight), expected, atol=1e-4)


def test_patch_distance_is_the_mean_over_the_patch() -> None:
    """Pictures that differ by a constant colour step have patches at that step's squared length."""
    picture = np.zeros((12, 24, 3))
    picture[:, 12:] = [0.1, 0.2, 0.3]
    p = nlm.patches(picture).reshape(12, 24, -1)
    assert np.sum((p[6, 4] - p[6, 20]) ** 2) == pytest.approx(0.01 + 0.04 + 0.09, rel=1e-5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_memory_meter_sees_a_passing_peak() -> None:
    size, counted_late = 64 << 20, 1 << 20
    with measure.peak_growth() as growth:
        np.full(size, 1, np.uint8)
    assert growth.bytes == pytest.approx(size, abs=counted_late)
    with measure.peak_growth() as growth:  # the peak before is forgotten
        pass
    assert growth.bytes == pytest.approx(0, abs=counted_late)


def test_memory_is_not_that_of_the_scores(tmp_path: Path) -> None:
    report = demo.run(tmp_path, size=96)
    assert report.extra_bytes is None or report.extra_bytes < report.unfused_bytes / 8


@pytest.mark.parametrize(("extra", "text"), [(None, "not measured"), (4e5, "less than 1 MB"), (52e6, "52 MB")])
def test_report_claims_no_more_than_the_meter_tells(report: Report, extra: float | None, text: str) -> None:
    assert f"extra memory   {text}" in str(dataclasses.replace(report, extra_bytes=extra))


def _png(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as file:
        return np.asarray(file.convert("RGB")) / 255.0
