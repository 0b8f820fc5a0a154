"""Histograms of similarities over time, as outlines one above the other."""

from collections.abc import Sequence
from typing import Any

from simclr_pl.report.images import spread

_MOST = 14
_LEFT, _RIGHT = 64, 472  # of the cosines -1 and 1, in the drawing's own units
_PITCH, _TALLEST, _TOP = 32, 54, 70


def ridges_of(histograms: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Paths of an SVG drawing, 480 wide; the oldest histogram is on top.

    Each kind, positive and negative pairs, is scaled by its own highest bin, so that both can be seen.

    Args:
        histograms: each with ``step``, ``positive`` and ``negative``, counts in equal bins over [-1, 1].

    Returns:
        ``height``, ``base`` of the lowest outline, ``ticks`` and ``rows`` with ``step``, ``y`` and a path
        of each kind; None where there is nothing to draw.
    """
    shown = spread(histograms, _MOST)
    if not shown:
        return None
    kinds = ("positive", "negative")
    highest = {k: max(max(row[k]) / sum(row[k]) for row in shown) for k in kinds}
    rows = []
    for i, row in enumerate(shown):
        y = _TOP + i * _PITCH
        paths = {k: _path([c / sum(row[k]) / highest[k] for c in row[k]], y) for k in kinds}
        rows.append({"step": row["step"], "y": y, **paths})
    base = _TOP + (len(shown) - 1) * _PITCH
    ticks = [(x, _LEFT + (x + 1) / 2 * (_RIGHT - _LEFT)) for x in (-1, -0.5, 0, 0.5, 1)]
    return {
        "height": base + 44,
        "base": base,
        "ticks": ticks,
        "rows": rows,
        "total": len(histograms),
    }


def _path(heights: Sequence[float], y: float) -> str:
    """A closed outline over the line y; heights in [0, 1] at the middles of equal bins."""
    width = (_RIGHT - _LEFT) / len(heights)
    points = [
        f"{_LEFT + (i + 0.5) * width:.1f},{y - _TALLEST * h:.1f}" for i, h in enumerate(heights)
    ]
    return f"M{_LEFT},{y} L{' '.join(points)} L{_RIGHT},{y} Z"
