"""Optional packages load only on use: a fresh interpreter imports NumPy, llvmlite and nothing else of ours."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from processes import run

pytestmark = pytest.mark.core

_REPORT = """
import sys
before = set(sys.modules)  # what the interpreter's own site packages load is not ours
{action}
roots = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(*sorted(roots - set(sys.stdlib_module_names) - {{"flashtile", "numpy", "llvmlite"}}))
"""

_SETUP = "import numpy as np, flashtile; q = np.ones((1, 1, 4, 8), np.float32); "
_ACTIONS = {
    "import": "import flashtile",
    "testing": "import flashtile.testing",
    "explain": _SETUP + "flashtile.explain(q, q, q)",
    **{
        f"call {name}": f"{_SETUP}flashtile.attention(q, q, q, kernel={name!r})"
        for name in ("auto", "reference", "vanilla")
    },
}


def _foreign_modules(action: str) -> list[str]:
    """The top-level modules that an action loads beyond the standard library and the core's two dependencies."""
    command = [sys.executable, "-c", _REPORT.format(action=action)]
    done = run(command)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("action", _ACTIONS.values(), ids=_ACTIONS.keys())
def test_core_loads_no_optional_package(action: str) -> None:
    assert _foreign_modules(action) == []


def test_report_sees_an_optional_package() -> None:
    assert "ml_dtypes" in _foreign_modules("import ml_dtypes")


# Of each door: the libraries that it loads, and the doors that it stands on.
DOORS = {
    "torch": "torch",
    "transformers": "torch transformers flashtile.torch",
    "flash_attn": "torch flashtile.torch",
    "jax": "jax",
    "onnx": "onnx",
    "starpu": "",
    "nntile": "",
}
_LOADED = """
import sys, flashtile.{door}
libraries = {{"torch", "transformers", "flash_attn", "jax", "onnx", "onnxruntime", "dask", "mpi4py"}}
doors = {{"flashtile." + name for name in {doors!r}}}
print(*sorted((libraries | doors) & set(sys.modules)))
"""


def test_the_torch_door_alone_leaves_the_compiler_and_other_doors() -> None:
    """The import of the compiler takes longer than torch's own."""
    pytest.importorskip("torch")
    counts = "import sys, torch; before = set(sys.modules); import flashtile.torch; print(*set(sys.modules) - before)"
    done = run([sys.executable, "-c", counts])
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "flashtile.torch.operator" in loaded and "torch._dynamo" not in loaded
    assert not loaded & {"transformers", "jax", "onnx"}
    assert not loaded & {f"flashtile.{door}" for door in DOORS if door != "torch"}


@pytest.mark.parametrize("door", [door for door in DOORS if door != "torch"])
def test_a_door_alone_loads_no_other(door: str) -> None:
    """Neither another door, beyond those that it stands on, nor another library, nor the real package of its name."""
    loads = DOORS[door].split()
    for name in loads:
        pytest.importorskip(name.partition(".")[0])
    done = run([sys.executable, "-c", _LOADED.format(door=door, doors=list(DOORS))])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted([*loads, f"flashtile.{door}"])


def test_every_door_is_listed() -> None:
    """As the page on the architecture has them."""
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    (row,) = re.findall(r"^\| \*\*doors\*\*: (.*?);", page, re.MULTILINE)
    assert set(re.findall(r"flashtile\.(\w+)", row)) == set(DOORS)
