"""Non-local means on a picture of yours, with the parts of `flashtile demo`: needs pillow, and the noise's sigma.

    $ python examples/denoise_your_picture.py noisy.jpg clean.png --sigma 0.05

Without arguments it makes a noisy picture of its own and says how much of the noise is gone. Work grows with the
square of the number of pixels: 100,000 take about 20 s on two cores.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from flashtile.demo.nlm import reweigh_self, tokens
from flashtile.demo.photo import add_noise, psnr, save


def denoise(noisy: np.ndarray, sigma: float) -> np.ndarray:
    """Remove noise of standard deviation sigma from a picture (rows, columns, 3) of values 0 ... 1."""
    t = tokens(noisy, h=sigma)
    o, lse = t.attend(return_lse=True, progress=True)
    return reweigh_self(o, lse, t, weight=math.exp(-6)).reshape(noisy.shape)


def rings(side: int) -> np.ndarray:
    """A picture with edges in every direction."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    stripes = np.sin(14 * np.hypot(x, y)) > 0
    return np.where(stripes[..., None], [0.9, 0.7, 0.3], [0.1, 0.3, 0.5])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("noisy", type=Path, nargs="?")
    parser.add_argument("denoised", type=Path, nargs="?")
    parser.add_argument("--sigma", type=float, default=0.1, help="of the noise, where white is 1 (default 0.1)")
    options = parser.parse_args()
    if options.noisy is None:
        clean = rings(96)
        noisy = add_noise(clean, options.sigma, seed=0)
        print(f"{psnr(noisy, clean):.1f} dB -> {psnr(denoise(noisy, options.sigma), clean):.1f} dB")
        return
    if options.denoised is None:
        parser.error("the name of the picture to write is missing")
    from PIL import Image

    with Image.open(options.noisy) as file:
        noisy = np.asarray(file.convert("RGB")) / 255.0
    save(denoise(noisy, options.sigma), options.denoised)


if __name__ == "__main__":
    main()
