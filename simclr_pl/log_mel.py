"""Log-mel spectrograms of batches of waveforms, on any device.

Symbols: n rows, L samples of a waveform, K bins of the spectrum, T frames.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from simclr_pl.errors import InputError

_FLOOR = 1e-8  # of the power, where a full-scale sine has 0.25: 74 dB below it
_FORMANTS = 0.6  # of half the rate: Jaitly and Hinton's F_hi of 4800 Hz at 16 kHz


class LogMel(nn.Module):
    """Logarithm of the power in mel-spaced bands, frame by frame.

    The scale is HTK's, mel = 2595 log10(1 + f / 700) (Young et al., The HTK Book, section 5.4), and so
    are the bands: triangles of height 1 between neighbours on that scale (Slaney's have equal area).
    Power is that of a Hann window's spectrum over the square of the window's sum, so that a sine of
    amplitude a has a^2 / 4 at its peak, whatever the window.

    Args:
        sample_rate: of the waveforms, in hertz.
        n_mels: bands.
        window: length of a frame, in milliseconds.
        hop: from one frame to the next, in milliseconds.
        f_min: lower edge of the lowest band, in hertz.
        f_max: upper edge of the highest band, in hertz; by default half the rate.

    Raises:
        InputError: a number out of its range, or bands so narrow that one holds no bin of the spectrum.
    """

    window: Tensor
    frequencies: Tensor
    edges: Tensor
    bank: Tensor

    def __init__(
        self,
        sample_rate: int = 16000,
        n_mels: int = 64,
        window: float = 25.0,
        hop: float = 10.0,
        f_min: float = 50.0,
        f_max: float | None = None,
    ) -> None:
        super().__init__()
        f_max = sample_rate / 2 if f_max is None else f_max
        length, self.hop = (round(ms * sample_rate / 1000) for ms in (window, hop))
        if length < 2 or self.hop < 1 or n_mels < 1:
            raise InputError(
                "`window` must hold two samples or more, `hop` and `n_mels` be >= 1; got "
                f"{window} ms, {hop} ms at {sample_rate} Hz and {n_mels}. Set `data.augment`."
            )
        if not 0 <= f_min < f_max <= sample_rate / 2:
            raise InputError(
                "`f_min` and `f_max` must be within 0 <= f_min < f_max <= half of `sample_rate`; got "
                f"{f_min} and {f_max} Hz at {sample_rate} Hz. Set `data.augment`."
            )
        self.n_mels, self.half_rate = n_mels, sample_rate / 2
        self.n_fft = 2 ** math.ceil(math.log2(length))
        low, high = (2595 * math.log10(1 + f / 700) for f in (f_min, f_max))
        edges = 700 * (10 ** (np.linspace(low, high, n_mels + 2) / 2595) - 1)
        bins = np.linspace(0, self.half_rate, self.n_fft // 2 + 1)
        holds = (edges[:-2, None] < bins) & (bins < edges[2:, None])  # (n_mels, K)
        if not holds.any(1).all():
            raise InputError(
                f"each of `n_mels` bands must hold a bin of the spectrum; got {n_mels} bands for bins of "
                f"{bins[1]:.1f} Hz, of which {(~holds.any(1)).sum()} hold none. Set "
                "`data.augment.n_mels` lower or `data.augment.window` higher."
            )
        hann = torch.hann_window(length, dtype=torch.float64)
        self.register_buffer("window", (hann / hann.sum()).float())
        self.register_buffer("frequencies", torch.from_numpy(bins).float())  # (K,) hertz
        self.register_buffer("edges", torch.from_numpy(edges).float())  # (n_mels + 2,) hertz
        self.register_buffer("bank", self._triangles(self.edges))  # (n_mels, K)

    def frames(self, length: int) -> int:
        """T of waveforms of ``length`` samples: a frame about each multiple of the hop."""
        return 1 + length // self.hop

    def forward(self, waves: Tensor, warp: Tensor | None = None) -> Tensor:
        """Maps waveforms to log-mel spectrograms.

        Args:
            waves: (n, L) float32, taken as zero beyond their ends.
            warp: (n,) float32, a factor on each row's frequency axis as of Jaitly and Hinton 2013, "Vocal
                Tract Length Perturbation (VTLP) improves speech recognition", section 2: a band listens
                at ``warp`` times its frequencies, up to where the rest is squeezed below half the rate.

        Returns:
            (n, n_mels, T) float32, natural logarithms, from low bands to high.
        """
        spectrum = torch.stft(
            waves,
            self.n_fft,
            self.hop,
            self.window.numel(),
            self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        power = torch.view_as_real(spectrum).square().sum(-1)  # (n, K, T)
        # A bank for each row costs n_mels K triangles; to move the spectrum itself costs K T.
        bank = self.bank if warp is None else self._triangles(self._warped(warp))
        return (bank @ power).clamp_(min=_FLOOR).log_()

    def _warped(self, warp: Tensor) -> Tensor:
        """Band edges (n, n_mels + 2) in hertz for factors (n,)."""
        warp, half = warp[:, None], self.half_rate
        bend = _FORMANTS * half * warp.clamp(max=1)  # F_hi min(alpha, 1)
        rest = half - (half - bend) / (half - bend / warp) * (half - self.edges)
        return torch.where(self.edges <= bend / warp, self.edges * warp, rest)

    def _triangles(self, edges: Tensor) -> Tensor:
        """Weights (..., n_mels, K) of the bins in bands with edges (..., n_mels + 2)."""
        low, middle, high = edges[..., :-2, None], edges[..., 1:-1, None], edges[..., 2:, None]
        up = (self.frequencies - low) / (middle - low)
        down = (high - self.frequencies) / (high - middle)
        return torch.minimum(up, down).clamp_(min=0)
