"""One global order of the images, whatever the number of ranks.

Symbols: M images, G global batch, W ranks.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler

from simclr_pl.keyed_random import Stream, keys, permutation, uniforms


class Draw(NamedTuple):
    """What a loader is asked for: the images of one rank's batch in one epoch.

    Attributes:
        epoch: from 0; keys the random choices.
        positions: (B,) int64 in the set; -1 is padding.
        step: of the epoch, from 0.
    """

    epoch: int
    positions: np.ndarray
    step: int = 0


# Lightning replaces a loader's sampler under DDP unless it is a DistributedSampler.
class _OwnSampler(DistributedSampler[Draw]):
    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.num_replicas, self.epoch = rank, world_size, 0


class KeyedSampler(_OwnSampler):
    """Shuffled training batches.

    The order of an epoch is a permutation keyed by (seed, epoch). Global step k takes the positions
    [k*G, (k+1)*G) of it, and rank r the r-th of W equal slices of those; what is left at the end
    of an epoch is dropped. So every rank count trains on the same global batches.

    Args:
        count: M.
        global_batch_size: G, a multiple of ``world_size``.
        seed: of the run.
        rank: this rank.
        world_size: W.

    Attributes:
        first_step: where the next iteration starts, for an epoch that is resumed in its middle. The
            length stays that of the whole epoch.
    """

    def __init__(
        self, count: int, global_batch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        super().__init__(rank, world_size)
        self.count, self.global_batch_size, self.seed = count, global_batch_size, seed
        self.batch_size = global_batch_size // world_size
        self.first_step = 0

    def __len__(self) -> int:
        """Steps of an epoch."""
        return self.count // self.global_batch_size

    def __iter__(self) -> Iterator[Draw]:
        order = permutation(self.count, self.seed, Stream.ORDER, self.epoch)
        for step in range(self.first_step, len(self)):
            start = step * self.global_batch_size + self.rank * self.batch_size
            yield Draw(self.epoch, order[start : start + self.batch_size], step)

    def spare(self, epoch: int, step: int, slot: int, attempt: int) -> int | None:
        """The image that takes the place of one that cannot be read.

        Spares are the images outside the global batch, in the epoch's order from its end on. Each of the
        G places has spares of its own, so none enters a batch twice, on whatever rank; only sets of
        less than two global batches have too few for that.

        Args:
            epoch: from 0.
            step: of the epoch.
            slot: the place in this rank's batch.
            attempt: how many spares of this place could not be read.

        Returns:
            A position in the set; None if every image is in the batch.
        """
        count, batch = self.count, self.global_batch_size
        if count == batch:
            return None
        place = self.rank * self.batch_size + slot
        offset = (place + attempt * batch) % (count - batch)
        return int(_order(count, self.seed, epoch)[((step + 1) * batch + offset) % count])

    def givers(self, draw: Draw, probability: float) -> np.ndarray:
        """The samples of the global batch whose views stand second in the places of others.

        Args:
            draw: of this rank.
            probability: of each place.

        Returns:
            (B,) int64 positions in the set, never the place's own; -1 where it keeps its second view.
        """
        batch = self.global_batch_size
        start = draw.step * batch
        whole = _order(self.count, self.seed, draw.epoch)[start : start + batch]
        key = keys(self.seed, draw.epoch, Stream.REPLACE, draw.positions)
        u = uniforms(key, 2)  # (B, 2)
        other = (u[:, 1] * (batch - 1)).astype(np.int64)  # among the places but the own one
        other += other >= self.rank * self.batch_size + np.arange(len(other))
        return np.where(u[:, 0] < probability, whole[other], -1)


class EvaluationSampler(_OwnSampler):
    """Batches of all images, each on one rank.

    Every rank has the same number of batches of the same size, as DDP's collectives need; what is
    missing is filled with index -1, to be left out of every result.

    Args:
        count: M.
        batch_size: images of a batch on one rank.
        rank: this rank.
        world_size: W.
    """

    def __init__(self, count: int, batch_size: int, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self.count, self.batch_size = count, batch_size

    def __len__(self) -> int:
        """Batches on each rank."""
        return -(-self.count // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[Draw]:
        per_rank = -(-self.count // self.num_replicas)
        index = np.arange(self.rank, per_rank * self.num_replicas, self.num_replicas)
        index = np.where(index < self.count, index, -1)
        for start in range(0, per_rank, self.batch_size):
            yield Draw(0, index[start : start + self.batch_size])


@lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(count, seed, Stream.ORDER, epoch)
