"""Sets of images, and sources made of a user's data set."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from pictures import content, encoded, noise, opened, pixels_of
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from simclr_pl.data import DatasetSource, Digits
from simclr_pl.data.decode import UnreadableSample
from simclr_pl.data.sources import (
    EncodedReader,
    Images,
    ResidentImages,
    StoredSamples,
    as_source,
)
from simclr_pl.errors import InputError

# Sets of images.


class InMemory(EncodedReader):
    """Encoded images of a list; None is one that cannot be fetched."""

    def __init__(self, files: list[bytes | None], channels: int = 3, **options: Any) -> None:
        super().__init__(channels, **options)
        self.files = files

    def name(self, i: int) -> str:
        return f"file {i}"

    def encoded(self, i: int) -> bytes:
        data = self.files[i]
        if data is None:
            raise UnreadableSample("gone")
        return data


def both_kinds(count: int) -> list[Images]:
    """The same images, with ten times their number for a label, in memory and stored."""
    pixels, labels = [noise(i) for i in range(count)], np.arange(count) * 10
    resident = ResidentImages(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), labels)
    return [resident, StoredSamples(InMemory([encoded(p, "png") for p in pixels]), labels)]


def test_subsets_keep_pixels_and_labels_together_in_the_given_order() -> None:
    index = np.array([4, 0, 5])
    for images in both_kinds(6):
        subset = images.subset(index)
        assert len(subset) == 3
        assert content(subset) == [(noise(i).tobytes(), 10 * i) for i in index]
        assert content(subset.subset(np.array([2, 0]))) == [
            (noise(i).tobytes(), 10 * i) for i in (5, 4)
        ]


def test_pictures_have_the_size_of_their_pixels() -> None:
    for images in both_kinds(2):
        picture = images.open(1)
        assert (picture.height, picture.width) == (6, 8)
        assert picture.pixels().shape == (6, 8, 3)


def test_a_subset_of_stored_images_has_their_names_and_files() -> None:
    images = both_kinds(6)[1]
    assert isinstance(images, StoredSamples)
    subset = images.subset(np.array([4, 0, 5])).subset(np.array([2, 0]))
    assert [subset.name(i) for i in range(2)] == ["file 5", "file 4"]
    assert [subset.number(i) for i in range(2)] == [5, 4]
    assert [subset.encoded(i) for i in range(2)] == [encoded(noise(i), "png") for i in (5, 4)]


@pytest.mark.parametrize("channels", [1, 3])
def test_resident_images_keep_channels_last_and_copy_only_what_does_not(channels: int) -> None:
    last = torch.from_numpy(np.stack([noise(i, channels=channels) for i in range(4)]))
    for pixels in (last.permute(0, 3, 1, 2), last.permute(0, 3, 1, 2).contiguous()):
        images = ResidentImages(pixels, np.arange(4))
        assert torch.equal(images.pixels, last.permute(0, 3, 1, 2))
        assert images.pixels.is_contiguous(memory_format=torch.channels_last)
        for i in range(4):
            row = images.open(i).pixels()
            assert np.array_equal(row, last[i].numpy())
            assert row.flags.c_contiguous
    kept = ResidentImages(last.permute(0, 3, 1, 2), np.arange(4))
    assert kept.pixels.data_ptr() == last.data_ptr()
    assert np.shares_memory(kept.open(2).pixels(), last.numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_resident_images_of_mixed_sizes_lie_one_behind_the_other(channels: int) -> None:
    sides = np.array([(6, 8), (2, 30), (1, 1), (9, 4), (6, 8)])
    expected = [noise(i, *pair, channels) for i, pair in enumerate(sides.tolist())]
    flat = torch.from_numpy(np.concatenate([p.reshape(-1, channels) for p in expected]))
    images = ResidentImages(flat, np.arange(5), {2: ("a.jpg", "it is cut")}, sides)
    assert images.one_size is None
    assert images.flat.data_ptr() == flat.data_ptr()
    for subset, index in (
        (images, [0, 1, 2, 3, 4]),
        (images.subset(np.array([3, 2, 1, 1])), [3, 2, 1, 1]),
        (images.subset(np.array([4, 0])), [4, 0]),
        (images.subset(np.array([], int)), []),
    ):
        assert subset.labels.tolist() == index
        assert len(subset.flat) == sides[index].prod(1).sum()
        for i, old in enumerate(index):
            if old == 2:
                assert subset.name(i) == "a.jpg"
                with pytest.raises(UnreadableSample, match="it is cut"):
                    subset.open(i)
                continue
            picture = subset.open(i)
            assert (picture.height, picture.width) == tuple(sides[old])
            assert np.array_equal(picture.pixels(), expected[old])
            assert np.shares_memory(picture.pixels(), subset.flat.numpy())
    same = images.subset(np.array([4, 0]))
    assert same.one_size == (6, 8)
    assert np.array_equal(same.pixels[0].permute(1, 2, 0).numpy(), expected[4])


def test_unreadable_resident_images_keep_their_name_and_reason_in_a_subset() -> None:
    pixels = torch.zeros(5, 3, 6, 8, dtype=torch.uint8)
    unreadable = {1: ("a.jpg", "it is cut"), 3: ("b.jpg", "it is empty")}
    images = ResidentImages(pixels, np.arange(5), unreadable).subset(np.array([4, 3, 0, 1]))
    assert [images.name(i) for i in range(4)] == ["image 0", "b.jpg", "image 2", "a.jpg"]
    for i, reason in ((1, "it is empty"), (3, "it is cut")):
        with pytest.raises(UnreadableSample, match=reason):
            images.open(i)
    assert images.open(0).pixels().shape == (6, 8, 3)


def test_an_encoded_reader_passes_on_its_channels_its_limit_and_its_errors() -> None:
    files = [encoded(noise(0), "png"), encoded(noise(0, 7, 8), "png"), b"no image", None]
    reader = InMemory(files, channels=1, max_pixels=48)
    assert reader.open(0).pixels().shape == (6, 8, 1)
    for i, reason in ((1, "`max_pixels` 48"), (2, "of no known image format"), (3, "gone")):
        with pytest.raises(UnreadableSample, match=reason):
            reader.open(i)


# A data set of the user's own.


class Listed(Dataset):
    """Items from a list, with any attributes."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


