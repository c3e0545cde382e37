"""What type checkers say of a user's program: right calls pass `mypy --strict` with exact types, wrong ones fail."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashtile

pytest.importorskip("mypy", reason="mypy is an extra: dev")
SOURCES = Path(flashtile.__file__).parent

RIGHT = """
import numpy as np
import flashtile
from typing import Any
from typing_extensions import assert_type
Array = np.ndarray[Any, np.dtype[np.float32]]
def use(x: Array, flag: bool) -> None:
    assert_type(flashtile.attention(x, x, x, causal=True, precision="tf32"), Array)
    assert_type(flashtile.attention(x, x, x, return_lse=True), tuple[Array, Any])
    assert_type(flashtile.attention(x, x, x, return_lse=flag), Array | tuple[Array, Any])
    assert_type(flashtile.plot_coverage((64, 64), path="a.png").ndim, int)
"""
WRONG = ("x, x, x, causl=True", 'x, x, x, precision="fp8"', "x, x, x, window=3", "[1.0], x, x", "x, x")


def mypy(tmp_path: Path, program: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "program.py"]
    environment = os.environ | {"MYPYPATH": str(SOURCES.parent)}
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)


def test_right_and_wrong_calls(tmp_path: Path) -> None:
    right = mypy(tmp_path, RIGHT)
    assert right.returncode == 0, right.stdout + right.stderr
    head = "import numpy as np\nimport flashtile\nx = np.ones((4, 4))\n"
    wrong = mypy(tmp_path, head + "".join(f"flashtile.attention({call})\n" for call in WRONG))
    lines = {int(n) for n in re.findall(r"program\.py:(\d+): error", wrong.stdout)}
    assert lines == set(range(4, 4 + len(WRONG))), wrong.stdout


def test_keywords_are_those_of_the_door() -> None:
    source = (SOURCES / "signature.py").read_text().split("class Keywords")[1]
    listed = set(re.findall(r"^        (\w+): ", source, re.M))
    keywords = {p.name for p in inspect.signature(flashtile.attention).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert listed == keywords - {"return_lse"}
