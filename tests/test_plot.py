"""flashtile.plot_coverage: the map that it returns, the picture that it draws, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashtile
from flashtile import score
from flashtile.errors import SpecError, UnavailableError

mpl = pytest.importorskip("matplotlib", reason="plot_coverage draws with it")

EMPTY, PARTIAL, FULL = 0, 1, 2
SHAPE = (2, 3, 8, 4)
COLOURS = {FULL: "#1f5a92", PARTIAL: "#f0a830", EMPTY: "#f4f4f4"}


def drawn(path: Path) -> np.ndarray:
    """Pixels (rows, columns, 3) of a picture, 0 ... 255."""
    from matplotlib.image import imread

    return np.rint(imread(path)[..., :3] * 255).astype(int)


def area(pixels: np.ndarray, kind: int) -> int:
    colour = [int(COLOURS[kind][at : at + 2], 16) for at in (1, 3, 5)]
    return int((pixels == colour).all(-1).sum())


def test_the_map_is_that_of_the_call(tmp_path: Path) -> None:
    def tiles(**options: Any) -> list[list[int]]:
        return flashtile.plot_coverage(SHAPE, path=tmp_path / "map.png", tile=(2, 4), **options).tiles.tolist()

    assert tiles() == [[2, 2]] * 4
    assert tiles(causal=True) == [[1, 0], [1, 0], [2, 1], [2, 1]]
    assert tiles(window=(1, 0)) == [[1, 0], [1, 0], [1, 1], [0, 1]]
    assert tiles(mask=score.padding(np.array([4, 3])), causal=True) == [[1, 0], [1, 0], [2, 0], [2, 0]]
    assert tiles(mask=score.padding(np.array([4, 3])), batch=1) == [[1, 0]] * 4
    assert tiles(mask=lambda b, h, i, j: j < 4 * h) == [[0, 0]] * 4
    assert tiles(mask=lambda b, h, i, j: j < 4 * h, head=1) == [[2, 0]] * 4
    assert tiles(score_mod=lambda s, b, h, i, j: np.where(i >= j, s, -np.inf)) == tiles(causal=True)
    assert tiles(mask=np.ones((8, 8), bool)) == [[1, 1]] * 4  # a stored mask is not looked through


def test_the_title_names_the_map_where_maps_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **options: titles.append(text))
    for options in (
        {"causal": True},
        {"mask": lambda b, h, i, j: j < 4 * h, "head": 2},
        {"mask": score.padding(np.array([4, 3])), "batch": 1},
    ):
        flashtile.plot_coverage(SHAPE, path=tmp_path / "map.png", tile=(2, 4), **options)
    common = "2 x 4 tiles, 8 x 8 scores"
    assert titles == [common, f"{common}, head 2 of 3", f"{common}, batch 1 of 2"]


def test_tiles_are_by_default_those_of_the_plan(tmp_path: Path) -> None:
    plan = flashtile.explain((1000, 64), causal=True).plan
    kinds = flashtile.plot_coverage((1000, 64), causal=True).tiles
    assert kinds.shape == (-(-1000 // plan.tile_q), -(-1000 // plan.tile_k))


@pytest.mark.parametrize("keys", [600, 1200, 7998])  # to scale, to scale and wide, not to scale
def test_the_picture_has_the_areas_of_the_map(tmp_path: Path, keys: int) -> None:
    kinds = flashtile.plot_coverage(
        (600, 8), (keys, 8), window=(150, 0), align=keys // 2, path=tmp_path / "a.PNG", tile=(100, keys // 6)
    ).tiles
    pixels = drawn(tmp_path / "a.PNG")
    share = {kind: area(pixels, kind) / sum(area(pixels, k) for k in COLOURS) for kind in COLOURS}
    for kind in COLOURS:
        assert share[kind] == pytest.approx((kinds == kind).mean(), abs=0.02)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_pictures_of_next_to_nothing(tmp_path: Path, lengths: tuple[int, int]) -> None:
    flashtile.plot_coverage((lengths[0], 4), (lengths[1], 4), path=tmp_path / "a.png")
    assert drawn(tmp_path / "a.png").size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "map.jpg"}, "path: got 'map.jpg', expected a name that ends in .png"),
        ({"path": "nowhere/map.png"}, "path: got 'nowhere/map.png', expected a folder that exists: nowhere does not"),
        ({"path": 3}, "path: got 3, expected a path, or None"),
        ({"batch": 2}, "batch: got 2, expected an integer from 0 to 1"),
        ({"head": -1}, "head: got -1, expected an integer from 0 to 2"),
        ({"tile": (0, 4)}, r"tile: got \(0, 4\), expected a pair"),
        ({"tile": 4}, "tile: got 4, expected a pair"),
        ({"mask": 3}, "mask: got 3, expected a boolean array"),
        ({"window": 4}, "window: got 4"),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match="^" + message):
        flashtile.plot_coverage(SHAPE, **{"path": tmp_path / "map.png", **options})
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "flashtile.picture", raising=False)
    with pytest.raises(UnavailableError, match="pip install matplotlib"):
        flashtile.plot_coverage(SHAPE, path=tmp_path / "map.png")


def test_a_notebook_shows_the_figure_that_is_returned(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figure = flashtile.plot_coverage(SHAPE, causal=True, tile=(2, 4))
    assert isinstance(figure, Figure) and figure._repr_png_().startswith(b"\x89PNG")
    flashtile.plot_coverage(SHAPE, causal=True, tile=(2, 4), path=tmp_path / "map.png")
    figure.savefig(tmp_path / "own.png", dpi=120, bbox_inches="tight")
    assert np.array_equal(drawn(tmp_path / "own.png"), drawn(tmp_path / "map.png"))


def test_a_wrong_path_is_refused_before_the_mask_is_looked_at() -> None:
    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        raise AssertionError("traced")

    with pytest.raises(SpecError, match="^path: "):
        flashtile.plot_coverage(SHAPE, mask=mask, path="map.jpg")
