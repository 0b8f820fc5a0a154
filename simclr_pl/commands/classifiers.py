"""Checkpoints of classifiers, and their training: what `finetune` and `distill` share.

A classifier's checkpoint is one that `simclr fit` could have written, so that every command takes its
encoder, with one more entry, ``classifier``: the head's weights and what belongs to it.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table
from torch import nn

from simclr_pl.augment import Augment
from simclr_pl.augmentation import Augmentation
from simclr_pl.commands.encoders import Subject, load_subject, trainer_for
from simclr_pl.commands.recipes import read_checkpoint, recipe_of
from simclr_pl.commands.results import percent, table_of
from simclr_pl.data import ContrastiveDataModule
from simclr_pl.errors import InputError
from simclr_pl.evaluation.classifier import Classifier
from simclr_pl.evaluation.finetune import Accuracy, Classification
from simclr_pl.metrics import wilson_interval

_ENTRY = "classifier"
_VIEWS = ("size", "crop_scale", "crop_ratio", "flip", "mean", "std", "clean_fraction")


@dataclass
class Origin:
    """What a classifier learned from.

    Attributes:
        dataset: as the user named it; None for that of the encoder's run.
        fraction: share of the labels.
        files: list of the labelled images.
        seed: which labels a fraction keeps.
        views: arguments of `Augment` by which it sees images; empty for other samples.
    """

    dataset: str | None = None
    fraction: float = 1.0
    files: str | None = None
    seed: int = 0
    views: dict[str, Any] = field(default_factory=dict)

    def augment(self) -> Augment:
        """Crops and flips alone, and the clean view."""
        rotation = shift = jitter = grey = blur = 0.0
        return Augment(
            rotation=rotation, shift=shift, jitter=jitter, grey=grey, blur=blur, **self.views
        )


def views_of(augment: Augmentation) -> dict[str, Any]:
    """The arguments of an augmentation of crops and flips, as plain values; none of other samples."""
    if not isinstance(augment, Augment):
        return {}
    return {name: getattr(augment, name) for name in _VIEWS}


@rank_zero_only
def save_classifier(file: Path, subject: Subject, classifier: Classifier, origin: Origin) -> None:
    """Writes a checkpoint of plain values and tensors, on rank 0.

    Args:
        file: to write.
        subject: whose architecture the encoder has.
        classifier: trained.
        origin: what it learned from.
    """
    layers = sum(isinstance(module, nn.Linear) for module in classifier.projector)
    content = _base(subject, with_projector=layers > 0)
    weights = classifier.state_dict()
    head = {k: v.cpu() for k, v in weights.items() if k.startswith("head.")}
    content["state_dict"].update({k: v.cpu() for k, v in weights.items() if k not in head})
    content[_ENTRY] = {"head": head, "projector_layers": layers, "origin": asdict(origin)}
    torch.save(content, file)


def _base(subject: Subject, with_projector: bool) -> dict[str, Any]:
    """A checkpoint of `SimCLR` with the subject's architecture, its encoder's weights left out."""
    if subject.checkpoint is None:
        options = {"name": subject.name, "in_channels": _channels(subject.encoder)}
        recipe: dict[str, Any] = {
            "encoder": {"class_path": "simclr_pl.models.Encoder", "init_args": options}
        }
        state: dict[str, Any] = {}
    elif subject.checkpoint.suffix == ".safetensors":  # of `simclr export` or `simclr import`
        recipe, state = {"encoder": subject.recipe}, {}
    else:
        content = read_checkpoint(subject.checkpoint)
        recipe = recipe_of(subject.checkpoint, content.get("hyper_parameters", {}), subject.config)
        state = {k: v for k, v in content["state_dict"].items() if not k.startswith("encoder.")}
    if not with_projector:  # it would be one of other features
        recipe["projector"] = {"class_path": "torch.nn.Identity"}
        state = {k: v for k, v in state.items() if not k.startswith("projector.")}
    return {"state_dict": state, "hyper_parameters": recipe, "global_step": subject.step}


def _channels(encoder: nn.Module) -> int:
    return next(m.in_channels for m in encoder.modules() if isinstance(m, nn.Conv2d))


def load_classifier(file: str) -> tuple[Subject, Classifier, Origin]:
    """Loads what `save_classifier` wrote.

    Args:
        file: the checkpoint.

    Returns:
        Its encoder as a subject, the classifier on that very encoder, and what it learned from.

    Raises:
        InputError: it is no checkpoint of a classifier.
    """
    content = read_checkpoint(Path(file)) if Path(file).is_file() else {}
    if _ENTRY not in content:
        raise InputError(
            f"a classifier must be a checkpoint that `simclr finetune` or `simclr distill` wrote; got "
            f"{file!r}. Fine-tune first: `simclr finetune SUBJECT`."
        )
    subject = load_subject(file)
    entry = content[_ENTRY]
    classes = len(entry["head"]["head.bias"])
    classifier = Classifier(subject.encoder, classes, subject.projector, entry["projector_layers"])
    classifier.load_state_dict(entry["head"], strict=False)  # the rest came with the subject
    return subject, classifier, Origin(**entry["origin"])


# Training and measuring.


def fresh(subject: Subject) -> tuple[nn.Module, nn.Module | None]:
    """Encoder and projector of the subject's architecture, initialised by the seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return subject.build()


