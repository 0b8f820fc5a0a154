"""What every kind of augmentation is: of images, of sound, of text, or of your own data.

Symbols: n rows, one for each view wanted; V views, B samples of a batch; E feature width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from simclr_pl.errors import InputError
from simclr_pl.keyed_random import keys, uniforms

Table = dict[str, Any]  # arrays or tensors by name, and plain numbers that stay on the host


@dataclass(frozen=True)
class Rows:
    """What the random choices about n views depend on, and all that they depend on.

    Attributes:
        seed: of the run.
        epoch: from 0.
        index: (n,) int64, the sample of each view.
        view: (n,) int64, its number among the views of that sample.
    """

    seed: int
    epoch: int
    index: np.ndarray
    view: np.ndarray

    def uniforms(self, stream: int, count: int) -> np.ndarray:
        """Random numbers for each view, the same whatever the batch, the worker and the rank.

        Args:
            stream: what they are for, a number of its own for each use; those below 1000 are the
                package's (`simclr_pl.keyed_random.Stream`).
            count: how many for each view.

        Returns:
            (n, count) float64 in [0, 1).
        """
        return uniforms(keys(self.seed, self.epoch, stream, self.index, self.view), count)


class Augmentation(ABC):
    """Makes views of samples in two steps: `prepare` in the loader, `finish` on the device.

    A sample is whatever the source's sets hand out: an opened image, a waveform, a list of tokens, a
    row of a table. Every random choice is made in `prepare`, from `Rows.uniforms` alone; then a view
    depends on the seed, the epoch, the sample and the view's number, and on nothing else.

    Attributes:
        raw_name: what the baseline of `raw` is called.
    """

    raw_name = "raw input"

    @abstractmethod
    def prepare(self, samples: Sequence[Any], rows: Rows | None) -> Table:
        """Makes arrays of samples, in numpy, with all that is random about them.

        Args:
            samples: n of them, one for each row; several rows may have the same one.
            rows: their keys; None asks for clean views, without anything random.

        Returns:
            Arrays (n, ...) by name, as small as they can be: they cross to the device.
        """

    @abstractmethod
    def finish(self, table: Table) -> Tensor:
        """Turns them into what the encoder takes, in torch and on the device, n rows in one call.

        Args:
            table: from `prepare`, its arrays as tensors; float64 has become float32.

        Returns:
            Views (n, ...), in the same order.
        """

    def raw(self, views: Tensor) -> Tensor:
        """Features (n, E) float32 of clean views that need no encoder, the baseline that it must beat."""
        return views.flatten(1).float()

    def pictures(self, views: Tensor) -> np.ndarray | None:
        """Views (n, ...) as pictures (n, H, W, C) uint8; None where there is nothing to see."""
        return None

    def picture_of(self, sample: Any) -> np.ndarray | None:
        """A sample before augmentation as a picture (H, W, C) uint8; None where there is none."""
        return None

    def small(self) -> "Augmentation":
        """That of small views (multi-crop).

        Raises:
            InputError: there is none but for images.
        """
        raise InputError(
            f"small views are made of images alone; got {type(self).__name__}. Set "
            "`data.n_small_views` to 0, or give `data.small_augment`."
        )
