"""What scripts/environment.sh decides by the machine that it finds."""

from __future__ import annotations

import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import run

ENVIRONMENT = Path(__file__).resolve().parents[1] / "scripts" / "environment.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


class Index(http.server.BaseHTTPRequestHandler):
    """An index that has torch."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/cpu/torch/" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def options_of_pip(devices: Path, index: str) -> str:
    """What cpu_torch prints."""
    environment = os.environ | {"TORCH_CPU_INDEX": index, "no_proxy": "127.0.0.1"}
    program = f"source {ENVIRONMENT}; cpu_torch {sys.executable} {devices}"
    return run(["bash", "-c", program], check=True, env=environment).stdout.strip()


def test_without_a_gpu_torch_comes_from_the_index_of_cpu_builds(tmp_path: Path, index: str) -> None:
    assert options_of_pip(tmp_path, f"{index}/cpu") == f"--extra-index-url {index}/cpu"


@pytest.mark.parametrize("device", ["nvidia0", "kfd"])
def test_with_a_gpu_torch_is_the_one_of_the_usual_index(tmp_path: Path, index: str, device: str) -> None:
    (tmp_path / device).touch()
    assert options_of_pip(tmp_path, f"{index}/cpu") == ""


def test_an_index_that_does_not_answer_is_not_asked(tmp_path: Path, index: str) -> None:
    assert options_of_pip(tmp_path, f"{index}/elsewhere") == ""
    assert options_of_pip(tmp_path, "http://127.0.0.1:1") == ""
