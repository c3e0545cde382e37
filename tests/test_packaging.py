"""What a user installs: one pure-Python wheel, whole and typed, with NumPy and llvmlite as its only needs."""

from __future__ import annotations

import email
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

import hatch_build

pytestmark = pytest.mark.core

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel as `pip` would build it, but without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


def wheel_metadata(wheel: pathlib.Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_wheel_is_pure_python(wheel: pathlib.Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        suffixes = {pathlib.PurePath(n).suffix for n in archive.namelist() if n.startswith("flashtile/")}
    assert suffixes <= {".py", ".typed", ".c", ".h"}, "only sources"


def test_wheel_holds_the_whole_package_and_nothing_else(wheel: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {n for n in archive.namelist() if ".dist-info/" not in n}
    sources = (p for p in (ROOT / "src").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    assert packed == {p.relative_to(ROOT / "src").as_posix() for p in sources}
    assert "flashtile/py.typed" in packed


def test_core_needs_only_numpy_and_llvmlite(wheel: pathlib.Path) -> None:
    requirements = wheel_metadata(wheel).get_all("Requires-Dist") or []
    core = {re.split(r"[^\w-]", r)[0] for r in requirements if "extra ==" not in r}
    assert core == {"numpy", "llvmlite"}


def test_wheel_declares_its_license(wheel: pathlib.Path) -> None:
    assert wheel_metadata(wheel)["License-Expression"] == "Apache-2.0"


def test_the_page_of_an_index_has_no_link_that_needs_files_beside_it(wheel: pathlib.Path) -> None:
    metadata = wheel_metadata(wheel)
    assert metadata["Description-Content-Type"] == "text/markdown"
    shown = str(metadata.get_payload())
    assert shown.startswith("# flashtile\n") and not hatch_build.RELATIVE.search(shown)


def test_links_of_that_page_lead_to_files_of_the_sources() -> None:
    readme = (ROOT / "README.md").read_text()
    source = "https://host.example/flashtile"
    shown = hatch_build.page(readme, source)
    assert not hatch_build.RELATIVE.search(shown)
    links = re.findall(re.escape(source) + r"/(blob|raw)/HEAD/([^)]+)\)", shown)
    assert len(links) == len(hatch_build.RELATIVE.findall(readme)) and ("raw", "docs/images/demo.png") in links
    assert [path for _, path in links if not (ROOT / path.partition("#")[0]).is_file()] == []
    without = hatch_build.page(readme, None)
    assert [path for kind, path in links if kind == "blob" and f"(`{path}`)" not in without] == []
    assert "demo.png" not in without


def test_an_sdist_holds_what_builds_it(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = tmp_path.iterdir()
    with tarfile.open(built) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "hatch_build.py", "README.md", "docs/images/demo.png"} <= packed


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {p.parent for p in (ROOT / "src" / "flashtile").rglob("*.py")}
    assert [str(f) for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_version_is_said_once(wheel: pathlib.Path) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert newest is not None
    assert wheel_metadata(wheel)["Version"] == newest[1]
    assert importlib.metadata.version("flashtile") == newest[1]
