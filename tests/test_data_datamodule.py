"""The data module: the same views at any number of ranks and workers, and what a batch holds."""

import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from ranks import on_ranks
from tiny import tiny_model
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from simclr_pl import ContrastiveDataModule, InputError
from simclr_pl.augment import Augment, digits, simclr_imagenet
from simclr_pl.data import DatasetSource, Digits, ImageFolder, Shards, Source
from simclr_pl.data.batches import to_tensors
from simclr_pl.data.decode import cut_crops, open_picture
from simclr_pl.data.image_batches import ImageBatches
from simclr_pl.data.image_stage import ImageStage
from simclr_pl.data.pack import pack_source
from simclr_pl.data.sampler import EvaluationSampler, KeyedSampler
from simclr_pl.data.sources import ResidentImages, as_source
from simclr_pl.image_operations import to_float
from simclr_pl.text_augment import TextAugment

SIZES = [(20, 30), (33, 17), (24, 24), (40, 16)]


def read_image(path: Path) -> np.ndarray:
    return open_picture(path.read_bytes(), 3).pixels()


def noise(seed: int, height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """26 JPEGs of four sizes in two classes to learn from, 7 to evaluate on."""
    root = tmp_path_factory.mktemp("jpegs")
    for i in range(33):
        path = root / ("train" if i < 26 else "val") / ("ape", "bee")[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i, *SIZES[i % 4])).save(path)
    return str(root)


class Squares(Dataset):
    targets = tuple(i % 4 for i in range(40))

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(noise(i, 10 + i % 5, 12)), self.targets[i]


# The main claim, in real fits.

Row = tuple[int, int, int, tuple[str, ...]]  # epoch, index, label, a hash of each view


