"""flashtile.plot_coverage: the map that it returns and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashtile
from flashtile.errors import SpecError
from flashtile.score import EMPTY, FULL, PARTIAL, causal, coverage, document
from flashtile.score.program import Program

pytest.importorskip("matplotlib", reason="pictures are matplotlib's")

IDS = np.repeat(np.arange(4), 50)
TYPED = {".": EMPTY, "/": PARTIAL, "#": FULL}


def typed(*rows: str) -> list[list[int]]:
    return [[TYPED[kind] for kind in row] for row in rows]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, ["####"] * 4),
        ({"causal": True}, ["/...", "#/..", "##/.", "###/"]),
        ({"window": (50, 50)}, ["#/..", "/#/.", "./#/", "../#"]),
        ({"mask": document(IDS)}, ["#...", ".#..", "..#.", "...#"]),
        ({"mask": lambda b, h, i, j: j // 50 <= h}, ["##..", "##..", "##..", "##.."]),
        ({"score_mod": lambda s, b, h, i, j: np.where(j <= i, s, -np.inf)}, ["/...", "#/..", "##/.", "###/"]),
    ],
)
def test_maps_of_4_by_4_tiles(tmp_path: Path, options: dict[str, Any], rows: list[str]) -> None:
    path = tmp_path / "map.png"
    found = flashtile.plot_coverage((1, 2, 200, 16), path=path, tile=(50, 50), head=1, **options)
    assert found.tolist() == typed(*rows)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_picture_shows_the_map(tmp_path: Path) -> None:
    """Areas of the colours are to each other as the numbers of tiles."""
    import matplotlib.image

    path = tmp_path / "map.png"
    mask = causal() & document(IDS)
    kinds = flashtile.plot_coverage((200, 16), path=path, mask=mask, tile=(25, 25))
    want = coverage(Program.of((1, 1, 200, 200), mask=mask), 25, 25).tiles()[0, 0]
    np.testing.assert_array_equal(kinds, want)
    pixels = np.rint(matplotlib.image.imread(path)[..., :3] * 255)
    blue, orange = ((pixels == colour).all(-1) for colour in ([0x1F, 0x5A, 0x92], [0xF0, 0xA8, 0x30]))
    ratio = (want == FULL).sum() / (want == PARTIAL).sum()
    assert blue.sum() / orange.sum() == pytest.approx(ratio, rel=0.1)  # the legend has a patch of each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "map.pdf"}, "path: got 'map.pdf', expected a name that ends in .png"),
        ({"head": 2}, "head: got 2, expected an integer from 0 to 1"),
        ({"batch": -1}, "batch: got -1, expected an integer from 0 to 0"),
        ({"tile": (0, 4)}, r"tile: got \(0, 4\), expected a pair"),
        ({"tile": 5}, "tile: got 5, expected a pair"),
        ({"mask": np.ones(7, bool)}, r"mask: got shape \(7,\)"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match="^" + message):
        flashtile.plot_coverage((1, 2, 200, 16), **{"path": "map.png", **options})
    assert not list(tmp_path.iterdir())
