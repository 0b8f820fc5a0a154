"""Distillation: the paper's loss, the teacher untouched, the same on two ranks."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from ranks import on_ranks
from tiny import tiny_model, tiny_trainer, weights
from torch import Tensor, nn

from simclr_pl import ContrastiveDataModule, ConvEncoder, InputError
from simclr_pl.data import Digits
from simclr_pl.data.labels import LabelledSubset
from simclr_pl.evaluation.classifier import Classifier
from simclr_pl.evaluation.distill import Distill, distillation_loss


def by_hand(
    student: Tensor, teacher: Tensor, label: Tensor, temperature: float, weight: float
) -> Tensor:
    """Equations 2 and 3, an image and a class at a time, in the sums' own order."""
    imitation = known = torch.zeros((), dtype=torch.float64)
    for s, t, y in zip(student, teacher, label.tolist(), strict=True):
        p, q = (torch.exp(v / temperature) for v in (t, s))
        for k in range(len(s)):
            imitation = imitation - p[k] / p.sum() * torch.log(q[k] / q.sum())
        if y >= 0:
            known = known - torch.log(torch.exp(s[y]) / torch.exp(s).sum())
    return ((1 - weight) * imitation + weight * known) / len(student)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_of_the_paper_s_sums(temperature: float, weight: float) -> None:
    student = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, -1, 4, 2, -1, -1, 2])
    expected = by_hand(student, teacher.detach(), label, temperature, weight)
    (gradient,) = torch.autograd.grad(expected, student)
    loss = distillation_loss(student, teacher, label, temperature, weight)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, gradient, rtol=1e-10, atol=1e-12)
    assert teacher.grad is None


def test_loss_in_float32_is_finite_for_far_logits() -> None:
    far = torch.tensor([[900.0, -900.0], [-900.0, 900.0]])
    loss = distillation_loss(far, far.flip(1), torch.tensor([0, -1]), 0.1, 0.5)
    assert loss.isfinite()


def classifier(batch_norm: bool = True) -> Classifier:
    return Classifier(tiny_model(batch_norm).encoder, 10, zero_head=False)


def fit(module: Distill, fraction: float = 1.0, **options: Any) -> Trainer:
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    source = LabelledSubset(Digits(), fraction, keep_rest=True)
    data = ContrastiveDataModule(source, devices, 1)
    options = {"devices": devices, "limit_val_batches": 0, **options}
    trainer = tiny_trainer(options.pop("callbacks", []), **options)
    trainer.fit(module, datamodule=data)
    return trainer


def test_the_teacher_keeps_its_bits_in_evaluation_mode_and_the_student_learns() -> None:
    teacher, student = classifier().train(), classifier()
    before, start = weights(teacher), weights(student)
    modes = []
    teacher.encoder[1].register_forward_hook(lambda m, *_: modes.append(m.training))
    student.encoder[1].register_forward_hook(lambda m, *_: modes.append(m.training))
    fit(Distill(student, teacher, batch_size=64))
    assert modes == [False, True] * 8
    assert all(torch.equal(teacher.state_dict()[n], v) for n, v in before.items())
    assert all(p.grad is None for p in teacher.parameters())
    moved = [not torch.equal(student.state_dict()[n], v) for n, v in start.items()]
    assert sum(moved) >= len(moved) - 1


def test_teacher_and_student_see_the_same_view() -> None:
    teacher, student, seen = classifier(), classifier(), []
    for model in (teacher, student):
        model.encoder.register_forward_hook(lambda m, args, out: seen.append(args[0].clone()))
    fit(Distill(student, teacher, batch_size=64), max_epochs=1, limit_train_batches=1)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


class Labels(Callback):
    """How many images of each step have a label, on this rank."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        self.counts.append(int((batch["label"] >= 0).sum()))


def trained_weights() -> tuple[dict[str, Tensor], list[int]]:
    torch.manual_seed(0)
    teacher, student = classifier(batch_norm=False), classifier(batch_norm=False)
    nn.init.normal_(teacher.head.weight)
    labels = Labels()
    distributed = torch.distributed.is_initialized()
    fit(
        Distill(student, teacher, 0.5, labelled_weight=0.4, batch_size=128),  # 1347 // 11 = 122
        0.05,
        callbacks=[labels],
        precision="64-true",
        strategy="ddp" if distributed else "auto",
    )
    return weights(student), labels.counts


def test_two_ranks_train_the_student_of_one_process_with_labels_spread_unevenly() -> None:
    expected, counts = trained_weights()
    ranks = on_ranks(2, trained_weights)
    assert [a + b for a, b in zip(ranks[0][1], ranks[1][1], strict=True)] == counts
    assert ranks[0][1] != ranks[1][1]
    for found, _ in ranks:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)


def test_labels_count_only_where_they_have_a_weight() -> None:
    def student_of(weight: float, fraction: float) -> dict[str, Tensor]:
        student = classifier()
        fit(Distill(student, classifier(), labelled_weight=weight, batch_size=64), fraction)
        return weights(student)

    name = "head.weight"
    assert torch.equal(student_of(0.0, 1.0)[name], student_of(0.0, 0.1)[name])
    assert not torch.equal(student_of(0.5, 1.0)[name], student_of(0.5, 0.1)[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"`temperature` must be > 0; got 0.0. Set `--temperature`"),
        ({"lr": -1.0}, r"`lr` must be > 0; got -1.0"),
        ({"labelled_weight": 1.5}, r"`labelled_weight` must be within \[0, 1\]; got 1.5"),
    ],
)
def test_options_are_checked(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Distill(classifier(), classifier(), **options)


def test_other_classes_than_the_teacher_s_are_an_error() -> None:
    with pytest.raises(InputError, match="must have the same classes; got 10 and 7"):
        Distill(classifier(), Classifier(ConvEncoder(4), 7))


def test_a_weight_of_labels_that_are_not_there_is_an_error() -> None:
    source = Digits()
    source.open()
    source.train.labels[:] = -1
    source.open = lambda: None  # type: ignore[method-assign]
    module = Distill(classifier(), classifier(), labelled_weight=0.1)
    data = ContrastiveDataModule(source, 1, 1)
    with pytest.raises(InputError, match=r"`labelled_weight` needs labelled training samples"):
        tiny_trainer([], limit_val_batches=0).fit(module, datamodule=data)
