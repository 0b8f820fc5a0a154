"""Simulated data: second views that show another sample of the global batch, and spares."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from ranks import on_ranks
from tiny import differences, tiny_data, tiny_model, tiny_trainer, weights

from simclr_pl import ContrastiveDataModule, InputError
from simclr_pl.augment import Augment
from simclr_pl.augmentation import Rows
from simclr_pl.callbacks import ExactCheckpoint
from simclr_pl.data import Digits, ImageFolder
from simclr_pl.data.batches import to_tensors
from simclr_pl.data.sampler import Draw, KeyedSampler

pytestmark = pytest.mark.filterwarnings("ignore:.*dirpath has changed")  # each has a folder

COLOUR = partial(Augment, crop_scale=(0.3, 1.0), rotation=20.0, blur=0.5, solarise=0.3)


def folder_of(root: Path, count: int = 25) -> str:
    generator = np.random.default_rng(0)
    for i in range(count):
        path = root / ("ape", "bee")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (20 + i % 3, 30 - i % 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return str(root)


def givers(count: int, batch: int, p: float, world: int = 1, epoch: int = 0) -> np.ndarray:
    """(steps, batch) of one epoch, the ranks beside each other."""
    ranks = [KeyedSampler(count, batch, 3, r, world) for r in range(world)]
    for sampler in ranks:
        sampler.set_epoch(epoch)
    steps = [[s.givers(draw, p) for draw in s] for s in ranks]
    return np.stack([np.concatenate(part) for part in zip(*steps, strict=True)])


def positions(count: int, batch: int, epoch: int = 0) -> np.ndarray:
    sampler = KeyedSampler(count, batch, 3, 0, 1)
    sampler.set_epoch(epoch)
    return np.stack([draw.positions for draw in sampler])


def test_a_giver_is_another_sample_of_the_same_global_batch_each_as_often() -> None:
    taken, own = givers(20_000, 10, 0.3), positions(20_000, 10)
    replaced = taken >= 0
    assert abs(replaced.mean() - 0.3) < 0.01
    assert not (taken == own).any()
    places = (own[:, None, :] == taken[:, :, None]).argmax(-1)  # (steps, batch)
    assert all(
        t in batch for row, batch in zip(taken, own.tolist(), strict=True) for t in row if t >= 0
    )
    counts = np.bincount(places[replaced], minlength=10) / replaced.sum()
    assert np.abs(counts - 0.1).max() < 0.01


def test_givers_depend_on_seed_epoch_and_batch_but_not_on_the_ranks() -> None:
    assert np.array_equal(givers(60, 12, 0.5, 3), givers(60, 12, 0.5, 1))
    assert not np.array_equal(givers(60, 12, 0.5, epoch=1) >= 0, givers(60, 12, 0.5) >= 0)
    assert (givers(60, 12, 0.0) == -1).all()
    assert (givers(60, 12, 1.0) >= 0).all()


def one_by_one(data: ContrastiveDataModule, draw: Draw, p: float) -> tuple[torch.Tensor, Any]:
    """The views of a batch, each made alone by the general way, and the samples that they show."""
    taken = data.train_dataloader().sampler.givers(draw, p).tolist()  # type: ignore[union-attr]
    sizes = [
        (data.augment, data.n_views, 0),
        (data.small_augment, data.n_small_views, data.n_views),
    ]
    views, shown = [], []
    for augment, n_views, first in sizes:
        for v in range(first, first + n_views):
            for own, giver in zip(draw.positions.tolist(), taken, strict=True):
                sample, number = own, v
                if v == 1 and giver >= 0:
                    sample, number = giver, data.n_views + data.n_small_views + own
                rows = Rows(data.seed, draw.epoch, np.array([sample]), np.array([number]))
                opened = data.samples("train").open(sample)
                view = augment.finish(to_tensors(augment.prepare([opened], rows)))
                views.append(view.flatten())
                shown.append(sample)
    return torch.cat(views), torch.tensor(shown)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("digits", {"n_views": 2}),  # cropped by the device stage
        ("digits", {"n_views": 3, "resident": "none"}),
        ("folder", {"n_views": 2, "augment": COLOUR(size=16), "n_small_views": 2}),
        ("folder", {"n_views": 2, "augment": COLOUR(size=72), "resident": "none"}),
    ],
)
def test_replaced_views_are_views_of_the_givers_each_of_its_own(
    kind: str, options: dict[str, Any], p: float, tmp_path: Path
) -> None:
    source = Digits() if kind == "digits" else ImageFolder(folder_of(tmp_path))
    data = ContrastiveDataModule(
        source, global_batch_size=11, seed=4, num_workers=0, replace_probability=p, **options
    )
    data.setup()
    loader = data.train_dataloader()
    draws = list(loader.sampler)[:2]
    for draw, batch in zip(draws, loader, strict=False):
        got = data.make_views(batch, "train")
        views = torch.cat([got[n].flatten() for n in ("views", "small_views") if n in got])
        expected, shown = one_by_one(data, draw, p)
        torch.testing.assert_close(views, expected, rtol=0, atol=2e-6)
        assert got["index"].tolist() == draw.positions.tolist()
        if p:
            assert torch.equal(got["ids"].flatten(), shown)
            labels = torch.from_numpy(data.samples("train").labels)
            assert torch.equal(got["row_label"], labels[shown])
            assert (got["ids"][1] != got["index"]).any()
        else:
            assert "ids" not in got


def test_an_unreadable_giver_is_reported_and_leaves_the_second_view_as_it_was(
    tmp_path: Path,
) -> None:
    root = folder_of(tmp_path)
    (tmp_path / "ape/04.png").write_bytes(b"no image")
    data = ContrastiveDataModule(
        ImageFolder(root),
        global_batch_size=7,
        augment=COLOUR(size=16),
        num_workers=0,
        replace_probability=1.0,
        resident="none",
        max_bad_fraction=0.2,
    )
    data.setup()
    images, seen = data.samples("train"), 0
    bad = next(i for i in range(len(images)) if images.name(i).endswith("04.png"))
    loader = data.train_dataloader()
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for draw, batch in zip(list(loader.sampler), loader, strict=True):
            got = data.make_views(batch, "train")
            taken = loader.sampler.givers(draw, 1.0)  # type: ignore[union-attr]
            assert not (got["ids"] == bad).any()
            for slot in np.flatnonzero(taken == bad):
                seen += 1
                assert got["ids"][1, slot] == got["index"][slot]
            ours = (taken != bad) & (draw.positions != bad)
            assert got["ids"][1].numpy()[ours].tolist() == taken[ours].tolist()
    assert seen
    assert list(data.unreadable) == [images.name(bad)]


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, float, list[int]]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        shown = outputs["ids"].flatten().tolist()
        self.seen.append((trainer.global_step, float(outputs["loss"]), shown))


def fit(folder: Path, resume: Path | None, p: float = 0.4) -> tuple[dict[str, Any], Any]:
    """Six steps in two epochs, with a checkpoint in the middle of the second."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    losses = Losses()
    trainer = tiny_trainer(
        [losses, ExactCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)],
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        enable_checkpointing=True,
        limit_train_batches=3,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    model = tiny_model(batch_norm=False)
    data = tiny_data(global_batch_size=24, replace_probability=p)
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    return weights(model), losses.seen


