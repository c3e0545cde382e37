"""`flashtile.plot_coverage`: the tile map of a call as a picture. matplotlib is imported when it is called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashtile import kernels
from flashtile.calls import as_name, describe
from flashtile.checks import integer
from flashtile.errors import UnavailableError, described, wrong
from flashtile.explain import offsets_of, tile_map, view_or_shape
from flashtile.plan import make_plan
from flashtile.score.coverage import EMPTY, FULL, PARTIAL
from flashtile.score.program import Program
from flashtile.signature import Align, Kernel, Window
from flashtile.spec import AttentionSpec

if TYPE_CHECKING:
    from flashtile.picture import Picture

# What a tile costs, from nothing to a product without mask code; told apart without colour, too.
_COLOURS = {EMPTY: "#f4f4f4", PARTIAL: "#f0a830", FULL: "#1f5a92"}
_SQUARE = 3  # times as many keys as rows, or rows as keys: up to here the picture is to scale
_LINED = 64  # tiles along a side: up to here lines show where each ends
_LABELS = {EMPTY: "empty: skipped", PARTIAL: "partial: masked element by element", FULL: "full: no mask code"}


def plot_coverage(
    q: Any,
    k: Any = None,
    *,
    path: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    mask: Any = None,
    score_mod: Any = None,
    causal: bool = False,
    window: Window = None,
    align: Align = None,
    kernel: Kernel = "auto",
    batch: int = 0,
    head: int = 0,
    tile: tuple[int, int] | None = None,
) -> Picture:
    """Draw which tiles of the scores a call skips, masks element by element, or computes whole.

    Shapes:  q and k are arrays, or shapes as in `flashtile.explain`; the map is that of one batch and query head. The
             other arguments are those of `flashtile.attention` that decide which keys a row sees.
    Options: path    where to write it as a PNG, if anywhere.
             batch, head  whose map is drawn; the title names them where maps may differ.
             tile    (queries, keys) of a tile; by default those of the call's plan.
    Returns: a matplotlib Figure, which notebooks show; its `tiles` is the map, uint8 (query tiles, key tiles): 0 empty,
             1 partial, 2 full. A partial tile may be whole or hidden where the analysis is cautious; empty and full are
             certain.
    Raises:  SpecError as attention, and for a batch, head or tile out of range, or a path that does not end in .png or
             whose folder does not exist; UnavailableError without matplotlib; OSError.

    >>> import flashtile
    >>> flashtile.plot_coverage((4096, 64), causal=True, path="causal.png")  # doctest: +SKIP
    """
    target = None if path is None else _target(path)
    views = [view_or_shape(x, name, dtype) for name, x in (("q", q), ("k", q if k is None else k))]
    scores = mask, None, score_mod, None, None, None, None
    request = describe(views[0], scores, (causal, window, align, None, "ieee", kernel, "auto"))
    spec, scoring = request.of(views[0], views[1], views[1])
    offsets = offsets_of(spec, request)
    for name, got, size in (("batch", batch, spec.batch), ("head", head, spec.heads)):
        number = integer(got)
        if number is None or not 0 <= number < size:
            raise wrong(name, repr(got), f"an integer from 0 to {size - 1}")
    program = scoring.program
    if program is None or program.mask is None:
        program = _band_program(spec, spec.offset if offsets is None else np.array(offsets))
    tile_q, tile_k = _tile(spec, kernel) if tile is None else _checked(tile)
    tiles = tile_map(program, spec, tile_q, tile_k).tiles()
    kinds: np.ndarray = tiles[min(batch, len(tiles) - 1), min(head, tiles.shape[1] - 1)]
    sizes = (("batch", batch, len(tiles), spec.batch), ("head", head, tiles.shape[1], spec.heads))
    which = "".join(f", {name} {number} of {size}" for name, number, maps, size in sizes if maps > 1)
    figure = _draw(kinds, (tile_q, tile_k), spec, which)
    if target is not None:
        figure.savefig(target, dpi=120, bbox_inches="tight")
    return figure


def _target(path: Any) -> Path:
    """Where the picture goes. Raises: SpecError for what is no name of a PNG in a folder that exists."""
    if not isinstance(path, (str, os.PathLike)):
        raise wrong("path", described(path), "a path, or None")
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise wrong("path", repr(str(path)), "a name that ends in .png")
    if not target.parent.is_dir():
        raise wrong("path", repr(str(path)), f"a folder that exists: {target.parent} does not")
    return target


def _band_program(spec: AttentionSpec, offset: Any) -> Program:
    """A band alone as a program, so that one analysis serves every picture."""
    window = None if spec.band is None else (spec.band.left, spec.band.right)
    return Program.of((spec.batch, spec.heads, spec.q_len, spec.kv_len), window=window, offset=offset)


def _tile(spec: AttentionSpec, kernel: str) -> tuple[int, int]:
    plan = make_plan(spec, kernels.pick(spec, as_name("kernel", kernel)).capabilities(spec))
    return plan.tile_q, plan.tile_k


def _checked(tile: Any) -> tuple[int, int]:
    sides = [integer(n) for n in tile] if isinstance(tile, (tuple, list)) and len(tile) == 2 else [None]
    if any(n is None or n < 1 for n in sides):
        raise wrong("tile", repr(tile), "a pair (queries, keys) of positive integers")
    return sides[0], sides[1]  # type: ignore[return-value]  # neither is None


def _draw(kinds: np.ndarray, tile: tuple[int, int], spec: AttentionSpec, which: str) -> Picture:
    """The picture; `which` names the batch and head where maps differ."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch

        from flashtile.picture import Picture
    except ImportError as cause:
        raise UnavailableError(f"plot_coverage: got {cause}, expected matplotlib: pip install matplotlib") from cause
    square = max(spec.q_len, spec.kv_len) <= _SQUARE * min(spec.q_len, spec.kv_len)
    height = min(5.0, 6.3 * spec.q_len / max(spec.kv_len, 1)) if square else 4.4
    figure = Picture(kinds, height + 1.4)
    axes = figure.add_subplot()
    rows, columns = kinds.shape
    extent = (0, columns * tile[1], rows * tile[0], 0)
    colours = ListedColormap([_COLOURS[kind] for kind in (EMPTY, PARTIAL, FULL)])
    if kinds.size:
        axes.imshow(kinds, cmap=colours, vmin=EMPTY, vmax=FULL, extent=extent, interpolation="nearest", aspect="auto")
        axes.set_aspect("equal" if square else "auto")
    if max(kinds.shape) <= _LINED:
        axes.vlines([n * tile[1] for n in range(1, columns)], *extent[3:1:-1], colors="white", linewidth=0.5)
        axes.hlines([n * tile[0] for n in range(1, rows)], *extent[:2], colors="white", linewidth=0.5)
    axes.set(xlabel="key j", ylabel="query row i", xlim=(0, max(spec.kv_len, 1)), ylim=(max(spec.q_len, 1), 0))
    axes.set_title(f"{tile[0]} x {tile[1]} tiles, {spec.q_len} x {spec.kv_len} scores{which}", fontsize=10)
    labels = {kind: f"{_LABELS[kind]} ({int((kinds == kind).sum())})" for kind in (FULL, PARTIAL, EMPTY)}
    shown = [Patch(facecolor=_COLOURS[kind], edgecolor="#888888", label=label) for kind, label in labels.items()]
    figure.legend(handles=shown, loc="outside lower center", ncols=1, fontsize=9, frameon=False)
    return figure
