"""The Triton family where it cannot run, which is most places: it says why, and imports nothing to find out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from processes import run

import flashtile
from flashtile import cli, kernels
from flashtile.arrays import contiguous
from flashtile.errors import SpecError, UnavailableError
from flashtile.kernels import triton as family
from flashtile.kernels.triton import driver, tiles
from flashtile.kernels.triton.backward_tiles import OLDER, TABLE, rows_for
from flashtile.spec import AttentionSpec

pytestmark = pytest.mark.core


def reasons() -> dict[str, str]:
    return {name: reason for _, name, available, reason in kernels.survey() if not available}


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "triton is not installed: pip install 'triton>=3.6,<3.10'"),
        ("3.5.1", "triton is 3.5.1, not from 3.6 to below 3.10: pip install 'triton>=3.6,<3.10'"),
        ("3.10.0", "triton is 3.10.0, not from 3.6 to below 3.10: pip install 'triton>=3.6,<3.10'"),
        ("4.0.0", "triton is 4.0.0, not from 3.6 to below 3.10: pip install 'triton>=3.6,<3.10'"),
    ],
)
def test_without_the_right_triton(monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str) -> None:
    monkeypatch.setattr(family, "installed_version", lambda: version)
    assert family.unavailable() == reason and reasons()["triton"] == reasons()["triton_vanilla"] == reason
    with pytest.raises(UnavailableError, match=f"kernel: got 'triton', .*; triton: {reason}"):
        flashtile.explain((1, 2, 16, 8), kernel="triton")


@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.8.1", "3.9.0", "3.9.0+git1234"])
def test_versions_in_range(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(family, "installed_version", lambda: version)
    assert family.compiler_missing() is None


def test_without_a_device(monkeypatch: pytest.MonkeyPatch, no_interpreter: None, tmp_path: Path) -> None:
    """No device file; a device file but no driver; both: the file system is asked, the driver is not started."""
    monkeypatch.setattr(family, "installed_version", lambda: "3.9.0")
    monkeypatch.setattr(driver, "NVIDIA_FILES", (str(tmp_path.relative_to("/")) + "/nvidia[0-9]*",))
    monkeypatch.setattr(driver, "AMD_FILE", "no such file")
    monkeypatch.setattr(driver, "Path", lambda *parts: Path("/", *parts[1:]))
    assert reasons()["triton"] == "no GPU of NVIDIA or AMD in this machine, and TRITON_INTERPRET=1 is not set"
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-that-is-not.so.1")
    driver.library.cache_clear()
    assert "NVIDIA's driver cannot be loaded: libcuda-that-is-not.so.1" in reasons()["triton"]
    driver.library.cache_clear()


def test_an_absent_triton_is_found_absent_in_a_fresh_process() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import flashtile.kernels, flashtile.cli
print([row[3] for row in flashtile.kernels.survey() if row[1] == "triton"])
print(flashtile.cli.main(["aot", "--arch", "sm_90", "-o", "never-made"]))
"""
    done = run([sys.executable, "-c", code], check=True)
    absent = "triton is not installed: pip install 'triton>=3.6,<3.10'"
    assert done.stdout.split("\n")[:2] == [f"{[absent]}", "2"]
    assert done.stderr == f"flashtile aot: error: aot: {absent}\n"
    assert not Path("never-made").exists()


def test_the_survey_imports_no_triton() -> None:
    code = "import sys, flashtile.kernels as k; k.survey(); print([n for n in ('triton', 'torch') if n in sys.modules])"
    done = run([sys.executable, "-c", code], check=True)
    assert done.stdout.strip() == "[]"


def spec(dtype: str = "float32", size: int = 64, q_len: int = 64, heads: int = 4, **options: Any) -> AttentionSpec:
    q, kv = (contiguous((1, n, q_len, size), dtype, "cuda:0") for n in (heads, 2))
    return AttentionSpec.of(q, kv, kv, **options)


def test_capabilities_without_a_device(monkeypatch: pytest.MonkeyPatch, no_interpreter: None) -> None:
    """As every family's, they can be asked for any spec; those of a GPU are its own."""
    monkeypatch.setattr(driver, "device", lambda number: driver.Device("Fake GPU", "sm_90", 232448, 132))
    able = family.capabilities(spec())
    assert (able.isa, able.enough_items) == ("sm_90", 132)
    assert able.devices == {"cuda"} and able.at_once and able.head_block == 1 and not able.native
    few = family.capabilities(spec(q_len=3))
    assert (few.tile_q, few.head_block, few.variant) == ((16,), 2, "few queries")
    assert family.capabilities(spec(size=300)).max_head_size == 256, "asked before it is found too large"
    assert family.capabilities(spec(precision="tf32")).precisions == {"ieee", "tf32", "bf16", "fp16"}


