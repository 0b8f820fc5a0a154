"""`simclr embed`: features of a whole set, on disk."""

from typing import Literal

from simclr_pl.callbacks.feature_writer import FeatureWriter
from simclr_pl.commands.encoders import (
    channels_of,
    clean_views,
    data_for,
    frozen,
    load_subject,
    source_for,
    trainer_for,
)
from simclr_pl.commands.results import result_file
from simclr_pl.data import Source

Split = Literal["query", "bank", "train"]


def embed(
    subject: str,
    dataset: str | None = None,
    split: Split = "query",
    out: str | None = None,
    neighbours: int = 0,
    size: int | None = None,
    pretrained: bool = False,
    batch_size: int = 256,
    num_workers: int | None = None,
    devices: int | str = "auto",
    accelerator: str = "auto",
    precision: str | None = None,
) -> None:
    """Write the features of every sample of a set, with label, index and path, to Parquet or npz.

    Each sample is seen once, without augmentation, as the run evaluated it. Memory stays constant however
    large the set is, and with several devices there still is one file, in the samples' order.

    For example:

        simclr embed runs/simclr/version_0 --split train --out photos.parquet

    Args:
        subject: A checkpoint of `simclr fit`, a run's folder, or a model of timm or torchvision.
        dataset: A folder, a packed folder, a file of texts, a YAML config or its name, or the name of a
            source; by default the run's own.
        split: Which samples: query, those to evaluate on; bank, the labelled training samples; train, all
            training samples.
        out: The file, ending in .parquet or .npz; by default <checkpoint>.<split>.parquet beside the
            checkpoint, or in the working folder.
        neighbours: Write a second file, NAME.neighbours.SUFFIX, with so many nearest samples of each one
            and their cosines, exact; the features are then kept in memory, shared out among the devices.
        size: Side of an image as the encoder sees it, in pixels; by default the run's, or the source's.
        pretrained: Load the published weights of a model by name.
        batch_size: Samples encoded at a time on each device.
        num_workers: Loader processes of each device; by default one for each core.
        devices: How many, or auto for all.
        accelerator: cpu, gpu or auto.
        precision: Of the encoder, e.g. bf16-mixed; by default 32-true.
    """
    model = load_subject(subject, pretrained, channels_of(dataset))
    if out is None:
        out = str(result_file(split, model).with_suffix(".parquet"))
    result_file("embed", model, out)  # the folder exists
    writer = FeatureWriter(out, neighbours)
    source = source_for(model, dataset)
    augment = clean_views(model, source, size)
    data = data_for(
        model,
        source=OneSplit(source, split),
        augment=augment,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    trainer = trainer_for(devices, accelerator, precision, [writer])
    trainer.predict(frozen(model.encoder), data, return_predictions=False)


class OneSplit(Source):
    """One set of a source, in the place of all three.

    Args:
        source: that opens it.
        split: its name.
    """

    def __init__(self, source: Source, split: Split) -> None:
        self.source, self.split = source, split
        self.channels, self.unit = source.channels, source.unit

    def prepare(self) -> None:
        """Downloads what is missing."""
        self.source.prepare()

    def open(self) -> None:
        """Opens the source."""
        self.source.open()
        self.train = self.bank = self.query = getattr(self.source, self.split)
        self.classes = self.source.classes
        self.left_out, self.converted = self.source.left_out, self.source.converted