def student_of(subject: Subject, num_classes: int) -> Classifier:
    """A classifier of the subject's architecture without projector, initialised by the seed 0.

    Its head is not of zeros: LARS adapts the rate of a tensor to its norm.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(subject.build()[0], num_classes, zero_head=False)


def train(
    module: Classification, data: ContrastiveDataModule, epochs: int, devices: dict[str, Any]
) -> Accuracy:
    """Trains a classifier and measures it on the query after the last epoch.

    Args:
        module: its classifier is trained in place.
        data: one view of each sample.
        epochs: >= 1.
        devices: options of `trainer_for`.

    Raises:
        InputError: ``epochs`` < 1; no query sample is labelled.
    """
    if epochs < 1:
        raise InputError(f"`epochs` must be >= 1; got {epochs}. Set `--epochs`.")
    options: dict[str, Any] = {"max_epochs": epochs, "limit_val_batches": 0, "log_every_n_steps": 1}
    _trainer(data, {**devices, **options}).fit(module, datamodule=data)
    return measure(module, data, devices)


def measure(
    module: Classification, data: ContrastiveDataModule, devices: dict[str, Any]
) -> Accuracy:
    """The accuracy of a classifier on the query, over all devices.

    Raises:
        InputError: no query sample is labelled.
    """
    _trainer(data, devices).predict(module, datamodule=data, return_predictions=False)
    return module.accuracy


def _trainer(data: ContrastiveDataModule, options: dict[str, Any]) -> Trainer:
    trainer = trainer_for(**options)
    # The least that the data module accepts: `Classification.setup` knows how many samples there are.
    data.global_batch_size = trainer.world_size
    return trainer


def scores_table(title: str, scores: dict[str, Accuracy]) -> Table:
    """Top-1 with its 95 % interval, and top-5, of several classifiers."""
    rows = [
        [name, percent(a.top1, interval(a.top1, a.total)), percent(a.top5)]
        for name, a in scores.items()
    ]
    return table_of(title, ["", "top-1 % (95 % interval)", "top-5 %"], rows)


def scores_values(suffix: str, accuracy: Accuracy) -> dict[str, Any]:
    """The same for the JSON file: shares in [0, 1], their names with a suffix."""
    return {
        f"top1{suffix}": accuracy.top1,
        f"top5{suffix}": accuracy.top5,
        f"top1_interval{suffix}": interval(accuracy.top1, accuracy.total),
    }


def interval(share: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``total`` samples."""
    return wilson_interval(round(share * total), total)
