"""What features and scores are worth: pure functions."""

import math
from statistics import NormalDist


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share, by Wilson's score (1927, J. Am. Stat. Assoc. 22).

    Unlike the normal approximation it stays within [0, 1] and has a width at 0 and 1.

    Args:
        correct: hits, of ``total``.
        total: trials, >= 1.
        confidence: that the interval covers the true share.

    Returns:
        Its lower and upper end.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (centre - spread) / scale, (centre + spread) / scale
