"""The SimCLR family of augmentations, on whole batches, with parameters of their own for each view.

Two steps. `Augment.draw` makes, in numpy and in the loader, every random choice about a batch as a
table of finished parameters. `Augment.apply` applies such a table on any device: no random number is
drawn there, and the device is never waited for. So a view can be replayed, and compared with
torchvision, from its table. Three backends read it: compiled loops over single images on the CPU
(`simclr_pl.image_kernels`), Triton's kernels on a GPU (`simclr_pl.view_kernels`), and where neither
can serve, batched torch (`simclr_pl.image_operations`).

Symbols: B images, V views, N = V*B rows, C channels, S side of a view.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_pl.augmentation import Augmentation, Rows, Table
from simclr_pl.errors import InputError
from simclr_pl.gpu import triton_serves
from simclr_pl.image_operations import blur, grey, jitter_colour, rotate_shift, to_float
from simclr_pl.keyed_random import Stream, keys, uniforms

_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
_RAW_SIDE = 32  # pixels; larger views are averaged down to this before pixels are compared


class Augment(Augmentation):
    """Random crop, flip, rotation, colour jitter, grey, blur and solarisation, then normalisation.

    The order is that of the authors' `data_util.py`; the jitter's four operations come in a random
    order of their own for each view, with torchvision's arithmetic.

    Args:
        size: side of a view, in pixels.
        crop_scale: range of the crop's share of the image's area.
        crop_ratio: range of the crop's width / height.
        flip: probability of a horizontal flip.
        rotation: largest rotation to either side, in degrees, up to 180; 0 is none, as in the paper. What
            comes in at the corners is black, a tenth of the view at 15 degrees.
        shift: largest shift along each axis, as a fraction of the side; what comes in is black.
        jitter: probability of the colour jitter.
        strength: s of the paper's appendix A: brightness, contrast and saturation change by up to
            0.8 s, hue by up to 0.2 s of a turn.
        grey: probability of grey.
        blur: probability of a Gaussian blur, whose window is a tenth of the side.
        blur_sigma: range of its standard deviation, in pixels.
        solarise: probability of inverting what is brighter than one half.
        mean: subtracted from each channel after all else; a single number serves all channels.
        std: divides each channel after that.
        clean_fraction: share of the shorter side that the clean view's central square keeps.

    Raises:
        InputError: a probability outside [0, 1], an empty range, or a size < 2.
    """

    raw_name = "raw pixels"

    def __init__(
        self,
        size: int = 224,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        rotation: float = 0.0,
        shift: float = 0.0,
        jitter: float = 0.8,
        strength: float = 1.0,
        grey: float = 0.2,
        blur: float = 0.5,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarise: float = 0.0,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        clean_fraction: float = 0.875,
    ) -> None:
        self.size = size
        self.crop_scale = crop_scale
        self.crop_ratio = crop_ratio
        self.flip = flip
        self.rotation = rotation
        self.shift = shift
        self.jitter = jitter
        self.strength = strength
        self.grey = grey
        self.blur = blur
        self.blur_sigma = blur_sigma
        self.solarise = solarise
        self.mean = mean
        self.std = std
        self.clean_fraction = clean_fraction
        self._check()

    def _check(self) -> None:
        for name in ("flip", "jitter", "grey", "blur", "solarise", "clean_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"`{name}` must be within [0, 1]; got {getattr(self, name)}. Set `data.augment`."
                )
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise InputError(
                    f"`{name}` must be a range (low, high) with 0 < low <= high; got "
                    f"({low}, {high}). Set `data.augment`."
                )
        if self.size < 2 or not 0 <= self.strength * 0.2 <= 0.5:
            raise InputError(
                "`size` must be >= 2 and `strength` within [0, 2.5]; got "
                f"{self.size} and {self.strength}. Set `data.augment`."
            )

    def small(self) -> "Augment":
        """The augmentation of multi-crop's small views: 96 pixels for 224, from 5 to 14 % of the area.

        Caron et al. 2020 (SwAV, arXiv:2006.09882), appendix; they take the large views from 14 to 100 %.
        """
        other = copy.copy(self)
        other.size = max(8, round(self.size * 96 / 224))
        other.crop_scale = (0.05, 0.14)
        return other

    # Drawing: numpy, in the loader.

    def draw(
        self,
        seed: int,
        epoch: int,
        index: np.ndarray,
        n_views: int,
        first_view: int | np.ndarray = 0,
    ) -> Table:
        """Draws the parameters of every operation on the cropped views of a batch.

        Args:
            seed: of the run.
            epoch: from 0.
            index: (B,) int64 sample indices; (B, V) where the views of a row are of several samples.
            n_views: V.
            first_view: number of the first of them, part of the key; (B, V) adds a number of its own
                to each.

        Returns:
            Only the operations that can happen: "angle" degrees (B, V), "shift" pixels right and down
            (B, V, 2), "factor" and "order" of the jitter (B, V, 4) with order -1 where there is none,
            "grey" and "solarise" bool (B, V), "sigma" pixels (B, V) with 0 for no blur. For the host of
            a device also which rows of the result (all of view 0 first) are concerned: "jitter_rows"
            (4, V*B) int64 and "jitter_counts", see `jitter_colour`, "grey_rows" and "blur_rows" (n,)
            int64.
        """
        samples, views = _by_view(index), first_view + np.arange(n_views)

        def uniform(stream: Stream, n: int) -> np.ndarray:
            return uniforms(keys(seed, epoch, stream, samples, views), n)

        table: Table = {}
        if self.rotation or self.shift:
            u = uniform(Stream.AFFINE, 3) * 2 - 1
            table["angle"] = u[..., 0] * self.rotation
            table["shift"] = u[..., 1:] * self.shift * self.size
        if self.jitter and self.strength:
            u = uniform(Stream.JITTER, 9)
            low = np.array([max(0.0, 1 - 0.8 * self.strength)] * 3 + [-0.2 * self.strength])
            high = np.array([1 + 0.8 * self.strength] * 3 + [0.2 * self.strength])
            table["factor"] = low + (high - low) * u[..., 1:5]
            order = u[..., 5:].argsort(-1)
            table["order"] = np.where(u[..., :1] < self.jitter, order, -1)
            table["jitter_rows"], table["jitter_counts"] = _grouped(table["order"])
        if self.grey:
            table["grey"] = uniform(Stream.GREY, 1)[..., 0] < self.grey
            table["grey_rows"] = np.flatnonzero(table["grey"].T)
        if self.blur:
            u = uniform(Stream.BLUR, 2)
            sigma = np.interp(u[..., 1], (0, 1), self.blur_sigma)
            table["sigma"] = np.where(u[..., 0] < self.blur, sigma, 0.0)
            table["blur_rows"] = np.flatnonzero(table["sigma"].T)
        if self.solarise:
            table["solarise"] = uniform(Stream.SOLARISE, 1)[..., 0] < self.solarise
        return {
            name: value.astype(np.float32) if getattr(value, "dtype", None) == np.float64 else value
            for name, value in table.items()
        }

    def draw_crops(
        self,
        seed: int,
        epoch: int,
        index: np.ndarray,
        n_views: int,
        height: np.ndarray,
        width: np.ndarray,
        first_view: int | np.ndarray = 0,
    ) -> np.ndarray:
        """Draws the crops of a batch, by the rule of torchvision's RandomResizedCrop.

        Args:
            seed: as for `draw`.
            epoch: as for `draw`.
            index: as for `draw`.
            n_views: as for `draw`.
            height: (B,) or (B, V) of the images, in pixels.
            width: as ``height``.
            first_view: as for `draw`.

        Returns:
            (B, V, 5) int64: top, left, height, width, flipped (0 or 1).
        """
        samples, views = _by_view(index), first_view + np.arange(n_views)
        u = uniforms(keys(seed, epoch, Stream.CROP, samples, views), 2 * _CROP_ATTEMPTS + 2)
        h_full, w_full = _by_view(height)[..., None], _by_view(width)[..., None]
        low, high = self.crop_scale
        area = (low + (high - low) * u[..., :_CROP_ATTEMPTS]) * h_full * w_full
        low, high = np.log(self.crop_ratio)
        ratio = np.exp(low + (high - low) * u[..., _CROP_ATTEMPTS:-2])
        w = np.round(np.sqrt(area * ratio)).astype(np.int64)  # (B, V, attempts)
        h = np.round(np.sqrt(area / ratio)).astype(np.int64)
        fits = (w > 0) & (w <= w_full) & (h > 0) & (h <= h_full)
        first = fits.argmax(-1)[..., None]
        w, h = np.take_along_axis(w, first, -1)[..., 0], np.take_along_axis(h, first, -1)[..., 0]
        fallback = ~fits.any(-1)  # the largest centred crop with an allowed ratio
        h_full, w_full = h_full[..., 0], w_full[..., 0]
        r_low, r_high = self.crop_ratio
        w = np.where(fallback, np.minimum(w_full, np.round(h_full * r_high)).astype(np.int64), w)
        h = np.where(fallback, np.minimum(h_full, np.round(w_full / r_low)).astype(np.int64), h)
        top = np.where(
            fallback, (h_full - h) // 2, (u[..., -2] * (h_full - h + 1)).astype(np.int64)
        )
        left = np.where(
            fallback, (w_full - w) // 2, (u[..., -1] * (w_full - w + 1)).astype(np.int64)
        )
        flip_key = keys(seed, epoch, Stream.FLIP, samples, views)
        flip = uniforms(flip_key, 1)[..., 0] < self.flip
        return np.stack([top, left, h, w, flip.astype(np.int64)], -1)

    def clean_crops(self, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        """The central squares for evaluation: (B, 1, 5), as `draw_crops` with V = 1 and no flip."""
        side = np.maximum(1, np.round(np.minimum(height, width) * self.clean_fraction)).astype(int)
        zero = np.zeros_like(side)
        return np.stack([(height - side) // 2, (width - side) // 2, side, side, zero], -1)[:, None]

    # The general way, a row at a time; the data module takes a faster one for images.

    def prepare(self, samples: Sequence[Any], rows: Rows | None) -> Table:
        """Crops opened images, which have `height`, `width` and `pixels()` (H, W, C) uint8."""
        from simclr_pl.crop_kernels import resize  # numba takes a while to import

        height, width = (np.array([getattr(s, n) for s in samples]) for n in ("height", "width"))
        if rows is None:
            crops, table = self.clean_crops(height, width), {}
        else:
            of = (rows.seed, rows.epoch, rows.index, 1)
            crops = self.draw_crops(*of, height, width, rows.view[:, None])
            table = self.draw(*of, rows.view[:, None])
        cut = []
        for sample, (top, left, h, w, flipped) in zip(samples, crops[:, 0].tolist(), strict=True):
            crop = sample.pixels()[top : top + h, left : left + w]
            cut.append(resize(crop, self.size, self.size, bool(flipped)))
        return {"images": np.stack(cut).transpose(0, 3, 1, 2)[:, None], "drawn": table}

    def finish(self, table: Table) -> Tensor:
        """Colours what `prepare` cropped."""
        if table["drawn"]:
            return self.apply(table["images"], table["drawn"])
        return self.normalise(to_float(table["images"][:, 0]))

    # Applying: torch, on any device.

    def apply(self, images: Tensor, table: Table) -> Tensor:
        """Turns crops into views.

        Args:
            images: (B, V, C, S, S) uint8.
            table: from `draw`, its arrays as tensors on the same device.

        Returns:
            (V*B, C, S, S) float32, normalised, all of view 0 first.
        """
        colours = table.keys() & {"order", "grey", "sigma", "solarise"}
        if images.device.type == "cpu" and images.shape[2] == 3 and colours:
            return self._apply_compiled(images, table)
        if images.shape[2] in (1, 3) and triton_serves(images.device):
            return self._apply_kernels(images, table)
        return self.apply_batched(images, table)

    def apply_batched(self, images: Tensor, table: Table) -> Tensor:
        """`apply` by torch alone, an operation at a time on all rows that it concerns."""
        x = to_float(_rows(images))  # (N, C, S, S)
        by_row = ("jitter_rows", "jitter_counts", "grey_rows", "blur_rows")
        rows: Table = {name: v if name in by_row else _rows(v) for name, v in table.items()}
        if "angle" in rows:
            x = rotate_shift(x, rows["angle"], rows["shift"])
        if "order" in rows:
            x = jitter_colour(x, rows["factor"], rows["jitter_rows"], rows["jitter_counts"])
        if "grey" in rows and x.shape[1] == 3:
            some = rows["grey_rows"]
            x.index_copy_(0, some, grey(x[some]))
        return self._blur_and_finish(x, rows)

    def _blur_and_finish(self, x: Tensor, rows: Table) -> Tensor:
        """What comes after grey, in place where it can be; ``rows`` is by row."""
        if "sigma" in rows:
            some = rows["blur_rows"]
            x.index_copy_(0, some, blur(x[some], rows["sigma"][some], self._blur_radius()))
        if "solarise" in rows:
            inverted = torch.where(x >= 0.5, 1 - x, x)
            x = torch.where(rows["solarise"][:, None, None, None], inverted, x)
        return self.normalise(x)

    def _apply_kernels(self, images: Tensor, table: Table) -> Tensor:
        from simclr_pl.view_kernels import colour_rows_on_gpu  # triton is not everywhere

        if "angle" in table:
            x = rotate_shift(to_float(_rows(images)), _rows(table["angle"]), _rows(table["shift"]))
            images = x.unflatten(0, (images.shape[1], images.shape[0])).transpose(0, 1)
        x = colour_rows_on_gpu(images, table, self.mean, self.std)
        if "sigma" not in table:
            return x
        rows: Table = {n: _rows(table[n]) for n in ("sigma", "solarise") if n in table}
        return self._blur_and_finish(x, rows | {"blur_rows": table["blur_rows"]})

    def _apply_compiled(self, images: Tensor, table: Table) -> Tensor:
        from simclr_pl.image_kernels import colour_rows  # numba takes a while to import

        n_images, n_views = images.shape[:2]
        rows = {
            name: _rows(table[name])
            for name in ("angle", "shift", "factor", "order", "grey", "sigma", "solarise")
            if name in table
        }
        if "angle" in rows:
            x = rotate_shift(to_float(_rows(images)), rows["angle"], rows["shift"])
            x = x.permute(0, 2, 3, 1)
            source = np.arange(len(x))
        else:
            x = images.permute(0, 1, 3, 4, 2).flatten(0, 1)  # (B*V, S, S, C), no copy from a loader
            source = np.arange(len(x)).reshape(n_images, n_views).T.flatten()
        views = colour_rows(
            x.contiguous().numpy(),
            source,
            {name: value.numpy() for name, value in rows.items()},
            self._blur_radius(),
            *(np.broadcast_to(np.array(v, np.float64), 3) for v in (self.mean, self.std)),
        )
        return torch.from_numpy(views).permute(0, 3, 1, 2)

    def _blur_radius(self) -> int:
        """Of the window, in pixels: a twentieth of the side, or 3 sigma if that is less."""
        return max(1, min(self.size // 10 // 2, math.ceil(3 * self.blur_sigma[1])))

    def raw(self, views: Tensor) -> Tensor:
        """Pixels (n, C * s * s) float32 of views (n, C, S, S), averaged down to a side s <= 32."""
        if views.shape[-1] > _RAW_SIDE:
            views = torch.nn.functional.adaptive_avg_pool2d(views, _RAW_SIDE)
        return views.flatten(1).float()

    def pictures(self, views: Tensor) -> np.ndarray:
        """Normalised views (n, C, S, S) as they were before: (n, S, S, C) uint8."""
        # one number may serve all channels
        scale, shift = (torch.tensor(v[: views.shape[1]]) for v in (self.std, self.mean))
        x = views.float().cpu().movedim(1, -1) * scale + shift
        return x.mul(255).round().clamp(0, 255).byte().numpy()

    def picture_of(self, sample: Any) -> np.ndarray:
        """The pixels (H, W, C) uint8 of an opened image."""
        return sample.pixels()  # type: ignore[no-any-return]

    def normalise(self, x: Tensor) -> Tensor:
        """Normalises float images (n, C, S, S) in [0, 1], in place."""
        for c in range(x.shape[1]):  # by numbers: a tensor made of them would wait for a GPU
            mean, std = (v[c] if len(v) > 1 else v[0] for v in (self.mean, self.std))
            x[:, c].sub_(mean).div_(std)
        return x


def simclr_imagenet(size: int = 224, strength: float = 1.0, **options: Any) -> Augment:
    """The paper's augmentation for ImageNet (appendix A), with ImageNet's mean and deviation.

    Args:
        size: side of a view, in pixels.
        strength: of the colour jitter.
        options: any argument of `Augment`.
    """
    return Augment(size=size, strength=strength, **options)


def simclr_cifar(
    size: int = 32,
    strength: float = 0.5,
    blur: float = 0.0,
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465),
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616),
    clean_fraction: float = 1.0,
    **options: Any,
) -> Augment:
    """The paper's augmentation for CIFAR-10 (appendix B.9): half the jitter, no blur.

    Args:
        size: side of a view, in pixels.
        strength: of the colour jitter.
        blur: probability of a Gaussian blur.
        mean: subtracted from each channel; by default that of CIFAR-10's training images.
        std: divides each channel; by default that of CIFAR-10's training images.
        clean_fraction: share of the shorter side that the clean view keeps.
        options: any argument of `Augment`.
    """
    return Augment(
        size=size,
        strength=strength,
        blur=blur,
        mean=mean,
        std=std,
        clean_fraction=clean_fraction,
        **options,
    )


def digits(
    size: int = 32,
    crop_scale: tuple[float, float] = (0.6, 1.0),
    rotation: float = 10.0,
    shift: float = 0.15,
    mean: tuple[float, ...] = (0.204,),
    std: tuple[float, ...] = (0.181,),
) -> Augment:
    """The augmentation of the embedded digits: crop, rotation and shift; a flipped digit is another.

    Args:
        size: side of a view, in pixels.
        crop_scale: range of the crop's share of the image's area.
        rotation: largest rotation to either side, in degrees.
        shift: largest shift along each axis, as a fraction of the side.
        mean: subtracted from the grey value.
        std: divides it.
    """
    return Augment(
        size=size,
        crop_scale=crop_scale,
        flip=0.0,
        rotation=rotation,
        shift=shift,
        jitter=0.0,
        grey=0.0,
        blur=0.0,
        mean=mean,
        std=std,
        clean_fraction=1.0,
    )


def _by_view(value: np.ndarray) -> np.ndarray:
    """(B,) -> (B, 1); (B, V) as it is."""
    return value[:, None] if value.ndim == 1 else value


def _rows(value: Tensor) -> Tensor:
    """(B, V, ...) -> (V*B, ...), all of view 0 first."""
    return value.transpose(0, 1).flatten(0, 1)


def _grouped(order: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """For each position in the order, the rows sorted by operation, and how many have each."""
    by_row = order.transpose(2, 1, 0).reshape(order.shape[2], -1)  # (4, V*B)
    rows = np.argsort(np.where(by_row < 0, 4, by_row), axis=1, kind="stable")
    return rows, [np.bincount(row[row >= 0], minlength=4).tolist() for row in by_row]