@pytest.mark.parametrize(
    ("arch", "rows"),
    [
        ("sm_80", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_100", "sm_100"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_80"),
        ("gfx942", "gfx942"),
        ("gfx950", "gfx942"),
        ("sm_75", None),
        ("gfx90a", None),
    ],
)
def test_architectures_take_the_rows_of_their_kin(arch: str, rows: str | None) -> None:
    assert tiles.rows_of(arch) == rows
    if rows is None:
        with pytest.raises(UnavailableError, match=f"no tile configuration for {arch}"):
            tiles.row_of(arch, "float32", 64)
    else:
        assert tiles.row_of(arch, "float32", 100) == tiles.TABLE[rows, "float32"][1]


def test_a_row_that_spills_with_an_older_triton_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for (arch, kind, size), (below, instead) in tiles.OLDER.items():
        usual = tiles.TABLE[arch, kind][tiles.HEADS.index(size)]
        assert instead.tile != usual.tile and below > family.VERSIONS[0]
        for version, chosen in (((3, 6), instead), (below, usual), ((3, 9), usual)):
            monkeypatch.setattr(family, "installed_version", lambda v=version: "{}.{}.0".format(*v))
            assert tiles.row_of(arch, kind, size) == chosen


def test_a_row_of_gradients_that_spills_with_an_older_triton_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one that does not, which is another tile or has a limit of registers."""
    for (arch, kind, size, direction), (below, instead) in OLDER.items():
        place = ("q", "kv").index(direction)
        usual = TABLE[arch, kind][place][tiles.HEADS.index(size)]
        assert usual is not None and instead.tile != usual.tile and not instead.spills
        for version, chosen in (((3, 6), instead), (below, usual)):
            monkeypatch.setattr(family, "installed_version", lambda v=version: "{}.{}.0".format(*v))
            found = rows_for(arch, kind, size)
            assert found is not None and found[place] == chosen


def test_an_architecture_without_tiles_is_refused(monkeypatch: pytest.MonkeyPatch, no_interpreter: None) -> None:
    monkeypatch.setattr(family, "installed_version", lambda: "3.9.0")
    monkeypatch.setattr(driver, "missing", lambda: None)
    monkeypatch.setattr(driver, "device", lambda number: driver.Device("Old GPU", "sm_75", 65536, 40))
    assert kernels.objection(family.FAMILY, spec()) == "has no tiles for Old GPU, which is sm_75"


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch, no_interpreter: None) -> None:
    monkeypatch.setattr(driver, "missing", lambda: None)
    monkeypatch.setattr(driver, "device", lambda number: driver.Device("New GPU", "sm_103", 232448, 148))
    monkeypatch.setattr(family, "installed_version", lambda: "3.7.1")
    assert kernels.objection(family.FAMILY, spec()) == "needs triton 3.8 for sm_103, not 3.7.1"
    assert family.too_old("sm_90") is None
    monkeypatch.setattr(family, "installed_version", lambda: "3.8.0")
    assert family.too_old("sm_100") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_75"], "arch: got 'sm_75', expected an architecture with tile configurations"),
        (["--arch", "h100"], "arch: got 'h100', expected an architecture"),
        (["--arch", "sm_90", "--dtype", "int8"], "dtype: got dtype int8, expected one of float64"),
        (["--arch", "sm_90", "--head-size", "300"], "head_sizes: got 300, expected 1 to 256"),
        (["--arch", "sm_90", "--kernels", "decode"], "kernels: got 'decode', expected some of forward, merge"),
        (["--arch", "sm_90", "--state", "done"], "states: got 'done', expected some of finished, partial, carried"),
        (["--arch", "sm_90", "--precision", "tf32"], "precision: got 'tf32' with bfloat16 inputs"),
    ],
)
def test_aot_refuses_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(family, "installed_version", lambda: "3.9.0")
    assert cli.main(["aot", *arguments, "-o", str(tmp_path / "made")]) == 2
    assert capsys.readouterr().err.startswith(f"flashtile aot: error: {message}")
    assert not (tmp_path / "made").exists()


def test_the_interpreter_does_not_compile(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(family, "installed_version", lambda: "3.9.0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["aot", "--arch", "sm_90", "-o", str(tmp_path)]) == 2
    assert "TRITON_INTERPRET=1: got an interpreter, expected a compiler: unset it" in capsys.readouterr().err


def test_unknown_targets() -> None:
    pytest.importorskip("triton")
    from flashtile.kernels.triton.compiler import target_of

    with pytest.raises(SpecError, match="^arch: got 'sm90', expected sm_80, sm_90"):
        target_of("sm90")
