"""The numbers behind the interactive map.

Symbols: n points, k neighbours, K classes.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class MapData(NamedTuple):
    """The latest map of a run.

    Attributes:
        xy: (n, 2) float.
        label: (n,) int64, -1 where there is none.
        image: (n,) int64, the images' places in the set.
        neighbours: (n, k) int64 positions, the nearest first; k = 0 in the map of an older version.
        similarity: (n, k) float, their cosines.
        classes: (K,) names by label.
        axes: (2,) what the axes are.
        step: of training.
        thumbnails: the sheet of small images; None where there is none.
    """

    xy: np.ndarray
    label: np.ndarray
    image: np.ndarray
    neighbours: np.ndarray
    similarity: np.ndarray
    classes: list[str]
    axes: list[str]
    step: int
    thumbnails: Path | None


def read_map(file: Path) -> MapData:
    """Reads map.npz.

    Args:
        file: with map_thumbnails.jpg beside it.

    Raises:
        ValueError: the numbers do not fit together.
        OSError: it cannot be read.
    """
    with np.load(file, allow_pickle=False) as table:
        found: dict[str, Any] = {name: table[name] for name in table.files}
    missing = {"xy", "label", "index", "step"} - found.keys()
    if missing:
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    n = len(found["xy"])
    none = np.zeros((n, 0))
    neighbours, similarity = found.get("neighbours", none), found.get("similarity", none)
    fits = found["xy"].shape == (n, 2) and neighbours.shape == similarity.shape
    fits &= len(found["label"]) == len(found["index"]) == len(neighbours) == n
    if not fits or not np.isfinite(found["xy"]).all():
        raise ValueError("its numbers do not fit together")
    if neighbours.size and not (neighbours.min() >= 0 and neighbours.max() < n):
        raise ValueError("a neighbour is none of its points")
    classes = [str(name) for name in found.get("classes", ())]
    highest = int(found["label"].max(initial=-1))
    classes += [str(k) for k in range(len(classes), highest + 1)]
    thumbnails = file.with_name("map_thumbnails.jpg")
    return MapData(
        found["xy"].astype(float),
        found["label"].astype(int),
        found["index"].astype(int),
        neighbours.astype(int),
        similarity.astype(float),
        classes,
        [str(name) for name in found.get("axes", ("first axis", "second axis"))],
        int(found["step"]),
        thumbnails if thumbnails.exists() else None,
    )
