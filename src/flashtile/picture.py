"""The figure that `flashtile.plot_coverage` returns. Importing this imports matplotlib."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Picture(Figure):
    """A matplotlib figure of a tile map, without pyplot: notebooks show it, `savefig` writes it.

    `tiles` is the map, uint8 (query tiles, key tiles): 0 empty, 1 partial, 2 full.
    """

    tiles: np.ndarray

    def __init__(self, tiles: np.ndarray, height: float) -> None:
        """height: inches, of the 7 that it is wide."""
        super().__init__(figsize=(7, height), layout="constrained")
        FigureCanvasAgg(self)
        self.tiles = tiles

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=120, bbox_inches="tight")
        return file.getvalue()
