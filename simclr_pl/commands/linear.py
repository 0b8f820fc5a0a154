"""`simclr linear`: how well a linear classifier on frozen features tells the class."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from simclr_pl.augmentation import Augmentation
from simclr_pl.cli import Tracker
from simclr_pl.commands.comparison import INIT, RAW, TRAINED, compared
from simclr_pl.commands.encoders import (
    Subject,
    channels_of,
    clean_views,
    data_for,
    frozen,
    load_subject,
    source_for,
    trainer_for,
)
from simclr_pl.commands.results import percent, publish, result_file, table_of
from simclr_pl.data import ContrastiveDataModule
from simclr_pl.data.labels import LabelledSubset
from simclr_pl.distributed import rank
from simclr_pl.errors import InputError
from simclr_pl.evaluation.crops import LinearOnCrops
from simclr_pl.evaluation.features import CleanViews
from simclr_pl.evaluation.finetune import crop_and_flip
from simclr_pl.evaluation.linear import LinearResult, linear_protocol

Found = Iterator[tuple[tuple[str, str], LinearResult]]


def linear(
    subject: str,
    dataset: str | None = None,
    method: Literal["lbfgs", "sgd"] = "lbfgs",
    augment: bool = False,
    l2: tuple[float, ...] = (1e4, 3e3, 1e3, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1),
    lr: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3),
    weight_decay: tuple[float, ...] = (0.0, 1e-4, 1e-3),
    epochs: int | None = None,
    sgd_batch_size: int = 512,
    baselines: bool = True,
    bank_size: int | None = None,
    size: int | None = None,
    pretrained: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int | None = None,
    devices: int | str = "auto",
    accelerator: str = "auto",
    precision: str | None = None,
    out: str | None = None,
    track: tuple[Tracker, ...] = (),
) -> None:
    """Train a linear classifier on frozen features and score it on the query.

    The labelled training samples are encoded once, without augmentation. A tenth of them, of each class
    alike, chooses among the options; the classifier is then fitted on all of them and scored once. The
    same is done with the encoder at initialisation and with no encoder, of images with raw pixels.

    For example:

        simclr linear runs/simclr/version_0 --method sgd --epochs 100

    Args:
        subject: A checkpoint of `simclr fit`, a run's folder, or a model of timm or torchvision.
        dataset: A folder, a packed folder, a file of texts, a YAML config or its name, or the name of a
            source; by default the run's own.
        method: lbfgs is logistic regression over the penalties l2; sgd trains all pairs of lr and
            weight_decay at once, with momentum and a cosine, and needs less memory.
        augment: As the papers do: by SGD on fresh random crops and flips of the images in every epoch; of
            other samples on fresh views as the run had them. This takes as long as training.
        l2: Penalties on the summed cross-entropy, l2 / 2 * |weights|^2.
        lr: Learning rates of SGD.
        weight_decay: Weight decays of SGD.
        epochs: Passes of SGD over the samples; by default 30, with augment 90 as in the paper.
        sgd_batch_size: Samples of a step of SGD over all devices.
        baselines: Do the same with the encoder at initialisation and with no encoder: of images, raw
            pixels (at most 32 x 32 of them, kept in memory as the features are).
        bank_size: Labelled training samples to learn from; by default all. Not with augment.
        size: Side of an image as the encoder sees it, in pixels; by default the run's, or the source's.
        pretrained: Load the published weights of a model by name.
        seed: Of the split, the order and the crops.
        batch_size: Samples encoded at a time on each device.
        num_workers: Loader processes of each device; by default one for each core.
        devices: How many, or auto for all.
        accelerator: cpu, gpu or auto.
        precision: Of the encoder, e.g. bf16-mixed; by default 32-true.
        out: The JSON file of the result; by default <checkpoint>.linear.json beside the checkpoint, or in
            the working folder.
        track: Trackers that get the result, into the run of the training: [wandb], [wandb-offline] or
            [tensorboard].
    """
    if augment and bank_size is not None:
        raise InputError(
            f"`augment` learns from all labelled samples; got `bank_size` {bank_size}. Leave one out."
        )
    model = load_subject(subject, pretrained, channels_of(dataset))
    result_file("linear", model, out)  # a wrong `out` is known before the work
    if epochs is None:
        epochs = 90 if augment else 30
    machine = {"devices": devices, "accelerator": accelerator, "precision": precision}
    if augment:
        data = _crops(model, dataset, size, seed, batch_size, num_workers)
        heads = {"lr": lr, "weight_decay": weight_decay, "batch_size": sgd_batch_size, "seed": seed}
        found = _on_crops(model, data, epochs, baselines, heads, machine)
    else:
        data = data_for(model, dataset, seed, batch_size, num_workers, bank_size, size)
        options: dict[str, Any] = {"method": method, "l2": l2, "lr": lr, "seed": seed}
        options |= {"weight_decay": weight_decay, "epochs": epochs, "batch_size": sgd_batch_size}
        found = _on_features(model, data, baselines, options, machine)
    values: dict[str, Any] = {"dataset": dataset or type(source_for(model, dataset)).__name__}
    values["method"] = "sgd on fresh views" if augment else method
    if baselines:
        values["raw_name"] = data.augment.raw_name
    rows = []
    for (name, suffix), result in found:
        row, part = _summary(name, suffix, result)
        rows.append(row)
        values |= {"classes": data.num_classes, "bank": result.bank, "query": result.query, **part}
    title = (
        f"Linear classifier by {values['method']} on {values['bank']:,} {data.source.unit}, scored on "
        f"{values['query']:,}, % [95 % interval]; options chosen on {values['held_out']:,} held out"
    )
    headings = ("", "top-1", "top-5", "options")
    publish("linear", model, table_of(title, headings, rows), values, out, track)


def _on_features(
    model: Subject,
    data: ContrastiveDataModule,
    baselines: bool,
    options: dict[str, Any],
    machine: dict[str, Any],
) -> Found:
    views = CleanViews(raw=baselines)
    trainer = trainer_for(**machine, callbacks=[views])
    for part in compared(model, data, trainer, views, baselines):
        with _bar(f"Fitting, {part.name}") as progress:
            result = linear_protocol(
                part.bank, part.query, data.num_classes, **options, progress=progress
            )
        yield (part.name, part.suffix), result


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on rank 0 that is told the work done and all work."""
    console = Console(stderr=True)
    hidden = rank() > 0 or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _crops(
    model: Subject,
    dataset: str | None,
    size: int | None,
    seed: int,
    batch_size: int,
    num_workers: int | None,
) -> ContrastiveDataModule:
    """One random view of each labelled training sample, and the clean views."""
    source = LabelledSubset(source_for(model, dataset))
    augment = crop_and_flip(clean_views(model, source, size))
    return data_for(
        model,
        source=source,
        augment=augment,
        seed=seed,
        batch_size=batch_size,
        num_workers=num_workers,
        n_views=1,
    )


