"""Tests of several ranks: programs under mpirun, two or four processes on what CPUs there are."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import processes
import pytest
from rank_cases import Ranks

from flashtile import launch
from flashtile.engines.starpu_mpi import build

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Run a program of this folder, or a text, on n ranks to its end."""
    if (reason := build.missing()) is not None:
        pytest.skip(reason)
    build.load()  # once, rather than by several ranks at a time

    def run(n: int, program: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
        path = HERE / program
        if not program.endswith(".py"):
            path = tmp_path_factory.mktemp("program") / "program.py"
            path.write_text(program)
        environment = launch.environment(n) | {"PYTHONPATH": processes.searched(HERE.parent)}
        return processes.run([*launch.command(n), path, *map(str, arguments)], env=environment)

    return run
