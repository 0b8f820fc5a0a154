"""The samples that pictures show: which ones, what lies nearest to each, and how they look small.

Symbols: n points of a map, E feature width, k neighbours, C channels, H x W pixels.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from simclr_pl.callbacks.drawing import scaled
from simclr_pl.keyed_random import Stream, permutation

SEED = 2002  # which images are shown is the same in every run
_ROWS = 1024  # of similarities between the points, at a time
_SIDE = 40  # pixels, of a thumbnail at most


def spread_over_classes(label: np.ndarray, count: int) -> np.ndarray:
    """Positions of samples that show as many classes as possible.

    Args:
        label: (n,) int64, -1 where there is none.
        count: positions wanted.

    Returns:
        (<= count,) int64 positions, of labelled ones if there are any, sorted by class.
    """
    order = permutation(len(label), SEED, Stream.SAMPLE)
    if (label >= 0).any():
        order = order[label[order] >= 0]
    classes = np.unique(label[order])
    if len(classes) > count:  # some classes from the whole range
        classes = classes[np.linspace(0, len(classes) - 1, count).round().astype(int)]
    members = [order[label[order] == k] for k in classes]
    rounds = [
        m[i] for i in range(count) for m in members if i < len(m)
    ]  # one of each, again and again
    chosen = np.array(rounds[:count], np.int64)
    return chosen[np.argsort(label[chosen], kind="stable")]


def nearest_among(points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest other points of each, by cosine.

    Args:
        points: (n, E) float32, of length 1.
        k: how many; all others where there are fewer.

    Returns:
        (n, k) int64 positions, the nearest first, and (n, k) float32 cosines.
    """
    x = torch.from_numpy(points)
    k = min(k, len(x) - 1)
    parts = []
    for start in range(0, len(x), _ROWS):
        cosine = x[start : start + _ROWS] @ x.T  # (rows, n)
        cosine.diagonal(start).fill_(-torch.inf)
        parts.append(cosine.topk(k))
    similarity, nearest = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return nearest, similarity


def draw_thumbnails(images: Iterable[np.ndarray | None]) -> np.ndarray | None:
    """Small images row by row, in as many columns as make the sheet a square.

    Args:
        images: each (H, W, C) uint8, or None for one that cannot be shown; at least one.

    Returns:
        The sheet of square cells, (H, W, 3) uint8, grey where there is nothing. Its cells are as
        large as the largest image, 40 pixels at most. None where no image can be shown.
    """
    small = [None if i is None else scaled(i, min(1.0, _SIDE / max(i.shape[:2]))) for i in images]
    side = max((max(i.shape[:2]) for i in small if i is not None), default=0)
    if not side:
        return None
    columns = math.ceil(math.sqrt(len(small)))
    sheet = np.full((-(-len(small) // columns) * side, columns * side, 3), 128, np.uint8)
    for place, image in enumerate(small):
        if image is not None:
            y, x = (side * part for part in divmod(place, columns))
            y, x = y + (side - image.shape[0]) // 2, x + (side - image.shape[1]) // 2
            sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
    return sheet


def query_table(
    xy: np.ndarray,
    label: np.ndarray,
    index: np.ndarray,
    nearest: np.ndarray,
    similarity: np.ndarray,
    names: Sequence[str],
) -> dict[str, list[Any]]:
    """The map's samples as a table to sort and filter, for the trackers.

    Args:
        xy: (n, 2) places on the map.
        label: (n,) int64, -1 where there is none.
        index: (n,) positions in the query set.
        nearest: (n, k) int64 positions among the n.
        similarity: (n, k) cosines.
        names: (K,) of the classes.

    Returns:
        Plain values by heading; ``same_class`` is the share of the k nearest, None without a label.
    """
    shown = np.array([*names, ""], object)  # the last for the label -1
    same = (label[nearest] == label[:, None]).mean(1).tolist()
    return {
        "image": index.tolist(),
        "class": shown[label].tolist(),
        "same_class": [s if k >= 0 else None for s, k in zip(same, label, strict=True)],
        "nearest": index[nearest[:, 0]].tolist(),
        "nearest_class": shown[label[nearest[:, 0]]].tolist(),
        "similarity": similarity[:, 0].tolist(),
        "x": xy[:, 0].tolist(),
        "y": xy[:, 1].tolist(),
    }
