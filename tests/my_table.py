"""A modality of a user's own, for tests: rows of a table, one of which is damaged and one a copy."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from simclr_pl.augmentation import Augmentation, Rows, Table
from simclr_pl.data.decode import UnreadableSample
from simclr_pl.data.sources import Reader, Source, StoredSamples

COLUMNS, DAMAGED, FIRST, COPY = 6, 7, 3, 50


class RowReader(Reader):
    def __init__(self, values: np.ndarray) -> None:
        self.values = values  # (M, COLUMNS) float32

    def name(self, i: int) -> str:
        return f"table.csv:{i}"

    def open(self, i: int) -> np.ndarray:
        if i == DAMAGED:
            raise UnreadableSample("a cell has no number")
        return self.values[i]


class Rows3(Source):
    """Rows around three centres.

    Args:
        count: M.
    """

    channels = 1
    unit = "rows"
    classes = ("low", "middle", "high")
    left_out = (("table.csv:head", "it has no numbers"),)
    converted = ("2 rows had commas for points",)

    def __init__(self, count: int = 450) -> None:
        self.count = count

    def open(self) -> None:
        rng, labels = np.random.default_rng(0), np.arange(self.count) % 3
        values = 2 * labels[:, None] - 2 + rng.normal(0, 0.5, (self.count, COLUMNS))
        values[COPY] = values[FIRST]
        reader, cut = RowReader(values.astype(np.float32)), self.count * 2 // 3
        self.train = self.bank = StoredSamples(reader, labels[:cut], np.arange(cut))
        self.query = StoredSamples(reader, labels[cut:], np.arange(cut, self.count))

    def default_augment(self) -> Augmentation:
        return Masks()


class Masks(Augmentation):
    """Masks cells.

    Args:
        share: of the cells.
    """

    raw_name = "raw rows"

    def __init__(self, share: float = 0.3) -> None:
        self.share = share

    def prepare(self, samples: Sequence[np.ndarray], rows: Rows | None) -> Table:
        x = np.stack(samples)
        kept = np.ones_like(x) if rows is None else rows.uniforms(1000, COLUMNS) >= self.share
        return {"x": x * kept}

    def finish(self, table: Table) -> Tensor:
        return torch.stack([table["x"], (table["x"] != 0).to(table["x"])], 1)  # (n, 2, COLUMNS)


class RowEncoder(nn.Sequential):
    """Two linear layers.

    Args:
        width: E.
    """

    def __init__(self, width: int = 16) -> None:
        first = nn.Linear(2 * COLUMNS, width)
        super().__init__(nn.Flatten(), first, nn.ReLU(), nn.Linear(width, width))
        self.num_features = width
