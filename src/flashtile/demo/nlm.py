"""Non-local means written as attention: patches are queries and keys, colours are values.

A pixel becomes the mean of all pixels, weighted by exp(-|p_i - p_j|^2 / h^2), how alike the patches around the two
are. Since |p_i - p_j|^2 = |p_i|^2 - 2 p_i.p_j + |p_j|^2 and a softmax over j does not see what depends on i alone,
the weights are softmax_j(2 p_i.p_j / h^2 - |p_j|^2 / h^2): attention of the patches to themselves with scale 2 / h^2
and a bias that depends on the key alone.

Source: Buades, Coll, Morel 2005, A non-local algorithm for image denoising.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import flashtile

RADIUS = 2  # patches of 5 x 5 pixels
SPREAD = 1.5  # standard deviation, in pixels, of the weights within a patch


@dataclass(frozen=True)
class Tokens:
    """One token a pixel, in row-major order: patches (pixels, D), queries and keys alike; colours (pixels, 3), the
    values; bias (1, 1, 1, pixels); all float32; and the scale."""

    patches: np.ndarray
    colours: np.ndarray
    bias: np.ndarray
    scale: float

    def attend(self, **options: Any) -> Any:
        """`flashtile.attention` of the tokens, with such options as return_lse, out and progress."""
        q, k, v = self.arrays
        return flashtile.attention(q, k, v, **self.scores, **options)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k and v."""
        return self.patches, self.patches, self.colours

    @property
    def scores(self) -> dict[str, Any]:
        """The keywords that say what the scores are."""
        return {"scale": self.scale, "bias": self.bias}


def patches(picture: np.ndarray) -> np.ndarray:
    """The weighted patch around every pixel: picture (rows, columns, 3) -> (rows * columns, 75).

    |p_i - p_j|^2 is the weighted mean over the patch of the squared differences, summed over the colours. The mean
    patch is subtracted: distances stay, but the products p_i.p_j, which cancel in them, get small.
    """
    axis = np.arange(-RADIUS, RADIUS + 1)
    weights = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * SPREAD**2))
    weights /= weights.sum()
    padded = np.pad(picture, ((RADIUS, RADIUS), (RADIUS, RADIUS), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, weights.shape, axis=(0, 1))
    p = (windows * np.sqrt(weights)).reshape(picture.shape[0] * picture.shape[1], -1)
    return (p - p.mean(axis=0)).astype(np.float32)


def tokens(noisy: np.ndarray, h: float) -> Tokens:
    """The attention call that denoises a picture (rows, columns, 3), with filter width h in units of its values."""
    p = patches(noisy)
    bias = np.sum(p.astype(np.float64) ** 2, axis=1) / -(h**2)
    return Tokens(p, noisy.reshape(-1, 3).astype(np.float32), bias.astype(np.float32)[None, None, None], 2 / h**2)


def reweigh_self(o: np.ndarray, lse: np.ndarray, t: Tokens, weight: float) -> np.ndarray:
    """Give every pixel `weight` in its own mean, in place of the 1 that it has at distance 0.

    Shapes:  o (pixels, 3), lse (pixels,) -> (pixels, 3), float64.
    A pixel is the one perfect match of itself, noise included, and would drown all others. Two pixels that differ by
    noise only are at |p_i - p_j|^2 = 6 sigma^2 on average (two noises, three colours): exp(-6 sigma^2 / h^2) is the
    weight of an honest match. With Z_i = sum_j exp(-|p_i - p_j|^2 / h^2), which lse holds, the sums are known, so the
    exchange is exact and needs no second pass.
    Source:  Salmon 2010, On two parameters for denoising with non-local means (the central weight).
    """
    own_score = t.scale * np.einsum("id,id->i", t.patches, t.patches, dtype=np.float64) + t.bias[0, 0, 0]
    z = np.exp(lse.astype(np.float64) - own_score)[:, None]
    excess = 1 - weight
    return (o * z - excess * t.colours) / (z - excess)
