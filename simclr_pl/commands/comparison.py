"""What an encoder is compared with: itself at initialisation, and no encoder at all."""

from collections.abc import Iterator
from typing import NamedTuple

from lightning.pytorch import Trainer

from simclr_pl.commands.encoders import Subject, frozen
from simclr_pl.data import ContrastiveDataModule
from simclr_pl.evaluation.features import CleanViews, Labelled


class Compared(NamedTuple):
    """Features of one of those that are compared.

    Attributes:
        name: in the table.
        suffix: of its keys in the JSON file, as in a run's summary.json.
        bank: of this rank.
        query: of this rank.
    """

    name: str
    suffix: str
    bank: Labelled
    query: Labelled


TRAINED = ("trained", "")
RAW = "_raw"  # the suffix; `Augmentation.raw_name` is the name
INIT = ("at initialisation", "_init")


def compared(
    subject: Subject,
    data: ContrastiveDataModule,
    trainer: Trainer,
    views: CleanViews,
    baselines: bool,
) -> Iterator[Compared]:
    """Encodes the clean views of bank and query, in the trainer's validation.

    Args:
        subject: the encoder.
        data: of the samples.
        trainer: one of its callbacks is ``views``.
        views: collects the augmentation's raw features where ``baselines``.
        baselines: also of no encoder, and of the encoder at initialisation.

    Yields:
        One at a time, so that the features of one are let go before the next are made.
    """
    trainer.validate(frozen(subject.encoder), data, verbose=False)
    (bank, raw_bank), (query, raw_query) = (views.collected.take(n) for n in ("bank", "query"))
    yield Compared(*TRAINED, bank, query)
    if not baselines:
        return
    assert raw_bank is not None
    assert raw_query is not None
    yield Compared(data.augment.raw_name, RAW, raw_bank, raw_query)
    views.raw = False
    del bank, query, raw_bank, raw_query
    trainer.validate(frozen(subject.fresh()), data, verbose=False)
    bank, query = (views.collected.take(name)[0] for name in ("bank", "query"))
    yield Compared(*INIT, bank, query)
