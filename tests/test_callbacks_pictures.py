"""The pictures of real runs: they hold what they claim, wherever they go, and change nothing."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from pictures import noise, write_classes
from PIL import Image
from ranks import on_ranks
from test_callbacks_drawing import places
from tiny import tiny_data, tiny_fit, tiny_model, tiny_trainer, weights
from torch import nn

from simclr_pl import ContrastiveDataModule, InputError, SimCLR
from simclr_pl.augment import Augment
from simclr_pl.callbacks import Pictures
from simclr_pl.callbacks.drawing import OTHER, SAME, scaled
from simclr_pl.callbacks.map_points import nearest_among, spread_over_classes
from simclr_pl.data import ImageFolder, Source
from simclr_pl.data.sources import ResidentImages
from simclr_pl.trackers import WandbTracker


class Recorder(Callback):
    """Keeps the first batch and what the validations return of the query images."""

    def __init__(self) -> None:
        self.batch: dict[str, Any] = {}
        self.query: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if not self.batch:
            self.batch = {name: value.clone() for name, value in batch.items()}

    def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
        self.query = []

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, loader: int = 0
    ) -> None:
        if loader == 1:
            self.query.append({name: value.clone() for name, value in outputs.items()})


class Twins(Source):
    """Images of noise, and a bank that holds each query image once more."""

    channels = 3

    def __init__(self, n_classes: int = 3) -> None:
        self.n_classes = n_classes

    def open(self) -> None:
        label = np.arange(70) % self.n_classes if self.n_classes else np.full(70, -1)
        pixels = torch.from_numpy(np.stack([noise(i, 16, 16) for i in range(70)]))
        everything = ResidentImages(pixels.permute(0, 3, 1, 2), label)
        self.train = self.bank = everything
        self.query = everything.subset(np.arange(11, 44))


class Pixels(nn.Module):
    """Raw pixels as features."""

    num_features = 768

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) * self.scale


def twins(**options: Any) -> ContrastiveDataModule:
    augment = Augment(16, clean_fraction=1.0)
    options = {"augment": augment, "global_batch_size": 16, "eval_batch_size": 16, **options}
    return ContrastiveDataModule(options.pop("source", Twins()), **options)


def model_of(encoder: nn.Module, width: int) -> SimCLR:
    model = tiny_model(batch_norm=False)
    model.encoder, model.projector = encoder, nn.Linear(width, 4)
    return model


def pixel_model() -> SimCLR:
    return model_of(Pixels(), 768)


def small_model() -> SimCLR:
    """For views of any size."""
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return model_of(encoder, 8)


def run(
    folder: Path, callbacks: list[Any], data: Any = None, model: Any = None, **more: Any
) -> Path:
    """One epoch of one step; returns the folder of the pictures."""
    options = {"max_epochs": 1, "limit_train_batches": 1, "num_sanity_val_steps": 0, **more}
    options = {"logger": CSVLogger(folder, name="run", version=0), **options}
    trainer = tiny_trainer(callbacks, **options)
    trainer.fit(model or pixel_model(), datamodule=data or twins())
    return folder / "run/version_0/pictures"


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_every_validation_has_its_pictures(tmp_path: Path) -> None:
    folder = run(tmp_path, [Pictures()], max_epochs=2, num_sanity_val_steps=-1)
    expected = ["map.npz", "map_1.png", "map_2.png", "map_thumbnails.jpg"]
    expected += ["neighbours_1.png", "neighbours_2.png", "views.png"]
    assert names_in(folder) == expected
    assert all(path.stat().st_size < 400_000 for path in folder.iterdir())


def test_the_views_are_those_of_the_first_batch(tmp_path: Path) -> None:
    recorder = Recorder()
    data = twins(n_small_views=2)
    folder = run(tmp_path, [Pictures(n_images=3), recorder], data, small_model(), max_epochs=2)
    page = read(folder / "views.png")
    augment = data.augment
    for name, side in (("views", 16), ("small_views", data.small_augment.size)):
        views = recorder.batch[name].double().permute(0, 2, 3, 1).numpy()
        shown = views * np.array(augment.std) + np.array(augment.mean)
        shown = np.round(255 * shown).clip(0, 255).astype(np.uint8).reshape(2, 16, side, side, 3)
        for view in shown:
            columns = [places(page, scaled(view[i], 6)) for i in range(4)]
            assert [len(found) for found in columns] == [1, 1, 1, 0]  # three images and no more
    for i in recorder.batch["index"][:3].tolist():
        assert len(places(page, scaled(noise(i, 16, 16), 6))) == 1


def test_the_views_are_shown_by_the_augmentation_of_their_epoch(tmp_path: Path) -> None:
    colour = [37, 91, 205]

    class Plain(Augment):
        def pictures(self, views: torch.Tensor) -> np.ndarray:
            return np.broadcast_to(np.array(colour, np.uint8), (len(views), 8, 8, 3))

    data = twins(augment_until={1: Plain(8)})
    folder = run(tmp_path, [Pictures(n_images=3)], data, small_model(), max_epochs=2)
    found = (read(folder / "views.png") == colour).all(2)
    assert found.sum() == 6 * 96 * 96  # two views of three images, as large as those of 16 pixels


def test_a_copy_of_the_query_is_its_nearest_neighbour(tmp_path: Path) -> None:
    page = read(run(tmp_path, [Pictures(n_images=5, n_neighbours=2)]) / "neighbours_1.png")
    found = [places(page, scaled(noise(i, 16, 16), 6)) for i in range(70)]
    twice = {i: sorted(where) for i, where in enumerate(found) if len(where) >= 2}
    assert len(twice) == 5
    assert set(twice) <= set(range(11, 44))
    assert {i % 3 for i in twice} == {0, 1, 2}
    for where in twice.values():
        rows, columns = zip(*where[:2], strict=True)
        assert rows[0] == rows[1]
        assert columns[0] < 30 < 140 < columns[1] < 160  # the query, then the first place
        frame = [int(SAME[i : i + 2], 16) for i in (1, 3, 5)]
        assert page[rows[0] - 1, columns[1] - 1].tolist() == frame
    other = [int(OTHER[i : i + 2], 16) for i in (1, 3, 5)]
    assert (page == other).all(2).any()


def plane(recorder: Recorder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The oracle, in float64: coordinates up to sign, labels and index of all query images."""
    rows = {n: torch.cat([part[n] for part in recorder.query]).cpu() for n in recorder.query[0]}
    order = rows["index"].argsort()
    x = rows["features"].double()[order].numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return (u * s)[:, :2], rows["label"][order].numpy(), rows["index"][order].numpy()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_map_holds_the_principal_components(tmp_path: Path, precision: Any) -> None:
    recorder = Recorder()
    folder = run(tmp_path, [Pictures(), recorder], tiny_data(), tiny_model(), precision=precision)
    table = np.load(folder / "map.npz")
    xy, label, index = plane(recorder)
    signs = np.sign((table["xy"] * xy).sum(0))
    np.testing.assert_allclose(table["xy"], xy * signs, atol=1e-5)
    assert table["xy"].dtype == np.float32
    assert np.array_equal(table["label"], label)
    assert np.array_equal(table["index"], index)
    assert table["step"] == 1


