"""Views of documents: crops of their tokens, some of them deleted.

Symbols: n rows, one for each view; L places in a row; E feature width.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_pl.augmentation import Augmentation, Rows, Table
from simclr_pl.errors import InputError
from simclr_pl.keyed_random import Stream

_STEP = 16  # L is a multiple: few lengths, so that a compiled encoder is compiled a few times


class TextAugment(Augmentation):
    """Crops and deletion of tokens.

    A sample is the tokens of a document, (m,) integers from 0. A view is a row of token numbers from 1,
    padded with 0 at its end; all rows of a batch are as long as the longest, rounded up to a multiple
    of 16.

    Two crops of one document say the same about its subject in other words (Izacard et al. 2022,
    arXiv:2112.09118, section 3.1). With ``crop`` (1, 1) and ``deletion`` 0 both views have the same
    tokens and differ by the encoder's dropout alone, as in SimCSE (Gao et al. 2021, arXiv:2104.08821).

    Args:
        vocab_size: tokens of the tokenizer, as the source's.
        crop: range of a crop's share of the document's tokens; its place is random. (1, 1) for none:
            then a view begins where the document does.
        deletion: probability that a token is left out.
        max_length: tokens of a view at most; as many as the encoder takes.

    Raises:
        InputError: a number out of its range; in `prepare`, a token that is not among ``vocab_size``.
    """

    raw_name = "bag of words"

    def __init__(
        self,
        vocab_size: int = 8192,
        crop: tuple[float, float] = (0.2, 0.8),
        deletion: float = 0.1,
        max_length: int = 128,
    ) -> None:
        low, high = crop
        if not 0 < low <= high <= 1:
            raise InputError(
                f"`crop` must be a range (low, high) with 0 < low <= high <= 1; got ({low}, {high}). "
                "Set `data.augment.crop`."
            )
        if not 0 <= deletion < 1:
            raise InputError(
                f"`deletion` must be within [0, 1); got {deletion}. Set `data.augment.deletion`."
            )
        for name, value in (("vocab_size", vocab_size), ("max_length", max_length)):
            if value < 1:
                raise InputError(f"`{name}` must be >= 1; got {value}. Set `data.augment.{name}`.")
        self.vocab_size, self.max_length = vocab_size, max_length
        self.crop, self.deletion = (low, high), deletion

    def prepare(self, samples: Sequence[Any], rows: Rows | None) -> Table:
        """Cuts and pads: "tokens" (n, L) int32. The clean view is the first ``max_length`` tokens."""
        if rows is None or (self.crop[0] == 1 and not self.deletion):
            cut = [tokens[: self.max_length] for tokens in samples]
        else:
            cut = self._cut(samples, rows)
        longest = max(map(len, cut), default=0)
        width = min(self.max_length, max(1, math.ceil(longest / _STEP)) * _STEP)
        table = np.zeros((len(cut), width), np.int32)
        for row, tokens in zip(table, cut, strict=True):
            row[: len(tokens)] = tokens
            row[: len(tokens)] += 1
        if table.max(initial=0) > self.vocab_size:
            raise InputError(
                f"`vocab_size` must be that of the tokenizer; got {self.vocab_size:,} where there is a "
                f"token {table.max() - 1:,}. Set `data.augment.vocab_size`."
            )
        return {"tokens": table}

    def _cut(self, samples: Sequence[Any], rows: Rows) -> list[np.ndarray]:
        place = rows.uniforms(Stream.TEXT_CROP, 2)
        share = self.crop[0] + (self.crop[1] - self.crop[0]) * place[:, 0]
        kept = (
            rows.uniforms(Stream.TEXT_DELETION, self.max_length) >= self.deletion
        )  # (n, max_length)
        cut = []
        for tokens, part, at, keep in zip(samples, share, place[:, 1], kept, strict=True):
            count = min(math.ceil(part * len(tokens)), self.max_length)
            # A document that is too long is cut at random, but from its start if it is not to be cut
            free = len(tokens) - count + 1 if self.crop[0] < 1 else 1
            tokens = tokens[int(at * free) :][:count]
            left = tokens[keep[:count]]
            cut.append(left if len(left) else tokens[:1])
        return cut

    def finish(self, table: Table) -> Tensor:
        """Token numbers (n, L) int64, 0 for padding."""
        return table["tokens"].long()  # type: ignore[no-any-return]

    def raw(self, views: Tensor) -> Tensor:
        """The bag of words (n, vocab_size) float32: log(1 + count) of each token."""
        counts = torch.zeros(len(views), self.vocab_size + 1, device=views.device)
        counts.scatter_add_(1, views, torch.ones_like(views, dtype=counts.dtype))
        return counts[:, 1:].log1p()
