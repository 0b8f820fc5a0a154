"""Two views of a sound: the waveform's operations in the loader, the spectrogram's on the device.

What changes the waveform is done where its few kilobytes are in the processor's cache and most of a
long clip need not be read at all: crop, speed, gain and noise are a pass over one view, and only the
view crosses to the device. What costs arithmetic (the spectrum, its bands, pitch) or is small (masks)
runs there on whole batches, with parameters of their own for each row.

Symbols: n rows, L samples of a view, T frames.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_pl.audio_kernels import change_speed
from simclr_pl.augmentation import Augmentation, Rows, Table
from simclr_pl.errors import InputError
from simclr_pl.keyed_random import Stream, keys, uniforms
from simclr_pl.log_mel import LogMel

_NOISE = (
    2**18
)  # samples of white noise that views take theirs from: drawing each anew costs 20 times that
_PICTURE = 10  # seconds of a clip that a picture shows at most
_SHADES = 3  # deviations of the log-mel from mid grey to black and to white


class AudioAugment(Augmentation):
    """Random crop, speed, pitch, gain, noise and masks, as a log-mel spectrogram.

    A sample is an opened clip with `rate` in hertz, `frames`, and `read(start, count)`, float32 in
    [-1, 1]. A view is a picture of one channel (1, n_mels, T), low bands first, with a mean of about 0
    and a deviation of about 1. Clips shorter than a view lie at a random place in it, between zeros. The
    clean view is the clip's middle, or all of it, in the middle.

    Args:
        sample_rate: of the clips, in hertz; the same as the source's.
        seconds: length of a view.
        speed: range of the factor of playing faster, by resampling; higher is also higher in pitch.
        pitch: range of the factor on the frequency axis alone (VTLP, Jaitly and Hinton 2013), as of a
            shorter or longer vocal tract.
        gain: range of the gain, in decibels.
        noise: probability of white noise.
        snr: range of the ratio of the clip's power, where it sounds, to the noise's, in decibels.
        time_masks: number of spans of time that are set to the mean (SpecAugment, Park et al. 2019,
            arXiv:1904.08779, section 2).
        time_mask: largest length of one, as a share of the view.
        mel_masks: number of masked spans of neighbouring bands.
        mel_mask: largest width of one, as a share of the bands.
        n_mels: bands of the spectrogram.
        window: length of a frame, in milliseconds.
        hop: from one frame to the next, in milliseconds.
        f_min: lower edge of the lowest band, in hertz.
        f_max: upper edge of the highest band, in hertz; by default half the rate.
        mean: subtracted from the log-mel; by default near that of the Free Spoken Digit Dataset.
        std: divides it after that.

    Raises:
        InputError: a number or range out of its bounds.
    """

    raw_name = "mean log-mel"

    def __init__(
        self,
        sample_rate: int = 16000,
        seconds: float = 2.0,
        speed: tuple[float, float] = (0.9, 1.1),
        pitch: tuple[float, float] = (0.9, 1.1),
        gain: tuple[float, float] = (-6.0, 6.0),
        noise: float = 0.5,
        snr: tuple[float, float] = (10.0, 40.0),
        time_masks: int = 1,
        time_mask: float = 0.2,
        mel_masks: int = 1,
        mel_mask: float = 0.25,
        n_mels: int = 64,
        window: float = 25.0,
        hop: float = 10.0,
        f_min: float = 50.0,
        f_max: float | None = None,
        mean: float = -14.0,
        std: float = 4.0,
    ) -> None:
        self.sample_rate = sample_rate
        self.seconds = seconds
        self.speed = speed
        self.pitch = pitch
        self.gain = gain
        self.noise = noise
        self.snr = snr
        self.time_masks = time_masks
        self.time_mask = time_mask
        self.mel_masks = mel_masks
        self.mel_mask = mel_mask
        self.mean = mean
        self.std = std
        self._check()
        self.length = round(seconds * sample_rate)  # L
        self._make = partial(LogMel, sample_rate, n_mels, window, hop, f_min, f_max)
        self._spectrogram = self._make()
        self._on_devices: dict[torch.device, LogMel] = {}
        if self.length < self._spectrogram.window.numel():
            raise InputError(
                f"`seconds` must be at least the `window`; got {seconds} s for {window} ms. Set "
                "`data.augment.seconds`."
            )

    def _check(self) -> None:
        for name, least, most in (
            ("speed", 0.25, 4.0),
            ("pitch", 0.25, 4.0),
            ("gain", -120.0, 120.0),
            ("snr", -120.0, 120.0),
        ):
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise InputError(
                    f"`{name}` must be a range (low, high) within [{least:g}, {most:g}]; got "
                    f"({low}, {high}). Set `data.augment.{name}`."
                )
        for name in ("noise", "time_mask", "mel_mask"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"`{name}` must be within [0, 1]; got {getattr(self, name)}. Set "
                    f"`data.augment.{name}`."
                )
        for name, least in (("sample_rate", 1), ("time_masks", 0), ("mel_masks", 0)):
            if getattr(self, name) < least:
                raise InputError(
                    f"`{name}` must be >= {least}; got {getattr(self, name)}. Set "
                    f"`data.augment.{name}`."
                )
        if not (
            0 < self.seconds < math.inf and 0 < self.std < math.inf and math.isfinite(self.mean)
        ):
            raise InputError(
                "`seconds` and `std` must be > 0 and `mean` finite; got "
                f"{self.seconds}, {self.std} and {self.mean}. Set `data.augment`."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without what lies on devices: workers get a copy of this, and need none of it."""
        return {**self.__dict__, "_on_devices": {}}

    # The waveform: numpy, in the loader.

    def draw(self, rows: Rows) -> Table:
        """Draws the parameters of every operation.

        Returns:
            Only the operations that can happen, of n rows: "at" in [0, 1), where the crop is, or the clip
            in the view; "speed" and "pitch", factors; "gain", a factor; "noise_at" in [0, 1) and "snr", a
            ratio of amplitudes, 0 for no noise; "time_masks" in frames and "mel_masks" in bands, int64
            (n, masks, 2), first and end.
        """

        def within(stream: Stream, bounds: tuple[float, float]) -> np.ndarray:
            return np.asarray(np.interp(rows.uniforms(stream, 1)[:, 0], (0, 1), bounds))

        table: Table = {"at": rows.uniforms(Stream.CLIP_CROP, 1)[:, 0]}
        if self.speed != (1, 1):
            table["speed"] = within(Stream.CLIP_SPEED, self.speed)
        if self.pitch != (1, 1):
            table["pitch"] = within(Stream.CLIP_PITCH, self.pitch).astype(np.float32)
        if self.gain != (0, 0):
            table["gain"] = _amplitude(within(Stream.CLIP_GAIN, self.gain))
        if self.noise:
            u = rows.uniforms(Stream.CLIP_NOISE, 3)
            ratio = _amplitude(-np.interp(u[:, 1], (0, 1), self.snr))
            table["snr"] = np.where(u[:, 0] < self.noise, ratio, 0.0)
            table["noise_at"] = u[:, 2]
        frames = self._spectrogram.frames(self.length)
        for name, stream, masks, share, size in (
            ("time_masks", Stream.CLIP_TIME_MASK, self.time_masks, self.time_mask, frames),
            ("mel_masks", Stream.CLIP_MEL_MASK, self.mel_masks, self.mel_mask, self.n_mels),
        ):
            if masks and (widest := round(share * size)):
                u = rows.uniforms(stream, 2 * masks).reshape(-1, masks, 2)
                width = (u[..., 0] * (widest + 1)).astype(np.int64)
                first = (u[..., 1] * (size - width + 1)).astype(np.int64)
                table[name] = np.stack([first, first + width], -1)
        return table

    @property
    def n_mels(self) -> int:
        """Bands of the spectrogram."""
        return self._spectrogram.n_mels

    def prepare(self, samples: Sequence[Any], rows: Rows | None) -> Table:
        """Cuts views out of opened clips: "waves" (n, L) float32, "pitch" and masks as of `draw`.

        Raises:
            InputError: a clip has another rate.
        """
        drawn = {} if rows is None else self.draw(rows)
        waves = np.zeros((len(samples), self.length), np.float32)
        for i, (clip, wave) in enumerate(zip(samples, waves, strict=True)):
            own = {name: drawn[name][i] for name in ("at", "speed", "gain", "snr") if name in drawn}
            part = self._cut(clip, own.get("at", 0.5), own.get("speed", 1.0), wave)
            if "gain" in own:
                part *= np.float32(own["gain"])
            if own.get("snr"):
                self._add_noise(wave, _rms(part) * own["snr"], drawn["noise_at"][i])
        return {"waves": waves} | {
            name: drawn[name] for name in ("pitch", "time_masks", "mel_masks") if name in drawn
        }

    def _cut(self, clip: Any, at: float, speed: float, wave: np.ndarray) -> np.ndarray:
        """Fills a view (L,) of zeros, and returns the part of it where the clip is."""
        if clip.rate != self.sample_rate:
            raise InputError(
                f"the augmentation's `sample_rate` must be that of the clips, {clip.rate} Hz; got "
                f"{self.sample_rate}. Set `data.augment.sample_rate` or `data.source.sample_rate`."
            )
        count = self.length if speed == 1 else math.ceil(self.length * speed) + 1
        count = min(clip.frames, count)
        part = clip.read(int(at * (clip.frames - count + 1)), count)
        if speed != 1:
            part = change_speed(part, speed)
        part = part[: self.length]
        start = int(at * (self.length - len(part) + 1))
        wave[start : start + len(part)] = part
        return wave[start : start + len(part)]

    def _add_noise(self, wave: np.ndarray, rms: float, at: float) -> None:
        hiss = _hiss(max(_NOISE, 2 * self.length))
        start = int(at * (len(hiss) - self.length + 1))
        piece = hiss[start : start + self.length]
        wave += np.float32(rms / _rms(piece)) * piece

    # The spectrogram: torch, on any device.

    def finish(self, table: Table) -> Tensor:
        """Turns waveforms into normalised log-mel spectrograms (n, 1, n_mels, T) float32."""
        waves = table["waves"]
        x: Tensor = self.on_device(waves.device)(waves, table.get("pitch"))
        x.sub_(self.mean).div_(self.std)
        if "time_masks" in table:
            x.masked_fill_(_inside(table["time_masks"], x.shape[2])[:, None], 0)
        if "mel_masks" in table:
            x.masked_fill_(_inside(table["mel_masks"], x.shape[1])[..., None], 0)
        return x[:, None]

    def on_device(self, device: torch.device) -> LogMel:
        """The front end on a device; the first call moves it there, and waits for that."""
        if device == self._spectrogram.window.device:
            return self._spectrogram
        if device not in self._on_devices:
            self._on_devices[device] = self._make().to(device)
        return self._on_devices[device]

    def raw(self, views: Tensor) -> Tensor:
        """The mean over time (n, n_mels) float32 of views (n, 1, n_mels, T)."""
        return views[:, 0].float().mean(-1)

    def pictures(self, views: Tensor) -> np.ndarray:
        """Views (n, 1, n_mels, T) as grey pictures (n, n_mels, T, 1) uint8, low bands at the bottom.

        Mid grey is the mean, black and white are three deviations away.
        """
        x = views.float().cpu().flip(2).movedim(1, -1)
        grey = x.div(2 * _SHADES).add(0.5).mul(255).round().clamp(0, 255)
        pictures: np.ndarray = grey.byte().numpy()
        return pictures

    def picture_of(self, sample: Any) -> np.ndarray:
        """The spectrogram (n_mels, frames, 1) uint8 of a clip, or of ten seconds in its middle."""
        count = min(sample.frames, _PICTURE * sample.rate)
        wave = sample.read((sample.frames - count) // 2, count)
        x = self._spectrogram(torch.from_numpy(wave)[None]).sub_(self.mean).div_(self.std)
        picture: np.ndarray = self.pictures(x[:, None])[0]
        return picture


def _amplitude(decibels: np.ndarray) -> np.ndarray:
    return np.asarray(10 ** (decibels / 20))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@lru_cache(1)
def _hiss(count: int) -> np.ndarray:
    """White noise (count,) float32. Uniform: a spectrum's bins sum so many that they are normal."""
    return (uniforms(keys(Stream.CLIP_NOISE), count) - 0.5).astype(np.float32)


def _inside(spans: Tensor, size: int) -> Tensor:
    """(n, size) bool: what lies in any of the spans (n, masks, 2)."""
    place = torch.arange(size, device=spans.device)
    return ((spans[..., :1] <= place) & (place < spans[..., 1:])).any(1)