def test_the_neighbours_of_a_point_are_those_of_a_plain_search() -> None:
    points = np.random.default_rng(0).normal(size=(1030, 5)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    nearest, similarity = nearest_among(points, 4)
    cosine = points.astype(np.float64) @ points.T.astype(np.float64)
    np.fill_diagonal(cosine, -2)
    assert np.array_equal(nearest, np.argsort(-cosine, axis=1)[:, :4])
    np.testing.assert_allclose(similarity, -np.sort(-cosine, axis=1)[:, :4], atol=1e-6)
    assert nearest_among(points[:3], 6)[0].shape == (3, 2)


def test_the_map_comes_with_its_classes_and_the_images_of_its_points(tmp_path: Path) -> None:
    folder = run(tmp_path, [Pictures(n_neighbours=2)])
    table = np.load(folder / "map.npz")
    assert table["neighbours"].shape == table["similarity"].shape == (33, 2)
    assert table["classes"].tolist() == ["0", "1", "2"]
    sheet = read(folder / "map_thumbnails.jpg").astype(float)
    assert sheet.shape == (6 * 16, 6 * 16, 3)  # 33 points, images of 16 pixels
    for place, index in enumerate(table["index"].tolist()):
        y, x = (16 * part for part in divmod(place, 6))
        own = np.corrcoef(sheet[y : y + 16, x : x + 16].ravel(), noise(11 + index, 16, 16).ravel())
        assert own[0, 1] > 0.5


def test_the_map_has_at_most_so_many_points(tmp_path: Path) -> None:
    index = np.load(run(tmp_path, [Pictures(max_points=20)]) / "map.npz")["index"]
    assert len(set(index.tolist())) == len(index) == 20
    assert index.max() < 33


class Mirror(Callback):
    """Turns every feature to its opposite after the first validation."""

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        module.encoder.scale.data.neg_()


def test_maps_keep_their_orientation_also_in_a_resumed_run(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def model() -> SimCLR:
        model = pixel_model()
        model.encoder.scale.requires_grad_(False)
        return model

    # Saved after the validation, as the trainer's own callback does.
    options: dict[str, Any] = {"limit_train_batches": 2}
    pictures = run(tmp_path / "a", [Pictures(), Mirror()], model=model(), **options)
    first = np.load(pictures / "map.npz")["xy"]
    pictures = run(
        tmp_path / "b", [Pictures(), Mirror(), Save()], model=model(), max_epochs=2, **options
    )
    whole = np.load(pictures / "map.npz")["xy"]
    np.testing.assert_allclose(whole, first, atol=1e-5)  # though the features are the opposite
    trainer = tiny_trainer(
        [Pictures()], logger=CSVLogger(tmp_path / "c", name="run", version=0), **options
    )
    trainer.fit(model(), datamodule=twins(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    resumed = np.load(tmp_path / "c/run/version_0/pictures/map.npz")["xy"]
    assert np.array_equal(resumed, whole)


def test_trackers_get_the_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    csv = CSVLogger(tmp_path, name="run", version=0)
    board = TensorBoardLogger(tmp_path / "board", name="", version="0")
    biases = WandbTracker(tmp_path, "tests", offline=True)
    folder = run(tmp_path, [Pictures()], logger=[csv, board, biases])
    wandb.finish()
    files = {"views": "views.png", "neighbours": "neighbours_1.png", "map": "map_1.png"}
    events = EventAccumulator(str(tmp_path / "board/0"), {"images": 0}).Reload()
    media = list(tmp_path.glob("wandb/offline-run-*/files/media/images/pictures/*.png"))
    assert len(media) == 3
    for tag, file in files.items():
        (event,) = events.Images(f"pictures/{tag}")
        assert event.step == 0  # of the numbers of the first update, as in metrics.csv
        (tmp_path / "event.png").write_bytes(event.encoded_image_string)
        assert np.array_equal(read(tmp_path / "event.png"), read(folder / file))
        (copy,) = (path for path in media if path.name.startswith(tag))
        assert copy.read_bytes() == (folder / file).read_bytes()


def on_a_rank(folder: Path) -> None:
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    strategy = "ddp" if devices > 1 else "auto"
    # 33 query images: an uneven share for each rank
    run(folder, [Pictures(n_images=4)], devices=devices, strategy=strategy)


def test_two_ranks_draw_the_pictures_of_one(tmp_path: Path) -> None:
    on_a_rank(tmp_path / "one")
    on_ranks(2, on_a_rank, tmp_path / "two")
    one, two = (tmp_path / name / "run/version_0/pictures" for name in ("one", "two"))
    assert names_in(one) == names_in(two)
    for name in ("views.png", "neighbours_1.png"):
        assert np.array_equal(read(one / name), read(two / name))
    ours, theirs = (np.load(folder / "map.npz") for folder in (one, two))
    assert np.array_equal(ours["index"], theirs["index"])
    np.testing.assert_allclose(ours["xy"], theirs["xy"], atol=1e-5)


def test_unlabelled_images_have_pictures(tmp_path: Path) -> None:
    folder = run(tmp_path, [Pictures()], twins(source=Twins(0)))
    assert len(names_in(folder)) == 5
    assert set(np.load(folder / "map.npz")["label"].tolist()) == {-1}
    page = read(folder / "neighbours_1.png")
    for colour in (SAME, OTHER):
        frame = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert not (page == frame).all(2).any()


def test_an_unreadable_image_is_not_among_the_samples(tmp_path: Path) -> None:
    write_classes(tmp_path / "set/train", {"cat": 9, "dog": 9}, seed=100)
    write_classes(tmp_path / "set/val", {"cat": 3, "dog": 2}, seed=200)
    (tmp_path / "set/val/cat/1.png").write_bytes(b"no image")
    source = ImageFolder(str(tmp_path / "set"))
    options = {"num_workers": 0, "max_bad_fraction": 0.5, "resident": "none"}
    data = twins(source=source, augment=Augment(8), **options)
    folder = run(tmp_path, [Pictures()], data, small_model())
    page = read(folder / "neighbours_1.png")
    shown = [len(places(page, scaled(noise(i), 12))) for i in range(201, 206)]
    assert shown == [1, 0, 1, 1, 1]
    assert np.load(folder / "map.npz")["index"].tolist() == [0, 2, 3, 4]


def test_an_encoder_that_collapsed_has_pictures(tmp_path: Path) -> None:
    model = pixel_model()
    model.encoder.scale.data.zero_()
    assert "map_1.png" in names_in(run(tmp_path, [Pictures()], model=model))


def test_features_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    class Torn(Pixels):
        """No number for a bright corner."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = super().forward(x)
            return torch.where(h[:, :1] > 0, torch.nan, h)

    recorder = Recorder()
    model = model_of(Torn(), 768)
    model.encoder.requires_grad_(False)  # else one step would spread them
    folder = run(tmp_path / "some", [Pictures(), recorder], model=model)
    rows = torch.cat([part["features"] for part in recorder.query])
    index = torch.cat([part["index"] for part in recorder.query])
    kept = index[rows.isfinite().all(1)].tolist()
    assert 3 < len(kept) < 33
    assert np.load(folder / "map.npz")["index"].tolist() == sorted(kept)
    model = pixel_model()
    model.encoder.scale.data.fill_(torch.nan)
    assert names_in(run(tmp_path / "all", [Pictures()], model=model)) == ["views.png"]


def test_a_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    run(tmp_path, [Pictures()], fast_dev_run=True)
    assert list(tmp_path.rglob("*.png")) == list(tmp_path.rglob("*.npz")) == []


def test_pictures_change_neither_the_encoder_nor_the_random_numbers(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([Pictures()], []):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        trainer = tiny_fit([*callbacks], tiny_model(), limit_train_batches=2)
        numpy_state = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr] # noqa: NPY002
        state = torch.get_rng_state(), numpy_state, random.getstate()
        ends.append((weights(trainer.lightning_module), *state))
    (with_pictures, *states), (without, *others) = ends
    assert all(torch.equal(with_pictures[name], without[name]) for name in without)
    assert torch.equal(states[0], others[0])
    assert states[1:] == others[1:]


def test_nothing_is_kept_after_a_validation(tmp_path: Path) -> None:
    pictures = Pictures()
    run(tmp_path, [pictures])
    assert pictures._bank == pictures._points == []


def test_samples_spread_over_the_classes_whatever_the_others() -> None:
    label = np.array([0] * 50 + [1] * 3 + [5] * 2 + [-1] * 30)
    chosen = spread_over_classes(label, 8)
    assert label[chosen].tolist() == [0, 0, 0, 1, 1, 1, 5, 5]
    assert len(set(chosen.tolist())) == 8
    assert np.array_equal(chosen, spread_over_classes(label, 8))
    assert spread_over_classes(np.arange(100), 3).tolist() == [0, 50, 99]  # of a hundred classes
    assert len(spread_over_classes(np.full(5, -1), 8)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_images": 0}, r"`n_images` must be >= 1; got 0. Set `pictures.n_images`"),
        ({"n_neighbours": 0}, r"`n_neighbours` must be >= 1; got 0"),
        ({"max_points": 2}, r"`max_points` must be >= 3; got 2"),
        ({"projection": "tsne"}, r"`projection` must be pca or umap; got 'tsne'"),
        ({"projection": "umap"}, r"needs the package umap-learn.*pip install 'simclr_pl\[umap\]'"),
    ],
)
def test_wrong_options_are_errors(
    options: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "umap", None)  # as if it were not installed
    with pytest.raises(InputError, match=message):
        Pictures(**options)
