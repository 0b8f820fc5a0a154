"""A look at a sample of a set: what is in it, what cannot be read, how long a sample takes.

Symbols: V views, B samples of a batch.
"""

import time
from typing import Any

import numpy as np
import torch

from simclr_pl.augment import Augment
from simclr_pl.augmentation import Augmentation
from simclr_pl.data.batches import Batch
from simclr_pl.data.datamodule import ContrastiveDataModule
from simclr_pl.data.decode import UnreadableSample
from simclr_pl.data.resident import fits_in_memory
from simclr_pl.data.sources import Images, ResidentImages, Source
from simclr_pl.doctor.children import Send
from simclr_pl.doctor.configured import Kind, build
from simclr_pl.doctor.lines import Line, duration, size

_BATCH = 32  # samples that the speed is measured with at a time

Found = dict[str, Any]


class _Sample(Source):
    """A part of a set, as a set of its own."""

    def __init__(self, source: Source, images: Images) -> None:
        self.train = self.bank = self.query = images
        self.channels, self.classes, self.unit = source.channels, source.classes, source.unit

    def open(self) -> None:
        """It is open."""


def look(send: Send, rank: int, args: list[str], count: int, seconds: float) -> None:
    """Opens the source of a config and sends what is found, part by part.

    Args:
        send: gets mappings.
        rank: not used.
        args: as those of `fit`.
        count: of the sample.
        seconds: to read the sample in, and as many again to time the making of views.
    """
    cli = build(args)
    data: ContrastiveDataModule = cli.datamodule
    torch.set_num_threads(1)
    source = data.source
    began = time.perf_counter()
    source.open()
    train = source.train
    labelled = int((source.bank.labels >= 0).sum())
    names = {"train": source.train, "bank": source.bank, "query": source.query}
    send(
        {
            "source": type(source).__name__,
            "unit": source.unit,
            "is_of_images": isinstance(data.augment, Augment),
            "opened": time.perf_counter() - began,
            "images": {name: len(images) for name, images in names.items()},
            "labelled": labelled,
            "bank": min(data.bank_size, labelled or len(source.bank)),
            "classes": len(set(source.bank.labels[source.bank.labels >= 0].tolist())),
            "channels": source.channels,
        }
    )
    index = np.unique(np.linspace(0, len(train) - 1, min(count, len(train))).astype(int))
    readable, found = _read(train, index, data.augment, seconds)
    send(found)
    if len(readable):
        send(_timed(data, source, train, train.subset(readable), cli.trainer.num_devices, seconds))


def _read(
    samples: Images, index: np.ndarray, augment: Augmentation, seconds: float
) -> tuple[np.ndarray, Found]:
    """Which of the samples can be read, and how long that takes."""
    readable, bad, sides = [], [], set()
    began = time.perf_counter()
    for i in (
        np.random.default_rng(0).permutation(index).tolist()
    ):  # when time runs out: of all parts
        try:
            sample = samples.open(i)
            if isinstance(augment, Augment):
                sides.add(sample.pixels(reuse=True).shape[:2])
            else:
                augment.prepare([sample], None)  # some content is not read before
            readable.append(i)
        except UnreadableSample as error:
            bad.append((samples.name(i), str(error)))
        if time.perf_counter() - began > seconds:
            break
    read = len(readable) + len(bad)
    return np.array(sorted(readable), int), {
        "sample": read,
        "unreadable": bad,
        "seconds_each": (time.perf_counter() - began) / read,
        "shorter_sides": [int(f(min(s) for s in sides)) for f in (min, max)] if sides else [],
    }