FORMS = {
    "PIL": lambda p: Image.fromarray(p),
    "array (H, W, C)": lambda p: p,
    "tensor (C, H, W)": lambda p: torch.from_numpy(p).permute(2, 0, 1),
    "pair": lambda p: (Image.fromarray(p), 3),
    "list": lambda p: [p, 3],
    "triple": lambda p: (p, 3, {"name": "x"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_item_is_read_to_the_same_pixels(form: str) -> None:
    pixels = [noise(i, height=5 + i) for i in range(4)]
    items = Listed([FORMS[form](p) for p in pixels])
    source = opened(DatasetSource(items, query=items))
    for images in (source.train, source.bank, source.query):
        found = pixels_of(images)
        assert all(np.array_equal(a, b) for a, b in zip(found, pixels, strict=True))
        assert all(p.dtype == np.uint8 for p in found)
        assert images.labels.tolist() == [-1] * 4


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_arrays_are_read_as_one_channel_or_three(channels: Any) -> None:
    flat = [noise(i, channels=1)[..., 0] for i in range(3)]
    source = opened(DatasetSource(Listed(flat), query=Listed(flat), channels=channels))
    assert source.channels == channels
    for found, pixels in zip(pixels_of(source.train), flat, strict=True):
        assert np.array_equal(found, np.repeat(pixels[..., None], channels, 2))


@pytest.mark.parametrize("name", ["targets", "labels"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_labels_come_from_the_attribute_of_the_data_set(name: str, kind: Any) -> None:
    train = Listed([noise(i) for i in range(3)], **{name: kind([2, 0, -1])})
    query = Listed([noise(i) for i in range(2)], **{name: kind([1, 5])})
    source = opened(DatasetSource(train, query))
    assert source.train.labels.tolist() == source.bank.labels.tolist() == [2, 0, -1]
    assert source.query.labels.tolist() == [1, 5]
    assert source.train.labels.dtype == source.query.labels.dtype == np.int64


def test_given_labels_win_over_the_attribute() -> None:
    train = Listed([noise(i) for i in range(3)], targets=[9, 9, 9])
    source = opened(DatasetSource(train, query=train, labels=[4, 5, 6]))
    assert source.train.labels.tolist() == [4, 5, 6]
    assert source.query.labels.tolist() == [9, 9, 9]


def test_without_query_a_tenth_of_train_is_kept_the_same_in_every_run() -> None:
    train = Listed([noise(i) for i in range(30)], targets=list(range(30)))
    source, again = (opened(DatasetSource(train)) for _ in range(2))
    assert (len(source.train), len(source.query)) == (27, 3)
    together = content(source.train) + content(source.query)
    assert sorted(together, key=lambda item: item[1]) == [
        (noise(i).tobytes(), i) for i in range(30)
    ]
    assert content(source.query) == content(again.query)


@pytest.mark.parametrize("labels", [[1, 2], [1, 2, 3, 4], [[1], [2], [3]], 1])
def test_labels_of_another_length_raise_input_error(labels: Any) -> None:
    with pytest.raises(InputError, match=r"one label for each image; got \(.*\) labels for 3"):
        DatasetSource(Listed([noise(i) for i in range(3)]), labels=labels).open()
    with pytest.raises(InputError, match="one label for each image"):
        DatasetSource(Listed([noise(i) for i in range(3)], targets=labels)).open()


def test_float_images_raise_input_error_when_read() -> None:
    floats = TensorDataset(torch.rand(4, 3, 6, 6))
    source = opened(DatasetSource(floats, query=floats))
    with pytest.raises(InputError, match=r"uint8 tensors; got .* of .*float32\. Return"):
        pixels_of(source.train)


@pytest.mark.parametrize("which", ["train", "query"])
def test_an_empty_data_set_raises_input_error(which: str) -> None:
    some = Listed([noise(0)])
    sets = {"train": some, "query": some, which: Listed([])}
    with pytest.raises(InputError, match="must hold images; got an empty one"):
        DatasetSource(**sets).open()


def test_as_source_wraps_a_data_set_and_keeps_a_source() -> None:
    source = Digits()
    assert as_source(source) is source
    data = Listed([noise(i) for i in range(10)])
    wrapped = as_source(data)
    assert isinstance(wrapped, DatasetSource)
    wrapped.open()
    assert (len(wrapped.train), len(wrapped.query)) == (9, 1)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        yield noise(0)


@pytest.mark.parametrize("garbage", [None, 3, object(), Digits, Endless(), "images/"])
def test_as_source_of_anything_else_raises_input_error(garbage: Any) -> None:
    found = type(garbage).__name__
    with pytest.raises(InputError, match=f"a Source or a Dataset with a length; got {found}"):
        as_source(garbage)


def test_a_subset_of_a_labelled_data_set_keeps_its_labels() -> None:
    class Labelled(torch.utils.data.Dataset):
        targets = (3, 1, 4, 1, 5)

        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> np.ndarray:
            return np.full((4, 4, 3), i, np.uint8)

    subset = torch.utils.data.Subset(Labelled(), [4, 0, 2])
    source = DatasetSource(subset, query=Labelled())
    source.open()
    assert source.train.labels.tolist() == [5, 3, 4]
    assert pixels_of(source.train)[1][0, 0, 0] == 0


class Failing(Dataset):
    """Fails as data sets of users do."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Any:
        if i == 0:
            raise FileNotFoundError("a.jpg")
        if i == 1:
            return Image.open(__file__)
        return noise(2)


def test_an_item_whose_reading_fails_is_unreadable_by_its_number_and_the_error() -> None:
    images = opened(DatasetSource(Failing(), query=Failing())).train
    assert isinstance(images, StoredSamples)
    assert images.name(0) == "item 0 of Failing"
    assert images.encoded(0) is None
    with pytest.raises(UnreadableSample, match=r"FileNotFoundError: a\.jpg"):
        images.open(0)
    with pytest.raises(UnreadableSample, match="UnidentifiedImageError"):
        images.open(1)
    assert np.array_equal(images.open(2).pixels(), noise(2))


def test_a_lazy_pil_image_that_is_damaged_is_unreadable_when_read() -> None:
    damaged = encoded(noise(0, 90, 90), "png")[:2000]
    items = Listed([Image.open(io.BytesIO(damaged))])
    images = opened(DatasetSource(items, query=items)).train
    with pytest.raises(UnreadableSample, match="truncated"):
        images.open(0)
