"""Programs that tests run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

# Ends what hangs, and decides no test: the slowest program takes a minute and a half on one core that is its own.
PATIENCE = 1800  # seconds


def run(command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; its output as text. `options` are those of subprocess.run."""
    return subprocess.run(command, **{"capture_output": True, "text": True, "timeout": PATIENCE, **options})


def run_together(commands: Sequence[Sequence[Any]], patience: float = PATIENCE, **options: Any) -> None:
    """Run programs that wait for each other, until all have ended well.

    None outlives the call: the others of one that fails would wait for it.
    Raises: AssertionError with what the first one to fail wrote, or which were still running after `patience` seconds.
    """
    with tempfile.TemporaryFile("w+") as written:  # one that is not read would stop a program that fills a pipe
        options = {"stdout": written, "stderr": subprocess.STDOUT, **options}
        programs = [subprocess.Popen([*map(str, command)], **options) for command in commands]
        try:
            until = time.monotonic() + patience
            while None in (codes := [program.poll() for program in programs]) and not any(codes):
                running = [n for n, code in enumerate(codes) if code is None]
                assert time.monotonic() < until, f"programs {running} still run after {patience} s"
                time.sleep(0.05)
        finally:
            for program in programs:
                program.kill()
                program.wait()
        written.seek(0)
        assert not any(codes), f"exit statuses {codes}:\n{written.read()}"


def searched(*folders: str | os.PathLike[str]) -> str:
    """PYTHONPATH with folders behind those of this process: what these tests test is what the program imports."""
    return os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), *map(os.fspath, folders)])