def _on_crops(
    model: Subject,
    data: ContrastiveDataModule,
    epochs: int,
    baselines: bool,
    heads: dict[str, Any],
    machine: dict[str, Any],
) -> Found:
    names = {"trained": TRAINED, "init": INIT, "raw": (data.augment.raw_name, RAW)}
    encoders: dict[str, nn.Module] = {"trained": frozen(model.encoder)}
    if baselines:
        encoders |= {"raw": _Raw(data.augment), "init": frozen(model.fresh())}
    module = LinearOnCrops(encoders, **heads)
    trainer = trainer_for(**machine, max_epochs=epochs, check_val_every_n_epoch=epochs)
    data.global_batch_size = trainer.world_size  # `LinearOnCrops` sets what the samples fill
    trainer.fit(module, data)
    for name, result in module.results.items():
        yield names[name], result


class _Raw(nn.Module):
    """No encoder: the features are the augmentation's own."""

    def __init__(self, augment: Augmentation) -> None:
        super().__init__()
        self.augment = augment

    def forward(self, x: Tensor) -> Tensor:
        return self.augment.raw(x)


def _summary(name: str, suffix: str, result: LinearResult) -> tuple[list[str], dict[str, Any]]:
    """The row of the table and the part of the JSON file for one of the compared."""
    values: dict[str, Any] = {}
    row = [name]
    for key, share in (("top1", result.top1), ("top5", result.top5)):
        if share is None:
            row.append("-")
            continue
        interval = share.low, share.high
        values |= {f"{key}{suffix}": share.value, f"{key}_interval{suffix}": interval}
        row.append(percent(share.value, interval))
    row.append(", ".join(f"{key} {value:g}" for key, value in result.chosen.items()))
    values |= {
        f"chosen{suffix}": result.chosen,
        f"grid{suffix}": result.grid,
        "held_out": result.held_out,
    }
    return row, values