class Recorder(LightningModule):
    """Writes down every row that a step is given; learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.rows: dict[str, list[Row]] = {"train": [], "bank": [], "query": [], "predict": []}
        self.sizes: dict[str, list[int]] = {name: [] for name in self.rows}

    def write(self, name: str, batch: dict[str, Tensor]) -> None:
        count = len(batch["index"])
        views = batch["views"].unflatten(0, (-1, count)).numpy()  # (V, B, C, S, S)
        self.sizes[name].append(count)
        for i in range(count):
            hashes = tuple(hashlib.sha1(v[i].tobytes()).hexdigest() for v in views)
            index, label = int(batch["index"][i]), int(batch["label"][i])
            self.rows[name].append((self.current_epoch, index, label, hashes))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.write("train", batch)
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self.write(("bank", "query")[dataloader_idx], batch)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.write("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WatchedModule(ContrastiveDataModule):
    """Writes down what arrives from the loaders, before the device stage."""

    arrived: set[tuple[str, torch.dtype, int]]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.arrived |= set(described(batch))
        return batch


def described(batch: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.dtype, int]]:
    """Name, dtype and number of axes of every tensor of a batch."""
    for name, value in batch.items():
        if isinstance(value, dict):
            yield from described(value, f"{name}.")
        elif name == "groups":
            for group in value:
                yield from described(group)
        elif isinstance(value, Tensor):
            yield prefix + name, value.dtype, value.dim()


def watched(source: Source, **options: Any) -> WatchedModule:
    data = WatchedModule(source, **options)
    data.arrived = set()
    return data


def trainer_of(devices: int = 1, **options: Any) -> Trainer:
    return Trainer(
        devices=devices,
        accelerator="cpu",
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def data_of(root: str | None, **options: Any) -> WatchedModule:
    """The folder with every operation of the augmentation, or the digits in memory."""
    if root is None:
        return watched(Digits(), global_batch_size=448, bank_size=45, eval_batch_size=32, **options)
    augment = simclr_imagenet(16, rotation=20.0, shift=0.1, solarise=0.3)
    options = {"eval_batch_size": 3, "resident": "none", **options}
    return watched(ImageFolder(root), global_batch_size=8, augment=augment, **options)


def fit_and_predict(root: str | None, num_workers: int) -> tuple[Any, Any, Any]:
    # The harness makes its ranks daemons, which may have no children, and starts children by a
    # server of their own; real ranks fork their workers.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    multiprocessing.set_start_method("fork", force=True)
    world_size = torch.distributed.get_world_size()
    module, data = Recorder(), data_of(root, num_workers=num_workers)
    trainer = trainer_of(world_size)
    trainer.fit(module, datamodule=data)
    trainer.predict(module, datamodule=data)
    return module.rows, module.sizes, data.arrived


SETTINGS = [(1, 0), (1, 2), (2, 0), (2, 2)]  # ranks, workers


@pytest.fixture(scope="module", params=["digits in memory", "folder of JPEGs"])
def runs(request: pytest.FixtureRequest, folder: str) -> dict[tuple[int, int], list[Any]]:
    """For each setting, what each rank saw."""
    root = None if request.param == "digits in memory" else folder
    return {(w, workers): on_ranks(w, fit_and_predict, root, workers) for w, workers in SETTINGS}


def rows_of(ranks: list[Any], name: str) -> list[Row]:
    return [row for rows, _, _ in ranks for row in rows[name]]


def test_views_are_identical_at_any_number_of_ranks_and_workers(
    runs: dict[tuple[int, int], list[Any]],
) -> None:
    alone = sorted(rows_of(runs[1, 0], "train"))
    assert len(alone) in (2 * 3 * 448, 2 * 3 * 8)  # three steps in each of two epochs
    assert len({row[:2] for row in alone}) == len(alone)  # no image twice in an epoch
    assert len({h for *_, hashes in alone for h in hashes}) == 2 * len(alone)  # no two views alike
    for setting in SETTINGS[1:]:
        assert sorted(rows_of(runs[setting], "train")) == alone, setting


def test_two_ranks_take_the_halves_of_the_global_batches_of_one(
    runs: dict[tuple[int, int], list[Any]],
) -> None:
    for workers in (0, 2):
        alone = [row[:2] for row in rows_of(runs[1, workers], "train")]
        halves = [[row[:2] for row in rows["train"]] for rows, _, _ in runs[2, workers]]
        batch = len(alone) // 6
        steps = zip(*[iter(halves[0])] * (batch // 2), strict=True)
        others = zip(*[iter(halves[1])] * (batch // 2), strict=True)
        assert [row for a, b in zip(steps, others, strict=True) for row in a + b] == alone


def test_the_epoch_reaches_the_views_also_with_persistent_workers(
    runs: dict[tuple[int, int], list[Any]],
) -> None:
    for setting in SETTINGS:
        views = {row[:2]: row[3] for row in rows_of(runs[setting], "train")}
        both = [index for epoch, index in views if epoch == 0 and (1, index) in views]
        assert len(both) > 10
        assert all(not set(views[0, i]) & set(views[1, i]) for i in both), setting
        orders = [[i for e, i, *_ in rows_of(runs[setting], "train") if e == n] for n in (0, 1)]
        assert orders[0] != orders[1]


@pytest.mark.parametrize("name", ["bank", "query", "predict"])
def test_clean_views_come_once_each_and_are_identical_at_any_number_of_ranks_and_workers(
    runs: dict[tuple[int, int], list[Any]], name: str
) -> None:
    alone = sorted(rows_of(runs[1, 0], name))
    passes = 1 if name == "predict" else 2
    assert [row[1] for row in alone] == list(range(len(alone) // passes)) * passes
    assert len({row[1:] for row in alone}) == len(alone) // passes  # the same in both epochs
    assert all(len(row[3]) == 1 for row in alone)
    for setting in SETTINGS[1:]:
        found = rows_of(runs[setting], name)
        assert sorted(row for row in found if row[1] >= 0) == alone, setting
        assert all(row[2] == -1 for row in found if row[1] < 0)  # padding has no label
        sizes = [rank_sizes[name] for _, rank_sizes, _ in runs[setting]]
        assert all(s == sizes[0] for s in sizes)  # every rank takes part in every collective


def test_only_uint8_images_and_integers_leave_a_worker(
    runs: dict[tuple[int, int], list[Any]],
) -> None:
    for setting in SETTINGS:
        for _, _, arrived in runs[setting]:
            assert not [name for name, dtype, _ in arrived if dtype.is_floating_point]
            images = {(name, dtype) for name, dtype, axes in arrived if axes > 3}
            names = {name for name, _, _ in arrived}
            if "images" in names:
                assert images == {("images", torch.uint8)}
            else:  # in memory: the crops of pixels that are on the device already
                assert not images
                assert "crops" in names


# The batch, against a slow oracle.


def batches(data: ContrastiveDataModule, loader: Any, name: str) -> list[dict[str, Tensor]]:
    return [data.make_views(batch, name) for batch in loader]


@pytest.mark.parametrize(("n_views", "resident"), [(2, "none"), (3, "none"), (3, "memory")])
def test_a_training_batch_equals_views_made_one_by_one(
    folder: str, n_views: int, resident: Any
) -> None:
    data = staged(ImageFolder(folder), n_views=n_views, seed=5, resident=resident)
    augment = simclr_imagenet(16)
    data.setup()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(3)  # type: ignore[attr-defined]
    paths = sorted(Path(folder, "train").rglob("*.jpg"))
    found = batches(data, loader, "train")
    assert len(found) == len(loader) == 3
    for batch in found:
        assert set(batch) == {"views", "label", "index"}
        assert batch["views"].shape == (n_views * 8, 3, 16, 16)
        assert batch["views"].dtype == torch.float32
        assert batch["label"].shape == batch["index"].shape == (8,)
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        for i, (index, label) in enumerate(zip(batch["index"], batch["label"], strict=True)):
            pixels = read_image(paths[index])
            assert ("ape", "bee")[label] == paths[index].parent.name
            key = index.numpy()[None]
            sides = np.array([pixels.shape[:1], pixels.shape[1:2]])
            images = np.empty((1, n_views, 16, 16, 3), np.uint8)
            cut_crops(pixels, augment.draw_crops(5, 3, key, n_views, *sides)[0], 16, images[0])
            crops = torch.from_numpy(images).permute(0, 1, 4, 2, 3)
            table = to_tensors(augment.draw(5, 3, key, n_views))
            expected = augment.apply(crops, table)  # (V, C, S, S)
            rows = batch["views"][i::8]  # all of view 0 come first
            torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("resident", ["none", "memory"])
def test_a_clean_batch_is_the_normalised_central_square(folder: str, resident: Any) -> None:
    augment = simclr_imagenet(16, clean_fraction=0.5)
    data = ContrastiveDataModule(
        ImageFolder(folder), 8, augment=augment, num_workers=0, eval_batch_size=4, resident=resident
    )
    data.setup()
    loaders = data.val_dataloader()
    paths = [sorted(Path(folder, split).rglob("*.jpg")) for split in ("train", "val")]
    mean, std = (torch.tensor(getattr(augment, name))[:, None, None] for name in ("mean", "std"))
    for loader, name, files in zip(loaders, ("bank", "query"), paths, strict=True):
        found = batches(data, loader, name)
        index = torch.cat([batch["index"] for batch in found])
        assert index.tolist() == list(range(len(files)))
        views = torch.cat([batch["views"] for batch in found])
        assert views.dtype == torch.float32
        for view, path in zip(views, files, strict=True):
            pixels = read_image(path)
            height, width = pixels.shape[:2]
            side = round(min(height, width) / 2)
            top, left = (height - side) // 2, (width - side) // 2
            square = Image.fromarray(pixels[top : top + side, left : left + side])
            small = np.array(square.resize((16, 16), Image.Resampling.BILINEAR))
            expected = (to_float(torch.from_numpy(small).permute(2, 0, 1)) - mean) / std
            # one grey level, through the normalisation
            torch.testing.assert_close(view, expected, rtol=0, atol=1.01 / 255 / 0.224)


def test_a_resident_batch_has_the_given_views_of_its_rows() -> None:
    data = ContrastiveDataModule(Digits(), 10, 3, seed=1)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"index", "label", "groups", "epoch"}
    assert set(batch["groups"][0]) == {"table", "crops"}  # no pixel travels
    views = data.make_views(batch, "train")["views"]
    assert views.shape == (30, 1, 32, 32)
    augment, index = digits(), batch["index"].numpy()
    train = data.source.train
    for i, position in enumerate(index):
        side = np.array([32])
        crops = augment.draw_crops(1, 0, index[i : i + 1], 3, side, side)[0]
        pixels = train.pixels[position].permute(1, 2, 0).numpy()  # type: ignore[union-attr]
        images = np.empty((1, 3, 32, 32, 1), np.uint8)
        cut_crops(pixels, crops, 32, images[0])
        table = to_tensors(augment.draw(1, 0, index[i : i + 1], 3))
        expected = augment.apply(torch.from_numpy(images).permute(0, 1, 4, 2, 3), table)
        torch.testing.assert_close(views[i::10], expected, rtol=0, atol=1e-5)
        assert batch["label"][i] == train.labels[position]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("size", [12, 11, 80])
def test_resident_and_stored_views_are_identical(
    tmp_path: Path, grey: bool, size: int, mixed: bool
) -> None:
    for i in range(30):
        path = tmp_path / f"{i % 3}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        sides = (9 + i % 7 * 11, 90 - i % 5 * 17) if mixed else (25, 18)
        Image.fromarray(noise(i, *sides)).save(path)
    modules = [
        ContrastiveDataModule(
            ImageFolder(str(tmp_path), grey=grey),
            9,
            augment=Augment(size=size, jitter=0.0, grey=0.0, blur=0.0, mean=(0.0,), std=(1.0,)),
            num_workers=0,
            resident=resident,
        )
        for resident in ("none", "memory")
    ]
    for data in modules:
        data.setup()
    for name in ("train", "bank", "query"):
        loaders = [
            data.train_dataloader() if name == "train" else data._clean_loader(name)
            for data in modules
        ]
        stored, resident = (batches(d, x, name) for d, x in zip(modules, loaders, strict=True))
        assert len(stored) == len(resident) > 0
        for a, b in zip(stored, resident, strict=True):
            assert torch.equal(a["index"], b["index"])
            assert torch.equal(a["label"], b["label"])
            assert a["views"].shape[1:] == (1 if grey else 3, size, size)
            assert torch.equal(a["views"], b["views"])
            assert a["views"].std() > 0.05


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_views_cut_on_a_device_are_within_one_level_of_those_of_the_loader(
    folder: str, tmp_path: Path, device: str
) -> None:
    shutil.copytree(folder, tmp_path / "set")
    for name in ("ape/00.jpg", "bee/15.jpg"):
        (tmp_path / "set" / "train" / name).write_bytes(b"")
    augment = Augment(size=80, jitter=0.0, grey=0.0, blur=0.0, mean=(0.0,), std=(1.0,))
    source = ImageFolder(str(tmp_path / "set"))
    data = staged(source, augment=augment, n_small_views=3, resident="memory", max_bad_fraction=0.1)
    images = data.samples("train")
    assert isinstance(images, ResidentImages)
    assert images.one_size is None
    sampler, clean = KeyedSampler(len(images), 8, 3, 0, 1), EvaluationSampler(len(images), 5, 0, 1)
    for views, order, draws, p in (
        (data._views("train"), sampler, sampler, 0.0),
        (data._views("train"), sampler, sampler, 0.5),
        (data._views("bank"), None, clean, 0.0),
    ):
        by_loader, by_device = (
            ImageBatches(images, views, 3, 3, order, on_device, p) for on_device in (False, True)
        )
        stage = ImageStage()
        for draw in draws:
            one, other = by_loader[draw], move_data_to_device(by_device[draw], device)
            assert torch.equal(one["index"], other["index"].cpu())
            assert "images" not in other["groups"][0]
            for a, b, of in zip(one["groups"], other["groups"], views, strict=True):
                shown = one["index"].repeat(max(1, of.n_views)) >= 0
                expected, found = stage(images, one, a, of), stage(images, other, b, of).cpu()
                assert expected[shown].std() > 0.05
                assert (found - expected)[shown].abs().max() <= 1.01 / 255


# Folder, shards and memory.


@pytest.fixture(scope="module")
def square_jpegs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """30 JPEGs of one size in three classes, as a folder and packed."""
    root = tmp_path_factory.mktemp("squares")
    for i in range(30):
        path = root / "folder" / "train" / "abc"[i % 3] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i, 40, 40)).save(path)
    (root / "folder" / "val").symlink_to(root / "folder" / "train")
    pack_source(ImageFolder(str(root / "folder")), root / "packed", workers=0)
    return str(root / "folder"), str(root / "packed")


SOURCES = ("folder", "shards", "resident")


def fit_from(source: str, folders: tuple[str, str], size: int, num_workers: int) -> Any:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    multiprocessing.set_start_method("fork", force=True)
    data = ContrastiveDataModule(
        Shards(folders[1]) if source == "shards" else ImageFolder(folders[0]),
        8,
        augment=simclr_imagenet(size),
        resident="memory" if source == "resident" else "none",
        num_workers=num_workers,
        eval_batch_size=4,
    )
    module = Recorder()
    trainer_of(torch.distributed.get_world_size()).fit(module, datamodule=data)
    return module.rows


@pytest.mark.parametrize("size", [24, 72])  # by the compiled triangle filter, and by OpenCV
def test_views_are_identical_from_folder_shards_and_memory_at_any_ranks_and_workers(
    square_jpegs: tuple[str, str], size: int
) -> None:
    def rows(source: str, ranks: int, workers: int) -> dict[str, list[Row]]:
        found = on_ranks(ranks, fit_from, source, square_jpegs, size, workers)
        names = ("train", "bank", "query")
        return {n: sorted(row for r in found for row in r[n] if row[1] >= 0) for n in names}

    expected = rows("folder", 1, 0)
    assert len(expected["train"]) == 2 * 24
    assert len({h for *_, hashes in expected["train"] for h in hashes}) == 2 * 2 * 24
    settings = [(1, 3), (2, 1)] if size == 24 else [(2, 3)]
    for source in SOURCES:
        for ranks, workers in [(1, 0), *settings]:
            assert rows(source, ranks, workers) == expected, (source, ranks, workers)


# Views of two sizes.


def test_small_views_are_those_of_their_own_augmentation_and_number(folder: str) -> None:
    augment, small = simclr_imagenet(24), simclr_imagenet(12, crop_scale=(0.05, 0.3))
    data = ContrastiveDataModule(
        ImageFolder(folder), 8, 2, 3, augment, small, seed=4, num_workers=0
    )
    data.setup()
    (batch, *_) = batches(data, data.train_dataloader(), "train")
    assert batch["views"].shape == (16, 3, 24, 24)
    assert batch["small_views"].shape == (24, 3, 12, 12)
    paths = sorted(Path(folder, "train").rglob("*.jpg"))
    for i, index in enumerate(batch["index"]):
        key = index.numpy()[None]
        pixels = read_image(paths[index])
        height, width = (np.array([n]) for n in pixels.shape[:2])
        # views 2, 3 and 4 of five: none of their numbers is one of the large views'
        crops = small.draw_crops(4, 0, key, 5, height, width)[0, 2:]
        images = np.empty((1, 3, 12, 12, 3), np.uint8)
        cut_crops(pixels, crops, 12, images[0])
        table = to_tensors(small.draw(4, 0, key, 3, first_view=2))
        expected = small.apply(torch.from_numpy(images).permute(0, 1, 4, 2, 3), table)
        torch.testing.assert_close(batch["small_views"][i::8], expected, rtol=0, atol=1e-5)


def test_small_views_leave_the_large_ones_as_they_are(folder: str) -> None:
    found = []
    for n_small_views in (0, 4):
        data = ContrastiveDataModule(
            ImageFolder(folder),
            8,
            n_small_views=n_small_views,
            augment=simclr_imagenet(24),
            num_workers=0,
        )
        data.setup()
        found.append(batches(data, data.train_dataloader(), "train"))
        assert ("small_views" in found[-1][0]) == bool(n_small_views)
    for alone, beside in zip(*found, strict=True):
        assert torch.equal(alone["views"], beside["views"])
    assert beside["small_views"].shape == (32, 3, 10, 10)  # 96/224 of 24


# Augmentations that change with the epoch.

UNTIL = {3: simclr_imagenet(24, grey=0.9), 1: simclr_imagenet(12, blur=0.0)}  # then 16


def staged(source: Source, **options: Any) -> ContrastiveDataModule:
    defaults = {"augment": simclr_imagenet(16), "seed": 3, "num_workers": 0, "eval_batch_size": 4}
    defaults["resident"] = "none"
    data = ContrastiveDataModule(source, 8, **{**defaults, **options})  # type: ignore[arg-type]
    data.setup()
    return data


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2, "n_small_views": 2, "replace_probability": 0.5},
        {"resident": "memory", "n_small_views": 2, "replace_probability": 0.5},
    ],
)
def test_views_of_an_epoch_are_those_of_its_own_augmentation(
    folder: str, options: dict[str, Any]
) -> None:
    data = staged(ImageFolder(folder), augment_until=UNTIL, **options)
    loader = data.train_dataloader()
    for epoch, augment in [(3, data.augment), (0, UNTIL[1]), (1, UNTIL[3]), (2, UNTIL[3])]:
        small = {"small_augment": data.small_augment}
        alone = staged(
            ImageFolder(folder), **{**options, **small, "num_workers": 0, "augment": augment}
        )
        other = alone.train_dataloader()
        for one in (loader, other):
            one.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        found, expected = batches(data, loader, "train"), batches(alone, other, "train")
        assert len(found) == len(expected) >= 3
        assert all(flat(a) == flat(b) for a, b in zip(found, expected, strict=True))
        assert found[0]["views"].shape == (16, 3, augment.size, augment.size)
        assert data.augment_at(epoch) is augment
        if epoch == 1:  # as where a run goes on
            other.first_step = lambda: 2
            rest = batches(alone, other, "train")
            assert [flat(batch) for batch in rest] == [flat(batch) for batch in found[2:]]


@pytest.mark.parametrize("resident", ["memory", "none"])
def test_a_rank_has_its_part_of_the_views_of_an_epoch(resident: Any) -> None:
    augment = digits(20)
    whole = staged(Digits(), augment=augment, resident=resident, augment_until={2: digits(28)})
    for epoch, side in ((1, 28), (2, 20)):
        parts = []
        for rank, ranks in ((0, 1), (0, 2), (1, 2)):
            sampler = KeyedSampler(len(whole.samples("train")), 8, 3, rank, ranks)
            sampler.set_epoch(epoch)
            batch = next(iter(whole._loader("train", sampler)))
            parts.append(whole.make_views(batch, "train")["views"].unflatten(0, (2, -1)))
        assert torch.equal(torch.cat(parts[1:], 1), parts[0])
        assert parts[0].shape[-1] == side


def test_clean_views_are_those_of_the_last_augmentation(folder: str) -> None:
    data, plain = (staged(ImageFolder(folder), **o) for o in ({"augment_until": UNTIL}, {}))
    for name, one, other in zip(
        ("bank", "query"), data.val_dataloader(), plain.val_dataloader(), strict=True
    ):
        found, expected = batches(data, one, name), batches(plain, other, name)
        assert [flat(batch) for batch in found] == [flat(batch) for batch in expected]


class Sides(Recorder):
    """Writes down the sides of views."""

    def write(self, name: str, batch: dict[str, Tensor]) -> None:
        self.sizes[name].append(batch["views"].shape[-1])


def test_batches_made_ahead_are_of_their_own_epoch(folder: str) -> None:
    data = staged(ImageFolder(folder), augment_until={1: simclr_imagenet(12)}, num_workers=1)
    module = Sides()
    trainer_of(limit_val_batches=2).fit(module, datamodule=data)
    assert module.sizes["train"] == [12] * 3 + [16] * 3
    assert module.sizes["bank"] == module.sizes["query"] == [16] * 4


def test_all_epochs_normalise_as_the_last_one(folder: str) -> None:
    numbers = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    first, last = simclr_imagenet(12), simclr_imagenet(16, **numbers)
    data = staged(ImageFolder(folder), augment=last, augment_until={1: first})
    found = data.augment_at(0)
    assert vars(found) == vars(first) | numbers
    assert first.mean != found.mean  # the one that was given is left alone
    alone = staged(ImageFolder(folder), augment=simclr_imagenet(12, **numbers))
    one, other = (batches(d, d.train_dataloader(), "train")[0] for d in (data, alone))
    assert flat(one) == flat(other)


def test_a_run_that_ends_before_the_last_augmentation_is_warned_of(folder: str) -> None:
    data = staged(ImageFolder(folder), augment_until=UNTIL)
    with pytest.warns(UserWarning, match="comes after epoch 3, and the run ends after 2: it will"):
        trainer_of(limit_val_batches=0, limit_train_batches=1).fit(Recorder(), datamodule=data)


# Images that cannot be read.


@pytest.fixture
def damaged(folder: str, tmp_path: Path) -> tuple[str, set[str]]:
    """The folder with three of 26 training files and one of 7 others damaged, and their paths."""
    root = tmp_path / "damaged"
    shutil.copytree(folder, root)
    train, val = (sorted((root / split).rglob("*.jpg")) for split in ("train", "val"))
    train[3].write_bytes(b"")
    train[11].write_bytes(train[11].read_bytes()[:300])
    train[20].write_text("an error page")
    val[2].unlink()
    val[2].mkdir()
    (val[2] / "note.txt").write_text("a folder called like an image")
    os.symlink("nowhere", root / "val" / "ape" / "zz.jpg")
    return str(root), {str(train[i]) for i in (3, 11, 20)} | {str(root / "val/ape/zz.jpg")}


def fit_damaged(root: str, num_workers: int, resident: str) -> Any:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    multiprocessing.set_start_method("fork", force=True)
    data = ContrastiveDataModule(
        ImageFolder(root),
        8,
        augment=simclr_imagenet(16),
        num_workers=num_workers,
        resident=resident,  # type: ignore[arg-type]
        eval_batch_size=3,
        max_bad_fraction=0.5,
    )
    module, log = Recorder(), ListHandler()
    logging.getLogger("simclr_pl").addHandler(log)
    trainer_of(torch.distributed.get_world_size()).fit(module, datamodule=data)
    return module.rows, data.unreadable, log.messages


class ListHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_unreadable_images_are_replaced_and_each_reported_once_with_its_path(
    damaged: tuple[str, set[str]],
) -> None:
    root, bad = damaged
    ((rows, unreadable, messages),) = on_ranks(1, fit_damaged, root, 2, "none")
    assert set(unreadable) == bad
    assert sorted(m.split("'")[1] for m in messages) == sorted(bad)  # two epochs, one report
    assert "the file is empty" in "".join(messages)
    readable = set(range(26)) - {3, 11, 20}
    steps = zip(*[iter(rows["train"])] * 8, strict=True)
    for step in steps:
        index = [row[1] for row in step]
        assert len(set(index)) == 8  # never a duplicate: it would be a false negative
        assert set(index) <= readable
        assert all(row[2] >= 0 for row in step)
    assert sum(row[1] < 0 for row in rows["bank"]) == 2 * 3  # left out, in each of two passes
    assert {row[1] for row in rows["bank"]} - {-1} == readable
    assert all(row[2] == -1 for row in rows["bank"] + rows["query"] if row[1] < 0)


def test_who_replaces_an_unreadable_image_depends_on_neither_ranks_nor_workers(
    damaged: tuple[str, set[str]],
) -> None:
    def rows(ranks: int, workers: int) -> list[Row]:
        found = on_ranks(ranks, fit_damaged, damaged[0], workers, "none")
        return sorted(row for r, _, _ in found for row in r["train"])

    expected = rows(1, 0)
    assert len(expected) == 2 * 3 * 8
    assert rows(1, 3) == expected
    assert rows(2, 1) == expected


def test_two_unreadable_images_of_a_batch_get_different_spares(tmp_path: Path) -> None:
    for i in range(40):
        Image.fromarray(noise(i)).save(tmp_path / f"{i:02}.png")
    for i in range(0, 40, 3):  # a third
        (tmp_path / f"{i:02}.png").write_bytes(b"")
    data = ContrastiveDataModule(
        ImageFolder(str(tmp_path)),
        8,
        augment=simclr_imagenet(8),
        num_workers=0,
        max_bad_fraction=0.9,
    )
    data.setup()
    for batch in batches(data, data.train_dataloader(), "train"):
        assert len(set(batch["index"].tolist())) == 8


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_stops_where_too_many_images_are_unreadable(
    damaged: tuple[str, set[str]], num_workers: int
) -> None:
    data = ContrastiveDataModule(
        ImageFolder(damaged[0]),
        8,
        augment=simclr_imagenet(8),
        num_workers=num_workers,
        resident="none",
        max_bad_fraction=0.04,
    )
    with pytest.raises(
        InputError, match=r"`max_bad_fraction` 0.04 .*; got [23] of 33, last '.*jpg'"
    ):
        trainer_of().fit(Recorder(), datamodule=data)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_storage_that_is_gone_stops_the_run_with_one_line(
    folder: str, tmp_path: Path, num_workers: int
) -> None:
    shutil.copytree(folder, tmp_path / "gone")
    source, options = ImageFolder(str(tmp_path / "gone")), {"num_workers": num_workers}
    data = staged(source, max_bad_fraction=1.0, **options)
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(InputError, match=r"no other to take their place.*No such file") as caught:
        next(iter(data.train_dataloader()))
    assert "\n" not in str(caught.value)


def test_the_mistake_of_a_user_s_data_set_arrives_as_one_line_from_a_worker() -> None:
    floats = TensorDataset(torch.rand(40, 3, 8, 8))
    data = ContrastiveDataModule(
        DatasetSource(floats), 8, augment=simclr_imagenet(8), num_workers=1, resident="none"
    )
    data.setup()
    with pytest.raises(InputError, match=r"^a data set's images must be .*without transforms\.$"):
        next(iter(data.train_dataloader()))


def test_what_was_reported_travels_in_the_state_as_plain_text() -> None:
    first = ContrastiveDataModule(Digits())
    first._sets = {}
    first.unreadable["a.jpg"] = "the file is empty"
    again = ContrastiveDataModule(Digits())
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert again.unreadable == {"a.jpg": "the file is empty"}


# What lives in memory.


def test_auto_keeps_in_memory_what_fits(folder: str, square_jpegs: tuple[str, str]) -> None:
    for source, options, kind in (
        (ImageFolder(square_jpegs[0]), {}, "resident in memory"),  # 224 pixels: not by the kernels
        (ImageFolder(square_jpegs[0]), {"augment": simclr_imagenet(32)}, "resident on cpu"),
        (ImageFolder(square_jpegs[0]), {"resident": "none"}, "read by"),
        (Shards(square_jpegs[1]), {}, "resident in memory"),
        (ImageFolder(folder), {}, "resident in memory"),  # of four sizes
        (ImageFolder(folder), {"augment": simclr_imagenet(32)}, "resident on cpu"),
    ):
        data = ContrastiveDataModule(source, 8, **options)  # type: ignore[arg-type]
        data.setup()
        assert kind in data.describe()
        assert (data.train_dataloader().num_workers == 0) == ("resident" in kind)


def test_a_set_is_held_in_memory_once_for_training_and_bank(square_jpegs: tuple[str, str]) -> None:
    data = ContrastiveDataModule(ImageFolder(square_jpegs[0]), 8)
    data.setup()
    assert data._sets["train"] is data._sets["bank"]
    assert data._sets["train"] is not data._sets["query"]


# The clock.


class Slow(Squares):
    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        time.sleep(0.01)
        return super().__getitem__(i)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_knows_how_long_it_was_waited_for(num_workers: int) -> None:
    data = ContrastiveDataModule(
        DatasetSource(Slow(), query=Squares()),
        20,
        augment=simclr_imagenet(8),
        num_workers=num_workers,
        resident="none",
    )
    data.setup()
    loader = data.train_dataloader()
    begin = time.perf_counter()
    assert len(list(loader)) == 2
    assert 0.2 < loader.seconds_waited < time.perf_counter() - begin
    before = loader.seconds_waited
    for _ in loader:
        time.sleep(0.3)  # a busy consumer; a worker uses that time
    waited = loader.seconds_waited - before
    assert waited > 0.35 if num_workers == 0 else waited < 0.45


# The bank.


def labelled(count: int, **options: Any) -> ContrastiveDataModule:
    """Image i is all of brightness i and its label is i, or -1 for every third one."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    labels = [-1 if i % 3 == 0 else i for i in range(count)]
    augment = Augment(size=8, mean=(0.0,), std=(1.0,))
    train = TensorDataset(images)
    source = DatasetSource(train, query=train, labels=labels, channels=1)
    data = ContrastiveDataModule(source, 4, augment=augment, num_workers=0, **options)
    data.setup()
    return data


