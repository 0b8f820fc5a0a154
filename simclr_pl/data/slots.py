"""Shared memory for batches that is used again and again.

A worker of a plain DataLoader makes new shared memory for every batch, and the system must clear and map
each of its pages anew: for 128 pairs of 224 pixels that took 34 to 45 ms, against 7 ms here, beside 67 ms
to make the pairs from packed images.

Symbols: B images of a batch, V views, C channels, S side of the largest view, s <= S of a batch's.
"""

import itertools
import math
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

# Batches of one worker: two that wait, one in the making, two in the consumer's hands.
_IN_FLIGHT = 5

_numbers = itertools.count()
_pools: "weakref.WeakValueDictionary[int, Slots]" = weakref.WeakValueDictionary()


class Slots:
    """A pool of slots, each with room for the images of one batch.

    Every worker has slots of its own. It fills a free one; the consuming process sees the slot as a
    tensor without a copy, and when the last tensor on it is gone the slot is free again. Where none
    is free, because the consumer keeps its batches, new memory serves: nothing is ever overwritten.
    A batch of smaller views takes the beginning of a slot.

    Args:
        shape: (B, V, S, S, C) of the largest batch.
        workers: processes that fill slots; 0 for the consumer itself.
    """

    def __init__(self, shape: tuple[int, ...], workers: int) -> None:
        self.shape = shape
        count = max(1, workers) * _IN_FLIGHT
        # A process that fills its own slots takes plain memory: some containers share little.
        self.room = _shared if workers else _plain
        # Loaders made within `Trainer.validate` outlive its inference mode, and so do the flags.
        with torch.inference_mode(False):
            self.memory = self.room((count, *shape))
            self.busy = _shared((count,)).zero_()
        self.number = next(_numbers)
        _pools[self.number] = self

    def take(self, count: int, side: int) -> "Slot":
        """Room for a batch of ``count`` <= B images, views of a side <= S, for the worker that asks."""
        shape = (count, self.shape[1], side, side, self.shape[4])
        worker = get_worker_info()
        first = 0 if worker is None else worker.id * _IN_FLIGHT
        for i in range(first, first + _IN_FLIGHT):
            if not self.busy[i]:
                self.busy[i] = 1
                return Slot(self, i, shape)
        return Slot(self, None, shape)

    def part(self, i: int, shape: tuple[int, ...]) -> Tensor:
        """The beginning of slot ``i``, of a shape (count, V, s, s, C)."""
        return self.memory[i].view(-1)[: math.prod(shape)].view(shape)

    def tensor(self, i: int, shape: tuple[int, ...]) -> Tensor:
        """That as a tensor (count, V, C, s, s), which frees the slot when it goes."""
        # A numpy array of its own for each use: the tensor's storage holds it as long as any
        # tensor shares that storage, which the life of one Python tensor would not tell.
        array = self.part(i, shape).numpy()
        weakref.finalize(array, self._free, i).atexit = False
        return torch.from_numpy(array).permute(0, 1, 4, 2, 3)

    def _free(self, i: int) -> None:
        self.busy[i] = 0


class Slot:
    """One slot while it is filled; sent to the consumer, it arrives there as a tensor.

    Attributes:
        array: (count, V, s, s, C) uint8, to fill in.
    """

    def __init__(self, pool: Slots, i: int | None, shape: tuple[int, ...]) -> None:
        self._pool, self._i, self._shape = pool, i, shape
        memory = pool.room(shape) if i is None else pool.part(i, shape)
        self._memory: Tensor = memory
        self.array: np.ndarray = memory.numpy()

    def tensor(self) -> Any:
        """(count, V, C, s, s) uint8 in the consumer; in a worker what becomes it on the way."""
        if self._i is None:
            return self._memory.permute(0, 1, 4, 2, 3)
        if get_worker_info() is not None:
            return self
        return self._pool.tensor(self._i, self._shape)

    def __reduce__(self) -> Any:
        return _arrive, (self._pool.number, self._i, self._shape)


def _arrive(pool: int, i: int, shape: tuple[int, ...]) -> Tensor:
    return _pools[pool].tensor(i, shape)


def _shared(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised uint8 memory that processes share; a page exists once it is written."""
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _plain(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)
