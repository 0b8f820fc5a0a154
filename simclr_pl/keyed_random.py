"""Stateless random numbers: a pure function of (seed, epoch, sample, view, stream).

No generator is carried along, so the number of workers, ranks or views, the batch size and a resume
change nothing about what any sample gets. The numbers are drawn in numpy, in the loader, also
for the work that the device does: the device stage gets finished parameters and draws nothing.

The hash is the output function of splitmix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), applied once for each part of the key; the n numbers
of one key are the splitmix64 sequence that starts at the key.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


class Stream(IntEnum):
    """What a number is for. A new use takes a new value; values are never reused."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    AFFINE = 3
    JITTER = 4
    GREY = 5
    BLUR = 6
    SOLARISE = 7
    SPLIT = 8
    STEP = 9
    DIGITS = 10
    SAMPLE = 11
    LABELS = 12
    HEADS = 13
    REPLACE = 14
    CLIP_CROP = 20
    CLIP_SPEED = 21
    CLIP_PITCH = 22
    CLIP_GAIN = 23
    CLIP_NOISE = 24
    CLIP_TIME_MASK = 25
    CLIP_MEL_MASK = 26
    TEXT_CROP = 30
    TEXT_DELETION = 31
    TEXT_PAIRS = 32


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIER_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIER_2
    return x ^ (x >> np.uint64(31))


def keys(*parts: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """One 64-bit key for each element of the broadcast parts.

    Args:
        parts: integers or integer arrays that broadcast; their order matters.

    Returns:
        uint64, in the broadcast shape.
    """
    with np.errstate(over="ignore"):  # arithmetic is modulo 2**64 by design
        key = np.zeros((), np.uint64)
        for part in parts:
            # through int64, so that -1 is a valid part
            absorbed = np.asarray(part, np.int64).astype(np.uint64)
            key = _mix((key ^ absorbed) + _GOLDEN)
        return np.asarray(key, np.uint64)


def uniforms(key: npt.NDArray[np.uint64], n: int) -> npt.NDArray[np.float64]:
    """N uniform numbers for each key.

    Args:
        key: uint64 (...), from `keys`.
        n: numbers for each key.

    Returns:
        float64 (..., n) in [0, 1), each a multiple of 2**-53.
    """
    with np.errstate(over="ignore"):
        counter = np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(np.asarray(key)[..., None] + counter)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, *parts: int) -> npt.NDArray[np.int64]:
    """A permutation of 0..n-1 that depends on nothing but ``parts``.

    Sorting hashed positions, unlike numpy's generators, is the same in every version of numpy.
    """
    return np.argsort(keys(*parts, np.arange(n)), kind="stable")