def bank_of(data: ContrastiveDataModule) -> list[tuple[int, int]]:
    """Brightness and label of each image in the bank."""
    found = batches(data, data.val_dataloader()[0], "bank")
    views, label = (torch.cat([batch[name] for batch in found]) for name in ("views", "label"))
    return [(round(float(v.mean()) * 255), int(n)) for v, n in zip(views, label, strict=True)]


def test_the_bank_holds_exactly_the_labelled_images() -> None:
    assert bank_of(labelled(60)) == [(i, i) for i in range(60) if i % 3]
    assert bank_of(labelled(60, bank_size=40)) == [(i, i) for i in range(60) if i % 3]


def test_bank_size_takes_a_subset_that_depends_on_the_seed_alone() -> None:
    banks = [bank_of(labelled(60, bank_size=15, seed=seed)) for seed in (0, 0, 1)]
    for bank in banks:
        assert len(set(bank)) == 15
        assert set(bank) < set(bank_of(labelled(60)))
    assert banks[0] == banks[1] != banks[2]
    assert max(banks[0]) > (30, 30) > min(banks[0])  # not the first ones


def test_a_smaller_bank_is_part_of_a_larger_one() -> None:
    small, large = (set(bank_of(labelled(60, bank_size=n))) for n in (10, 20))
    assert small < large


