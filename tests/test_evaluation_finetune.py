"""Fine-tuning: the paper's solver, the same on two ranks, and an exact accuracy at the end."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from ranks import on_ranks
from tiny import tiny_model, tiny_trainer, weights
from torch import Tensor, nn
from torch.optim import AdamW

from simclr_pl import ContrastiveDataModule, ConvEncoder, InputError, Projector, SimCLR
from simclr_pl.augment import simclr_imagenet
from simclr_pl.data import Digits
from simclr_pl.data.labels import LabelledSubset
from simclr_pl.evaluation.classifier import Classifier
from simclr_pl.evaluation.finetune import FineTune, crop_and_flip, even_batch


class OddDigits(Digits):
    """449 query images, of which every seventh has no label."""

    def open(self) -> None:
        super().open()
        self.query = self.query.subset(np.arange(449))
        self.query.labels[::7] = -1


def classifier(batch_norm: bool = False) -> Classifier:
    model = tiny_model(batch_norm)
    return Classifier(model.encoder, 10, model.projector, 1 if batch_norm else 0)


def trainer_of(callbacks: list[Callback] | None = None, **options: Any) -> Trainer:
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    strategy = "ddp" if devices > 1 else "auto"
    options = {"devices": devices, "strategy": strategy, "limit_val_batches": 0, **options}
    return tiny_trainer(callbacks or [], **{"limit_train_batches": 1.0, **options})


def few_digits(fraction: float = 0.1) -> ContrastiveDataModule:
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    source = LabelledSubset(OddDigits(), fraction)
    return ContrastiveDataModule(source, devices, 1, eval_batch_size=64)


class Batches(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.seen.append((batch["views"].clone(), batch["label"]))


def test_it_equals_nesterov_with_a_cosine_and_a_rate_for_each_layer() -> None:
    batches, module = Batches(), FineTune(classifier().double(), 0.4, 0.5, batch_size=50)
    trainer_of([batches], precision="64-true").fit(module, datamodule=few_digits())
    assert [len(y) for _, y in batches.seen] == [45] * 6  # 135 labels in three steps, two epochs
    own = classifier().double()
    layers = [(own.head, 1.0), (own.encoder, 0.5)]  # this encoder has one layer with weights
    velocity = {p: torch.zeros_like(p) for p in own.parameters()}
    for step, (x, y) in enumerate(batches.seen):
        own.zero_grad()
        F.cross_entropy(own(x.double()), y).backward()
        rate = 0.4 * 45 / 256 * 0.5 * (1 + math.cos(math.pi * step / 6))
        with torch.no_grad():
            for layer, factor in layers:
                for p in layer.parameters():
                    velocity[p] = 0.9 * velocity[p] + p.grad
                    p -= rate * factor * (p.grad + 0.9 * velocity[p])
    for name, value in weights(own).items():
        torch.testing.assert_close(module.classifier.state_dict()[name], value, rtol=0, atol=1e-12)


def trained_weights() -> dict[str, Tensor]:
    module = FineTune(classifier(), 1.0, 0.8, batch_size=34)
    trainer_of(precision="64-true").fit(module, datamodule=few_digits(0.0965))
    return weights(module.classifier)


def test_two_ranks_train_the_weights_of_one_process() -> None:
    # 130 labels in four steps; of 135 the two ranks would take 32 at a time, and one process 33
    assert even_batch(130, 34, 1) == even_batch(130, 34, 2) == 32
    expected = trained_weights()
    for found in on_ranks(2, trained_weights):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)


def with_batch_norm() -> tuple[dict[str, Tensor], tuple[float, float, int]]:
    module, data = FineTune(classifier(batch_norm=True), 1.0, batch_size=64), few_digits()
    trainer = trainer_of()
    trainer.fit(module, datamodule=data)
    before = weights(module.classifier)
    trainer_of().predict(module, datamodule=data, return_predictions=False)
    assert all(torch.equal(before[n], v) for n, v in weights(module.classifier).items())
    return before, tuple(module.accuracy)  # type: ignore[return-value]


def counted(model: Classifier) -> tuple[float, float, int]:
    """Top-1 and top-5 of the odd digits' labelled query images, one by one."""
    source = OddDigits()
    source.open()
    data = ContrastiveDataModule(source, 8, eval_batch_size=1)
    data.setup()
    top1 = top5 = total = 0
    for batch in data.val_dataloader()[1]:
        label = int(batch["label"])
        if label < 0:
            continue
        with torch.no_grad():
            logits = model(data.make_views(batch, "query")["views"])[0]
        rank = int((logits > logits[label]).sum())
        top1, top5, total = top1 + (rank == 0), top5 + (rank < 5), total + 1
    return top1 / total, top5 / total, total


def test_accuracy_on_two_ranks_is_that_of_counting_one_by_one() -> None:
    ((first, scores), (second, others)) = on_ranks(2, with_batch_norm)
    assert all(torch.equal(second[name], value) for name, value in first.items())
    model = classifier(batch_norm=True)
    model.load_state_dict(first)
    expected = counted(model.eval())
    assert expected[2] == 449 - 65
    assert scores == others == pytest.approx(expected, abs=1e-6)


