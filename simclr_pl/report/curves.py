"""Curves with few enough points for a page, and in groups by what they are about.

Symbols: n points.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# What the keys before the slash say; others follow by name.
GROUPS = {
    "train": "The loss over all ranks, and what it saw",
    "knn": "Accuracy of nearest neighbours among clean features",
    "probe": "Accuracy of linear heads trained beside the encoder",
    "collapse": "How many dimensions the features fill, and how evenly",
    "throughput": "Speed, and where the time goes",
    "data": "Samples that could not be read",
}

# How to read a curve.
ABOUT = {
    "train/loss": "how low depends on batch and temperature",
    "train/top1": "the other view is the nearest of all",
    "train/positive_similarity": "cosine of two views of one sample",
    "train/negative_similarity": "cosine of two samples; near 0 when spread",
    "train/entropy": "of the softmax; low: few negatives matter",
    "knn/top1": "the query, by its neighbours' votes",
    "probe/top1": "the query, by the best linear head",
    "collapse/feature_rank": "RankMe: dimensions in use; 1 is a collapse",
    "collapse/projection_rank": "the same of the projections",
    "collapse/feature_std": "0 is a point, 1 an even spread",
    "collapse/projection_std": "the same of the projections",
    "collapse/alignment": "between views of one sample; lower is closer",
    "collapse/uniformity": "lower is more even over the sphere",
    "collapse/top1": "the nearest view shows the same sample",
    "throughput/data": "share of the time waiting for batches",
    "throughput/step_ms": "milliseconds a step, without evaluation",
    "throughput/peak_memory_mib": "so far",
}


class Curve(NamedTuple):
    """One number over the steps of a run.

    Attributes:
        steps: (n,) int64, ascending.
        values: (n,) float64, finite.
        total: points before any were left out.
        not_finite: points that were no numbers, and are left out.
    """

    steps: np.ndarray
    values: np.ndarray
    total: int
    not_finite: int


def curve_of(steps: Sequence[int], values: Sequence[float], max_points: int) -> Curve:
    """A curve of at most so many points; of several values of a step the last one counts.

    Args:
        steps: n, in any order.
        values: n.
        max_points: to keep.
    """
    at, y = np.array(steps, np.int64), np.array(values, np.float64)
    order = np.argsort(at, kind="stable")
    at, y = at[order], y[order]
    is_last = np.append(at[1:] != at[:-1], True)[: len(at)]
    at, y = at[is_last], y[is_last]
    is_finite = np.isfinite(y)
    at, y = at[is_finite], y[is_finite]
    kept = thinned(y, max_points)
    return Curve(at[kept], y[kept], len(y), int((~is_finite).sum()))


def thinned(values: np.ndarray, max_points: int) -> np.ndarray:
    """Which points to draw, so that a line through them looks like one through all.

    The first, the last, the least and the greatest point of each of equal parts: what is drawn in a
    column of pixels is the same (Jugel et al. 2014, M4, doi:10.14778/2732951.2732953, section 4).

    Args:
        values: (n,) finite.
        max_points: at most so many are kept; >= 4.

    Returns:
        (m,) int64 positions, ascending, m <= max_points.
    """
    n = len(values)
    if n <= max_points:
        return np.arange(n)
    kept = []
    for part in np.array_split(np.arange(n), max_points // 4):
        inside = values[part]
        kept += [part[0], part[-1], part[inside.argmin()], part[inside.argmax()]]
    return np.unique(kept)


def grouped(keys: Iterable[str]) -> dict[str, list[str]]:
    """Keys by what stands before their first slash; those without one are "other".

    Known groups come first, and within a group what one looks for first.

    Args:
        keys: of metrics.csv; those of "summary" are left out, for they are no curves.
    """
    found: dict[str, list[str]] = {}
    for key in sorted(set(keys)):
        group, slash, _ = key.partition("/")
        found.setdefault(group if slash else "other", []).append(key)
    order = [*GROUPS, *sorted(found.keys() - GROUPS.keys() - {"summary"})]

    def place(key: str) -> tuple[int, int]:
        name = key.partition("/")[2]
        return name.count("/"), {"loss": 0, "top1": 1}.get(name, 2)

    return {group: sorted(found[group], key=place) for group in order if group in found}
