"""Tests of machine code and launches: they compile, so Triton must not interpret in their process."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from flashtile.kernels.triton import compiler_missing

# The core's tests run without either; these files import them at once.
if find_spec("triton") is None or find_spec("torch") is None:
    collect_ignore_glob = ["interpreted/*", "test_triton_programs.py", "test_triton_specialisation.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot compile here, with the reason."""
    reason = compiler_missing()
    if os.environ.get("TRITON_INTERPRET") == "1":
        reason = "Triton interprets in this process and does not compile"
    for item in items:
        here = Path(__file__).parent
        if reason and item.path.parent == here:
            item.add_marker(pytest.mark.skip(reason=reason))
