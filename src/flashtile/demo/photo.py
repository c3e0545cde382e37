"""A real photograph, noise, and pictures on disk. Pictures are (rows, columns, 3), 0 is black and 1 is white."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flashtile.errors import UnavailableError, wrong

CENTRE = (196, 256)  # the face, as (row, column)
SMALLEST = 32  # side of a crop


def photograph(size: int | None) -> np.ndarray:
    """The portrait of Grace Hopper that matplotlib ships (600 x 512 pixels, public domain), in float64.

    size is the side of a square crop around the face, None for the whole picture.
    Raises: UnavailableError without matplotlib and its sample data; SpecError if no such crop exists.
    """
    try:
        from matplotlib import cbook
        from PIL import Image

        with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
            whole = np.asarray(file.convert("RGB")) / 255.0
    except (ImportError, OSError) as missing:
        advice = "expected matplotlib with its sample data; install it with: pip install 'flashtile[demo]'"
        raise UnavailableError(f"demo: got {missing}, {advice}") from missing
    if size is None:
        return whole
    largest = min(whole.shape[:2])
    if not SMALLEST <= size <= largest:
        raise wrong("size", size, f"{SMALLEST} to {largest} pixels")
    starts = [min(max(c - size // 2, 0), n - size) for c, n in zip(CENTRE, whole.shape[:2], strict=True)]
    rows, columns = (slice(start, start + size) for start in starts)
    return whole[rows, columns]


def add_noise(picture: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    """Add independent Gaussian noise of standard deviation sigma to every colour of every pixel; not clipped."""
    return picture + np.random.default_rng(seed).normal(0, sigma, picture.shape)


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, of the picture as shown: clipped to 0 ... 1."""
    return float(-10 * np.log10(np.mean((np.clip(picture, 0, 1) - truth) ** 2)))


def save(picture: np.ndarray, path: Path) -> None:
    """Write a picture as a PNG of 8 bits a colour."""
    from PIL import Image

    Image.fromarray(np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8)).save(path)


def save_comparison(panels: dict[str, np.ndarray], path: Path) -> None:
    """Write pictures of one size side by side under their titles, and below each the same detail of it, enlarged."""
    from matplotlib.figure import Figure

    height, width = next(iter(panels.values())).shape[:2]
    side = min(height, width) // 3
    top, left = (height - side) // 2, (width - side) // 2
    columns = len(panels)
    figure = Figure(figsize=(3 * columns, 3 * height / width + 3.3), dpi=120, layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False, height_ratios=(height / width, 1))
    for column, (title, picture) in enumerate(panels.items()):
        shown = np.clip(picture, 0, 1)
        axes[0, column].set_title(title, fontsize=11)
        axes[0, column].imshow(shown)
        axes[1, column].imshow(shown[top : top + side, left : left + side], interpolation="nearest")
    for ax in axes.flat:
        ax.set_axis_off()
    figure.savefig(path)
