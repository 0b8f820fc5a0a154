"""The resampling of views as a compiled loop, for the CPU.

soxr designs a filter for each new ratio, which takes longer than to use it: 5,120 samples cost it 200 to
380 us of CPU time, the loop here 80.

Symbols: m samples in, n samples out.
"""

import math

import numpy as np

from simclr_pl.cpu import compiled

_CROSSINGS = 8  # zeros of the sinc on either side that the filter keeps
_PHASES = 256  # places between two samples that have a filter of their own
_FINE = 2048  # places of the table of the filter between two zeros


def _filter() -> np.ndarray:
    """Half of a sinc under a Hann window, (_CROSSINGS * _FINE + 2,) float32."""
    t = np.arange(_CROSSINGS * _FINE + 2) / _FINE
    window = np.where(t < _CROSSINGS, np.cos(np.pi * t / (2 * _CROSSINGS)) ** 2, 0.0)
    return (np.sinc(t) * window).astype(np.float32)


_TABLE = _filter()


def change_speed(wave: np.ndarray, speed: float) -> np.ndarray:
    """Plays a wave faster by resampling, band-limited (Smith and Gossett 1984).

    Args:
        wave: (m,) float32, taken as zero beyond its ends.
        speed: factor; frequencies rise by it, and those that would pass half the rate are left out.

    Returns:
        (n,) float32, n = m / speed, rounded; within 1 % of full scale of what soxr gives.
    """
    out = np.empty(max(1, round(len(wave) / speed)), np.float32)
    reach = math.ceil(_CROSSINGS * max(1.0, speed))
    padded = np.zeros(len(wave) + 2 * reach + 2, np.float32)
    padded[reach : reach + len(wave)] = wave
    _interpolate(padded, reach, speed, _TABLE, out)
    return out


@compiled(fastmath={"reassoc", "contract"})  # else the taps are added one after the other
def _interpolate(
    padded: np.ndarray, reach: int, speed: float, table: np.ndarray, out: np.ndarray
) -> None:
    cutoff = min(1.0, 1.0 / speed)
    bank = np.zeros((_PHASES + 1, 2 * reach), np.float32)
    for phase in range(_PHASES + 1):
        for tap in range(2 * reach):
            distance = abs(phase / _PHASES - (tap - reach + 1)) * cutoff
            if distance < _CROSSINGS:
                bank[phase, tap] = cutoff * table[int(distance * _FINE + 0.5)]
    last = len(padded) - 2 * reach - 2  # samples of the wave
    for i in range(len(out)):
        place = min(i * speed, last)
        whole = int(place)
        weights = bank[int((place - whole) * _PHASES + 0.5)]
        total = np.float32(0)
        first = whole + 1  # of the wave's sample whole - reach + 1, in the padded one
        for tap in range(2 * reach):
            total += weights[tap] * padded[first + tap]
        out[i] = total
