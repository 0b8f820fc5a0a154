"""Pictures for people: a grid of views, nearest neighbours, a map of features.

From arrays to the pixels of a picture, with no state anywhere: matplotlib is used by its objects, never
by pyplot, and is imported when the first picture is drawn. Images are pasted pixel by pixel, enlarged by
whole numbers only, so that a picture shows what is there.

Symbols: n images or points, V views, C channels, H x W pixels, K classes.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from simclr_pl.keyed_random import Stream, permutation

DARK, MUTED, PALE = "#1f2328", "#57606a", "#d0d7de"
SAME, OTHER = "#009e73", "#d55e00"  # green and red for the colour-blind, too: Okabe and Ito 2008
# Ten colours that the colour-blind tell apart: Petroff 2021, arXiv:2107.02270, table 1.
PALETTE = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
_DPI = 100
_MARGIN = 20  # pixels, as all lengths below
_HEAD = 74  # of the title and the line below it
_CELL = 96  # side of an image at most
_GAP = 8
_FRAME = 4
_LEAST_WIDTH = 640  # for the line below the title
_MAP_SIZE = (860, 700)


class Shown(NamedTuple):
    """One image of a row of neighbours.

    Attributes:
        image: (H, W, C) uint8.
        name: of its class; empty where that is not known.
        similarity: to the query; None for the query itself.
        same: whether its class is the query's; None where that is not known.
    """

    image: np.ndarray
    name: str
    similarity: float | None = None
    same: bool | None = None


class _Sheet:
    """A white page with a title, measured in pixels from its top left corner."""

    def __init__(self, width: int, height: int, title: str, note: str) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure((width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)
        self._images: list[tuple[int, int, np.ndarray]] = []
        self.text(_MARGIN, 33, title, 16, weight="bold")
        self.text(_MARGIN, 55, note, 12, MUTED)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int,
        colour: str = DARK,
        align: str = "left",
        weight: str = "normal",
    ) -> None:
        """Writes one line whose baseline is at y; what the text holds is never taken for formulas."""
        style = {"fontsize": size * 72 / _DPI, "color": colour, "ha": align, "weight": weight}
        style |= {"va": "baseline", "parse_math": False, "family": "DejaVu Sans"}
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)  # type: ignore[arg-type]

    def image(self, x: int, y: int, image: np.ndarray, frame: str | None = None) -> None:
        """Pastes an image (H, W, 3), perhaps with a frame around it."""
        if frame is not None:
            red_green_blue = [int(frame[i : i + 2], 16) for i in (1, 3, 5)]
            height, width = (side + 2 * _FRAME for side in image.shape[:2])
            block = np.full((height, width, 3), red_green_blue, np.uint8)
            self._images.append((x - _FRAME, y - _FRAME, block))
        self._images.append((x, y, image))

    def pixels(self) -> np.ndarray:
        """The page, (H, W, 3) uint8."""
        with warnings.catch_warnings():  # a class's name in letters that the font lacks: boxes
            warnings.filterwarnings("ignore", "Glyph .* missing")
            self.canvas.draw()
        page = np.array(self.canvas.buffer_rgba())[..., :3]
        for x, y, image in self._images:
            page[y : y + image.shape[0], x : x + image.shape[1]] = image
        return page


def scaled(image: np.ndarray, scale: float) -> np.ndarray:
    """An image as RGB in another size.

    Args:
        image: (H, W, C) uint8, C = 1 or 3.
        scale: below 1, pixels are averaged; from 1 on each is repeated, a whole number of times.

    Returns:
        (H', W', 3) uint8.
    """
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.shape[1::-1])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        image = image.reshape(height, width, -1)  # cv2 drops a single channel
    else:
        image = image.repeat(int(scale), axis=0).repeat(int(scale), axis=1)
    return np.broadcast_to(image, (*image.shape[:2], 3))


def draw_views(
    originals: Sequence[np.ndarray | None], views: Sequence[np.ndarray], unit: str = "images"
) -> np.ndarray:
    """A column for each image: the stored image on top, its views below.

    Args:
        originals: n images (H, W, C) uint8, or None for one that cannot be shown.
        views: for each view (n, H, W, C) uint8; small views keep their relation to the first view's size.
        unit: what the images are of.

    Returns:
        The picture, (H, W, 3) uint8.
    """
    high, wide = views[0].shape[1:3]
    scale = _fit(views[0][0], _CELL)
    cell, left = int(max(high, wide) * scale), 80
    rows: list[tuple[str, Sequence[np.ndarray | None], int]] = [("original", originals, cell)]
    rows += [(f"view {v + 1}", list(x), int(x.shape[1] * scale)) for v, x in enumerate(views)]
    width = max(left + len(originals) * (cell + _GAP) - _GAP + _MARGIN, _LEAST_WIDTH)
    height = _HEAD + sum(row_height + _GAP for *_, row_height in rows) + _MARGIN - _GAP
    note = (
        f"The first {unit} of the first batch, one in each column; views of {wide} x {high} pixels."
    )
    sheet = _Sheet(width, height, "Views as the encoder sees them", note)
    y = _HEAD
    for name, images, row_height in rows:
        sheet.text(_MARGIN, y + row_height / 2 + 4, name, 12, MUTED)
        for i, image in enumerate(images):
            if image is not None:
                by = _fit(image, cell) if images is originals else scale
                place = left + i * (cell + _GAP), y + row_height // 2 - cell // 2
                _centre(sheet, scaled(image, by), *place, cell)
        y += row_height + _GAP
    return sheet.pixels()


def draw_neighbours(rows: Sequence[tuple[Shown, Sequence[Shown]]], step: int) -> np.ndarray:
    """A row for each query: the query, then its neighbours, the nearest first.

    Args:
        rows: queries with their neighbours.
        step: of training, for the title.

    Returns:
        The picture, (H, W, 3) uint8.
    """
    columns = max(len(neighbours) for _, neighbours in rows)
    pitch = _CELL + 2 * _FRAME  # of an image with its frame
    start = 2 * _MARGIN + pitch  # of the neighbours, a little apart
    width = max(start + columns * (pitch + _GAP) - _GAP + _MARGIN, _LEAST_WIDTH)
    top, row_height = _HEAD + 20, pitch + 30
    known = [shown.same for _, row in rows for shown in row if shown.same is not None]
    note = "Below each image the cosine similarity of its features to the query's."
    if known:
        note = (
            f"Cosine similarity below each image. Green: the query's class ({sum(known)} of "
            f"{len(known)}); red: another class."
        )
    title = f"Nearest neighbours in the bank, step {step:,}"
    sheet = _Sheet(width, top + len(rows) * row_height + 8, title, note)
    sheet.text(_MARGIN + pitch / 2, top - 8, "query", 12, MUTED, "center")
    sheet.text(start + _FRAME, top - 8, "bank, the nearest first", 12, MUTED)
    for r, (query, neighbours) in enumerate(rows):
        y = top + r * row_height
        places = [_MARGIN, *(start + i * (pitch + _GAP) for i in range(len(neighbours)))]
        for x, shown in zip(places, (query, *neighbours), strict=True):
            colour = {None: None, True: SAME, False: OTHER}[shown.same]
            small = scaled(shown.image, _fit(shown.image, _CELL))
            _centre(sheet, small, x + _FRAME, y + _FRAME, _CELL, colour)
            number = "" if shown.similarity is None else f"{shown.similarity:.3f}"
            caption = f"{_shorten(shown.name, 11)}  {number}".strip()
            sheet.text(x + pitch / 2, y + pitch + 13, caption, 11, DARK, "center")
    return sheet.pixels()


def draw_map(
    xy: np.ndarray,
    label: np.ndarray,
    names: Sequence[str],
    axes: tuple[str, str],
    step: int,
    unit: str = "images",
) -> np.ndarray:
    """The query as points, coloured by class.

    Args:
        xy: (n, 2) float.
        label: (n,) int64, -1 where there is none.
        names: (K,) of the classes, by label.
        axes: what the two axes are.
        step: of training, for the title.
        unit: what the points are.

    Returns:
        The picture, (H, W, 3) uint8.
    """
    shown = _shown_classes(label)
    colours = dict(zip(shown, PALETTE, strict=False))
    others = len(np.unique(label)) - len(shown)
    note = "Nearby points have similar features"
    note += "; one colour for each class." if shown else "; without labels."
    title = f"Map of {len(xy):,} query {unit}, step {step:,}"
    sheet = _Sheet(*_MAP_SIZE, title, note)
    entries = [(colours[k], names[k]) for k in shown]
    if shown and others:
        entries.append((PALE, f"others ({others})"))
    texts = [_shorten(name, 20) for _, name in entries]
    left, right = 74, _MAP_SIZE[0] - _MARGIN
    if entries:
        right -= 44 + 9 * max(map(len, texts))
    colour = [colours.get(k, PALE if shown else PALETTE[0]) for k in label.tolist()]
    _scatter(sheet, xy, colour, (left, right), axes)
    for i, ((dot, _), text) in enumerate(zip(entries, texts, strict=True)):
        y = _HEAD + 24 + 26 * i
        sheet.text(right + 18, y, "\N{BLACK CIRCLE}", 17, dot)
        sheet.text(right + 40, y, text, 13)
    return sheet.pixels()


def _scatter(
    sheet: _Sheet,
    xy: np.ndarray,
    colour: Sequence[str],
    ends: tuple[int, int],
    names: tuple[str, str],
) -> None:
    bottom = 62
    box = (
        ends[0] / sheet.width,
        bottom / sheet.height,
        (ends[1] - ends[0]) / sheet.width,
        (sheet.height - _HEAD - bottom) / sheet.height,
    )
    axes = sheet.figure.add_axes(box)
    order = permutation(len(xy), 0, Stream.SAMPLE)  # no class lies over all others
    area = np.clip(20_000 / max(1, len(xy)), 14, 60)  # square points
    axes.scatter(
        xy[order, 0], xy[order, 1], s=area, c=[colour[i] for i in order], alpha=0.8, linewidths=0
    )
    axes.set_aspect("equal", "datalim")  # a distance is the same along both axes
    axes.grid(color="#eaeef2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    for spine in axes.spines.values():
        spine.set_color(PALE)
    axes.set_xlabel(names[0], fontsize=9, color=MUTED, labelpad=8)
    axes.set_ylabel(names[1], fontsize=9, color=MUTED, labelpad=8)


def _shown_classes(label: np.ndarray) -> list[int]:
    """The classes that get a colour of their own: the most frequent ones, in the order of labels."""
    classes, count = np.unique(label[label >= 0], return_counts=True)
    most = np.argsort(-count, kind="stable")[: len(PALETTE)]
    return sorted(classes[most].tolist())


def _fit(image: np.ndarray, cell: int) -> float:
    """The scale at which an image fills a cell as well as `scaled` can."""
    scale = cell / max(image.shape[:2])
    return scale if scale < 1 else float(int(scale))


def _centre(
    sheet: _Sheet, image: np.ndarray, x: int, y: int, cell: int, frame: str | None = None
) -> None:
    height, width = image.shape[:2]
    sheet.image(x + (cell - width) // 2, y + (cell - height) // 2, image, frame)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"
