"""Every example that a reader can copy runs: docstrings, and the Python blocks of README.md and docs/."""

from __future__ import annotations

import doctest
import importlib
import pathlib
import re
import sys
import types

import numpy as np
import page_runner
import pytest
from page_runner import OPTIONS, PYTHON_BLOCK, python_blocks, run_page
from processes import run

import flashtile

ROOT = pathlib.Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "images"
STARPU = re.compile(r"import starpu(_mpi)?\b|flashtile\.starpu(_mpi)?\b|engine=\"starpu\"|memory_limit=")
OPTIONAL_IMPORT = re.compile(r"import (?:\w+, )*(?:flashtile\.)?(torch|jax|ml_dtypes|transformers|dask|zarr)\b")


def run_in_a_process(page: pathlib.Path, folder: pathlib.Path) -> None:
    """Run a page that starts and stops StarPU, of which a process has one; files that it writes go to the folder."""
    from flashtile.engines import starpu
    from flashtile.engines.starpu_mpi import build as ranks

    if reason := starpu.unavailable():
        pytest.skip(f"StarPU: {reason}")
    if "starpu_mpi" in page.read_text() and (reason := ranks.missing()):
        pytest.skip(f"StarPU-MPI: {reason}")
    command = [sys.executable, page_runner.__file__, str(page)]
    done = run(command, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def pages() -> list[pathlib.Path]:
    candidates = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [p for p in candidates if PYTHON_BLOCK.search(p.read_text())]


def modules() -> list[str]:
    """Every module of the package, by its file: nothing is imported for the list."""
    root = pathlib.Path(flashtile.__file__).parent
    files = [file.relative_to(root.parent).with_suffix("") for file in root.rglob("*.py")]
    names = [".".join(file.parts).removesuffix(".__init__") for file in files]
    return sorted(name for name in names if not name.endswith("__main__"))


def import_module(name: str) -> types.ModuleType:
    """Import a module of the package; one whose optional package is missing skips the test."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("flashtile"):
            raise
        pytest.skip(f"{name} needs {missing.name}")


@pytest.fixture
def folder_of_its_own(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page writes stays out of the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("folder_of_its_own")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("page", pages(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_page_examples_run(page: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text()
    for package in OPTIONAL_IMPORT.findall(python_blocks(text)):
        pytest.importorskip(package)
    if STARPU.search(python_blocks(text)):
        run_in_a_process(page, tmp_path)
        return
    results = run_page(text, page.name, str(page))
    assert results.attempted > 0, "the page has a Python block without a `>>>` example"
    assert results.failed == 0, capsys.readouterr().out
    for drawn in tmp_path.glob("*.png"):
        shown = PICTURES / drawn.name
        assert shown.exists() and same_picture(drawn, shown), f"another picture than the page's; cp {drawn} {shown}"


def same_picture(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two PNGs are equal, pixel by pixel; of two versions of matplotlib, whether the tiles' areas agree."""
    from PIL import Image

    pictures = [Image.open(path) for path in (one, other)]
    pixels = [np.asarray(picture.convert("RGB"), int) for picture in pictures]
    if pictures[0].info.get("Software") == pictures[1].info.get("Software"):
        return np.array_equal(*pixels)
    colours = ([31, 90, 146], [240, 168, 48])  # full and partial, in plot.py
    return all(np.ptp([(p == colour).all(-1).mean() for p in pixels]) < 0.003 for colour in colours)


def test_the_comparison_of_pictures_sees_another_map(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    shown = PICTURES / "tiles-local.png"
    assert same_picture(shown, shown)
    flashtile.plot_coverage((1024, 64), window=(190, 0), tile=(64, 64), path=tmp_path / "other.png")
    assert not same_picture(shown, tmp_path / "other.png")
    Image.open(tmp_path / "other.png").save(tmp_path / "unsigned.png")
    assert same_picture(tmp_path / "other.png", tmp_path / "unsigned.png")
    assert not same_picture(shown, tmp_path / "unsigned.png")


def test_every_picture_is_shown() -> None:
    text = "".join(page.read_text() for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
    assert [picture.name for picture in PICTURES.iterdir() if f"images/{picture.name})" not in text] == []


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_python_block_is_an_example(page: pathlib.Path) -> None:
    blocks = [b[1] for b in PYTHON_BLOCK.finditer(page.read_text())]
    assert [b for b in blocks if not b.startswith(">>> ")] == []


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = import_module(name)
    results = doctest.testmod(module, extraglobs={"np": np, "flashtile": flashtile}, optionflags=OPTIONS)
    assert results.failed == 0, capsys.readouterr().out


def test_the_page_checker_sees_a_wrong_result(capsys: pytest.CaptureFixture[str]) -> None:
    page = "Text.\n```python\n>>> 1 + 1\n3\n```\n```python\n>>> 2 + 2\n4\n```\n"
    results = run_page(page, "page", "page.md")
    assert (results.attempted, results.failed) == (2, 1)
    assert 'File "page.md", line 3' in capsys.readouterr().out


def test_a_wrong_page_on_starpu_fails(tmp_path: pathlib.Path) -> None:
    """In its own process, too; and so does one without an example."""
    page = tmp_path / "page.md"
    for text in ("```python\n>>> from flashtile import starpu\n>>> 1 + 1\n3\n```\n", "Text.\n"):
        page.write_text(text)
        with pytest.raises(AssertionError):
            run_in_a_process(page, tmp_path)


def test_the_page_checker_keeps_names_from_block_to_block() -> None:
    page = "```python\n>>> x = 41\n```\nand then\n```python\n>>> x + 1\n42\n```\n"
    results = run_page(page, "page", "page.md")
    assert (results.attempted, results.failed) == (2, 0)


def test_relative_links_lead_somewhere() -> None:
    link = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
        for target in link.findall(page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []
