"""Slots of shared memory: filled by workers, seen without a copy, free again when nobody sees them."""

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from simclr_pl.data.slots import _IN_FLIGHT, Slots

SHAPE = (4, 2, 8, 8, 3)  # (B, V, S, S, C)


class Filled(Dataset):
    """Batch i is full of the number i, with less images than the slot for odd i, and smaller ones."""

    def __init__(self, pool: Slots) -> None:
        self.pool = pool

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, i: int) -> dict[str, Any]:
        slot = self.pool.take(4 - i % 2, 8 - i % 3)
        slot.array[...] = i % 251
        return {"i": i, "images": slot.tensor()}


class Numbers(Sampler[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


def loader_of(pool: Slots, workers: int, count: int = 1000, **options: Any) -> DataLoader:
    return DataLoader(
        Filled(pool),
        batch_size=None,
        sampler=Numbers(count),
        num_workers=workers,
        collate_fn=_same,
        **options,
    )


def holds(batch: dict[str, Any]) -> bool:
    images: Tensor = batch["images"]
    side = 8 - batch["i"] % 3
    return (
        images.shape == (4 - batch["i"] % 2, 2, 3, side, side)
        and images.dtype == torch.uint8
        and bool((images == batch["i"] % 251).all())
    )


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_arrive_as_they_were_filled_and_the_slots_come_free(workers: int) -> None:
    pool = Slots(SHAPE, workers)
    addresses = set()
    for n, batch in enumerate(loader_of(pool, workers, 100)):
        assert batch["i"] == n
        assert holds(batch)
        addresses.add(batch["images"].data_ptr())
    slots = max(1, workers) * _IN_FLIGHT
    assert len(addresses) <= slots  # always the same memory
    first = pool.memory.data_ptr()
    assert addresses <= {
        first + i * pool.memory[0].nbytes for i in range(slots)
    }  # and that, uncopied
    del batch
    gc.collect()
    assert pool.busy.sum() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_kept_are_never_overwritten(workers: int) -> None:
    pool = Slots(SHAPE, workers)
    kept = list(loader_of(pool, workers, 60))
    assert all(holds(batch) for batch in kept)
    assert len({batch["images"].data_ptr() for batch in kept}) == 60


def test_a_slot_stays_taken_as_long_as_any_view_of_it_lives() -> None:
    pool = Slots(SHAPE, 0)
    slot = pool.take(4, 8)
    slot.array[...] = 7
    tensor = slot.tensor()
    del slot
    part = tensor[1:2, :, 0].float, tensor[2]  # a method of a view, and a view
    del tensor
    gc.collect()
    assert pool.busy.sum() == 1
    taken = [pool.take(4, 8) for _ in range(_IN_FLIGHT + 1)]
    for other in taken:
        other.array[...] = 9
    assert (part[1] == 7).all()
    del part
    gc.collect()
    assert pool.busy[0] == 0


def test_batches_dropped_on_the_way_free_their_slots() -> None:
    pool = Slots(SHAPE, 2)
    loader = loader_of(pool, 2, persistent_workers=True)
    for _ in range(3):  # an epoch that ends early leaves batches in the queue
        for batch in itertools.islice(loader, 5):
            assert holds(batch)
    for n, batch in enumerate(loader):
        assert batch["i"] == n
        assert holds(batch)
        if n == 50:
            break
    pointers = {b["images"].data_ptr() for b in itertools.islice(loader, 50)}
    first, size = pool.memory.data_ptr(), pool.memory[0].nbytes
    assert pointers <= {first + i * size for i in range(2 * _IN_FLIGHT)}  # none had to be new


def test_workers_fill_only_slots_of_their_own() -> None:
    pool = Slots(SHAPE, 2)
    first, size = pool.memory.data_ptr(), pool.memory[0].nbytes
    for batch in loader_of(pool, 2, 40):
        worker = batch["i"] % 2  # DataLoader deals in turn
        assert (batch["images"].data_ptr() - first) // size // _IN_FLIGHT == worker


def test_spawned_workers_share_the_memory_too() -> None:
    pool = Slots(SHAPE, 1)
    loader = DataLoader(
        Filled(pool),
        batch_size=None,
        sampler=Numbers(12),
        num_workers=1,
        collate_fn=_same,
        multiprocessing_context="spawn",
    )
    first = pool.memory.data_ptr()
    for batch in loader:
        assert holds(batch)
        assert 0 <= batch["images"].data_ptr() - first < pool.memory.nbytes


def _same(batch: Any) -> Any:
    return batch


def test_slots_made_in_inference_mode_are_freed_outside_it() -> None:
    with torch.inference_mode():
        pool = Slots(SHAPE, 0)
        slot = pool.take(2, 8)
        images = slot.tensor()
        assert pool.busy.sum() == 1
    del slot, images
    gc.collect()
    assert pool.busy.sum() == 0
