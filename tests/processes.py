"""Programs that tests run in a process of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Any

# Ends what hangs, and decides no test: the slowest program takes a minute and a half on one core that is its own.
PATIENCE = 1800  # seconds


def run(command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; its output as text. `options` are those of subprocess.run."""
    return subprocess.run(command, **{"capture_output": True, "text": True, "timeout": PATIENCE, **options})


def searched(*folders: str | os.PathLike[str]) -> str:
    """PYTHONPATH with folders behind those of this process: what these tests test is what the program imports."""
    return os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), *map(os.fspath, folders)])