def test_batch_norm_learns_even_in_an_encoder_that_was_evaluated_before() -> None:
    model = classifier(batch_norm=True).eval()
    before = weights(model)
    trainer_of().fit(FineTune(model), datamodule=few_digits())
    name = "encoder.1.running_mean"
    assert not torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize("count", [1, 2, 7, 13, 135, 256, 257, 1000])
@pytest.mark.parametrize(("most", "ranks"), [(256, 1), (256, 4), (10, 3), (4, 4)])
def test_even_batches_take_nearly_all_images_in_the_fewest_steps(
    count: int, most: int, ranks: int
) -> None:
    if count < ranks:
        with pytest.raises(InputError, match=f"got {count} samples"):
            even_batch(count, most, ranks)
        return
    batch = even_batch(count, most, ranks)
    assert batch % ranks == 0
    assert 0 < batch <= most
    fewest = math.ceil(count / most)
    assert count - batch * fewest < ranks * fewest or batch == ranks


@pytest.mark.parametrize(("least", "epochs"), [(0, 2), (6, 2), (7, 3), (20, 7)])
def test_least_steps_lengthen_the_training(least: int, epochs: int) -> None:
    module = FineTune(classifier(), batch_size=45, least_steps=least)  # three steps an epoch
    trainer = trainer_of()
    trainer.fit(module, datamodule=few_digits())
    assert module.epochs == epochs
    assert trainer.global_step == 3 * epochs
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_the_classifier_may_be_made_from_the_number_of_classes() -> None:
    seen = []

    def make(num_classes: int) -> Classifier:
        seen.append(num_classes)
        return Classifier(ConvEncoder(4, in_channels=1), num_classes)

    module = FineTune(make)
    trainer_of().fit(module, datamodule=few_digits())
    assert seen == [10]
    assert module.classifier.head.weight.any()


def test_training_twice_gives_the_same_bits_with_dropout() -> None:
    runs = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        encoder = nn.Sequential(tiny_model(False).encoder, nn.Dropout(0.5))
        encoder.num_features = 800
        torch.manual_seed(noise)
        module = FineTune(Classifier(encoder, 10), 1.0)
        trainer_of().fit(module, datamodule=few_digits())
        runs.append(weights(module.classifier))
    assert all(torch.equal(runs[0][name], value) for name, value in runs[1].items())


def test_bf16_trains_float32_weights_nearly_as_float32_does() -> None:
    losses = []
    for precision in ("bf16-mixed", "32-true"):
        module = FineTune(classifier(), 0.2)
        trainer = trainer_of(precision=precision, max_epochs=20)
        trainer.fit(module, datamodule=few_digits())
        assert module.classifier.head.weight.dtype == torch.float32
        losses.append(float(trainer.callback_metrics["finetune/loss"]))
    assert losses[1] < 2.25  # from log 10 = 2.30
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_crop_and_flip_leaves_crops_and_normalisation_alone() -> None:
    full = simclr_imagenet(32, crop_scale=(0.3, 1.0), rotation=10.0, solarise=0.2)
    plain, index, side = crop_and_flip(full), np.arange(5), np.full(5, 40)
    assert plain.draw(1, 2, index, 1) == {}
    crops = [a.draw_crops(1, 2, index, 1, side, side) for a in (full, plain)]
    assert np.array_equal(*crops)
    assert (plain.size, plain.mean, plain.std) == (32, full.mean, full.std)
    assert full.draw(1, 2, index, 1).keys() >= {"angle", "factor", "grey", "sigma"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"`lr` must be > 0; got 0.0"),
        ({"lr_decay": 0.0}, r"`lr_decay` must be within \(0, 1\]; got 0.0"),
        ({"lr_decay": 1.1}, r"`lr_decay` must be within \(0, 1\]; got 1.1"),
        ({"batch_size": 0}, r"`batch_size` must be >= 1; got 0"),
    ],
)
def test_options_are_checked(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FineTune(classifier(), **options)


def test_images_of_further_classes_are_an_error() -> None:
    module = FineTune(Classifier(ConvEncoder(4, in_channels=1), 9))
    with pytest.raises(InputError, match="got 10 classes for 9"):
        trainer_of().fit(module, datamodule=few_digits())


def test_query_images_without_labels_are_an_error() -> None:
    data = few_digits()
    data.setup()
    data.samples("query").labels[:] = -1
    with pytest.raises(InputError, match="accuracy needs labelled query samples; got none"):
        trainer_of().predict(FineTune(classifier()), datamodule=data)


def test_a_contrastive_start_beats_a_random_one_on_few_labels() -> None:
    def model() -> SimCLR:
        torch.manual_seed(0)
        head = partial(Projector, hidden_features=64, out_features=32)
        rate = partial(AdamW, lr=4e-3)
        encoder = ConvEncoder(8, in_channels=1)
        return SimCLR(encoder, head, 0.2, optimizer=rate, lr_scaling="none", warmup_epochs=1)

    start, trained = model(), model()
    data = ContrastiveDataModule(Digits(), 128)
    trainer_of(max_epochs=12).fit(trained, datamodule=data)  # 120 steps
    top1 = []
    for encoder in (trained.encoder, start.encoder):
        module, labels = FineTune(Classifier(encoder, 10), least_steps=150), few_digits(0.02)
        trainer_of().fit(module, datamodule=labels)
        trainer_of().predict(module, datamodule=labels, return_predictions=False)
        top1.append(module.accuracy.top1)
    assert top1[0] > top1[1] + 0.08