def test_training_still_sees_the_unlabelled_images() -> None:
    data = labelled(60, bank_size=10)
    found = torch.cat([b["index"] for b in batches(data, data.train_dataloader(), "train")])
    assert sorted(found.tolist()) == list(range(60))


@pytest.mark.parametrize(("labels", "classes"), [(None, 0), ([-1] * 20, 0), ([3, 7] * 10, 8)])
def test_num_classes_counts_up_to_the_largest_label_and_is_0_without_any(
    labels: list[int] | None, classes: int
) -> None:
    images = TensorDataset(torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
    data = ContrastiveDataModule(DatasetSource(images, labels=labels), 4)
    data.setup()
    assert data.num_classes == classes


def test_classes_that_the_bank_does_not_show_are_counted() -> None:
    images = TensorDataset(torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
    data = ContrastiveDataModule(DatasetSource(images, labels=[*range(20)]), 4, bank_size=1)
    data.setup()
    assert len(data.samples("bank")) == 1
    assert data.num_classes == 20


def test_where_no_image_is_labelled_the_bank_holds_all_without_labels() -> None:
    images = TensorDataset(torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
    data = ContrastiveDataModule(
        DatasetSource(images, query=images), 4, augment=simclr_imagenet(8), num_workers=0
    )
    data.setup()
    (batch,) = batches(data, data.val_dataloader()[0], "bank")
    assert batch["index"].tolist() == list(range(20))
    assert batch["label"].tolist() == [-1] * 20


# A data set of the user's own; describing; workers.


def test_a_data_set_is_accepted_directly_and_trained_on() -> None:
    data = ContrastiveDataModule(Squares(), 9, augment=simclr_imagenet(8), num_workers=0)
    module = Recorder()
    trainer_of().fit(module, datamodule=data)
    assert len(module.rows["train"]) == 2 * 36
    assert len(module.rows["bank"]) == 2 * 36
    assert len(module.rows["query"]) == 2 * 4
    assert data.num_classes == 4
    assert {row[2] for row in module.rows["train"]} == {0, 1, 2, 3}


def test_describe_names_the_source_the_counts_and_where_the_images_are(folder: str) -> None:
    data = ContrastiveDataModule(Digits(), bank_size=1000)
    data.setup()
    line = "Digits: 1,347 train, 1,000 bank, 450 query images, 1 MiB resident on cpu"
    assert data.describe() == line
    data = ContrastiveDataModule(ImageFolder(folder), 8, num_workers=3, resident="none")
    data.setup()
    assert data.describe() == "ImageFolder: 26 train, 26 bank, 7 query images, read by 3 workers"


def test_workers_default_to_none_in_memory_and_to_the_cores_for_files(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = ContrastiveDataModule(ImageFolder(folder), 8, resident="none")
    for data, workers in (
        (ContrastiveDataModule(Digits()), 0),
        (stored, len(os.sched_getaffinity(0))),
    ):
        data.setup()
        assert data.train_dataloader().num_workers == workers
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS and Windows
    assert stored.train_dataloader().num_workers == os.cpu_count()


def test_what_a_worker_gets_can_be_pickled_as_the_start_method_spawn_needs(folder: str) -> None:
    for source, resident in (
        (Digits(), "auto"),
        (ImageFolder(folder), "none"),
        (Squares(), "none"),
    ):
        data = staged(as_source(source), augment=simclr_imagenet(8), resident=resident)
        for loader in (data.train_dataloader(), *data.val_dataloader()):
            copy = pickle.loads(pickle.dumps(loader.dataset))
            draw = next(iter(loader.sampler))
            assert flat(copy[draw]) == flat(loader.dataset[draw])


def flat(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: flat(v) for k, v in value.items()}
    if isinstance(value, list):
        return [flat(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) else value


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 0}, "`global_batch_size` must be >= 1; got 0. Set `data.global"),
        ({"n_views": 0}, "`n_views` must be >= 1; got 0. Set `data.n_views`"),
        ({"bank_size": 0}, "`bank_size` must be >= 1; got 0"),
        ({"eval_batch_size": -1}, "`eval_batch_size` must be >= 1; got -1"),
        ({"augment_until": {0: digits()}}, "augmentations end must be >= 1; got 0. Set `data.aug"),
        ({"augment_until": {2: TextAugment()}}, "got TextAugment until epoch 2, then Augment"),
    ],
)
def test_options_that_do_not_fit_raise_input_error(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ContrastiveDataModule(Digits(), **options)


def test_the_smallest_allowed_numbers_give_a_batch() -> None:
    data = ContrastiveDataModule(Digits(), 1, 2, bank_size=1, eval_batch_size=1)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert data.make_views(batch, "train")["views"].shape == (2, 1, 32, 32)
    assert len(data.val_dataloader()[0]) == 1


def test_one_view_of_each_image_serves_supervised_training_but_not_simclr() -> None:
    module = Recorder()
    data = ContrastiveDataModule(Digits(), 64, n_views=1)
    trainer_of(limit_train_batches=1, limit_val_batches=0).fit(module, datamodule=data)
    assert module.sizes["train"] == [64, 64]
    with pytest.raises(InputError, match=r"needs >= 2 views.*got 1. Set `data.n_views`"):
        trainer_of().fit(tiny_model(), datamodule=ContrastiveDataModule(Digits(), 64, n_views=1))


def test_open_sets_are_given_by_name_and_say_whether_training_is_labelled() -> None:
    data = labelled(60, bank_size=15)
    assert [len(data.samples(name)) for name in ("train", "bank", "query")] == [60, 15, 60]
    assert data.train_is_labelled
    images = TensorDataset(torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
    unlabelled = ContrastiveDataModule(DatasetSource(images), 4)
    unlabelled.setup()
    assert not unlabelled.train_is_labelled


def test_a_source_that_is_none_raises_input_error() -> None:
    with pytest.raises(InputError, match="must be a Source or a Dataset with a length; got int"):
        ContrastiveDataModule(7)  # type: ignore[arg-type]


def test_a_set_smaller_than_the_global_batch_raises_input_error(folder: str) -> None:
    data = ContrastiveDataModule(ImageFolder(folder), 27, num_workers=0)
    with pytest.raises(InputError, match=r"got 26 images for `global_batch_size` 27.*at most 26"):
        trainer_of().fit(Recorder(), datamodule=data)
    data.setup("validate")  # evaluation needs no whole batch
    data = ContrastiveDataModule(ImageFolder(folder), 26, num_workers=0)
    data.setup()
    assert len(data.train_dataloader()) == 1


def fit_with_batch(global_batch_size: int) -> str:
    module, data = Recorder(), ContrastiveDataModule(Digits(), global_batch_size)
    try:
        trainer_of(2, limit_train_batches=1, limit_val_batches=0).fit(module, datamodule=data)
    except InputError as error:
        return str(error)
    return f"{module.sizes['train']}"


def test_a_batch_that_does_not_divide_by_the_ranks_raises_on_every_rank() -> None:
    messages = on_ranks(2, fit_with_batch, 9)
    expected = (
        "must divide by the number of ranks; got 9 for 2 ranks. Set `data.global_batch_size` to 10."
    )
    assert len(messages) == 2
    assert all(expected in message for message in messages), messages


def test_a_batch_that_divides_by_the_ranks_gives_each_its_share() -> None:
    assert on_ranks(2, fit_with_batch, 10) == ["[5, 5]"] * 2


# Processes.


def load_for_ever(pids: Any) -> None:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    data = ContrastiveDataModule(
        DatasetSource(Squares()), 4, augment=simclr_imagenet(8), num_workers=2, resident="none"
    )
    data.setup()
    batches = iter(loader := data.train_dataloader())
    next(batches)
    pids.send([w.pid for w in loader._iterator._workers])  # type: ignore[union-attr]
    time.sleep(60)  # the workers' pipe is full by now


def test_workers_leave_with_a_parent_that_is_killed() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=load_for_ever, args=(theirs,))
    process.start()
    assert ours.poll(30)
    workers = ours.recv()
    assert all(is_running(pid) for pid in workers)
    process.kill()
    process.join()
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
