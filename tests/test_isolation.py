"""Optional packages load only on use: a fresh interpreter imports NumPy, llvmlite and nothing else of ours."""

from __future__ import annotations

import sys

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
    "doors": "import flashtile.nntile, flashtile.starpu",
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


def test_the_torch_door_leaves_the_compiler_alone() -> None:
    """Its import takes longer than torch's own."""
    pytest.importorskip("torch")
    counts = "import sys, torch; before = set(sys.modules); import flashtile.torch; print(*set(sys.modules) - before)"
    done = run([sys.executable, "-c", counts])
    assert done.returncode == 0, done.stderr
    assert "flashtile.torch.operator" in done.stdout and "torch._dynamo" not in done.stdout


def test_report_sees_an_optional_package() -> None:
    assert "ml_dtypes" in _foreign_modules("import ml_dtypes")
