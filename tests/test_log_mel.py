"""Log-mel spectrograms against a slow float64 oracle."""

import math

import numpy as np
import pytest
import torch

from simclr_pl.errors import InputError
from simclr_pl.log_mel import LogMel


def slow_log_mel(
    wave: np.ndarray,
    rate: int,
    n_mels: int,
    window: float,
    hop: float,
    f_min: float,
    f_max: float,
    warp: float = 1.0,
) -> np.ndarray:
    """(n_mels, T) of one waveform: every frame, band and bin by itself, by the definitions."""
    length, step = round(window * rate / 1000), round(hop * rate / 1000)
    n_fft = 2
    while n_fft < length:
        n_fft *= 2
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    padded = np.concatenate([np.zeros(n_fft), wave.astype(np.float64), np.zeros(n_fft)])
    mel = np.linspace(*(2595 * np.log10(1 + np.array([f_min, f_max]) / 700)), n_mels + 2)
    edges = [warped(700 * (10 ** (m / 2595) - 1), warp, rate) for m in mel]
    out = np.zeros((n_mels, 1 + len(wave) // step))
    for t in range(out.shape[1]):
        start = n_fft + t * step - n_fft // 2 + (n_fft - length) // 2
        frame = padded[start : start + length] * hann
        for_bins = [
            abs(np.sum(frame * np.exp(-2j * np.pi * k * np.arange(length) / n_fft))) ** 2
            for k in range(n_fft // 2 + 1)
        ]
        for m, (low, mid, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
            total = 0.0
            for k, power in enumerate(for_bins):
                f = k * rate / n_fft
                if low < f < high:
                    weight = (f - low) / (mid - low) if f < mid else (high - f) / (high - mid)
                    total += weight * power / hann.sum() ** 2
            out[m, t] = math.log(max(total, 1e-8))
    return out


def warped(f: float, alpha: float, rate: int) -> float:
    """Jaitly and Hinton 2013, section 2, with F_hi at 0.6 of half the rate."""
    half = rate / 2
    f_hi = 0.6 * half
    if f <= f_hi * min(alpha, 1) / alpha:
        return f * alpha
    top = half - f_hi * min(alpha, 1)
    return half - top / (half - f_hi * min(alpha, 1) / alpha) * (half - f)


CASES = [  # rate, n_mels, window ms, hop ms, f_min, f_max, samples
    (8000, 13, 25.0, 10.0, 50.0, 4000.0, 1111),
    (16000, 20, 16.0, 7.5, 0.0, 7000.0, 900),
    (11025, 7, 23.3, 11.7, 100.0, 5000.0, 701),
]


def noisy_tones(count: int, length: int, rate: int) -> np.ndarray:
    random = np.random.default_rng(0)
    t = np.arange(length) / rate
    tones = [0.3 * np.sin(2 * np.pi * (300 + 450 * i) * t) for i in range(count)]
    return (np.array(tones) + 0.02 * random.standard_normal((count, length))).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("warps", [None, [0.88, 1.0, 1.13]])
def test_log_mel_equals_the_definition(case: tuple, warps: list[float] | None) -> None:
    *settings, length = case
    rate = settings[0]
    waves = noisy_tones(3, length, rate)
    front_end = LogMel(*settings)
    warp = None if warps is None else torch.tensor(warps)
    found = front_end(torch.from_numpy(waves), warp)
    assert found.shape == (3, settings[1], front_end.frames(length))
    assert found.dtype == torch.float32
    for row, (wave, alpha) in enumerate(zip(waves, warps or [1.0] * 3, strict=True)):
        expected = slow_log_mel(wave, *settings, warp=alpha)
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=0, atol=2e-3)


def test_a_sine_has_a_quarter_of_its_amplitude_squared_whatever_the_window() -> None:
    rate, amplitude = 8000, 0.5
    for window, frequency in ((32.0, 1000.0), (64.0, 1000.0)):
        front_end = LogMel(rate, 20, window, 10.0)
        wave = amplitude * torch.sin(2 * math.pi * frequency * torch.arange(4000) / rate)[None]
        spectrum = torch.stft(
            wave, front_end.n_fft, 80, window=front_end.window, return_complex=True
        )
        assert spectrum.abs().square().max().item() == pytest.approx(amplitude**2 / 4, rel=1e-3)


def test_silence_is_the_floor_and_finite() -> None:
    assert LogMel(8000, 20)(torch.zeros(2, 800)).unique().tolist() == [
        pytest.approx(math.log(1e-8))
    ]


def test_a_row_does_not_depend_on_the_others() -> None:
    waves = torch.from_numpy(noisy_tones(5, 1600, 16000))
    front_end, warp = LogMel(), torch.tensor([0.9, 1.0, 1.1, 1.05, 0.95])
    whole = front_end(waves, warp)
    for row in range(5):
        alone = front_end(waves[row : row + 1], warp[row : row + 1])
        torch.testing.assert_close(whole[row], alone[0], rtol=0, atol=1e-5)


def test_a_higher_warp_moves_a_tone_to_lower_bands() -> None:
    wave = torch.sin(2 * math.pi * 1000 * torch.arange(1600) / 8000)[None].repeat(3, 1)
    peaks = LogMel(8000, 40)(wave, torch.tensor([0.8, 1.0, 1.25])).mean(2).argmax(1)
    assert peaks[0] > peaks[1] > peaks[2]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_mels": 0}, "n_mels"),
        ({"hop": 0.0}, "hop"),
        ({"window": 0.1}, "window"),
        ({"f_min": -1.0}, "f_min"),
        ({"f_min": 5000.0, "f_max": 4000.0}, "f_max"),
        ({"f_max": 8001.0}, "f_max"),
        ({"n_mels": 128}, "hold none"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], match: str) -> None:
    with pytest.raises(InputError, match=match):
        LogMel(16000, **options)
