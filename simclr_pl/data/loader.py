"""The loader of whole batches."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from simclr_pl.data.batches import Batch, BatchDataset
from simclr_pl.data.sampler import KeyedSampler
from simclr_pl.data.workers import settle
from simclr_pl.errors import InputError


class Loader(DataLoader[Batch]):
    """A DataLoader of whole batches that knows where to start and how long it was waited for.

    Its iterator starts with the first batch that is asked for: Lightning makes it before the checkpoint
    that it resumes from is read.

    Args:
        dataset: maps a `Draw` to a batch.
        first_step: says how many steps of the epoch are done; of training only.
        options: of the DataLoader; ``sampler`` yields the draws. Lightning copies loaders by these.

    Attributes:
        seconds_waited: for batches so far, in the process that asked.
    """

    def __init__(
        self, dataset: BatchDataset, first_step: Callable[[], int] | None = None, **options: Any
    ) -> None:
        defaults = {
            "batch_size": None,  # the sampler yields whole batches
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": options.get("num_workers", 0) > 0,
            "worker_init_fn": settle,
            "collate_fn": _as_it_is,
        }
        super().__init__(dataset, **{**defaults, **options})
        self.first_step = first_step
        self.seconds_waited = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches.

        Raises:
            InputError: of the user's, from whatever process.
        """
        if self.first_step is not None:
            assert isinstance(self.sampler, KeyedSampler)
            self.sampler.first_step = self.first_step()
        batches = super().__iter__()
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waited += time.perf_counter() - begin
            if batch is None:
                return
            if "error" in batch:
                raise InputError(batch["error"])
            yield batch

    # Lightning takes a loader for resumable if it has these two. The position is the trainer's own
    # progress: what Lightning keeps of a loader's state it gives back too late, or not at all.

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes nothing up."""


def _as_it_is(batch: Batch) -> Batch:
    return batch
