"""Features of clean views: the same in the trainer's validation, beside its loops, and by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks
from tiny import tiny_data, tiny_model, tiny_trainer, weights

from simclr_pl import ContrastiveDataModule, InputError
from simclr_pl.augment import Augment
from simclr_pl.data import DatasetSource
from simclr_pl.evaluation.features import CleanViews, encode_clean_views


class Half(torch.utils.data.Dataset[Any]):
    """Grey noise, of which every third image has a label."""

    def __init__(self, count: int, every: int = 3) -> None:
        rng = np.random.default_rng(count)
        self.images = rng.integers(0, 256, (count, 40, 40, 1), dtype=np.uint8)
        self.targets = [i % 2 if i % every == 0 else -1 for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.images[i]


def by_callback() -> dict[str, Any]:
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    views = CleanViews(raw=True)
    trainer = tiny_trainer([views], devices=devices, strategy="ddp" if devices > 1 else "auto")
    trainer.validate(tiny_model(), tiny_data(bank_size=301, eval_batch_size=64), verbose=False)
    return {name: views.collected.take(name) for name in ("bank", "query")}


def by_hand(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    data, model = tiny_data(bank_size=301), tiny_model().eval()
    data.setup()
    loader = data.val_dataloader()[("bank", "query").index(name)]
    batches = [data.make_views(batch, name) for batch in loader]
    views = torch.cat([batch["views"] for batch in batches])
    with torch.no_grad():
        return model(views), views.flatten(1), torch.cat([batch["label"] for batch in batches])


def test_collected_features_pixels_and_labels_are_those_of_the_clean_views() -> None:
    for name, (features, pixels) in by_callback().items():
        expected, raw, label = by_hand(name)
        torch.testing.assert_close(features.features, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(pixels.features, raw)
        assert torch.equal(features.labels, label)
        assert torch.equal(pixels.labels, label)


def test_two_ranks_collect_each_image_once_without_padding() -> None:
    first, second = on_ranks(2, by_callback)
    for name in ("bank", "query"):
        expected, raw, label = by_hand(name)
        for part, whole in ((0, expected), (1, raw)):
            for rank, found in ((0, first), (1, second)):
                torch.testing.assert_close(
                    found[name][part].features, whole[rank::2], rtol=1e-4, atol=1e-5
                )
                assert torch.equal(found[name][part].labels, label[rank::2])


def test_beside_the_loops_the_features_are_the_same_and_nothing_changes() -> None:
    expected = by_callback()
    trainer = tiny_trainer([], limit_val_batches=0)
    model = tiny_model()
    trainer.fit(model, tiny_data(bank_size=301))
    model.load_state_dict(tiny_model().state_dict())
    model.train()
    before, state = weights(model), torch.get_rng_state()
    found = encode_clean_views(trainer, model, raw=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[k]) for k, value in model.state_dict().items())
    for name, parts in expected.items():
        for ours, theirs in zip(found[name], parts, strict=True):
            assert ours is not None
            torch.testing.assert_close(ours.features, theirs.features, rtol=1e-4, atol=1e-5)
            assert torch.equal(ours.labels, theirs.labels)
    assert encode_clean_views(trainer, model)["query"][1] is None


def test_unlabelled_images_are_left_out_and_bfloat16_gives_float32() -> None:
    source = DatasetSource(Half(40), Half(20), channels=1)
    data = ContrastiveDataModule(source, 8, num_workers=0, eval_batch_size=7, resident="none")
    views = CleanViews(raw=True)
    trainer = tiny_trainer([views], precision="bf16-mixed")
    trainer.validate(tiny_model(), data, verbose=False)
    features, pixels = views.collected.take("query")
    assert pixels is not None
    assert features.labels.tolist() == [i % 2 for i in range(0, 20, 3)]
    assert features.features.dtype == pixels.features.dtype == torch.float32
    assert (features.features.shape, pixels.features.shape) == ((7, 32), (7, 32 * 32))


def test_images_without_labels_are_refused_by_name() -> None:
    for bank, query, name in ((9, 2, "bank"), (2, 9, "query")):
        parts = Half(8, bank), Half(8, query)
        for part, every in zip(parts, (bank, query), strict=True):
            part.targets = part.targets if every == 2 else [-1] * 8
        data = ContrastiveDataModule(DatasetSource(*parts, channels=1), 4, num_workers=0)
        with pytest.raises(InputError, match=f"by the labels .* got none in the {name} set"):
            tiny_trainer([CleanViews()]).validate(tiny_model(), data, verbose=False)


def test_large_pixels_are_averaged_down_to_32() -> None:
    views = torch.arange(2 * 64 * 64.0).view(2, 1, 64, 64)
    expected = views.view(2, 1, 32, 2, 32, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(Augment().raw(views), expected)
    assert torch.equal(Augment().raw(views[..., :20, :20]), views[..., :20, :20].flatten(1))
