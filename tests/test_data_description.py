"""What stats and info say, against numpy over all pixels and files."""

from pathlib import Path

import numpy as np
import pytest
from packing import image_folder, packed, picture
from PIL import Image

from simclr_pl.data import Digits
from simclr_pl.data.description import Moments, contents, moments, write_moments
from simclr_pl.data.folders import ImageFolder
from simclr_pl.data.shards import Shards
from simclr_pl.errors import InputError

# Statistics.


def oracle(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.concatenate([image.reshape(-1, image.shape[2]) for image in images]) / 255
    return pixels.mean(0), pixels.std(0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("channels", [3, 1])
def test_moments_equal_float64_over_all_pixels(tmp_path: Path, channels: int, workers: int) -> None:
    source = image_folder(tmp_path / "source", 8, channels=channels)
    extra = picture(5, 100, 90, channels)  # counts more, having more pixels
    Image.fromarray(extra if channels == 3 else extra[..., 0]).save(source / "train/ants/big.png")
    (source / "train/ants/bad.png").write_bytes(b"bad")
    folder = ImageFolder(str(source), grey=channels == 1)
    found = moments(folder, workers=workers)
    readable = [
        folder.train.open(i).pixels() for i in range(10) if "bad" not in folder.train.name(i)
    ]
    mean, std = oracle(readable)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-13)
    np.testing.assert_allclose(found.std, std, rtol=1e-12)
    assert (found.images, found.unreadable, found.pixels) == (9, 1, 8 * 2000 + 9000)


def test_moments_of_a_sample_are_those_of_its_images_and_follow_the_seed(tmp_path: Path) -> None:
    folder = ImageFolder(str(image_folder(tmp_path / "source", 40)))
    first, again, other = (moments(folder, 7, seed, workers=0) for seed in (0, 0, 1))
    assert first == again
    assert first.mean != other.mean
    assert first.images == 7
    assert first.pixels == 7 * 2000


def test_moments_need_a_readable_image(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", 4)
    for file in (source / "train").rglob("*.*"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"got none of 4. Check the source"):
        moments(ImageFolder(str(source)), workers=0)
    with pytest.raises(InputError, match=r"`max_images` must be >= 1; got 0"):
        moments(Digits(), max_images=0)


def test_moments_of_a_channel_that_never_varies_are_no_config(tmp_path: Path) -> None:
    found = Moments((0.5, 0.1), (0.25, 0.00004), 3, 30, 0)
    with pytest.raises(InputError, match=r"every channel must vary.*got std \(0.25, 4e-05\)"):
        write_moments(tmp_path / "stats.yaml", found, [])
    assert not list(tmp_path.iterdir())


# Contents.


def test_contents_of_a_folder_and_of_its_pack(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", 16)
    train = [file.stat().st_size for file in (source / "train").rglob("*.*")]
    found = contents(ImageFolder(str(source)), workers=0)["train"]
    assert (found.images, found.classes, found.median_size) == (16, 2, (50, 40))
    assert found.bytes == sum(train)
    assert found.median_bytes == int(np.median(train))
    packed(source, tmp_path / "out", short_side=20)
    shards = contents(Shards(str(tmp_path / "out")), workers=0)
    assert shards["query"].median_size == (25, 20)
    stored = sum(file.stat().st_size for file in (tmp_path / "out").glob("query-*"))
    assert shards["query"].bytes == stored


def test_contents_of_a_set_in_memory() -> None:
    found = contents(Digits(), workers=0)
    assert (found["train"].images, found["query"].images) == (1347, 450)
    assert found["train"].classes == 10
    assert found["train"].median_size == (32, 32)
    assert found["train"].bytes == 1347 * 32 * 32
