"""What type checkers say of a user's program: right calls pass `mypy --strict` with exact types, wrong ones fail."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
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
Check = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def mypy(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Check a program that uses flashtile as installed packages are used: by its py.typed, its own errors unseen."""
    pytest.importorskip("mypy", reason="mypy is an extra: dev")
    folder = tmp_path_factory.mktemp("mypy")

    def check(program: str) -> subprocess.CompletedProcess[str]:
        (folder / "program.py").write_text(program)
        command = [sys.executable, "-m", "mypy", "--strict", "program.py"]
        environment = os.environ | {"PYTHONPATH": str(SOURCES.parent)}
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)

    return check


def needs(library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is an extra")


@pytest.mark.parametrize(("library", "program"), [("numpy", NUMPY), ("torch", TORCH)])
def test_right_calls_pass_with_exact_types(mypy: Check, library: str, program: str) -> None:
    needs(library)
    right = mypy(program)
    assert right.returncode == 0, right.stdout + right.stderr


@pytest.mark.parametrize(("library", "head"), [("numpy", NUMPY_HEAD), ("torch", TORCH_HEAD)])
def test_each_wrong_call_is_an_error(mypy: Check, library: str, head: str) -> None:
    needs(library)
    wrong = mypy(head + "".join(f"attention({call})\n" for call in WRONG))
    lines = {int(n) for n in re.findall(r"program\.py:(\d+): error", wrong.stdout)}
    first = head.count("\n") + 1
    assert lines == set(range(first, first + len(WRONG))), wrong.stdout + wrong.stderr


def test_keywords_are_those_of_the_door() -> None:
    source = (SOURCES / "signature.py").read_text().split("class Keywords")[1]
    listed = set(re.findall(r"^        (\w+): ", source, re.M))
    keywords = {p.name for p in inspect.signature(flashtile.attention).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert listed == keywords - {"return_lse"}


def test_names_are_those_of_the_folders() -> None:
    assert set(get_args(signature.Kernel)) == {"auto", *(name for name, _ in kernels.families())}
    assert set(get_args(signature.Engine)) == {"auto", *(name for name, _ in engines.engines())}