def whole_and_resumed(folder: Path) -> list[Any]:
    return [fit(folder, None), fit(folder / "resumed", folder / "step=4.ckpt")]


def test_two_ranks_and_a_resume_train_on_the_same_simulated_data(tmp_path: Path) -> None:
    (alone, losses), (again, rest) = whole_and_resumed(tmp_path / "one")
    assert differences(alone, again) == []
    assert rest == losses[4:]
    first, second = on_ranks(2, whole_and_resumed, tmp_path / "two")
    for whole, resumed in (first, second):
        assert differences(whole[0], resumed[0]) == []
        assert resumed[1] == whole[1][4:]
        torch.testing.assert_close(whole[0], alone, rtol=2e-5, atol=2e-6)
    for step, (one, *two) in enumerate(zip(losses, first[0][1], second[0][1], strict=True)):
        assert one[1] == pytest.approx(two[0][1], rel=1e-5), step
        views = [np.array(part[2]).reshape(2, -1) for part in (one, *two)]
        assert np.array_equal(views[0], np.concatenate(views[1:], 1))


@pytest.mark.parametrize(
    "options",
    [
        {"replace_probability": 1.5},
        {"replace_probability": 0.5, "n_views": 1},
        {"replace_probability": 0.5, "global_batch_size": 1},
    ],
)
def test_a_probability_that_cannot_be_met_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="`replace_probability` must be within"):
        tiny_data(**options)