def _timed(
    data: ContrastiveDataModule,
    source: Source,
    whole: Images,
    sample: Images,
    ranks: int,
    seconds: float,
) -> Found:
    """How the set would be kept, and seconds to make the views of a sample."""
    of_images = isinstance(data.augment, Augment)
    kept = isinstance(whole, ResidentImages) or (
        of_images
        and (
            data.resident in ("memory", "device")
            or (data.resident == "auto" and fits_in_memory(whole, source.channels, ranks))
        )
    )
    pixels = 0
    data.source = _Sample(source, sample)
    data.augment_until = None  # of most epochs
    data.resident = "memory" if kept else "none"
    data.num_workers = 0
    data.global_batch_size = min(_BATCH, len(sample))
    data.setup("fit")
    held = data.samples("train")
    if isinstance(held, ResidentImages):
        pixels = held.flat.nbytes // len(held) * len(whole)
    loading, staging, batch, views = _stopwatch(data, seconds)
    return {
        "kinds": [] if of_images else _kinds(views, data),
        "table": sum(_bytes(group) for group in batch["groups"]) // data.global_batch_size,
        "kept": kept,
        "decoded": kept and not isinstance(whole, ResidentImages),
        "bytes": pixels,
        "loading": loading,
        "staging": staging,
    }


def _kinds(views: Batch, data: ContrastiveDataModule) -> list[Kind]:
    """What the views of a sample are like, from those of a batch."""
    found = {"views": data.n_views, "small_views": data.n_small_views}
    return [
        Kind(n, tuple(x.shape[1:]), None if x.is_floating_point() else int(x.max()))
        for n, x in ((n, views[name]) for name, n in found.items() if name in views)
    ]


def _bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def _stopwatch(data: ContrastiveDataModule, seconds: float) -> tuple[float, float, Batch, Batch]:
    """Seconds for a sample's views, in one worker and in the device stage on the CPU; the last batch."""
    loading, staging = [], []
    batches = iter(data.train_dataloader())
    began = last = time.perf_counter()
    for batch in batches:
        fetched = time.perf_counter()
        views = data.make_views(batch, "train")
        loading.append(fetched - last)
        last = time.perf_counter()
        staging.append(last - fetched)
        if last - began > seconds:
            break
    count = data.global_batch_size
    return float(np.median(loading)) / count, float(np.median(staging)) / count, batch, views


def lines_of(found: Found, bad_share: float, batch: int) -> list[Line]:
    """What the look says.

    Args:
        found: the parts that `look` sent, in one mapping.
        bad_share: of unreadable samples that the run would stand.
        batch: samples of a global batch.
    """
    return [_counts(found, batch), *([_sample(found, bad_share)] if "sample" in found else [])]


def _counts(found: Found, batch: int) -> Line:
    images, unit = found["images"], found["unit"]
    text = (
        f"{found['source']}: {images['train']:,} {unit} to learn from, a bank of {found['bank']:,}, "
        f"{images['query']:,} to evaluate on"
    )
    if found["is_of_images"]:
        text += f"; {found['channels']} channel(s)"
    if found["classes"]:
        text += f", {found['classes']:,} classes"
    if found["opened"] > 2:
        text += f"; opened in {duration(found['opened'])}"
    if images["train"] < batch:
        return Line(
            "error",
            "data",
            f"{text}; fewer than the {batch:,} of one global batch",
            f"Set --data.global_batch_size to at most {images['train']}, or give more {unit}.",
        )
    if not found["labelled"]:
        return Line(
            "warning",
            "data",
            f"{text}; none is labelled, so there will be no accuracies",
            "None is needed to learn; give labels, images by class folders, to have them.",
        )
    return Line("ok", "data", text)


def _sample(found: Found, bad_share: float) -> Line:
    read, bad = found["sample"], found["unreadable"]
    text = f"{read:,} {found['unit']} read, {1000 * found['seconds_each']:.2g} ms each"
    if sides := found["shorter_sides"]:
        low, high = sides
        text += f"; shorter side {low}" + (f" to {high}" if high > low else "") + " pixels"
    if found.get("kept"):
        where = "decoded once and kept" if found["decoded"] else "kept"
        text += f"; {where} in memory ({size(found['bytes'])})"
    if not bad:
        return Line("ok", "sample", text)
    name, reason = bad[0]
    text += f"; {len(bad)} cannot be read, e.g. {name}: {reason.rstrip('.')}"
    level = "error" if len(bad) / read > bad_share else "warning"
    stands = "stops the run" if level == "error" else "is left out by the run"
    root = f" ({bad_share:.0%} are allowed)"
    return Line(
        level,  # type: ignore[arg-type]
        "sample",
        text,
        f"That share {stands}{root}: simclr data check lists all.",
    )
