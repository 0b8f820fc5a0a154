"""Pictures hold the very pixels that they are given, and say what is known about them."""

import ast
from pathlib import Path

import numpy as np
import pytest
from pictures import noise

import simclr_pl
from simclr_pl.callbacks.drawing import (
    OTHER,
    PALETTE,
    SAME,
    Shown,
    draw_map,
    draw_neighbours,
    draw_views,
    scaled,
)


def places(page: np.ndarray, block: np.ndarray) -> list[tuple[int, int]]:
    """Where a block of pixels stands in a picture: (y, x) of its corner."""
    height, width = block.shape[:2]
    tops, lefts = page.shape[0] - height + 1, page.shape[1] - width + 1
    likely = np.ones((tops, lefts), bool)
    for y, x in ((0, 0), (height - 1, width - 1), (height // 2, width // 2)):
        likely &= (page[y : y + tops, x : x + lefts] == block[y, x]).all(2)
    return [
        (y, x)
        for y, x in np.argwhere(likely).tolist()
        if np.array_equal(page[y : y + height, x : x + width], block)
    ]


def rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


@pytest.mark.parametrize("channels", [1, 3])
def test_views_stand_below_their_original_pixel_by_pixel(channels: int) -> None:
    originals = [noise(i, 20, 30, channels) for i in range(3)]
    views = [np.stack([noise(10 * v + i, 16, 16, channels) for i in range(3)]) for v in (1, 2)]
    small = [np.stack([noise(50 + i, 8, 8, channels) for i in range(3)])]
    page = draw_views(originals, [*views, *small])
    for i in range(3):
        centres = []
        for image, factor in ((originals[i], 3), *((v[i], 6) for v in (*views, *small))):
            block = scaled(image, factor)
            assert block.shape == (image.shape[0] * factor, image.shape[1] * factor, 3)
            ((y, x),) = places(page, block)
            centres.append((y, x + block.shape[1] // 2))
        assert [y for y, _ in centres] == sorted({y for y, _ in centres})  # each below the other
        assert len({x for _, x in centres}) == 1
    assert places(page, scaled(views[0][0], 6))[0][1] < places(page, scaled(views[0][1], 6))[0][1]


def test_an_original_that_cannot_be_read_leaves_its_place_empty() -> None:
    views = [np.stack([noise(1, 8, 8), noise(2, 8, 8)])]
    page = draw_views([None, noise(3, 8, 8)], views)
    y = places(page, scaled(noise(3, 8, 8), 12))[0][0]
    x = places(page, scaled(noise(1, 8, 8), 12))[0][1]
    assert (page[y : y + 96, x : x + 96] == 255).all()


def test_large_images_are_averaged() -> None:
    image = noise(0, 64, 96)
    expected = image.reshape(32, 2, 48, 2, 3).mean((1, 3))
    assert np.abs(scaled(image, 0.5) - expected).max() <= 0.5
    page = draw_views([noise(1, 8, 8)], [noise(2, 192, 192)[None]])
    assert len(places(page, scaled(noise(2, 192, 192), 0.5))) == 1


def test_frames_tell_the_query_s_class_from_others() -> None:
    query = Shown(noise(0, 8, 8), "cat")
    near = [Shown(noise(1, 8, 8), "cat", 0.9, True), Shown(noise(2, 8, 8), "dog", 0.8, False)]
    page = draw_neighbours([(query, near)], 5)
    corners = [places(page, scaled(s.image, 12))[0] for s in (query, *near)]
    assert [x for _, x in corners] == sorted(x for _, x in corners)
    around = [page[y - 1, x - 1].tolist() for y, x in corners]
    assert around == [[255, 255, 255], rgb(SAME), rgb(OTHER)]


def test_unlabelled_neighbours_have_no_frames() -> None:
    shown = Shown(noise(1, 8, 8), "", 0.9)
    page = draw_neighbours([(Shown(noise(0, 8, 8), ""), [shown, shown])], 5)
    colourful = page.astype(int).max(2) - page.min(2) > 60
    for _, x in places(page, scaled(shown.image, 12)):
        assert not colourful[:, x - 6 : x].any()


def test_names_are_written_as_they_are() -> None:
    pages = []
    for name in ("$\\frac{$", "_private", "a" * 300, "\N{CJK UNIFIED IDEOGRAPH-72AC}", "cat"):
        row = (Shown(noise(0, 8, 8), name), [Shown(noise(1, 8, 8), name, 0.5, True)])
        pages.append(draw_neighbours([row], 5))
        draw_map(np.eye(2, dtype=np.float32), np.array([0, 0]), [name], ("x", "y"), 5)
    assert len({page.tobytes() for page in pages}) == len(pages)


def solid(page: np.ndarray, colour: str) -> np.ndarray:
    """(n, 2) places of the pixels of this colour, up to the rounding of many layers."""
    return np.argwhere((np.abs(page.astype(int) - rgb(colour)) <= 4).all(2))


def test_points_have_the_colours_of_their_classes_and_stand_where_they_are() -> None:
    centres = np.array([[-3.0, 0.0], [3.0, 0.0], [0.0, 2.0]], np.float32)
    label = np.arange(3).repeat(100)  # a hundred points on each other hide what is below
    page = draw_map(centres[label], label, ["a" * 20, "b", "c"], ("x", "y"), 5)
    page = page[:, :620]  # without the legend
    (_, left), (middle, right), (top, between) = (solid(page, c).mean(0) for c in PALETTE[:3])
    assert left < between < right
    assert top < middle
    assert between - left == pytest.approx(right - between, abs=1)
    assert (right - left) / (middle - top) == pytest.approx(3, rel=0.02)  # one scale for both axes


def test_every_shown_class_is_in_the_legend() -> None:
    label = np.arange(12).repeat([3, 2] * 6)
    names = [str(k) for k in range(12)]
    page = draw_map(np.zeros((len(label), 2), np.float32), label, names, ("x", "y"), 5)
    order = [solid(page[:, 700:], colour)[:, 0].mean() for colour in PALETTE]
    assert order == sorted(order)  # ten of twelve classes, below each other
    nowhere, none = np.zeros((50, 2), np.float32), np.full(50, -1)
    without = draw_map(nowhere, none, [], ("x", "y"), 5)
    assert len(solid(without, PALETTE[0]))
    assert not any(len(solid(without, PALETTE[i])) for i in (1, 2, 4, 6, 9))  # text is grey


def test_drawing_leaves_matplotlib_s_own_state_alone() -> None:
    import matplotlib
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    first = draw_map(np.eye(2, dtype=np.float32), np.array([0, 1]), ["a", "b"], ("x", "y"), 5)
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []
    again = draw_map(np.eye(2, dtype=np.float32), np.array([0, 1]), ["a", "b"], ("x", "y"), 5)
    assert np.array_equal(first, again)


def test_the_callbacks_import_matplotlib_only_when_they_draw() -> None:
    assert simclr_pl.__file__
    for file in (Path(simclr_pl.__file__).parent / "callbacks").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "matplotlib" not in ast.unparse(node), file
