"""The resampling of views against a slow float64 oracle, and against soxr."""

import math

import numpy as np
import pytest
import soxr
from scipy.signal import firwin, lfilter

from simclr_pl.audio_kernels import change_speed


def slow(wave: np.ndarray, speed: float) -> np.ndarray:
    """Every output as a sum over all inputs of a sinc of eight crossings under a Hann window."""
    cutoff = min(1.0, 1 / speed)
    out = []
    for i in range(max(1, round(len(wave) / speed))):
        t = (np.minimum(i * speed, len(wave)) - np.arange(len(wave))) * cutoff
        window = np.where(np.abs(t) < 8, np.cos(np.pi * t / 16) ** 2, 0)
        out.append(np.sum(wave.astype(np.float64) * np.sinc(t) * window) * cutoff)
    return np.array(out)


SPEEDS = [0.25, 0.8, 1.0, 1.07, 1.25, 4.0]


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("length", [1, 2, 40, 777])
def test_resampling_equals_the_definition_up_to_the_steps_between_filters(
    speed: float, length: int
) -> None:
    wave = np.random.default_rng(0).uniform(-1, 1, length).astype(np.float32)
    found = change_speed(wave, speed)
    assert found.dtype == np.float32
    # filters are 1/256 of a sample apart, and white noise changes by up to pi times its size a sample
    np.testing.assert_allclose(found, slow(wave, speed), atol=0.02, rtol=0)


@pytest.mark.parametrize("speed", SPEEDS)
def test_what_lies_well_within_the_band_is_resampled_as_by_soxr(speed: float) -> None:
    noise = np.random.default_rng(0).standard_normal(8000) * 0.2
    wave = lfilter(firwin(301, 0.6 / max(1.0, speed)), 1, noise).astype(np.float32)
    found, expected = change_speed(wave, speed), soxr.resample(wave, speed, 1.0, "VHQ")
    inner = slice(100, len(expected) - 100)
    error = found[: len(expected)][inner] - expected[inner]
    assert len(found) == pytest.approx(len(expected), abs=1)
    assert error.std() < 0.005 * expected[inner].std()


def test_speed_1_changes_nothing() -> None:
    wave = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    np.testing.assert_allclose(change_speed(wave, 1.0), wave, atol=1e-6)


def test_what_would_pass_half_the_rate_is_left_out() -> None:
    tone = np.sin(math.pi * 0.9 * np.arange(4000)).astype(np.float32)
    assert np.abs(change_speed(tone, 1.0)[100:-100]).max() > 0.9
    assert np.abs(change_speed(tone, 1.4)[100:-100]).max() < 0.02
