"""What a command is given: an encoder, the data that it is to see, and a trainer to run it.

Symbols: B samples of a batch on one rank, C channels, E feature width, S side of a view.
"""

import copy
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor, nn

from simclr_pl.augment import Augment
from simclr_pl.augmentation import Augmentation
from simclr_pl.commands.encoder_file import read_encoder
from simclr_pl.commands.recipes import build_model, read_checkpoint, recipe_of, run_of
from simclr_pl.data import ContrastiveDataModule, PackageDocs, Source
from simclr_pl.data.commands import source_of
from simclr_pl.errors import InputError
from simclr_pl.models import Encoder
from simclr_pl.simclr import SimCLR

_LIBRARIES = ("timm", "torchvision")


@dataclass
class Subject:
    """An encoder that a command works on.

    Attributes:
        name: what the user called it.
        encoder: maps views (n, ...) to features (n, E), with an integer ``num_features``, E.
        build: makes the same architecture anew, randomly initialised: the encoder and, if the
            checkpoint has one, the projector.
        projector: maps features (n, E) to projections; None for an encoder by name or in a file.
        checkpoint: the file it came from.
        run: the folder of the run that trained it.
        config: the run's config.yaml.
        step: optimiser steps that it was trained for.
        normalisation: mean and standard deviation that the weights expect, for those without a run.
        recipe: ``class_path`` and ``init_args`` of the encoder, as far as they are known.
        size: side of a view in pixels that an encoder's file asks for.
        tuned: the weights have seen labels since: those of `simclr finetune` and `simclr distill`.
    """

    name: str
    encoder: nn.Module
    build: Callable[[], tuple[nn.Module, nn.Module | None]]
    projector: nn.Module | None = None
    checkpoint: Path | None = None
    run: Path | None = None
    config: dict[str, Any] | None = None
    step: int = 0
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    recipe: dict[str, Any] | None = None
    size: int | None = None
    tuned: bool = False

    def fresh(self) -> nn.Module:
        """The same architecture at initialisation, with the seed 0."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build()[0]

    @property
    def num_features(self) -> int:
        """The feature width E."""
        return int(self.encoder.num_features)  # type: ignore[arg-type]


def load_subject(what: str, pretrained: bool = False, in_channels: int = 3) -> Subject:
    """Loads what a command was given.

    Args:
        what: a checkpoint of `simclr fit`, the folder of a run (its last checkpoint is taken), an
            encoder's file or folder of `simclr export` or `simclr import`, or the name of a model of
            timm or torchvision.
        pretrained: for a name, load the published weights.
        in_channels: for a name, channels of the images, C.

    Raises:
        InputError: there is no such thing, or the checkpoint does not say how its model is built.
    """
    path = Path(what)
    if path.is_dir():
        names = ("checkpoints/last.ckpt", "last.ckpt", "model.safetensors")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise InputError(
                f"a run's folder must hold checkpoints/last.ckpt; got {what!r} without. Give the "
                "checkpoint's file."
            )
        path = found[0]
    if path.suffix == ".safetensors" and path.is_file():
        return _from_encoder_file(what, path)
    if path.is_file():
        return _from_checkpoint(what, path)
    is_name = what.split("/")[0] in _LIBRARIES or "/" not in what
    if (
        path.suffix in (".ckpt", ".pt", ".pth", ".safetensors")
        or not is_name
        or os.sep in what.partition("/")[2]
    ):
        raise InputError(
            f"a checkpoint or a run's folder must exist; got {what!r}. Check the path."
        )
    return _by_name(what, pretrained, in_channels)


def _from_checkpoint(name: str, path: Path) -> Subject:
    content = read_checkpoint(path)
    run = run_of(path)
    config = None if run is None else yaml.safe_load((run / "config.yaml").read_text())
    recipe = recipe_of(path, content.get("hyper_parameters", {}), config)
    module = build_model(path, recipe)
    module.on_load_checkpoint(content)  # an InputError where the weights are of another model
    module.load_state_dict(content["state_dict"])

    def build() -> tuple[nn.Module, nn.Module | None]:
        other = build_model(path, recipe)
        return other.encoder, other.projector

    return Subject(
        name=name,
        encoder=module.encoder,
        build=build,
        projector=module.projector,
        checkpoint=path,
        run=run,
        config=config,
        step=int(content.get("global_step", 0)),
        recipe=_as_recipe(recipe["encoder"]),
        tuned="classifier" in content,
    )


def _as_recipe(encoder: str | dict[str, Any]) -> dict[str, Any]:
    return {"class_path": encoder} if isinstance(encoder, str) else encoder


def _from_encoder_file(name: str, path: Path) -> Subject:
    content = read_encoder(path)
    return Subject(
        name=name,
        encoder=content.encoder,
        build=lambda: (content.build(), None),
        checkpoint=path,
        step=content.step,
        normalisation=content.normalisation,
        recipe=content.recipe,
        size=content.size,
    )


def _by_name(name: str, pretrained: bool, in_channels: int) -> Subject:
    def build() -> tuple[nn.Module, None]:
        return Encoder(name, in_channels=in_channels), None

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            encoder = Encoder(name, in_channels=in_channels, pretrained=pretrained)
        except InputError as error:
            raise InputError(
                f"{name!r} is no checkpoint and no run's folder, and as an encoder: {error}"
            ) from error
    normalisation = None
    if pretrained:  # torchvision's weights expect ImageNet's
        published = getattr(encoder.model, "pretrained_cfg", {})
        plain = Augment()
        normalisation = (
            tuple(published.get("mean", plain.mean)),
            tuple(published.get("std", plain.std)),
        )
    return Subject(
        name=name,
        encoder=encoder,
        build=build,
        normalisation=normalisation,
        recipe={
            "class_path": "simclr_pl.models.Encoder",
            "init_args": {"name": name, "in_channels": in_channels},
        },
    )


# The data.


def data_for(
    subject: Subject,
    dataset: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int | None = None,
    bank_size: int | None = None,
    size: int | None = None,
    source: Source | None = None,
    augment: Augmentation | None = None,
    **options: Any,
) -> ContrastiveDataModule:
    """The data that an encoder is to see: clean views as those of its run.

    Args:
        subject: the encoder.
        dataset: a folder, a packed folder, a file of texts, a YAML config or the name of a source; by
            default that of the encoder's run.
        seed: of the order, the views, and the choice of ``bank_size`` samples.
        batch_size: B, samples of an evaluation batch on each rank.
        num_workers: loader processes of each rank; see `ContrastiveDataModule`.
        bank_size: labelled training samples to take; by default all.
        size: S, side of a view of images in pixels; by default that of the run, or the source's.
        source: the source itself, in place of ``dataset``.
        augment: of training views, in place of the run's; its clean views must be `clean_views`'s.
        options: of `ContrastiveDataModule`.

    Raises:
        InputError: there is no data set, or its channels do not fit the encoder.
    """
    source = source or source_for(subject, dataset)
    augment = augment or clean_views(subject, source, size)
    channels = image_channels(subject.encoder) if isinstance(augment, Augment) else None
    if channels is not None and channels != source.channels:
        remedy = "`grey: true`" if channels == 1 else "`grey: false`"
        raise InputError(
            f"the images must have the channels of the encoder; got {source.channels} for "
            f"{channels}. Give a YAML config as `dataset`, e.g. with {remedy} for an ImageFolder under "
            "`data.source.init_args`."
        )
    of_run = (subject.config or {}).get("data", {})
    if "max_bad_fraction" in of_run:  # what the run put up with
        options.setdefault("max_bad_fraction", of_run["max_bad_fraction"])
    return ContrastiveDataModule(
        source,
        augment=augment,
        seed=seed,
        eval_batch_size=batch_size,
        num_workers=num_workers,
        bank_size=sys.maxsize if bank_size is None else bank_size,
        **options,
    )


def source_for(subject: Subject, dataset: str | None) -> Source:
    """The source that ``dataset`` means; by default that of the encoder's run.

    Raises:
        InputError: there is none, or its samples are of another kind than those of the run.
    """
    if dataset is not None:
        source = source_of(dataset)
        _fit_to_run(source, subject)
        return source
    if subject.run is None:
        raise InputError(
            f"a data set must be given for {subject.name!r}, which has no run's config.yaml beside "
            "it. Set `--dataset` to a folder or the name of a source."
        )
    return source_of(str(subject.run / "config.yaml"))


# What the samples of a source are made by, beside its files: as those that an encoder has learned from.
_LEARNED = ("sample_rate", "tokenizer_path", "vocab_size")


def _fit_to_run(source: Source, subject: Subject) -> None:
    """Gives a source the sample rate and the tokenizer of the encoder's run.

    Raises:
        InputError: the two are of different kinds: sounds are not for an encoder of images, nor other
            tokens for one of texts.
    """
    own: Source | None = None
    if subject.run is not None:
        with suppress(InputError):  # its own may be gone, and is not asked for
            own = source_of(str(subject.run / "config.yaml"))
    if own is not None and own.unit != source.unit:
        raise InputError(
            f"`dataset` must hold what the encoder was trained on, {own.unit}; got {source.unit} of "
            f"{type(source).__name__}. Set `--dataset`."
        )
    if isinstance(source, PackageDocs):
        if own is not None and not isinstance(own, PackageDocs):
            raise InputError(
                "`dataset` must have the tokens that the encoder was trained on; got PackageDocs, which "
                f"have a tokenizer of their own, for {type(own).__name__}. Set `--dataset` to a file."
            )
        return
    for name in _LEARNED:
        if hasattr(own, name) and hasattr(source, name):
            setattr(source, name, getattr(own, name))


def clean_views(subject: Subject, source: Source, size: int | None = None) -> Augmentation:
    """The augmentation whose clean views an encoder is to see: of images size, normalisation and cut.

    It is that of the run, also where the samples are others; for an encoder by name the source's default;
    for an encoder's file that too, but for what the file says.

    Args:
        subject: the encoder.
        source: of the samples.
        size: side of a view of images in pixels, in place of that.

    Raises:
        InputError: ``size`` < 2, or not of images.
    """
    augment = augment_of_run(subject) or source.default_augment()
    if not isinstance(augment, Augment):
        if size is not None:
            raise InputError(
                f"`size` is of images; got {size} for {source.unit}. Leave out `--size`."
            )
        return augment
    if size is not None and size < 2:
        raise InputError(f"`size` must be >= 2; got {size}. Set `--size`.")
    augment = copy.copy(augment)
    augment.size = size or subject.size or augment.size
    if subject.normalisation is not None:
        augment.mean, augment.std = subject.normalisation
    return augment


def augment_of_run(subject: Subject) -> Augmentation | None:
    """The augmentation of the run that trained an encoder; None where there is no run."""
    if subject.config is None or subject.run is None:
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--augment", type=Augmentation | None)
    given = subject.config.get("data", {}).get("augment")
    augment: Augmentation | None = parser.instantiate(
        parser.parse_object({"augment": given})
    ).augment
    return augment or source_of(str(subject.run / "config.yaml")).default_augment()


def clean_example(subject: Subject, count: int) -> Tensor:
    """The first clean views (count, ...) of the run's query, as its encoder sees them.

    Raises:
        InputError: the encoder's run, or its data, is not here.
    """
    data = data_for(subject, num_workers=0, batch_size=count)
    data.prepare_data()
    data.setup("validate")
    batch = next(iter(data.val_dataloader()[1]))
    views: Tensor = data.make_views(batch, "query")["views"]
    return views


def channels_of(dataset: str | None) -> int:
    """Channels of the images of a data set, C; 3 where none is given."""
    return 3 if dataset is None else source_of(dataset).channels


def frozen(encoder: nn.Module) -> SimCLR:
    """An encoder as a module whose validation and prediction steps give features."""
    return SimCLR(encoder, nn.Identity())


def image_channels(encoder: nn.Module) -> int | None:
    """C, of the first convolution; None where there is none."""
    convs = (module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    return next((conv.in_channels for conv in convs), None)


# The trainer.


def trainer_for(
    devices: int | str = "auto",
    accelerator: str = "auto",
    precision: str | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Trainer:
    """A trainer with a progress bar that writes nothing, unless ``options`` ask for it.

    Args:
        devices: how many, or "auto"; with several, each runs a process of its own.
        accelerator: "cpu", "gpu" or "auto".
        precision: e.g. "bf16-mixed"; by default float32.
        callbacks: further ones.
        options: of the Trainer.
    """
    defaults: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the data module's own samplers know the ranks
    }
    return Trainer(
        devices=devices,
        accelerator=accelerator,
        precision=precision,  # type: ignore[arg-type]
        callbacks=[RichProgressBar(), *callbacks],
        **{**defaults, **options},
    )
