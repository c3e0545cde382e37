"""What type checkers say of a user's program: right calls pass `mypy --strict` with exact types, wrong ones fail."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import flashtile
from flashtile import engines, kernels, signature

SOURCES = Path(flashtile.__file__).parent

NUMPY = """
import flashtile
import numpy as np
from typing import Any
from typing_extensions import assert_type
Array = np.ndarray[tuple[int, int], np.dtype[np.float16]]
Lse = np.ndarray[Any, np.dtype[np.floating[Any]]]
class CuPy:
    __cuda_array_interface__: dict[str, Any]
class Jax:
    sharding: object
def use(x: Array, mapped: np.memmap[Any, np.dtype[np.float64]], cupy: CuPy, jax: Jax, flag: bool) -> None:
    assert_type(flashtile.attention(x, x, x, causal=True, precision="tf32", kernel="cpu", align=np.int64(3)), Array)
    assert_type(flashtile.attention(x, x, x, return_lse=True, align=np.array([1, 2])), tuple[Array, Lse])
    assert_type(flashtile.attention(x, x, x, return_lse=flag, align=[1, 2]), Array | tuple[Array, Lse])
    mapped_o, mapped_lse = flashtile.attention(mapped, mapped, mapped, return_lse=True)
    assert_type(mapped_o, np.ndarray[Any, np.dtype[np.float64]])
    assert_type(mapped_lse, Lse)
    assert_type(flashtile.attention(cupy, cupy, cupy, return_lse=True), tuple[CuPy, CuPy])
    assert_type(flashtile.attention(jax, jax, jax), Jax)
    assert_type(flashtile.plot_coverage((64, 64), path="a.png").tiles.ndim, int)
    flashtile.explain(x, engine="direct", kernel="vanilla", align="top_left", window=(3, None))
"""
TORCH = """
import flashtile
import flashtile.torch
import torch
from torch import Tensor
from typing_extensions import assert_type
def use(x: Tensor, flag: bool) -> None:
    for attention in (flashtile.attention, flashtile.torch.attention):
        assert_type(attention(x, x, x, causal=True, precision="tf32", align=torch.tensor([1, 2])), Tensor)
        assert_type(attention(x, x, x, return_lse=True), tuple[Tensor, Tensor])
        assert_type(attention(x, x, x, return_lse=flag), Tensor | tuple[Tensor, Tensor])
"""
NUMPY_HEAD = "import flashtile, numpy\nx = numpy.ones((4, 4))\nattention = flashtile.attention\n"
TORCH_HEAD = "import flashtile.torch, torch\nx = torch.ones((4, 4))\nattention = flashtile.torch.attention\n"
WRONG = (
    "x, x, x, causl=True",
    'x, x, x, precision="fp8"',
    'x, x, x, kernel="gpu"',
    'x, x, x, engine="threads"',
    'x, x, x, align="left"',
    "x, x, x, align=0.5",
    "x, x, x, window=3",
    "x, x, x, progress=1",
    "[1.0], x, x",
    "x, x",
)


def test_right_calls_have_exact_types_and_each_wrong_one_is_an_error(tmp_path: Path) -> None:
    """As installed packages are checked: by py.typed, flashtile's own errors unseen. One run: torch takes a while."""
    pytest.importorskip("mypy", reason="mypy is an extra: dev")
    programs = {"right_numpy": NUMPY, "wrong_numpy": NUMPY_HEAD}
    if importlib.util.find_spec("torch"):
        programs |= {"right_torch": TORCH, "wrong_torch": TORCH_HEAD}
    expected = set()
    for name, program in programs.items():
        calls = [f"attention({call})\n" for call in WRONG] if name.startswith("wrong") else []
        (tmp_path / f"{name}.py").write_text(program + "".join(calls))
        expected |= {(name, program.count("\n") + 1 + n) for n in range(len(calls))}
    command = [sys.executable, "-m", "mypy", "--strict", *(f"{name}.py" for name in programs)]
    environment = os.environ | {"PYTHONPATH": str(SOURCES.parent)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    found = {(name, int(line)) for name, line in re.findall(r"^(\w+)\.py:(\d+): error", done.stdout, re.M)}
    assert found == expected, done.stdout + done.stderr


def test_keywords_are_those_of_the_door() -> None:
    source = (SOURCES / "signature.py").read_text().split("class Keywords")[1]
    listed = set(re.findall(r"^        (\w+): ", source, re.M))
    keywords = {p.name for p in inspect.signature(flashtile.attention).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert listed == keywords - {"return_lse"}


def test_names_are_those_of_the_folders() -> None:
    assert set(get_args(signature.Kernel)) == {"auto", *(name for name, _ in kernels.families())}
    assert set(get_args(signature.Engine)) == {"auto", *(name for name, _ in engines.engines())}
