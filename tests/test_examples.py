"""Every file in examples/ runs as it stands, and checks its own result."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from processes import run

from flashtile.engines.starpu_mpi import build

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    for package in ("torch", "transformers"):
        if f"\nimport {package}\n" in example.read_text():
            pytest.importorskip(package)
    if "\nfrom mpi4py " in example.read_text() and (reason := build.missing()) is not None:
        pytest.skip(reason)
    done = run([sys.executable, str(example)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_examples_are_found() -> None:
    assert len(EXAMPLES) >= 3


def test_denoising_example_removes_noise() -> None:
    example = next(path for path in EXAMPLES if path.stem == "denoise_your_picture")
    done = run([sys.executable, str(example)])
    before, after = (float(number) for number in re.findall(r"([\d.]+) dB", done.stdout))
    assert after > before + 5
