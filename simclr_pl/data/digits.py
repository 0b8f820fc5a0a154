"""The embedded set of handwritten digits.

Symbols: M images, H x W pixels.
"""

import numpy as np
import torch
from torch import Tensor

from simclr_pl.augment import Augment, digits
from simclr_pl.data.sources import ResidentImages, Source
from simclr_pl.keyed_random import Stream, keys, permutation, uniforms

DIGITS_SEED = 2002  # fixes the embedded set once, whatever the run's seed is
DIGITS_NOISE = 0.3  # of full brightness: raw pixels then lie between a random and a trained encoder


class Digits(Source):
    """The embedded set: scikit-learn's 1,797 handwritten digits, each somewhere on a noisy canvas.

    A digit (8x8 pixels, Alpaydin and Kaynak 1998, shipped inside scikit-learn) is drawn at 16x16
    pixels at a random place of a 32x32 canvas of noise. Place, noise and split depend on the digit's
    index alone, so the set is the same everywhere: 1,347 images to learn from and 450 to evaluate on.
    """

    channels = 1

    def open(self) -> None:
        """Draws the canvases."""
        pixels, labels = _digit_canvases()
        order = permutation(len(labels), DIGITS_SEED, Stream.SPLIT)
        everything = ResidentImages(pixels, labels)
        self.train = self.bank = everything.subset(np.sort(order[:1347]))
        self.query = everything.subset(np.sort(order[1347:]))

    def default_augment(self) -> Augment:
        """Crop, rotation and shift."""
        return digits()


def _digit_canvases() -> tuple[Tensor, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.from_numpy(data.images / 16).float()[:, None]  # (M, 1, 8, 8) in [0, 1]
    drawn = torch.nn.functional.interpolate(small, size=16, mode="bilinear")[:, 0].numpy()
    index = np.arange(len(drawn))
    place = (uniforms(keys(DIGITS_SEED, Stream.DIGITS, 0, index), 2) * 17).astype(int)
    noise = uniforms(keys(DIGITS_SEED, Stream.DIGITS, 1, index), 32 * 32).reshape(-1, 32, 32)
    canvas = DIGITS_NOISE * noise
    for i, (top, left) in enumerate(place):
        spot = canvas[i, top : top + 16, left : left + 16]
        np.maximum(spot, drawn[i], out=spot)
    pixels = torch.from_numpy(np.round(canvas * 255).astype(np.uint8))[:, None]
    return pixels, data.target.astype(np.int64)
