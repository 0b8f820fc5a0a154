"""`simclr finetune`: an encoder trained on all or a few labels."""

from collections.abc import Sequence

from torch import nn

from simclr_pl.cli import Tracker
from simclr_pl.commands.classifiers import (
    Origin,
    fresh,
    save_classifier,
    scores_table,
    scores_values,
    train,
    views_of,
)
from simclr_pl.commands.encoders import (
    channels_of,
    clean_views,
    data_for,
    load_subject,
    source_for,
)
from simclr_pl.commands.results import publish, result_file
from simclr_pl.data.labels import LabelledSubset
from simclr_pl.evaluation.classifier import Classifier
from simclr_pl.evaluation.finetune import FineTune, crop_and_flip

_BASELINE = "from random initialisation"
_LEAST_STEPS = 300  # of a default training: the paper's epochs are for sets like ImageNet
_FEW = 0.05  # of the labels; up to here the paper's number of epochs for 1 % is the default


def finetune(
    subject: str,
    fraction: float = 1.0,
    files: str | None = None,
    dataset: str | None = None,
    projector_layers: int = 0,
    epochs: int | None = None,
    lr: float = 0.05,
    lr_decay: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    baselines: bool = True,
    out: str | None = None,
    size: int | None = None,
    pretrained: bool = False,
    num_workers: int | None = None,
    devices: int | str = "auto",
    accelerator: str = "auto",
    precision: str | None = None,
    track: Sequence[Tracker] = (),
) -> None:
    """Train an encoder with a linear head on all or a few labels, and from a random start to compare.

    The protocol of the paper (appendix B.5): random crops and flips (of other samples than images, views
    as in training), SGD with Nesterov momentum, no weight decay. The accuracy is that of the last epoch,
    on what is kept for evaluation. The model is saved beside the result, NAME.finetune.ckpt; every
    command takes it, and `simclr distill` learns from it. For example, as SimCLRv2 with a three-layer
    projector:

        simclr finetune runs/simclr/version_0 --fraction 0.01 --projector_layers 1

    Args:
        subject: A checkpoint of `simclr fit`, a run's folder, or a model of timm or torchvision.
        fraction: Share of the labels of each class, at least one of each; the same ones in every
            run of the same seed.
        files: A text file with the names of the labelled samples, one a line, in place of the fraction.
        dataset: A folder, a packed folder, a file of texts, a YAML config or its name, or the name of a
            source; by default the run's own.
        projector_layers: Linear layers of the projector to keep under the new head.
        epochs: By default 60 up to 5 % of the labels or with a list of files, else 30, as the paper has;
            or as many as make 300 steps, where the labels are few.
        lr: Learning rate for a batch of 256; it grows in proportion to the batch.
        lr_decay: Factor of the learning rate from each layer to the one below it.
        batch_size: Samples of a step over all devices at most; smaller sets are taken in equal steps.
        seed: Of the choice of labels, the order, and the views.
        baselines: Train the same from a random initialisation, too.
        out: The JSON file; by default <checkpoint>.finetune.json beside the checkpoint, or in the working
            folder.
        size: Side of a view in pixels; by default the run's, or the source's.
        pretrained: Load the published weights of a model by name.
        num_workers: Loader processes of each device; by default one for each core.
        devices: How many, or auto for all.
        accelerator: cpu, gpu or auto.
        precision: For example bf16-mixed; by default 32-true.
        track: Trackers that log the result into the run.
    """
    model = load_subject(subject, pretrained, channels_of(dataset))
    file = result_file("finetune", model, out)
    source = LabelledSubset(source_for(model, dataset), fraction, files, seed)
    augment = crop_and_flip(clean_views(model, source, size))
    data = data_for(
        model, source=source, augment=augment, seed=seed, num_workers=num_workers, n_views=1
    )
    least_steps = 0
    if epochs is None:
        epochs, least_steps = 60 if files or fraction <= _FEW else 30, _LEAST_STEPS
    options = {"devices": devices, "accelerator": accelerator, "precision": precision}

    def trained(encoder: nn.Module, projector: nn.Module | None) -> FineTune:
        def make(num_classes: int) -> Classifier:
            return Classifier(encoder, num_classes, projector, projector_layers)

        module = FineTune(make, lr, lr_decay, batch_size, least_steps, seed)
        train(module, data, epochs, options)
        return module

    module = trained(model.encoder, model.projector)
    origin = Origin(dataset, fraction, files, seed, views_of(augment))
    saved = file.with_suffix(".ckpt")
    save_classifier(saved, model, module.classifier, origin)
    scores = {"fine-tuned": module.accuracy}
    if baselines:
        scores[_BASELINE] = trained(*fresh(model)).accuracy
    labels = len(data.samples("train"))
    total = module.accuracy.total
    title = f"{model.name}, {labels:,} labels, {module.epochs} epochs, {total:,} query "
    title += source.unit
    values = {
        **scores_values("", module.accuracy),
        **(scores_values("_random", scores[_BASELINE]) if baselines else {}),
        "labels": labels,
        "query": total,
        "epochs": module.epochs,
        "missing_files": len(source.missing),
        "classifier": str(saved),
        "options": {
            "fraction": fraction,
            "files": files,
            "dataset": dataset,
            "projector_layers": projector_layers,
            "lr": lr,
            "lr_decay": lr_decay,
            "batch_size": batch_size,
            "seed": seed,
        },
    }
    table = scores_table(title, scores)
    publish("finetune", model, [table, f"The classifier is in {saved}"], values, out, track)
