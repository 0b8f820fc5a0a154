"""Who takes the places of a batch: spares for what cannot be read, and views of other samples.

Symbols: B samples of this rank's batch, V views.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from simclr_pl.data.decode import UnreadableSample
from simclr_pl.data.sampler import Draw, KeyedSampler
from simclr_pl.data.sources import Images
from simclr_pl.errors import InputError

_ATTEMPTS = 20  # spares that may be unreadable too, before the storage is to blame


class Places:
    """The places of one batch.

    Args:
        images: the set.
        draw: what the batch is to hold.
        blank: makes what stands in the place of padding.
        order: of training, for spares; None in evaluation, where padding takes their place.
        replace_probability: of a second view that shows another sample of the global batch.
        n_views: of a sample, all sizes together.

    Attributes:
        positions: (B,) int64 in the set, -1 for padding; what could not be read is replaced.
        givers: (B,) int64, the samples whose views stand second, -1 where it is the place's own.
        unreadable: name and reason of what was found so far.
    """

    def __init__(
        self,
        images: Images,
        draw: Draw,
        blank: Callable[[], Any],
        order: KeyedSampler | None,
        replace_probability: float = 0.0,
        n_views: int = 1,
    ) -> None:
        self.images, self.draw, self.order, self.n_views = images, draw, order, n_views
        self.positions = draw.positions.copy()
        self.givers = np.full_like(self.positions, -1)
        if replace_probability and order is not None:
            self.givers = order.givers(draw, replace_probability)
        self.unreadable: list[tuple[str, str]] = []
        self._attempts: dict[int, int] = {}
        self._blank = blank

    def open(self, slot: int) -> Any:
        """Opens the sample of a place, or a spare."""
        while self.positions[slot] >= 0:
            try:
                return self.images.open(int(self.positions[slot]))
            except UnreadableSample as error:
                self.replace(slot, error)
        return self._blank()

    def replace(self, slot: int, error: UnreadableSample) -> None:
        """Gives a place to a spare, or, where there is no order to take one from, to padding.

        Raises:
            InputError: there is no readable spare.
        """
        name = self._note(int(self.positions[slot]), error)
        if self.order is None:
            self.positions[slot] = -1
            return
        attempt = self._attempts[slot] = self._attempts.get(slot, -1) + 1
        spare = self.order.spare(self.draw.epoch, self.draw.step, slot, attempt)
        if spare is None or attempt >= _ATTEMPTS:
            raise InputError(
                f"a batch must be readable; got {len(self.unreadable)} samples that are not and no "
                f"other to take their place, last {name!r}: {error}. Check that the storage is there; "
                "`simclr data check` lists what is wrong."
            )
        self.positions[slot] = spare

    def given(self) -> list[int]:
        """The places whose second view is another sample's."""
        return np.flatnonzero(self.givers >= 0).tolist()  # type: ignore[no-any-return]

    def open_giver(self, slot: int) -> Any:
        """Opens what stands second in a place; None if it cannot be read, and the own view stays."""
        try:
            return self.images.open(int(self.givers[slot]))
        except UnreadableSample as error:
            self.drop_giver(slot, error)
            return None

    def drop_giver(self, slot: int, error: UnreadableSample) -> None:
        """Lets a place keep its own second view."""
        self._note(int(self.givers[slot]), error)
        self.givers[slot] = -1

    def _note(self, position: int, error: UnreadableSample) -> str:
        name = self.images.name(position)
        self.unreadable.append((name, str(error)))
        return name

    def views(self, n_views: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """The keys of views.

        Args:
            n_views: V.
            first: number of the first of them.

        Returns:
            The sample and the number of each view, int64, both (B, V). A view that stands in for
            another sample's has a number that no other view of its sample has.
        """
        index = np.repeat(self.positions[:, None], n_views, 1)
        number = np.repeat(first + np.arange(n_views)[None], len(index), 0)
        if first <= 1 < first + n_views and (given := self.givers >= 0).any():
            index[given, 1 - first] = self.givers[given]
            number[given, 1 - first] = self.n_views + self.draw.positions[given]
        return index, number
