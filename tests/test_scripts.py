"""What scripts/environment.sh decides by the machine that it finds, how steps.sh tells what failed, and usages."""

from __future__ import annotations

import http.server
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import run

ENVIRONMENT = Path(__file__).resolve().parents[1] / "scripts" / "environment.sh"
STEPS = ENVIRONMENT.with_name("steps.sh")
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


def in_steps(program: str) -> subprocess.CompletedProcess[str]:
    """What a script does that sources both."""
    return run(["bash", "-c", f"source {ENVIRONMENT}; source {STEPS}; {program}"])


def test_a_step_that_fails_stops_no_other_and_is_named_at_the_end() -> None:
    done = in_steps("both() { false; echo after; return 3; }; step one false; step two both; step three true; verdict")
    assert done.returncode == 1 and "after" in done.stdout
    table = [line.split() for line in done.stdout.split("== steps\n")[1].splitlines()]
    states = [(words[0], words[-1]) for words in table[:-1]]
    assert states == [("one", "FAILED"), ("two", "FAILED"), ("three", "passed")]
    assert table[-1] == ["FAILED:", "one", "two"]


def test_steps_that_pass_say_so() -> None:
    done = in_steps("step one true; verdict")
    assert done.returncode == 0 and "All checks passed" in done.stdout.splitlines()[-1]


def test_a_package_that_cannot_be_installed_is_not_tested_as_another(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    program = f"bin={tmp_path}; step other with_package triton==3.6.* {tmp_path}/folder touch {ran}; verdict"
    assert "FAILED: other" in in_steps(program).stdout and not ran.exists()


def test_a_command_finds_the_package_of_the_folder_first(tmp_path: Path) -> None:
    (tmp_path / "triton-3.6.0.dist-info").mkdir()
    done = in_steps(f"PYTHONPATH=/before; with_package triton {tmp_path} printenv PYTHONPATH; echo $PYTHONPATH")
    assert done.stdout.split() == [f"{tmp_path}:/before", "/before"]


SCRIPTS = ENVIRONMENT.parent
FILES = [x for x in SCRIPTS.iterdir() if x.is_file() and x != ENVIRONMENT]
TAKE_HELP = sorted(x.name for x in FILES if "help_for" in x.read_text())


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The scripts in a folder that has nothing else, so that whatever they set up would show."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    return tmp_path


@pytest.mark.parametrize("option", [["-h"], ["--help"], ["-k", "merge", "--help"]])
@pytest.mark.parametrize("script", TAKE_HELP)
def test_help_tells_and_does_nothing(copied: Path, script: str, option: list[str]) -> None:
    done = run(["bash", copied / "scripts" / script, *option], cwd=copied)
    assert done.returncode == 0 and not done.stderr
    comment = itertools.takewhile(lambda line: line.startswith("#"), (SCRIPTS / script).read_text().splitlines()[1:])
    assert done.stdout.splitlines() == [line[2:] for line in comment]
    assert [x.name for x in copied.iterdir()] == ["scripts"]


def test_usage_names_what_a_script_reads() -> None:
    """Each variable that a script takes from outside stands in its usage."""
    assert TAKE_HELP == ["demo", "test", "test-core"]
    for script in TAKE_HELP:
        text = (SCRIPTS / script).read_text()
        for variable in set(re.findall(r"\$\{([A-Z_]+):-", text)) - {"PYTHONPATH"}:
            assert re.search(rf"^#     {variable}\b", text, re.MULTILINE), (script, variable)


def options_pass(*options: str) -> tuple[int, str]:
    """How check_pytest_options ends, and what it says."""
    program = f"source {ENVIRONMENT}; check_pytest_options {SCRIPTS / 'test'} {sys.executable} {shlex.join(options)}"
    done = run(["bash", "-c", program])
    return done.returncode, done.stderr


@pytest.mark.parametrize("options", [[], ["-k", "merge or hints"], ["tests/test_merge.py", "-x", "-k", "x", "--lf"]])
def test_options_of_pytest_pass(options: list[str]) -> None:
    assert options_pass(*options) == (0, "")


def test_options_that_pytest_does_not_know_end_in_the_usage() -> None:
    code, said = options_pass("--halp", "-k", "merge")
    assert code == 2 and "unrecognized arguments: --halp" in said and "TEST_WORKERS" in said


def test_what_is_no_interpreter_ends_in_the_usage(copied: Path) -> None:
    done = run(["bash", copied / "scripts" / "test-core", "--quick"], cwd=copied)
    assert done.returncode == 2 and done.stderr.startswith("--quick: got no Python") and "TEST_WORKERS" in done.stderr
    assert [x.name for x in copied.iterdir()] == ["scripts"]
